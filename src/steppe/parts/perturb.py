"""Which ε? The ascents, the filter-wise noise, and the mask of stochastic weight perturbation."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from .. import checks, vec
from ..point import Perturb, Point
from ..vec import Vec


@dataclass(frozen=True)
class Ascent(Perturb):
    """Steepest ascent in the ball ``‖ε‖_p ≤ ρ``: ``ε = ρ·sign(g)|g|^(q−1) / ‖g‖_q^(q/p)``, ``1/p + 1/q = 1``."""

    p: float = 2.0
    steps: int = 1

    def __post_init__(self) -> None:
        checks.above_one(p=self.p)
        checks.count(steps=self.steps)

    @property
    def passes(self) -> int:
        return self.steps

    @property
    def is_steepest(self) -> bool:
        return self.p == 2 and self.steps == 1

    def __call__(self, at: Point, rho: float) -> tuple[Vec, Tensor | float]:
        if self.p == 2:
            return at.g0, vec.over(rho, vec.norm(at.g0))
        q = 1.0 if self.p == math.inf else self.p / (self.p - 1)
        direction = at.g0 if at.spare else vec.clone(at.g0)
        factor: Tensor | float = rho
        if self.p < math.inf:  # the largest entry becomes 1, which no power takes out of the type's range
            vec.scale_(direction, vec.over(1.0, vec.norm(direction, math.inf)))
            factor = vec.over(rho, vec.norm(direction, q) ** (q / self.p))
        for g in vec.local(direction):
            g.copy_(g.sign() * g.abs() ** (q - 1))
        return direction, factor


@dataclass(frozen=True)
class Adaptive(Perturb):
    """Ascent in the ball ``‖T⁻¹ε‖ ≤ ρ``: ``ε = ρ T²g/‖Tg‖``, ``T = |w| + η`` on adaptive tensors, else 1."""

    eta: float = 0.01
    needs_names: bool = False

    def __post_init__(self) -> None:
        checks.non_negative(eta=self.eta)
        checks.flag(by_name=self.needs_names)

    def __call__(self, at: Point, rho: float) -> tuple[Vec, Tensor | float]:
        chosen = ["weight" in name for name in at.names] if self.needs_names else [w.ndim >= 2 for w in at.w]
        t = [w.abs().add_(self.eta) for w, c in zip(vec.local(at.w), chosen, strict=True) if c]
        direction = at.g0 if at.spare else vec.clone(at.g0)
        adaptive = [g for g, c in zip(direction, chosen, strict=True) if c]
        vec.mul_(adaptive, t)
        factor = vec.over(rho, vec.norm(direction))
        vec.mul_(adaptive, t)
        return direction, factor


@dataclass(frozen=True)
class FilterNoise(Perturb):
    """Gaussian noise of deviation ``ρ‖w_k‖`` on each filter k, a slice along dimension 0; needs no gradient."""

    needs_g0: ClassVar[bool] = False

    def __call__(self, at: Point, rho: float) -> tuple[Vec, Tensor | float]:
        devices = dict.fromkeys(w.device for w in at.w)
        generators = {each: at.generator(f"noise/{i}" if i else "noise", each) for i, each in enumerate(devices)}
        noise = [vec.randn(w, generators[w.device]) for w in at.w]
        vec.mul_(noise, vec.filter_norms(at.w))
        return noise, rho


class Over(Perturb):
    """An ε laid over that of ``inner``: it needs what ``inner`` needs."""

    inner: Perturb

    @property
    def needs_g0(self) -> bool:  # type: ignore[override]
        return self.inner.needs_g0

    @property
    def needs_names(self) -> bool:  # type: ignore[override]
        return self.inner.needs_names

    @property
    def passes(self) -> int:
        return self.inner.passes


@dataclass(frozen=True)
class Masked(Over):
    """Stochastic weight perturbation: ``inner`` with ``ρ/β`` on tensors picked with probability β."""

    inner: Perturb
    beta: float

    def __post_init__(self) -> None:
        checks.share(beta=self.beta)

    @property
    def share(self) -> float:
        return self.beta

    def picks(self, at: Point, count: int) -> list[bool]:
        draws = torch.rand(count, generator=at.generator("swp"), dtype=torch.float64)
        return (draws < self.beta).tolist()  # type: ignore[no-any-return]

    def __call__(self, at: Point, rho: float) -> tuple[Vec, Tensor | float]:
        return self.inner(at, rho / self.beta)
