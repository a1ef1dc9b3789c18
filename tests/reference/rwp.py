"""RWP (Li 2022)."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from .common import Data, Losses, Reference, Tensors, gradient, moved


class RWP(Reference):
    """eps = gamma ||w_k|| noise on each filter w_k; d = alpha g0(B) + (1 - alpha) g(w + eps, B').

    With alpha = 0 pass one is not run, and the perturbed pass moves the statistics.
    """

    def __init__(self, model: nn.Module, base: torch.optim.Optimizer, gamma: float = 0.01, alpha: float = 0.5) -> None:
        super().__init__(model, base)
        self.gamma, self.alpha = gamma, alpha

    def epsilon(self, noise: Tensors) -> Tensors:
        eps = []
        for w, z in zip(self.params, noise, strict=True):
            filters = w.detach() if w.ndim >= 2 else w.detach().reshape(1, -1)
            e = torch.zeros_like(filters)
            for k, f in enumerate(filters):
                e[k] = self.gamma * (f**2).sum().sqrt() * z.reshape(filters.shape)[k]
            eps.append(e.reshape(w.shape))
        return eps

    def direction(
        self, losses: Losses, batch: Data, *, noise: Tensors, other: Data | None = None, **draws: Any
    ) -> Tensors:
        second = batch if other is None else other
        eps = self.epsilon(noise)
        if self.alpha == 0:
            with moved(self.params, eps):
                return gradient(losses(self.model, second).mean(), self.params)
        g0 = self.gradient(losses, batch)
        g1 = self.gradient_at(eps, losses, second)
        return [self.alpha * a + (1 - self.alpha) * b for a, b in zip(g0, g1, strict=True)]
