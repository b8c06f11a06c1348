"""Contrastive model inversion: Fang et al., "Contrastive Model Inversion for Data-Free Knowledge Distillation",
IJCAI 2021, arXiv:2105.08584, as configured by ABD.

Each epoch a new generator and its latent numbers are fitted to a batch of images that the teacher is sure of, that have
the statistics of its batch norms, on which the student differs, and that differ from each other and from earlier ones:

    batch_norm + one_hot + adversarial + contrast

all times their weights. The best of them join a pool, from which the student learns.
"""
from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from datafree.contrast import Head, MemoryBank, contrast_loss
from datafree.distiller import Facts, Terms, differentiate_by
from datafree.features import inside, instance_means
from datafree.generator import build_generator
from datafree.inversion import disagreement
from datafree.synthesis import Best, Inversion, weigh
from datafree.views import shifted, zoomed
from utils.errors import UserError
from utils.losses import cross_entropy
from utils.params import CMIParams
from utils.step import autocast
from utils.supervised import load_optimizer


class CMI(Inversion):
    def __init__(self, student: nn.Module, teacher: nn.Module, facts: Facts, params: CMIParams,
                 dtype: torch.dtype) -> None:
        super().__init__(student, teacher, facts, params, dtype)
        self.generator = build_generator(params.latent_size, facts, params.seed, pixels=True)
        if not self.num_features:
            raise UserError(f'"method": cmi compares what enters batch norms, of which {params.teacher_model} '
                            "has none")
        self.head = Head(self.num_features).to(self.device)
        self.head_optimizer = torch.optim.Adam(self.head.parameters(), lr=params.head_learning_rate, fused=True)
        self.bank = MemoryBank(params.bank_size, self.num_features, self.device)

    def synthesise(self, random: torch.Generator) -> dict[str, Tensor]:
        params, count = self.params, self.params.synthesis_batch_size
        latent = torch.randn(count, params.latent_size, generator=random).to(self.device).requires_grad_()
        targets = self.targets(count, random)
        self.generator.reinitialise(random)
        made_of = [*self.generator.parameters(), latent]
        optimizer = torch.optim.Adam(made_of, lr=params.synthesis_learning_rate, betas=(0.5, 0.999), fused=True)
        judged = list(self.head.parameters()) if params.contrast_weight else []
        best, terms = Best(), Terms()
        for _ in range(params.synthesis_steps):
            with autocast(self.device, self.dtype):
                pixels = self.generator(latent).float()
                losses, features = self._losses(pixels, targets, random)
            loss = sum(losses.values())
            differentiate_by(made_of + judged, loss)
            optimizer.step()
            self.head_optimizer.step()
            best.offer(loss, pixels, features)
            terms.add(losses)
        pixels, features = best.tensors
        self.pool.add(pixels, targets)
        self.bank.add(features)
        return terms.average()

    def _losses(self, pixels: Tensor, targets: Tensor, random: torch.Generator) -> tuple[dict[str, Tensor], Tensor]:
        """The weighted losses of pixels in [0, 1], and the features (B, 2, D) of a local and a global view."""
        params, flip = self.params, self.facts.flips
        whole = self.facts.standardise(shifted(pixels, random, padding=pixels.shape[2] // 8, flip=flip))
        local = self.facts.standardise(zoomed(pixels, random, scale=(0.25, 1.0), flip=flip))
        logits, seen, losses = self.look(whole)
        with inside(self.teacher) as seen_local:
            self.teacher(local)
        features = torch.stack([instance_means(seen_local), instance_means(seen)], dim=1)
        remembered = self.bank.draw(params.negatives, random)
        return losses | weigh({
            "one_hot": (params.one_hot_weight, lambda: cross_entropy(logits, targets)),
            "adversarial": (params.adversarial_weight,
                            lambda: disagreement(logits, self.student(whole), where_alike=True)),
            "contrast": (params.contrast_weight,
                         lambda: contrast_loss(self.head, features[:, 0], features[:, 1], remembered,
                                               temperature=params.contrast_temperature)),
        }), features.detach()

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "generator": self.generator.state_dict(), "head": self.head.state_dict(),
                "head_optim_dict": self.head_optimizer.state_dict(), "bank": self.bank.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        self.generator.load_state_dict(state["generator"])
        self.head.load_state_dict(state["head"])
        load_optimizer(self.head_optimizer, state["head_optim_dict"])
        self.bank.load_state_dict(state["bank"])
