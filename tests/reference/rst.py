"""RST and G-RST (2022)."""

from __future__ import annotations

from typing import Any

from .common import Data, Losses, Reference, Tensors, held


class RST(Reference):
    """Heads: d = g0 + s (inner's d - g0), for s = 1 the inner's d itself; tails: d = g0."""

    def __init__(self, inner: Reference, strength: float = 1.0) -> None:
        super().__init__(inner.model, inner.base)
        self.inner, self.strength = inner, strength

    def direction(self, losses: Losses, batch: Data, *, coin: bool, **draws: Any) -> Tensors:
        self.inner.t = self.t  # tails count as steps
        if not coin:
            return self.gradient(losses, batch)
        if self.strength == 1:
            return self.inner.direction(losses, batch, **draws)
        with held(self.model):
            d = self.inner.direction(losses, batch, **draws)
        g0 = self.gradient(losses, batch)  # the one pass that moves the statistics
        return [a + self.strength * (b - a) for a, b in zip(g0, d, strict=True)]
