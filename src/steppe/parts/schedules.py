"""The schedules p(t) of randomized sharpness-aware training (RST 2022, table 2, appendix B.1), over ``t/T``."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, fields
from typing import Protocol, runtime_checkable

from .. import checks


@runtime_checkable
class Schedule(Protocol):
    """A probability that changes over the training; ``text`` is the expression that builds it."""

    text: str

    def __call__(self, progress: float) -> float:
        """Return p at ``progress = t/T``."""
        ...

    def limit(self) -> float:
        """Return the mean of p over the whole training, in the limit of many steps."""
        ...

    def __repr__(self) -> str:
        if self.text:
            return self.text
        values = (f"{f.name}={getattr(self, f.name)!r}" for f in fields(self) if f.name != "text")  # type: ignore[arg-type]
        return f"{type(self).__name__}({', '.join(values)})"


@dataclass(frozen=True, repr=False)
class Piecewise(Schedule):
    """``p = a`` for ``t < bT``, then ``1 − a``."""

    a: float
    b: float
    text: str = field(default="", init=False, compare=False)

    def __post_init__(self) -> None:
        checks.probability(a=self.a, b=self.b)

    def __call__(self, progress: float) -> float:
        return self.a if progress < self.b else 1 - self.a

    def limit(self) -> float:
        return self.b * self.a + (1 - self.b) * (1 - self.a)


@dataclass(frozen=True, repr=False)
class Linear(Schedule):
    """``p`` goes from ``start`` at 0 to ``end`` at T in a straight line."""

    start: float
    end: float
    text: str = field(default="", init=False, compare=False)

    def __post_init__(self) -> None:
        checks.probability(start=self.start, end=self.end)

    def __call__(self, progress: float) -> float:
        return self.start + (self.end - self.start) * progress

    def limit(self) -> float:
        return (self.start + self.end) / 2


@dataclass(frozen=True, repr=False)
class Cosine(Schedule):
    """``p = ½ + ½cos(πt/T)``, or 1 minus that."""

    flipped: bool = False
    text: str = field(default="", init=False, compare=False)

    def __post_init__(self) -> None:
        checks.flag(flipped=self.flipped)

    def __call__(self, progress: float) -> float:
        p = 0.5 + 0.5 * math.cos(math.pi * progress)
        return 1 - p if self.flipped else p

    def limit(self) -> float:
        return 0.5


@dataclass(frozen=True, repr=False)
class Sine(Schedule):
    """``p = sin(πt/T)``, or 1 minus that."""

    flipped: bool = False
    text: str = field(default="", init=False, compare=False)

    def __post_init__(self) -> None:
        checks.flag(flipped=self.flipped)

    def __call__(self, progress: float) -> float:
        p = math.sin(math.pi * progress)
        return 1 - p if self.flipped else p

    def limit(self) -> float:
        return 1 - 2 / math.pi if self.flipped else 2 / math.pi
