"""The loss and the accuracy around the weights, along one or two directions."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Literal, TypeAlias

import torch
from torch import Tensor

from .directions import Directions, adversarial, eigenvectors, filter_normalized, given
from .objective import Objective
from .walk import Accuracy, Progress, walk

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Along: TypeAlias = Literal["filter", "adversarial", "eigenvectors"] | Tensor | Sequence[Tensor]
Value: TypeAlias = Literal["loss", "accuracy"]


@dataclass(frozen=True)
class Landscape:
    """Losses on a grid in one or two dimensions; float64, on the CPU. Far out they may be infinite or NaN."""

    coordinates: Tensor
    """Where the points lie along each axis, shape (points,); 0 is the model."""
    losses: Tensor
    """Mean loss of each draw of directions, (draws, points) or (draws, points, points): ``[d, i, j]`` is the loss at
    ``w + coordinates[i]·u + coordinates[j]·v``."""
    accuracies: Tensor | None
    """Likewise, in [0, 1]."""
    names: tuple[str, ...]
    """What the axes are."""
    converged: bool
    """Whether the directions are what they are called: Hessian eigenvectors might not have been found."""
    passes: float
    """Cost in gradient passes over the data."""

    @property
    def dims(self) -> int:
        """One or two."""
        return self.losses.ndim - 1

    @property
    def loss(self) -> Tensor:
        """Mean over the draws."""
        return self.losses.mean(0)

    @property
    def spread(self) -> Tensor:
        """Standard deviation of the loss over the draws; NaN for one draw."""
        draws = self.losses
        return draws.std(0) if len(draws) > 1 else torch.full_like(draws[0], float("nan"))

    @property
    def accuracy(self) -> Tensor | None:
        """Mean over the draws."""
        return None if self.accuracies is None else self.accuracies.mean(0)

    def plot(self, axes: Axes | None = None, *, label: str | None = None, value: Value = "loss") -> Axes:
        """Draw a curve with its spread over the draws, or contours; see `plot_landscapes` for several models.

        The scale is logarithmic where the values span more than a factor of 20. What is not finite is a gap.

        Args:
            axes: where to draw; a new figure by default. Call it again on the same axes to add another model.
            label: the model's name, for the legend. With one, contours are lines of one colour and not filled.
            value: ``"loss"`` or ``"accuracy"``.

        Raises:
            ValueError: if the accuracy was not measured, or nothing is finite.
            ImportError: without matplotlib.
        """
        from .pictures import draw

        return draw(self, axes, label=label, value=value)


def landscape(
    objective: Objective,
    *,
    dims: int = 2,
    directions: Along = "filter",
    points: int = 41,
    radius: float = 1.0,
    draws: int = 1,
    accuracy_fn: Accuracy | None = None,
    seed: int = 0,
    progress: Progress = lambda share: None,
) -> Landscape:
    """Return the loss, and the accuracy if asked for, on a grid around the weights.

    ``L(w + a u)`` or ``L(w + a u + b v)``, a and b from −radius to radius. Weights, buffers, mode and gradients are as
    they were found when it ends, on an exception too.

    Args:
        objective: the loss and the parameters that move. Running statistics of batch norms stay what they are; with
            ``mode="train"`` the batches' own are used.
        dims: 1 or 2.
        directions: ``"filter"``: `filter_normalized` Gaussian draws; ``"adversarial"``: see `adversarial`;
            ``"eigenvectors"``: of the Hessian's largest eigenvalues; or ``dims`` flat vectors, which are taken as they
            are. Draws depend on the seed and the shapes of the parameters: models of one architecture get the same.
        points: along each axis, at least 2; with an odd number the model itself is one of them. Default 41.
        radius: the largest a and b, in units of the directions: filter-normalised ones are as long as the weights,
            adversarial ones and eigenvectors have norm 1. Default 1.
        draws: of random directions, to be averaged. Default 1.
        accuracy_fn: ``accuracy_fn(output, batch)`` returns 1 for each example that is right and 0 for the others,
            shape (B,); ``output`` is what the model returned to ``loss_fn``.
        seed: of the draws.
        progress: told the share done, in [0, 1].

    Raises:
        ValueError: if an argument is out of range, or there is no such direction.

    Cost:
        ``draws · points^dims / 3`` and what the directions cost. The data are read once for each draw.

    Source:
        Li et al. 2018, "Visualizing the loss landscape of neural nets".
    """
    if dims not in (1, 2):
        raise ValueError(f"dims={dims!r} must be 1 or 2")
    if points < 2 or draws < 1:
        raise ValueError(f"points={points!r} must be at least 2, and draws={draws!r} at least 1")
    if not 0 < radius < float("inf"):
        raise ValueError(f"radius={radius!r} must be positive and finite")
    if draws > 1 and not (isinstance(directions, str) and directions in ("filter", "adversarial")):
        raise ValueError(f"draws={draws!r}: only filter-normalised and adversarial directions are drawn at random")
    before = objective.passes
    coordinates = radius * torch.arange(1 - points, points, 2, dtype=torch.float64) / (points - 1)
    places = torch.cartesian_prod(*[coordinates] * dims).reshape(-1, dims).tolist()
    losses, accuracies = [], []
    for draw, along in enumerate(_draws(objective, directions, dims, draws, seed)):
        part = partial(_part, progress, draw, draws)
        loss, accuracy = _along(objective, along.vectors, places, accuracy_fn, part)
        losses.append(loss.view(dims * (points,)))
        accuracies += [] if accuracy is None else [accuracy.view(dims * (points,))]
    return Landscape(
        coordinates,
        torch.stack(losses),
        torch.stack(accuracies) if accuracies else None,
        along.names,
        along.converged,
        objective.passes - before,
    )


def _along(
    objective: Objective, vectors: Tensor, places: list[list[float]], accuracy_fn: Accuracy | None, progress: Progress
) -> tuple[Tensor, Tensor | None]:
    with objective.moved() as move:
        return walk(
            objective,
            lambda i: move(*zip(places[i], vectors, strict=True)),
            len(places),
            accuracy_fn,
            progress,
        )


def _part(progress: Progress, draw: int, draws: int, share: float) -> None:
    progress((draw + share) / draws)


def _draws(objective: Objective, directions: Along, dims: int, draws: int, seed: int) -> Iterator[Directions]:
    """Give the directions of each draw."""
    if not isinstance(directions, str):
        yield given(objective, directions, dims)
        return
    if directions == "eigenvectors":
        yield eigenvectors(objective, dims, seed=seed)
        return
    if directions not in ("filter", "adversarial"):
        raise ValueError(f'directions={directions!r} is none of "filter", "adversarial", "eigenvectors", nor vectors')
    numbers = ("", "") if dims == 1 else (" 1", " 2")
    for draw in range(draws):
        generator = objective.generator(seed, f"landscape {directions} {draw}")
        if directions == "filter":
            vectors = torch.stack([filter_normalized(objective, generator) for _ in range(dims)])
            yield Directions(vectors, tuple(f"filter-normalised direction{number}" for number in numbers[:dims]))
        else:
            vectors = adversarial(objective, generator)[:dims]
            yield Directions(vectors, tuple(f"adversarial direction{number}" for number in numbers[:dims]))
