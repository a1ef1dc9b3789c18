"""The choice of each method's values on a validation split of the training images."""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path

from rich.table import Table

import steppe
from steppe.lab.config import Setting
from steppe.lab.files import write
from steppe.lab.report import machine, markdown, percent, table
from steppe.lab.run import Run
from steppe.lab.stats import Estimate, estimate
from steppe.lab.study import configure, perform

__all__ = ["Candidate", "expand", "tune", "write_choice"]

VALIDATION = 0.2
"""Share of the training images that candidates are judged on. Test images take no part."""


@dataclass(frozen=True)
class Candidate:
    """One set of values of a grid and its validation accuracy, a share in [0, 1]; None if a run failed."""

    grid: str
    method: str
    accuracy: Estimate | None
    best: bool


def expand(grid: str) -> list[str]:
    """All expressions that a grid stands for.

    Args:
        grid: a method's expression in which braces list values, as in `"gsam(rho={0.2,0.4},
            alpha={0.1,0.4})"`.

    Raises:
        ValueError: if braces are unbalanced or empty, or an expression does not parse.
    """
    pieces = re.split(r"\{([^{}]*)\}", grid)
    if any(brace in piece for piece in pieces[::2] for brace in "{}"):
        raise ValueError(f"{grid}: braces do not match; write a list of values as rho={{0.1,0.2}}")
    choices = [piece.split(",") if number % 2 else [piece] for number, piece in enumerate(pieces)]
    if any(not value.strip() for values in choices[1::2] for value in values):
        raise ValueError(f"{grid}: a value between braces is missing; write a list of values as rho={{0.1,0.2}}")
    return [repr(steppe.parse("".join(words))) for words in product(*choices)]


def tune(setting: Setting, grids: Sequence[str], seeds: int, out: Path, jobs: int = 1) -> list[Candidate]:
    """Train all candidates of all grids on 80 % of the training images and judge them on the rest.

    Labels of the held-out images are as noisy as the training labels: a choice by clean labels would use what
    nobody has. All candidates see the same split of a seed.

    Args:
        setting: what all runs share.
        grids: see `expand`.
        seeds: number of seeds, 0 to seeds - 1.
        out: folder of the study.
        jobs: number of processes, each of which takes a run at a time.

    Returns:
        Candidates in the order of the grids, the best of each grid marked.

    Raises:
        ValueError: if a grid does not expand, or a value is out of its range.
        OSError: if a file cannot be written.
    """
    if seeds < 1:
        raise ValueError(f"seeds must be at least 1, got {seeds}")
    expanded = {grid: expand(grid) for grid in grids}
    methods = dict.fromkeys(method for methods in expanded.values() for method in methods)
    groups = ([configure(setting, method, seed, VALIDATION)] for seed in range(seeds) for method in methods)
    runs = perform(groups, out, jobs)
    return [candidate for grid, names in expanded.items() for candidate in _judge(grid, names, runs)]


def _judge(grid: str, methods: Sequence[str], runs: Sequence[Run]) -> list[Candidate]:
    found: dict[str, Estimate | None] = {}
    for method in methods:
        accuracies = [run.accuracy for run in runs if run.config.method == method]
        known = [accuracy for accuracy in accuracies if accuracy is not None]
        found[method] = estimate(known) if len(known) == len(accuracies) else None
    means = {method: accuracy.mean for method, accuracy in found.items() if accuracy is not None}
    best = max(means, key=lambda method: means[method], default=None)
    return [Candidate(grid, method, accuracy, method == best) for method, accuracy in found.items()]


def write_choice(candidates: Sequence[Candidate], out: Path, command: str) -> Table:
    """Write tuned.json (grid to best expression) and tuned.md into `out`, and return the terminal's table.

    Args:
        candidates: from `tune`.
        out: folder of the study.
        command: the command line that made them.

    Raises:
        OSError: if a file cannot be written.
    """
    header = ["method", "validation accuracy (%)", "seeds", "best"]
    body = [
        [
            candidate.method,
            percent(candidate.accuracy) if candidate.accuracy else "failed",
            str(candidate.accuracy.n if candidate.accuracy else 0),
            "best" if candidate.best else "",
        ]
        for candidate in candidates
    ]
    best = {candidate.grid: candidate.method for candidate in candidates if candidate.best}
    write(out / "tuned.json", json.dumps(best, indent=2) + "\n")
    write(out / "tuned.md", f"# Choice of values\n\n{markdown(header, body)}\n    {command}\n\n{machine()}.\n")
    return table(header, body)
