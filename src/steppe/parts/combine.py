"""Which direction from g0 and g1?"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch

from .. import checks, vec
from ..point import Combine, Fill, Point
from ..vec import Vec


@dataclass(frozen=True)
class Second(Combine):
    """``d = g1``."""

    @property
    def needs_g0(self) -> bool:
        return False

    @property
    def weights(self) -> tuple[float, float]:
        return 0.0, 1.0

    def __call__(self, at: Point, g1: Vec | None) -> Vec:
        return at.g0 if g1 is None else g1


@dataclass(frozen=True)
class SecondOrder(Combine):
    """SAM's gradient differentiated through ε: ``d = g1 + (ρ/‖g0‖) H (g1 − ĝ0(ĝ0ᵀg1))``, H the Hessian at w."""

    @property
    def needs_product(self) -> bool:
        return True

    def probe(self, at: Point, g1: Vec) -> Vec:
        across = vec.reject(g1, at.g0)
        vec.scale_(across, vec.over(at.rho, vec.norm(at.g0)))
        return across

    def __call__(self, at: Point, g1: Vec | None) -> Vec:
        assert g1 is not None
        vec.add_(g1, at.product)
        return g1


@dataclass(frozen=True)
class Mix(Combine):
    """``d = α g0 + (1 − α) g1``."""

    alpha: float

    def __post_init__(self) -> None:
        checks.probability(alpha=self.alpha)

    @property
    def needs_g0(self) -> bool:
        return self.alpha != 0

    @property
    def weights(self) -> tuple[float, float]:
        return self.alpha, 1 - self.alpha

    def __call__(self, at: Point, g1: Vec | None) -> Vec:
        assert g1 is not None
        if self.needs_g0:
            vec.lerp_(g1, at.g0, self.alpha)
        return g1


@dataclass(frozen=True)
class Orthogonal(Combine):
    """GSAM: descend the perturbed loss, ascend the plain one across it: ``d = g1 − α (g0 − (g0ᵀĝ1)ĝ1)``."""

    alpha: float

    def __post_init__(self) -> None:
        checks.finite(alpha=self.alpha)

    @property
    def needs_g0(self) -> bool:
        return self.alpha != 0

    def __call__(self, at: Point, g1: Vec | None) -> Vec:
        assert g1 is not None
        if not self.needs_g0:
            return g1
        along = vec.dot(at.g0, g1) * vec.over(1.0, vec.dot(g1, g1))
        vec.scale_(g1, 1 + self.alpha * along)
        vec.add_(g1, at.g0, -self.alpha)
        return g1


@dataclass(frozen=True)
class LossFirst(Combine):
    """GSAM's min(f, h): descend the plain loss, and the perturbed one across it: ``d = g0 + α (g1 − (g1ᵀĝ0)ĝ0)``."""

    alpha: float

    def __post_init__(self) -> None:
        checks.finite(alpha=self.alpha)

    def __call__(self, at: Point, g1: Vec | None) -> Vec:
        assert g1 is not None
        vec.add_(at.g0, vec.reject(g1, at.g0), self.alpha)
        return at.g0


@dataclass(frozen=True)
class Look(Combine):
    """LookSAM: sharp steps keep ``ĝv`` of ``gv = g1 − (g1ᵀĝ0)ĝ0``, the others reuse it: ``d = g0 + α‖g0‖ ĝv``."""

    alpha: float
    memories: ClassVar[Mapping[str, Fill]] = {"gv": torch.zeros_like}

    def __post_init__(self) -> None:
        checks.finite(alpha=self.alpha)

    def __call__(self, at: Point, g1: Vec | None) -> Vec:
        if g1 is not None:
            gv = vec.reject(g1, at.g0)
            vec.scale_(gv, vec.over(1.0, vec.norm(gv), beside=vec.norm(g1)))
            at.memory.write("gv", gv, others=torch.zeros_like)
            return g1
        if "gv" in at.memory:
            vec.add_(at.g0, at.memory.read("gv", self.memories["gv"]), self.alpha * vec.norm(at.g0))
        return at.g0


@dataclass(frozen=True)
class Amplified(Combine):
    """A multiple of what the method changes: ``d = g0 + s (g − g0)``, g the direction of ``inner``."""

    inner: Combine
    strength: float

    def __post_init__(self) -> None:
        checks.finite(strength=self.strength)

    @property
    def needs_g0(self) -> bool:
        return self.strength != 1 or self.inner.needs_g0

    @property
    def needs_product(self) -> bool:
        return self.inner.needs_product

    @property
    def memories(self) -> Mapping[str, Fill]:  # type: ignore[override]
        return self.inner.memories

    def probe(self, at: Point, g1: Vec) -> Vec:
        return self.inner.probe(at, g1)

    def __call__(self, at: Point, g1: Vec | None) -> Vec:
        if self.strength == 1:
            return self.inner(at, g1)
        g0 = vec.clone(at.g0) if self.inner.needs_g0 else at.g0
        vec.lerp_(g0, self.inner(at, g1), self.strength)
        return g0
