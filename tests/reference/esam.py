"""ESAM (Du 2022) and its two halves."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn

from .common import Data, Losses, Reference, Tensors, gradient, held, moved, rows
from .sam import sam_epsilon


class ESAM(Reference):
    """eps on the picked tensors alone, rho/beta long; d = gradient at w + eps of the examples that rise most.

    Where eps is zero (nothing picked, no gradient, rho = 0) d = g0 of the whole batch.
    """

    def __init__(
        self,
        model: nn.Module,
        base: torch.optim.Optimizer,
        rho: float = 0.05,
        beta: float = 0.6,
        gamma: float = 0.5,
    ) -> None:
        super().__init__(model, base)
        self.rho, self.beta, self.gamma = rho, beta, gamma

    def direction(self, losses: Losses, batch: Data, *, picks: list[bool], **draws: Any) -> Tensors:
        before = losses(self.model, batch)
        g0 = gradient(before.mean(), self.params)
        picked = [g if pick else torch.zeros_like(g) for g, pick in zip(g0, picks, strict=True)]
        eps = sam_epsilon(picked, self.rho / self.beta)
        if all((e == 0).all() for e in eps):
            return g0
        with torch.no_grad(), held(self.model), moved(self.params, eps):
            after = losses(self.model, batch)
        rise = (after - before.detach()).tolist()
        return self.gradient_at(eps, losses, rows(batch, self.sharpest(rise)))

    def sharpest(self, rise: list[float]) -> list[int]:
        """The max(1, floor(gamma B)) examples of largest rise, in the order of the batch."""
        n = max(1, math.floor(self.gamma * len(rise)))
        return sorted(sorted(range(len(rise)), key=lambda i: -rise[i])[:n])


class SWP(ESAM):
    """ESAM's perturbation, every example."""

    def __init__(self, model: nn.Module, base: torch.optim.Optimizer, rho: float = 0.05, beta: float = 0.6) -> None:
        super().__init__(model, base, rho, beta, gamma=1.0)


class SDS(ESAM):
    """ESAM's selection, SAM's perturbation."""

    def __init__(self, model: nn.Module, base: torch.optim.Optimizer, rho: float = 0.05, gamma: float = 0.5) -> None:
        super().__init__(model, base, rho, 1.0, gamma)

    def direction(self, losses: Losses, batch: Data, **draws: Any) -> Tensors:
        return super().direction(losses, batch, picks=[True] * len(self.params))
