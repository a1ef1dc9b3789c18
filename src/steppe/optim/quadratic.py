"""A quadratic model of the loss of a step's batches."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from .. import vec
from ..curvature import Objective, Operator
from ..curvature.operator import Kind
from ..ranks import Ranks
from ..vec import Vec


@dataclass(frozen=True, eq=False)
class Source:
    """A batch's loss, and the weights at which a step looked at it."""

    share: float
    """Its part of the step's loss on this rank."""
    objective: Objective
    """The batch's mean loss on this rank, as a function of all trainable parameters."""
    weights: Vec
    """Values of ``objective.params``."""
    ranks: Ranks
    """Over which gradients are averaged."""


class Quadratic:
    """``q(d) = gᵀd + ½ dᵀB d``, a model of ``L(w + d) − L(w)``.

    L and B are sums over the sources, each at the weights where it was seen: under a sharpness-aware method those are
    perturbed, with m-sharpness differently for each source. As gradients are, the sums are averaged over the ranks. Use
    it inside ``away()``.

    Args:
        sources: the batches.
        params: the parameters that d moves; vectors are flat, in the order of ``self.params``.
        kind: ``"ggn"`` or ``"hessian"``.
    """

    def __init__(self, sources: Sequence[Source], params: Vec, kind: Kind) -> None:
        self._sources, self._ranks = list(sources), sources[0].ranks
        self._operators = [Operator(each.objective.only(params), kind) for each in sources]
        self._all = self._sources[0].objective.params
        self._place: Source | None = None
        first = self._operators[0].objective
        self.params, self.join, self.split = first.params, first.join, first.split
        self.products = 0
        """Products with B so far."""

    @contextmanager
    def away(self) -> Iterator[None]:
        """Let the weights be moved inside; afterwards they are what they were, to the bit."""
        home = vec.clone(self._all)
        try:
            yield
        finally:
            vec.copy_(self._all, home)
            self._place = None

    def __matmul__(self, v: Tensor) -> Tensor:
        """Return B v, shape (n,).

        Raises:
            ValueError: on all ranks, if on one of them the loss is not twice differentiable or not finite.
        """
        total, reason = torch.zeros_like(v), None
        try:
            for source, operator in zip(self._sources, self._operators, strict=True):
                self._go(source)
                total += source.share * (operator @ v)
        except ValueError as error:
            if self._ranks.world == 1:
                raise
            reason = error
            total.fill_(math.nan)
        self._ranks.mean_([total])
        if not total.isfinite().all():
            raise ValueError(str(reason or "the curvature of another rank's batch is not finite")) from reason
        self.products += 1
        return total

    def loss(self, step: Vec | None = None, factor: float = 1.0) -> float:
        """Return L(w), or L(w + factor · step); infinite or not a number where it is."""
        total = torch.zeros(())
        for source in self._sources:
            self._go(source)
            if step is not None:
                vec.add_(self.params, step, factor)
                self._place = None
            total = total + source.share * source.objective.loss(finite=False)
        self._ranks.mean_([total])
        return float(total)

    def _go(self, source: Source) -> None:
        """Set the weights to those of the source; where they stay, so do the graphs."""
        if self._place is not source:
            vec.copy_(self._all, source.weights)
            self._place = source
