"""ASAM (Kwon 2021)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from .common import Data, Losses, Reference, Tensors, norm


class ASAM(Reference):
    """eps = rho T^2 g0 / ||T g0||, T = |w| + eta on weights, 1 elsewhere; d = g(w + eps).

    Weights are the tensors of ndim >= 2 or, where names are given, those with "weight" in it.
    """

    def __init__(
        self,
        model: nn.Module,
        base: torch.optim.Optimizer,
        rho: float = 0.5,
        eta: float = 0.01,
        names: Sequence[str] | None = None,
    ) -> None:
        super().__init__(model, base)
        self.rho, self.eta = rho, eta
        if names is None:
            self.is_weight = [w.ndim >= 2 for w in self.params]
        else:
            self.is_weight = ["weight" in name for name, _ in zip(names, self.params, strict=True)]

    def scales(self) -> Tensors:
        return [
            w.detach().abs() + self.eta if is_weight else torch.ones_like(w)
            for w, is_weight in zip(self.params, self.is_weight, strict=True)
        ]

    def direction(self, losses: Losses, batch: Data, **draws: Any) -> Tensors:
        g0 = self.gradient(losses, batch)
        T = self.scales()
        length = norm([t * g for t, g in zip(T, g0, strict=True)])
        if length == 0:
            return g0
        eps = [self.rho * t**2 * g / length for t, g in zip(T, g0, strict=True)]
        return self.gradient_at(eps, losses, batch)
