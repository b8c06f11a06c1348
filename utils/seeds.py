"""Seed streams: random numbers depend on (seed, purpose, epoch, ...), never on what ran before."""
from __future__ import annotations

import hashlib

import torch


def derive_seed(*parts: int | str) -> int:
    """Derive a 63-bit seed from numbers and words, for example `derive_seed(seed, "order", epoch)`."""
    digest = hashlib.sha256("/".join(map(str, parts)).encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1


def generator(*parts: int | str) -> torch.Generator:
    """CPU generator seeded by `derive_seed`, so that the numbers do not depend on the device."""
    return torch.Generator().manual_seed(derive_seed(*parts))
