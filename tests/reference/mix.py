"""Methods with SAM's eps whose direction mixes g0 and g1."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from .common import Data, Losses, Reference, Tensors, rejection
from .sam import sam_epsilon


class Mixing(Reference):
    """eps = rho g0 / ||g0||; d = combine(g0, g1)."""

    def __init__(self, model: nn.Module, base: torch.optim.Optimizer, rho: float = 0.05) -> None:
        super().__init__(model, base)
        self.rho = rho

    def radius(self) -> float:
        return self.rho

    def combine(self, g0: Tensors, g1: Tensors) -> Tensors:
        raise NotImplementedError

    def direction(self, losses: Losses, batch: Data, **draws: Any) -> Tensors:
        g0 = self.gradient(losses, batch)
        g1 = self.gradient_at(sam_epsilon(g0, self.radius()), losses, batch)
        return self.combine(g0, g1)


class MixedSAM(Mixing):
    """d = alpha g0 + (1 - alpha) g1 (RWP paper 4.7)."""

    def __init__(self, model: nn.Module, base: torch.optim.Optimizer, rho: float = 0.05, alpha: float = 0.2) -> None:
        super().__init__(model, base, rho)
        self.alpha = alpha

    def combine(self, g0: Tensors, g1: Tensors) -> Tensors:
        return [self.alpha * a + (1 - self.alpha) * b for a, b in zip(g0, g1, strict=True)]


class GNR(Mixing):
    """d = (1 - s) g0 + s g1, s = gamma / rho (Zhao 2022)."""

    def __init__(self, model: nn.Module, base: torch.optim.Optimizer, rho: float = 0.05, strength: float = 1.0) -> None:
        super().__init__(model, base, rho)
        self.strength = strength

    def combine(self, g0: Tensors, g1: Tensors) -> Tensors:
        return [(1 - self.strength) * a + self.strength * b for a, b in zip(g0, g1, strict=True)]


class GSAM(Mixing):
    """d = g1 - alpha (part of g0 orthogonal to g1) (Zhuang 2022).

    With rho_min, the radius follows the learning rate: rho at lr_max, rho_min at lr_min.
    """

    def __init__(
        self,
        model: nn.Module,
        base: torch.optim.Optimizer,
        rho: float = 0.05,
        alpha: float = 0.4,
        rho_min: float | None = None,
        lr_min: float = 0.0,
        lr_max: float = 1.0,
    ) -> None:
        super().__init__(model, base, rho)
        self.alpha, self.rho_min, self.lr_min, self.lr_max = alpha, rho_min, lr_min, lr_max

    def radius(self) -> float:
        if self.rho_min is None:
            return self.rho
        lr = self.base.param_groups[0]["lr"]
        return self.rho_min + (self.rho - self.rho_min) * (lr - self.lr_min) / (self.lr_max - self.lr_min)

    def combine(self, g0: Tensors, g1: Tensors) -> Tensors:
        return [b - self.alpha * v for b, v in zip(g1, rejection(g0, g1), strict=True)]


class GSAMMinFH(GSAM):
    """min(f, h): d = g0 + alpha (part of g1 orthogonal to g0)."""

    def combine(self, g0: Tensors, g1: Tensors) -> Tensors:
        return [a + self.alpha * v for a, v in zip(g0, rejection(g1, g0), strict=True)]


class GSAMPenalty(Mixing):
    """min(f_p + lam h): d = g1 + lam (g1 - g0)."""

    def __init__(self, model: nn.Module, base: torch.optim.Optimizer, rho: float = 0.05, *, lam: float) -> None:
        super().__init__(model, base, rho)
        self.lam = lam

    def combine(self, g0: Tensors, g1: Tensors) -> Tensors:
        return [b + self.lam * (b - a) for a, b in zip(g0, g1, strict=True)]
