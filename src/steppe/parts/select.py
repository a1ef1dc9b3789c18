"""Which examples does pass two see?"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from .. import checks
from ..point import Select


@dataclass(frozen=True)
class Sharpest(Select):
    """The ``max(1, ⌊γB⌋)`` examples whose loss rises the most from w to w + ε."""

    gamma: float
    needs_rise: ClassVar[bool] = True

    def __post_init__(self) -> None:
        checks.share(gamma=self.gamma)

    def count(self, batch_size: int) -> int:
        return max(1, math.floor(round(self.gamma * batch_size, 9)))  # 0.7 · 90 is 62.99… in floating point

    def __call__(self, rise: Tensor) -> Tensor:
        return rise.topk(self.count(len(rise)), sorted=False).indices


@dataclass(frozen=True)
class Another(Select):
    """Another batch altogether, handed to ``opt.step(batch, second)``."""

    needs_second: ClassVar[bool] = True
