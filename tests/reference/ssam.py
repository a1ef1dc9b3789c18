"""SSAM (Mi 2022): SAM's eps times a 0/1 mask, from the Fisher diagonal or dynamic."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from .common import Data, Losses, Reference, Tensors, rows
from .sam import sam_epsilon


def flat(tensors: Tensors) -> Tensor:
    return torch.cat([x.reshape(-1) for x in tensors])


def shaped(vector: Tensor, like: Tensors) -> Tensors:
    parts = vector.split([x.numel() for x in like])
    return [part.reshape(x.shape) for part, x in zip(parts, like, strict=True)]


class SSAM(Reference):
    """eps = mask rho g0 / ||g0||, the norm over all of g0; d = g(w + eps)."""

    mask: Tensors

    def masked_pass(self, g0: Tensors, rho: float, losses: Losses, batch: Data) -> Tensors:
        eps = [e * m for e, m in zip(sam_epsilon(g0, rho), self.mask, strict=True)]
        return self.gradient_at(eps, losses, batch)


class SSAMFisher(SSAM):
    """Mask: full; from the first refresh on the top 1 - s of the summed squares of per-example gradients."""

    def __init__(
        self,
        model: nn.Module,
        base: torch.optim.Optimizer,
        rho: float = 0.05,
        s: float = 0.5,
        n: int = 128,
        refresh: int = 1,
    ) -> None:
        super().__init__(model, base)
        self.rho, self.s, self.n, self.refresh = rho, s, n, refresh
        self.mask = [torch.ones_like(w) for w in self.params]

    def fisher(self, losses: Losses, batch: Data) -> Tensors:
        total = [torch.zeros_like(w) for w in self.params]
        training = [(module, module.training) for module in self.model.modules()]
        self.model.eval()
        try:
            for i in range(min(self.n, len(batch[0]))):
                g = self.gradient(losses, rows(batch, slice(i, i + 1)))
                total = [a + b**2 for a, b in zip(total, g, strict=True)]
        finally:
            for module, mode in training:
                module.training = mode
        return total

    def direction(self, losses: Losses, batch: Data, **draws: Any) -> Tensors:
        if self.t > 0 and self.t % self.refresh == 0:
            score = flat(self.fisher(losses, batch))
            mask = torch.zeros_like(score)
            mask[score.argsort(descending=True)[: round((1 - self.s) * len(score))]] = 1
            self.mask = shaped(mask, self.params)
        return self.masked_pass(self.gradient(losses, batch), self.rho, losses, batch)


class SSAMDynamic(SSAM):
    """Mask: at each refresh the flattest d_t of the kept go, as many come; d_t = d0 (1 + cos(pi t/T))/2.

    `scores`, uniform and shaped like the parameters, decide who comes: the largest among those that were out.
    """

    def __init__(
        self,
        model: nn.Module,
        base: torch.optim.Optimizer,
        mask: Tensors,
        total: int,
        rho: float = 0.05,
        d0: float = 0.5,
        refresh: int = 1,
    ) -> None:
        super().__init__(model, base)
        self.rho, self.d0, self.refresh, self.total = rho, d0, refresh, total
        self.mask = [m.to(w.dtype) for m, w in zip(mask, self.params, strict=True)]

    def regrow(self, g0: Tensors, scores: Tensors) -> None:
        mask, slope, score = flat(self.mask), flat(g0).abs(), flat(scores)
        kept, out = (mask == 1).nonzero().flatten(), (mask == 0).nonzero().flatten()
        d_t = self.d0 * (1 + math.cos(math.pi * self.t / self.total)) / 2
        n = min(math.floor(d_t * len(kept)), len(out))
        mask[kept[slope[kept].argsort()[:n]]] = 0
        mask[out[score[out].argsort(descending=True)[:n]]] = 1
        self.mask = shaped(mask, self.params)

    def direction(self, losses: Losses, batch: Data, *, scores: Tensors | None = None, **draws: Any) -> Tensors:
        g0 = self.gradient(losses, batch)
        if self.t > 0 and self.t % self.refresh == 0:
            assert scores is not None
            self.regrow(g0, scores)
        return self.masked_pass(g0, self.rho, losses, batch)
