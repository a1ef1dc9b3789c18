"""How far long work is: a bar on a terminal, else a line for each run that finishes."""

import sys
from collections.abc import Callable, Sequence

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from steppe.lab.bases import cost
from steppe.lab.run import Run

__all__ = ["Bar", "Display"]


class Display:
    """The progress of runs, on stderr, for the length of a `with` block.

    Args:
        runs: as they are at the start; what is finished already is not announced.
    """

    def __init__(self, runs: Sequence[Run]) -> None:
        console = Console(stderr=True)
        self._quiet = not console.is_terminal
        self._finished = {run.config for run in runs if run.result is not None}
        self._costs = {run.config: cost(run.config) for run in runs}
        self._work = self._left(runs)
        self._accuracy = ""
        self._progress = _progress(console)
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
            description=f"{moved.config.title} · seed {moved.config.seed}{self._accuracy}",
            completed=self._work - self._left(runs),
        )
        for run in runs:
            if run.result is not None and run.config not in self._finished:
                self._finished.add(run.config)
                if self._quiet:
                    line = run.failure or f"{run.config.title} seed {run.config.seed}: {run.accuracy:.1%}"
                    print(line, file=sys.stderr, flush=True)

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
        self._quiet = not console.is_terminal
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
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.percentage:3.0f} %"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        console=console,
        transient=True,
        disable=not console.is_terminal,
        speed_estimate_period=300,
    )
