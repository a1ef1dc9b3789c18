"""The loss of a few examples, and means over such parts of the data."""

from __future__ import annotations

import math
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from .. import rng
from ..examples import extent, take
from .objective import FORWARD, Objective
from .together import agree

T = TypeVar("T")


class Part:
    """The weighted mean loss of one batch or a part of it, as a function of an objective's parameters.

    In train mode every pass draws the same dropout masks. To be used inside ``objective.still()``.

    Args:
        objective: what is measured.
        batch: the examples.
        per_example: whether a ``loss_fn`` that returns a mean is refused.
    """

    def __init__(self, objective: Objective, batch: Any, *, per_example: bool = False) -> None:
        self.objective, self.batch, self.per_example = objective, batch, per_example
        self.size, self.device = extent(batch)
        self.weights, self.weight = torch.zeros(0), 0.0
        """The examples' weights and their sum, known after the first pass."""
        self._states = rng.states({p.device for p in objective.params}) if objective.mode == "train" else {}

    def groups(self, m: int) -> list[Part]:
        """Return groups of ``m`` consecutive examples, the last one maybe smaller."""
        return [self.rows(slice(i, i + m)) for i in range(0, self.size, m)]

    def rows(self, rows: Tensor | slice) -> Part:
        """Return some of the examples."""
        return Part(self.objective, take(self.batch, rows, self.size), per_example=self.per_example)

    def loss(self, *, finite: bool = True) -> float:
        """Return the mean loss, for 1/3 of a pass."""
        with torch.no_grad():
            return self.mean(self._run(finite).detach())

    def gradient(self, *, finite: bool = True) -> tuple[Tensor, Tensor]:
        """Return the loss of each example, float64 on the CPU, (B,), and the gradient of the mean, (n,), for 1 pass."""
        with torch.enable_grad():
            losses = self._run(finite)
            slopes = self.objective.slopes((self.weights * losses).sum(), create_graph=False)
        self.objective.count(1 - FORWARD, self.size)
        return losses.detach().cpu().double(), self.objective.join(slopes) * (1 / self.weight if self.weight else 0.0)

    def mean(self, losses: Tensor) -> float:
        """Return the weighted mean of the examples' losses; 0 if all weights are."""
        return float(self.weights.cpu().double() @ losses.cpu().double()) / self.weight if self.weight else 0.0

    def _run(self, finite: bool) -> Tensor:
        rng.put_back(self._states)
        losses = self.objective.losses(self.batch, finite=finite, per_example=self.per_example)
        self.objective.count(FORWARD, self.size)
        self.weights = self.objective.weights_of(self.batch, losses)
        self.weight = float(self.weights.cpu().double().sum())
        return losses


def finite(loss: float, **size: float) -> float:
    """Return a loss at ``w + ε``.

    Raises:
        ValueError: if it is not finite; ``size`` names what to make smaller.
    """
    if not math.isfinite(loss):
        ((name, value),) = size.items()
        raise ValueError(f"the loss is {loss} at w + ε, while it is finite at w: make {name}={value!r} smaller")
    return loss


def gathered(objective: Objective, items: list[T]) -> list[T]:
    """Return the items of all ranks, those of rank 0 first."""
    if objective.group is None:
        return items
    agree(objective.group, objective.device)
    lists: list[Any] = [None] * dist.get_world_size(objective.group)
    dist.all_gather_object(lists, items, group=objective.group)
    return [item for each in lists for item in each]


def estimate(values: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """Return the weighted means of some values, and their standard errors.

    ``v̄ = Σ aⱼ vⱼ / Σ aⱼ`` and ``SE² = G/(G−1) Σ aⱼ² (vⱼ − v̄)² / (Σ aⱼ)²``; for equal weights ``SE = s/√G``.

    Args:
        values: shape (G, ...).
        weights: aⱼ ≥ 0, shape (G,); those of weight 0 do not count.

    Returns:
        The means and the errors, shape (...); the errors are NaN if G < 2.

    Raises:
        ValueError: if all weights are 0.
    """
    values, weights = values[weights > 0], weights[weights > 0]
    if not len(values):
        raise ValueError("the weights of all examples are 0")
    shares = (weights / weights.sum()).reshape(-1, *[1] * (values.ndim - 1))
    mean = (shares * values).sum(0)
    scale = len(values) / (len(values) - 1) if len(values) > 1 else math.nan
    return mean, (scale * (shares * (values - mean)).square().sum(0)).sqrt()
