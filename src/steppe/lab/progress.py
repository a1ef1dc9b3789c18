"""How far long work is: a bar on a terminal, else a line for each run that finishes, and one a minute."""

import sys
import time
from collections.abc import Callable, Sequence
from datetime import timedelta

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Column

from steppe.lab.bases import cost
from steppe.lab.run import Run

__all__ = ["Bar", "Display"]

MINUTE = 60.0
"""Seconds between two lines that say how far it is."""
LONGEST = 1e9
"""Seconds back that the speed is taken over: the whole, since an epoch of a large network may take an hour."""


class Display:
    """The progress of runs, on stderr, for the length of a `with` block.

    Args:
        runs: as they are at the start; what is finished already is not announced.
    """

    def __init__(self, runs: Sequence[Run]) -> None:
        console = Console(stderr=True)
        self._quiet = not console.is_interactive
        self._finished = {run.config for run in runs if run.result is not None}
        self._costs = {run.config: cost(run.config) for run in runs}
        self._work = self._left(runs)
        self._progress = _progress(console)
        self._task = self._progress.add_task("", total=max(self._work, 1.0))
        self._start = self._said = time.monotonic()

    def __enter__(self) -> "Display":
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def show(self, runs: Sequence[Run], moved: Run) -> None:
        """Show where the runs are, and the one that moved last."""
        accuracies = [f" · {each['test_accuracy']:.1%}" for each in moved.records if "test_accuracy" in each]
        self._progress.update(
            self._task,
            description=f"{moved.config.title} · seed {moved.config.seed}{''.join(accuracies[-1:])}",
            completed=self._work - self._left(runs),
        )
        for run in runs:
            if run.result is not None and run.config not in self._finished:
                self._finished.add(run.config)
                if self._quiet:
                    line = run.failure or f"{run.config.title} seed {run.config.seed}: {run.accuracy:.1%}"
                    print(line, file=sys.stderr, flush=True)
        if self._quiet:
            self._say(1 - self._left(runs) / max(self._work, 1.0))

    def _say(self, done: float) -> None:
        """Write how far all of it is, once a minute."""
        now = time.monotonic()
        if now - self._said >= MINUTE and 0 < done < 1:
            self._said = now
            left = timedelta(seconds=round((now - self._start) * (1 - done) / done))
            print(f"{done:.0%} done, {left} left", file=sys.stderr, flush=True)

    def _left(self, runs: Sequence[Run]) -> float:
        """Epochs that are left, each weighed by the propagations of a step."""
        return sum(
            self._costs[run.config] * (run.config.epochs - len(run.records)) for run in runs if run.result is None
        )


class Bar:
    """The progress of work in pieces of known size, on stderr, for the length of a `with` block.

    Args:
        total: size of the work, in any unit.
    """

    def __init__(self, total: float) -> None:
        console = Console(stderr=True)
        self._quiet = not console.is_interactive
        self._progress = _progress(console)
        self._task = self._progress.add_task("", total=max(total, 1.0))
        self._begun = 0.0

    def __enter__(self) -> "Bar":
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def piece(self, label: str, size: float) -> Callable[[float], None]:
        """Begin a piece of the work, and return a function that is told the share of it that is done."""
        start = self._begun
        self._begun += size

        def show(share: float) -> None:
            self._progress.update(self._task, description=label, completed=start + share * size)

        show(0.0)
        return show

    def say(self, line: str) -> None:
        """Write a line where there is no bar."""
        if self._quiet:
            print(line, file=sys.stderr, flush=True)


def _progress(console: Console) -> Progress:
    return Progress(
        TextColumn("{task.percentage:3.0f} %"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        BarColumn(20),
        TextColumn("{task.description}", markup=False, table_column=Column(no_wrap=True, overflow="ellipsis")),
        console=console,
        transient=True,
        disable=not console.is_interactive,
        speed_estimate_period=LONGEST,
    )
