"""The choice of the values of methods and bases on a validation split of the training images."""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path

from rich.table import Table

import steppe
from steppe.lab import bases
from steppe.lab.config import Config, Setting, titled
from steppe.lab.files import write
from steppe.lab.report import NAMES, machine, markdown, percent, table
from steppe.lab.run import Run
from steppe.lab.stats import Estimate, estimate
from steppe.lab.study import configure, perform

__all__ = ["Candidate", "expand", "expand_base", "tune", "write_choice"]

OUTER_COMMA = r",(?![^(]*\))"
"""Between values, and not between the arguments of one."""
VALIDATION = 0.2
"""Share of the training images that candidates are judged on. Test images take no part."""


@dataclass(frozen=True)
class Candidate:
    """One set of values of a grid and its validation accuracy, a share in [0, 1]; None if a run failed."""

    grid: str
    """Of the method, and of the base where it is not plain sgd."""
    method: str
    base: str
    accuracy: Estimate | None
    best: bool


def expand(grid: str) -> list[str]:
    """All methods that a grid stands for.

    Args:
        grid: a method's expression in which braces list values, as in `"gsam(rho={0.2,0.4},
            alpha={0.1,0.4})"`.

    Raises:
        ValueError: if braces are unbalanced or empty, or an expression does not parse.
    """
    return [repr(steppe.parse(text)) for text in _unfold(grid)]


def expand_base(grid: str) -> list[str]:
    """All bases that a grid stands for.

    Args:
        grid: a base's expression in which braces list values, as in `"adamw(lr={0.001,0.003})"`.

    Raises:
        ValueError: if braces are unbalanced or empty, or an expression does not parse.
    """
    return [bases.write(*bases.read(text)) for text in _unfold(grid)]


def _unfold(grid: str) -> list[str]:
    pieces = re.split(r"\{([^{}]*)\}", grid)
    if any(brace in piece for piece in pieces[::2] for brace in "{}"):
        raise ValueError(f"{grid}: braces do not match; write a list of values as rho={{0.1,0.2}}")
    choices = [re.split(OUTER_COMMA, piece) if number % 2 else [piece] for number, piece in enumerate(pieces)]
    if any(not value.strip() for values in choices[1::2] for value in values):
        raise ValueError(f"{grid}: a value between braces is missing; write a list of values as rho={{0.1,0.2}}")
    return ["".join(words) for words in product(*choices)]


def tune(
    setting: Setting,
    grids: Sequence[str],
    seeds: int,
    out: Path,
    jobs: int = 1,
    base: Sequence[str] = ("sgd",),
) -> list[Candidate]:
    """Train all candidates of all grids on 80 % of the training images and judge them on the rest.

    Labels of the held-out images are as noisy as the training labels: a choice by clean labels would use what
    nobody has. All candidates see the same split of a seed.

    Args:
        setting: what all runs share.
        grids: of methods, see `expand`.
        seeds: number of seeds, 0 to seeds - 1.
        out: folder of the study.
        jobs: number of processes, each of which takes a run at a time.
        base: grids of bases, see `expand_base`; each goes with every grid of methods.

    Returns:
        Candidates in the order of the bases' grids, and of the methods' on each; of each such pair the best is marked.

    Raises:
        ValueError: if a grid does not expand, or a value is out of its range.
        OSError: if a file cannot be written.
    """
    if seeds < 1:
        raise ValueError(f"seeds must be at least 1, got {seeds}")
    if not grids or not base:
        raise ValueError("no grid to try: name at least one, such as 'sam(rho={0.1,0.2})', and one base")
    expanded: dict[str, dict[Config, tuple[str, str]]] = {
        titled(grid, bases_grid): {
            configure(setting, method, 0, VALIDATION, each): (method, each)
            for each in expand_base(bases_grid)
            for method in expand(grid)
        }
        for bases_grid in base
        for grid in grids
    }
    configs = dict.fromkeys(config for found in expanded.values() for config in found)
    groups = ([replace(config, seed=seed)] for seed in range(seeds) for config in configs)
    runs = perform(groups, out, jobs)
    return [candidate for grid, names in expanded.items() for candidate in _judge(grid, names, runs)]


def _judge(grid: str, names: Mapping[Config, tuple[str, str]], runs: Sequence[Run]) -> list[Candidate]:
    found: dict[Config, Estimate | None] = {}
    for config in names:
        accuracies = [run.accuracy for run in runs if replace(run.config, seed=0) == config]
        known = [accuracy for accuracy in accuracies if accuracy is not None]
        found[config] = estimate(known) if len(known) == len(accuracies) else None
    means = {config: accuracy.mean for config, accuracy in found.items() if accuracy is not None}
    best = max(means, key=lambda config: means[config], default=None)
    return [Candidate(grid, *names[config], accuracy, config == best) for config, accuracy in found.items()]


def write_choice(candidates: Sequence[Candidate], out: Path, command: str) -> Table:
    """Write tuned.json (grid to best expressions) and tuned.md into `out`, and return the terminal's table.

    Args:
        candidates: from `tune`.
        out: folder of the study.
        command: the command line that made them.

    Raises:
        OSError: if a file cannot be written.
    """
    header = ["method", "base", "validation accuracy (%)", "seeds", "best"]
    body = [
        [
            candidate.method,
            candidate.base,
            percent(candidate.accuracy) if candidate.accuracy else "failed",
            str(candidate.accuracy.n if candidate.accuracy else 0),
            "best" if candidate.best else "",
        ]
        for candidate in candidates
    ]
    best = {candidate.grid: titled(candidate.method, candidate.base) for candidate in candidates if candidate.best}
    write(out / "tuned.json", json.dumps(best, indent=2) + "\n")
    write(out / "tuned.md", f"# Choice of values\n\n{markdown(header, body, NAMES)}\n    {command}\n\n{machine()}.\n")
    return table(header, body, NAMES)
