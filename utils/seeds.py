"""Where every random number comes from: (seed, what it is for, epoch, ...) and never from what ran before."""
from __future__ import annotations

import hashlib

import torch


def derive_seed(*parts: int | str) -> int:
    """A 63-bit seed from a sequence of numbers and words, for example `derive_seed(seed, "order", epoch)`."""
    digest = hashlib.sha256("/".join(map(str, parts)).encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1


def generator(*parts: int | str) -> torch.Generator:
    """A CPU generator seeded by `derive_seed`: the same numbers on every device."""
    return torch.Generator().manual_seed(derive_seed(*parts))
