"""LookSAM (Liu 2022)."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from .common import Data, Losses, Reference, Tensors, norm, rejection
from .sam import sam_epsilon


class LookSAM(Reference):
    """At steps t % k == 0: d = g1, and gv = the part of g1 orthogonal to g0 is kept.

    Otherwise: d = g0 + alpha ||g0|| / ||gv|| gv, or g0 while there is no gv.
    """

    def __init__(
        self,
        model: nn.Module,
        base: torch.optim.Optimizer,
        rho: float = 0.05,
        k: int = 5,
        alpha: float = 0.7,
    ) -> None:
        super().__init__(model, base)
        self.rho, self.k, self.alpha = rho, k, alpha
        self.gv: Tensors | None = None

    def direction(self, losses: Losses, batch: Data, **draws: Any) -> Tensors:
        g0 = self.gradient(losses, batch)
        if self.t % self.k == 0:
            g1 = self.gradient_at(sam_epsilon(g0, self.rho), losses, batch)
            self.gv = rejection(g1, g0)
            return g1
        if self.gv is None or norm(self.gv) == 0:
            return g0
        scale = self.alpha * norm(g0) / norm(self.gv)
        return [g + scale * v for g, v in zip(g0, self.gv, strict=True)]
