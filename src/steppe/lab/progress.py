"""How far many runs are: a bar on a terminal, else a line for each that finishes."""

import sys
from collections.abc import Sequence

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

import steppe
from steppe.lab.run import Run

__all__ = ["Display"]


class Display:
    """The progress of runs, on stderr, for the length of a `with` block.

    Args:
        runs: as they are at the start; what is finished already is not announced.
    """

    def __init__(self, runs: Sequence[Run]) -> None:
        console = Console(stderr=True)
        self._quiet = not console.is_terminal
        self._finished = {run.config for run in runs if run.result is not None}
        self._costs = {method: steppe.parse(method).cost() for method in {run.config.method for run in runs}}
        self._work = self._left(runs)
        self._accuracy = ""
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.percentage:3.0f} %"),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=console,
            transient=True,
            disable=self._quiet,
            speed_estimate_period=300,
        )
        self._task = self._progress.add_task("", total=max(self._work, 1.0))

    def __enter__(self) -> "Display":
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def show(self, runs: Sequence[Run], moved: Run) -> None:
        """Show where the runs are, and the one that moved last."""
        last = moved.records[-1] if moved.records else {}
        if "test_accuracy" in last:
            self._accuracy = f" · {last['test_accuracy']:.1%}"
        self._progress.update(
            self._task,
            description=f"{moved.config.method} · seed {moved.config.seed}{self._accuracy}",
            completed=self._work - self._left(runs),
        )
        for run in runs:
            if run.result is not None and run.config not in self._finished:
                self._finished.add(run.config)
                if self._quiet:
                    line = run.failure or f"{run.config.method} seed {run.config.seed}: {run.accuracy:.1%}"
                    print(line, file=sys.stderr, flush=True)

    def _left(self, runs: Sequence[Run]) -> float:
        """Epochs that are left, each weighed by the propagations of a step."""
        return sum(
            self._costs[run.config.method] * (run.config.epochs - len(run.records))
            for run in runs
            if run.result is None
        )
