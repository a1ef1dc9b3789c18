"""When is a step sharp, and how large is ρ?"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TypeAlias

import torch

from .. import checks
from ..point import Point, When
from .schedules import Schedule

Probability: TypeAlias = float | Schedule


@dataclass(frozen=True)
class Always(When):
    """Every step is sharp, at the same ρ; never any at ρ = 0."""

    rho: float

    def __post_init__(self) -> None:
        checks.non_negative(rho=self.rho)

    def chance(self, step: int, total: int) -> float:
        return 1.0 if self.rho > 0 else 0.0

    def limit(self, among: int) -> float:
        return 1.0 if self.rho > 0 else 0.0

    def __call__(self, at: Point) -> float:
        return self.rho


@dataclass(frozen=True)
class FollowLR(When):
    """ρ follows the learning rate: ``ρmin + (ρmax − ρmin)(lr − lr_min)/(lr_peak − lr_min)``, held within the two."""

    rho: float
    rho_min: float
    lr_min: float = 0.0

    def __post_init__(self) -> None:
        checks.non_negative(rho=self.rho, rho_min=self.rho_min, lr_min=self.lr_min)
        if self.rho_min > self.rho:
            raise ValueError(f"rho_min={self.rho_min!r} must not exceed rho={self.rho!r}")

    def chance(self, step: int, total: int) -> float:
        return 1.0 if self.rho > 0 else 0.0

    def limit(self, among: int) -> float:
        return 1.0 if self.rho > 0 else 0.0

    def __call__(self, at: Point) -> float:
        span = at.peak_lr - self.lr_min
        height = (at.lr - self.lr_min) / span if span > 0 else 1.0
        return self.rho_min + (self.rho - self.rho_min) * min(1.0, max(0.0, height))


@dataclass(frozen=True)
class Every(When):
    """Every k-th step is as ``inner`` says; the steps between reuse what it left."""

    inner: When
    k: int

    def __post_init__(self) -> None:
        checks.count(k=self.k)

    @property
    def needs_total(self) -> bool:
        return self.inner.needs_total

    def chance(self, step: int, total: int) -> float:
        return self.inner.chance(step, total) if step % self.k == 0 else 0.0

    def limit(self, among: int) -> float:
        both = math.lcm(self.k, among)
        return self.inner.limit(both) * among / both

    def __call__(self, at: Point) -> float | None:
        return self.inner(at) if at.step % self.k == 0 else None


@dataclass(frozen=True)
class Coin(When):
    """``X ~ Bernoulli(p(t))``, the same on every rank: heads is as ``inner`` says, tails a step of the base alone."""

    inner: When
    p: Probability

    def __post_init__(self) -> None:
        if isinstance(self.p, (int, float)):
            checks.probability(p=self.p)
        elif not isinstance(self.p, Schedule):
            raise TypeError(f"p={self.p!r} must be a number in [0, 1] or a schedule such as linear(0, 1)")

    @property
    def needs_total(self) -> bool:
        return not isinstance(self.p, (int, float)) or self.inner.needs_total

    def chance(self, step: int, total: int) -> float:
        return self._heads(step, total) * self.inner.chance(step, total)

    def limit(self, among: int) -> float:
        heads = self.p if isinstance(self.p, (int, float)) else self.p.limit()
        return heads * self.inner.limit(among)

    def _heads(self, step: int, total: int | None) -> float:
        if isinstance(self.p, (int, float)):
            return self.p
        assert total is not None
        return self.p(min(step, total) / total)

    def __call__(self, at: Point) -> float | None:
        p = self._heads(at.step, at.total)
        heads = p >= 1 or torch.rand((), generator=at.generator("coin"), dtype=torch.float64).item() < p
        return self.inner(at) if heads else 0.0
