"""The loss around the minima of finished runs: what `steppe landscape` measures."""

import math
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from steppe import curvature
from steppe.lab.measure import Progress, Task, measure
from steppe.lab.options import Landscapes
from steppe.lab.run import Run
from steppe.lab.trained import grouped, load

__all__ = ["measure_landscapes", "plain"]

FILE = "landscape.json"


def measure_landscapes(
    runs: Sequence[Run], what: Landscapes
) -> tuple[dict[str, curvature.Landscape], dict[str, curvature.Landscape]]:
    """Measure loss and accuracy; they are kept in each run's folder, in landscape.json, and not measured again.

    Args:
        runs: finished runs.
        what: options of the landscapes.

    Returns:
        Curves, those of a method's seeds together, and maps, one a run; each by its label.

    Raises:
        ValueError: see `steppe.lab.measure.measure`; and if a line has not two ends of one network.
        OSError: if a file cannot be written.
    """
    groups = grouped(runs)
    names = {i: f"{label} seed {runs[i].config.seed}" for label, places in groups.items() for i in places}
    if what.directions == "line":
        lines = _lines(runs, what)
        return {f"{names[0]} to {names[i]}": _together([line]) for i, line in enumerate(lines, 1)}, {}
    found = measure(runs, what, lambda run: list(_tasks(what)), FILE)
    curves = {
        label: _together([found[i]["curve"] for i in places]) for label, places in groups.items() if 1 in what.dims
    }
    return curves, {names[i]: _together([found[i]["map"]]) for i in sorted(names) if 2 in what.dims}


def plain(found: curvature.Landscape) -> dict[str, Any]:
    """A landscape as values that JSON can hold."""
    tensors = {"coordinates": found.coordinates, "losses": found.losses, "accuracies": found.accuracies}
    values = {name: tensor.tolist() for name, tensor in tensors.items() if tensor is not None}
    return {**values, "names": found.names, "converged": found.converged}


def _tasks(what: Landscapes) -> Iterator[Task]:
    for dims, name in ((1, "curve"), (2, "map")):
        if dims in what.dims:
            draws = what.draws if dims == 1 and what.directions != "eigenvectors" else 1
            options = {**_options(what), "directions": what.directions, "radius": what.radius, "draws": draws}
            yield Task(name, options, draws * what.points**dims / 3, partial(_landscape, what, dims, draws))


def _landscape(
    what: Landscapes, dims: int, draws: int, objective: curvature.Objective, progress: Progress
) -> dict[str, Any]:
    assert what.directions != "line"
    return plain(
        curvature.landscape(
            objective,
            dims=dims,
            directions=what.directions,
            points=what.points,
            radius=what.radius,
            draws=draws,
            accuracy_fn=_right,
            seed=what.seed,
            progress=progress,
        )
    )


def _lines(runs: Sequence[Run], what: Landscapes) -> list[dict[str, Any]]:
    if len(runs) < 2:
        raise ValueError("a line has two ends: give at least two runs")
    first, *others = runs
    for other in others:
        one, two = (f"{run.config.model} of width {run.config.width or 'as published'}" for run in (first, other))
        if one != two:
            raise ValueError(
                f"no line leads from {first.folder}, {one}, to {other.folder}, {two}: give runs of one network"
            )
    tasks = [
        Task(f"line to {other.config.name}", _options(what), what.points / 3, partial(_line, what, other))
        for other in others
    ]
    (found,) = measure([first], what, lambda run: tasks, FILE)
    return [found[task.name] for task in tasks]


def _line(what: Landscapes, other: Run, objective: curvature.Objective, progress: Progress) -> dict[str, Any]:
    end = load(other, what)[0].state_dict()
    return plain(curvature.line(objective, end, points=what.points, accuracy_fn=_right, progress=progress))


def _options(what: Landscapes) -> dict[str, Any]:
    return {name: getattr(what, name) for name in ("examples", "split", "seed", "points")}


def _right(logits: Tensor, batch: tuple[Tensor, Tensor]) -> Tensor:
    return (logits.argmax(1) == batch[1]).float()


def _together(found: Sequence[Mapping[str, Any]]) -> curvature.Landscape:
    """The landscape of one or more runs, in which each draw of each run counts alike."""
    first = found[0]
    losses, accuracies = (
        torch.tensor([draw for each in found for draw in each[name]], dtype=torch.float64)
        for name in ("losses", "accuracies")
    )
    return curvature.Landscape(
        torch.tensor(first["coordinates"], dtype=torch.float64),
        losses,
        accuracies,
        tuple(first["names"]),
        all(each["converged"] for each in found),
        math.nan,
    )
