"""Measurements of finished runs: in one go, with one bar, and none of them twice."""

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

from steppe.curvature import Objective
from steppe.lab.files import read_json, write
from steppe.lab.options import Sample
from steppe.lab.progress import Bar
from steppe.lab.run import Run
from steppe.lab.train import cross_entropy
from steppe.lab.trained import load

__all__ = ["Kept", "Progress", "Task", "measure"]

Progress: TypeAlias = Callable[[float], None]
"""Told the share done, in [0, 1]."""


class Task(NamedTuple):
    """One measurement of one run."""

    name: str
    options: Mapping[str, Any]
    """All that the figures depend on beside the run."""
    cost: float
    """In gradients of the data, about."""
    make: Callable[[Objective, Progress], Any]
    """Returns plain JSON-able figures."""

    @property
    def description(self) -> str:
        """What the figures are kept under."""
        return f"{self.name}({', '.join(f'{option}={value}' for option, value in self.options.items())})"


class Kept:
    """The figures of a run, in a JSON file that is written anew with each measurement.

    Args:
        path: the file; it need not exist.

    Raises:
        ValueError: if what is there cannot be read.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._found: dict[str, Any] = {}
        if path.exists():
            self._found = read_json(path)
            if not isinstance(self._found, dict):
                raise ValueError(f"{path} is damaged (no figures by name): delete it, and what it held is made anew")

    def __contains__(self, task: Task) -> bool:
        return task.description in self._found

    def __getitem__(self, task: Task) -> Any:
        return self._found[task.description]

    def keep(self, task: Task, figures: Any) -> None:
        """Keep the figures of a measurement.

        Raises:
            OSError: if the file cannot be written.
        """
        self._found[task.description] = figures
        write(self._path, json.dumps(self._found) + "\n")


def measure(
    runs: Sequence[Run], sample: Sample, tasks: Callable[[Run], Sequence[Task]], file: str
) -> list[dict[str, Any]]:
    """Measure finished runs; what is kept already is not measured again, and needs no checkpoint.

    Args:
        runs: finished runs.
        sample: the images to measure on.
        tasks: the measurements of a run.
        file: name of the file in each run's folder that keeps the figures.

    Returns:
        For each run, the figures of each measurement by its name.

    Raises:
        ValueError: if a checkpoint is missing or does not match, or a measurement is impossible; the run is named.
        OSError: if a file cannot be written.
    """
    plans = [(run, Kept(run.folder / file), tasks(run)) for run in runs]
    with Bar(sum(task.cost for _, kept, planned in plans for task in planned if task not in kept)) as bar:
        for run, kept, planned in plans:
            if lacking := [task for task in planned if task not in kept]:
                _measure(run, sample, kept, lacking, bar)
    return [{task.name: kept[task] for task in planned} for _, kept, planned in plans]


def _measure(run: Run, sample: Sample, kept: Kept, tasks: Sequence[Task], bar: Bar) -> None:
    label = f"{run.config.title} seed {run.config.seed}"
    model, batches = load(run, sample)
    objective = Objective(model, cross_entropy, batches)
    for task in tasks:
        show = bar.piece(f"{label} · {task.name}", task.cost)
        try:
            kept.keep(task, task.make(objective, show))
        except ValueError as error:
            raise ValueError(f"{task.name} of {run.folder}: {error}") from error
    bar.say(f"{label}: measured")
