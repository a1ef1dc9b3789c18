"""SAM (Foret 2021): p-norms, inner steps, second-order term, m-sharpness."""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from .common import Data, Losses, Reference, Tensors, dot, gradient, held, norm, rows


def sam_epsilon(g: Sequence[Tensor], rho: float, p: float = 2) -> Tensors:
    """eps = rho sign(g) |g|^(q-1) / (||g||_q^q)^(1/p), 1/p + 1/q = 1."""
    if p == math.inf:
        return [rho * x.sign() for x in g]
    q = p / (p - 1)
    total = sum((x.abs() ** q).sum() for x in g)
    if total == 0:
        return [torch.zeros_like(x) for x in g]
    return [rho * x.sign() * x.abs() ** (q - 1) / total ** (1 / p) for x in g]


def p_norm(v: Sequence[Tensor], p: float) -> Tensor:
    """||v||_p over all tensors together."""
    if p == math.inf:
        return max(x.abs().max() for x in v)
    return sum((x.abs() ** p).sum() for x in v) ** (1 / p)


class SAM(Reference):
    """d = g(w + eps), eps by k projected ascent steps of length rho/k.

    second_order: d = the whole gradient of w -> L(w + eps(w)).
    """

    def __init__(
        self,
        model: nn.Module,
        base: torch.optim.Optimizer,
        rho: float = 0.05,
        p: float = 2,
        k: int = 1,
        second_order: bool = False,
    ) -> None:
        super().__init__(model, base)
        assert not second_order or (p == 2 and k == 1)
        self.rho, self.p, self.k, self.second_order = rho, p, k, second_order

    def epsilon(self, losses: Losses, batch: Data) -> Tensors:
        eps = [torch.zeros_like(w) for w in self.params]
        for i in range(self.k):
            g = self.gradient(losses, batch) if i == 0 else self.gradient_at(eps, losses, batch)
            eps = [e + s for e, s in zip(eps, sam_epsilon(g, self.rho / self.k, self.p), strict=True)]
            length = p_norm(eps, self.p)
            if length > self.rho:  # for p = 2 the nearest point of the ball
                eps = [e * self.rho / length for e in eps]
        return eps

    def direction(self, losses: Losses, batch: Data, **draws: Any) -> Tensors:
        g1 = self.gradient_at(self.epsilon(losses, batch), losses, batch)
        if not self.second_order:
            return g1
        # d = g1 + (d eps / d w)^T g1, with eps(w) = rho g0(w) / ||g0(w)|| differentiated through g0
        with held(self.model):
            g0 = gradient(losses(self.model, batch).mean(), self.params, create_graph=True)
            if norm(g0) == 0:
                return g1
            through_eps = gradient(dot([self.rho * g / norm(g0) for g in g0], g1), self.params)
        return [a + b for a, b in zip(g1, through_eps, strict=True)]


class MSharpness(Reference):
    """Any memoryless method on groups of m consecutive examples; d = mean of the groups' d, weighted by size.

    As on data-parallel ranks, of which the first one's buffers survive, the first group moves the statistics.
    """

    def __init__(self, inner: Reference, m: int) -> None:
        super().__init__(inner.model, inner.base)
        self.inner, self.m = inner, m

    def direction(self, losses: Losses, batch: Data, **draws: Any) -> Tensors:
        self.inner.t = self.t
        B = len(batch[0])
        d = [torch.zeros_like(w) for w in self.params]
        for start in range(0, B, self.m):
            group = rows(batch, slice(start, start + self.m))
            with nullcontext() if start == 0 else held(self.model):
                d_group = self.inner.direction(losses, group, **draws)
            d = [x + len(group[0]) / B * y for x, y in zip(d, d_group, strict=True)]
        return d
