"""The 0/1 masks of sparse SAM: by Fisher information, or grown and dropped as the training goes.

Entries are ranked over whole parameters: those of sharded ones are gathered on every rank while a mask changes.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import torch
from torch import Tensor

from .. import checks, vec
from ..point import Fill, Perturb, Point, When
from ..vec import Vec
from .perturb import Over


def _top(scores: Tensor, s: float) -> Tensor:
    """Return the mask of the largest ``1 − s`` of the scores."""
    kept = torch.zeros_like(scores, dtype=torch.bool)
    kept[scores.topk(round((1 - s) * len(scores)), sorted=False).indices] = True
    return kept


def _masked(inner: Perturb, at: Point, rho: float, mask: Vec) -> tuple[Vec, Tensor | float]:
    direction, factor = inner(at, rho)
    if not at.spare:
        direction = vec.clone(direction)
    vec.mul_(direction, mask)
    return direction, factor


@dataclass(frozen=True)
class FisherSparse(Over):
    """``ε`` of ``inner`` on the global top ``1 − s`` of ``Σᵢ(∇ℓᵢ)²`` over n examples; full until the first refresh."""

    inner: Perturb
    s: float
    n: int
    refresh: int
    memories: ClassVar[Mapping[str, Fill]] = {"mask": partial(torch.ones_like, dtype=torch.bool)}
    needs_examples: ClassVar[bool] = True

    def __post_init__(self) -> None:
        _check(self.inner, self.s, self.refresh)
        checks.count(n=self.n)

    def fisher_examples(self, step: int) -> int:
        return self.n if step > 0 and step % self.refresh == 0 else 0

    def extra(self, batch_size: int, total: int | None, when: When) -> float:
        if total is None:
            refreshes = when.share(None, self.refresh) / self.refresh
        else:
            refreshes = sum(when.chance(step, total) for step in range(self.refresh, total, self.refresh)) / total
        return refreshes * min(self.n, batch_size) / batch_size

    def __call__(self, at: Point, rho: float) -> tuple[Vec, Tensor | float]:
        if at.squares:
            at.memory.write("mask", vec.split(_top(vec.join(at.squares), self.s), at.w))
        if "mask" not in at.memory:
            return self.inner(at, rho)
        return _masked(self.inner, at, rho, at.memory.read("mask", self.memories["mask"]))


@dataclass(frozen=True)
class DynamicSparse(Over):
    """``ε`` of ``inner`` on a mask of density ``1 − s`` that drops its flattest entries, regrowing others at random."""

    inner: Perturb
    s: float
    drop: float
    refresh: int
    needs_g0: ClassVar[bool] = True
    memories: ClassVar[Mapping[str, Fill]] = {"mask": partial(torch.zeros_like, dtype=torch.bool)}
    needs_total: ClassVar[bool] = True

    def __post_init__(self) -> None:
        _check(self.inner, self.s, self.refresh)
        checks.probability(drop=self.drop)

    def __call__(self, at: Point, rho: float) -> tuple[Vec, Tensor | float]:
        if "mask" not in at.memory:
            at.memory.write("mask", self._first(at))
        elif at.step % self.refresh == 0 and not at.memory.is_new("mask"):
            at.memory.write("mask", self._regrown(at))
        return _masked(self.inner, at, rho, at.memory.read("mask", self.memories["mask"]))

    def _first(self, at: Point) -> Vec:
        scores = torch.rand(sum(w.numel() for w in at.w), generator=at.generator("ssam"))
        return vec.split(_top(scores, self.s), at.w)

    def _regrown(self, at: Point) -> Vec:
        assert at.total is not None
        kept = vec.join(at.memory.read("mask", self.memories["mask"]))
        gone = kept.logical_not()
        rate = self.drop * (1 + math.cos(math.pi * min(at.step, at.total) / at.total)) / 2
        density, free = int(kept.sum()), int(gone.sum())
        count = min(int(rate * density), free)
        slope = vec.join(at.g0).abs()
        flattest = slope.where(kept, math.inf).topk(count, largest=False, sorted=False).indices
        scores = torch.rand(len(kept), generator=at.generator("ssam")).to(kept.device)
        missing = round((1 - self.s) * len(kept)) - (density - count)  # more than count where parameters were added
        regrown = scores.where(gone, -1.0).topk(min(max(missing, 0), free), sorted=False).indices
        kept[flattest] = False
        kept[regrown] = True
        return vec.split(kept, at.w)


def _check(inner: Perturb, s: float, refresh: int) -> None:
    checks.below_one(s=s)
    checks.count(refresh=refresh)
    if inner.memories or inner.share < 1:
        raise ValueError(f"a mask over single weights cannot be laid over {inner!r}, which has a mask of its own")
