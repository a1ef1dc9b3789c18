"""The loss along the straight line between two checkpoints."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from .. import caches
from .landscape import Landscape
from .objective import Objective
from .walk import Accuracy, Progress, walk


def line(
    objective: Objective,
    other: Mapping[str, Tensor],
    *,
    points: int = 31,
    start: float = -0.25,
    stop: float = 1.25,
    accuracy_fn: Accuracy | None = None,
    progress: Progress = lambda share: None,
) -> Landscape:
    """Return the loss at ``(1 − t)·w₀ + t·w₁``: w₀ the model's ``state_dict()``, w₁ another of the same architecture.

    The whole ``state_dict`` is interpolated, frozen parameters and floating-point buffers included; buffers of integers
    are those of the nearer end. So at t = 0 and t = 1 stand the checkpoints exactly. Running variances may be negative
    where t is outside of [0, 1], and the loss is then NaN. The model is left as it was found.

    Args:
        objective: the loss; which parameters it has does not matter.
        other: w₁.
        points: evenly spaced values of t; 0 and 1 are added if they lie between ``start`` and ``stop`` and are not
            among them. Default 31.
        start: the first t. Default −0.25.
        stop: the last t. Default 1.25.
        accuracy_fn: as for `landscape`.
        progress: told the share done, in [0, 1].

    Returns:
        A landscape of one dimension, with t for coordinates.

    Raises:
        ValueError: if the checkpoint does not match the model; the first culprit is named. Or if an argument is out of
            range.

    Cost:
        1/3 for each point.

    Source:
        Goodfellow et al. 2015, "Qualitatively characterizing neural network optimization problems".
    """
    if points < 2 or not start < stop:
        raise ValueError(f"points={points!r} must be at least 2, and start={start!r} less than stop={stop!r}")
    before = objective.passes
    found = [round(t, 12) for t in torch.linspace(start, stop, points, dtype=torch.float64).tolist()]
    places = sorted({*found, *(t for t in (0.0, 1.0) if start <= t <= stop)})
    pairs = _pairs(objective.model, other)
    with objective.still(), _between(pairs) as go:
        losses, accuracies = walk(objective, lambda i: go(places[i]), len(places), accuracy_fn, progress)
    return Landscape(
        torch.tensor(places, dtype=torch.float64),
        losses[None],
        None if accuracies is None else accuracies[None],
        ("t: 0 is the model, 1 the other checkpoint",),
        True,
        objective.passes - before,
    )


def _pairs(model: nn.Module, other: Mapping[str, Tensor]) -> list[tuple[Tensor, Tensor]]:
    """Return the tensors of the model, each with the other's."""
    mine = {name: t for name, t in model.state_dict(keep_vars=True).items() if isinstance(t, Tensor)}
    theirs = {name: t for name, t in other.items() if isinstance(t, Tensor)}
    kind = type(model).__name__
    for name, t in mine.items():
        if name not in theirs:
            raise ValueError(f"the checkpoint has no {name}: it is not one of this {kind}")
        if theirs[name].shape != t.shape:
            shapes = f"{tuple(theirs[name].shape)} in the checkpoint and {tuple(t.shape)} in the {kind}"
            raise ValueError(f"{name} has shape {shapes}: give two checkpoints of one architecture")
    for name in theirs:
        if name not in mine:
            raise ValueError(f"the checkpoint has {name}, and the {kind} has not: it is not one of this model")
    return [(t.detach(), theirs[name].detach().to(t.device, t.dtype, copy=True)) for name, t in mine.items()]


@contextmanager
def _between(pairs: list[tuple[Tensor, Tensor]]) -> Iterator[Callable[[float], None]]:
    """Give ``go(t)``; at the end the first tensors of the pairs are back to the bit."""
    starts = [t.clone() for t, _ in pairs]

    def go(t: float) -> None:
        with caches.forgotten():
            for (here, end), begin in zip(pairs, starts, strict=True):
                mixed = t not in (0, 1) and (begin.is_floating_point() or begin.is_complex())
                here.copy_(torch.lerp(begin, end, t) if mixed else end if t >= 0.5 else begin)

    try:
        yield go
    finally:
        go(0.0)
