"""What measurements of flatness found: tables, pictures, and the figures behind them."""

import datetime
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.console import Group

from steppe import curvature
from steppe.lab.files import write
from steppe.lab.options import Sharpness
from steppe.lab.plots import filters, spectra
from steppe.lab.report import MISSING, Columns, machine, markdown, percent, table
from steppe.lab.run import Run
from steppe.lab.sharpness import measure_sharpness
from steppe.lab.stats import estimate
from steppe.lab.trained import grouped

__all__ = ["Figure", "columns", "text", "write_sharpness"]

BRIEF = ("λmax", "λmax/λ5", "surrogate gap", "m-sharpness")
"""What a comparison shows beside accuracy and cost, and what has to be measured for it."""
MEASUREMENTS = ("surrogate gap", "m-sharpness", "eigenvalues")


class Figure(NamedTuple):
    """A measured number."""

    value: float
    error: float = math.nan
    """Half the width of where it lies, if that is known."""
    converged: bool = True


def columns(runs: Sequence[Run]) -> Columns:
    """Measure the runs of a comparison, and return what its table shows of that.

    Args:
        runs: finished runs of one setting; those that failed are left out.

    Raises:
        ValueError: if a run cannot be measured.
        OSError: if a file cannot be written.
    """
    good = [run for run in runs if not run.failure]
    if not good:
        return Columns(BRIEF, {}, "")
    what = Sharpness(m=min(Sharpness.m, good[0].config.train_size or Sharpness.m))
    every = [_figures(found) for found in measure_sharpness(good, what, MEASUREMENTS)]
    cells = {
        method: [text([every[i][title] for i in places]) for title in BRIEF] for method, places in grouped(good).items()
    }
    return Columns(BRIEF, cells, _legend(good, what, BRIEF))


def _figures(found: Mapping[str, Any]) -> dict[str, Figure | None]:
    """What a table says of one run, by the titles of its columns."""
    eigenvalues, gap = found["eigenvalues"], found["surrogate gap"]
    last = min(5, len(eigenvalues["values"]))
    return {
        "λmax": _eigenvalue(eigenvalues),
        **(
            {f"λ{last}": _eigenvalue(eigenvalues, last), f"λmax/λ{last}": _ratio(eigenvalues, last)} if last > 1 else {}
        ),
        "surrogate gap": Figure(gap["gap"]),
        "2h/ρ²": Figure(gap["sharpness"]),
        "2(h − slope)/ρ²": Figure(gap["curvature"]),
        **{name: Figure(**found[name]) for name in ("m-sharpness", "average rise", "trace") if name in found},
    }


def _eigenvalue(found: Mapping[str, Any], number: int = 1) -> Figure:
    return Figure(*(found[name][number - 1] for name in ("values", "bounds", "converged")))


def _ratio(found: Mapping[str, Any], number: int) -> Figure | None:
    first, other = _eigenvalue(found), _eigenvalue(found, number)
    if other.value <= 0:
        return None
    ratio = first.value / other.value
    error = ratio * (first.error / first.value + other.error / other.value)
    return Figure(ratio, error, first.converged and other.converged)


def text(figures: Sequence[Figure | None]) -> str:
    """A cell: one figure with its error, or the mean of several with half its 95 % interval.

    Figures that did not converge are said not to have, and those that do not exist are left out.
    """
    known = [figure for figure in figures if figure is not None]
    if not known:
        return MISSING
    mean, half, n = estimate([figure.value for figure in known])
    error, digits = (known[0].error, 1) if half is None else (half, 2)
    words = _number(mean, 4) + ("" if math.isnan(error) else f" ± {_number(error, digits)}")
    if len(known) < len(figures):
        words += f" ({n} of {len(figures)})"
    if lacking := sum(not figure.converged for figure in known):
        words += " (not converged)" if n == 1 else f" ({lacking} of {n} not converged)"
    return words


def _number(x: float, digits: int) -> str:
    """A number with so many digits, without an exponent where it can be read without."""
    if x == 0 or not math.isfinite(x):
        return f"{x:g}"
    size = math.floor(math.log10(abs(x)))
    return f"{x:.{max(0, digits - 1 - size)}f}" if -5 <= size < 6 else f"{x:.{digits - 1}e}"


LEGEND = """
Flatness is measured on at most {examples} {images}, without augmentation, in eval mode.
With one seed, ± is the error of the measurement: the bound of an eigenvalue's residual, else a standard error.
With several it is half a 95 % t-interval over seeds.
"""
EXPLAINED = {
    "λmax": "λmax is the Hessian's largest eigenvalue. One whose bound is above {tol:g} of itself has not converged.",
    "surrogate gap": "The surrogate gap is h = L(w + ε) − L(w) with SAM's ε = ρ∇L/‖∇L‖, ρ = {rho:g}.",
    "2h/ρ²": "At a minimum, 2h/ρ² is about λmax; elsewhere h is mostly slope εᵀ∇L, without which is the next column.",
    "m-sharpness": "m-sharpness is the mean rise of the loss of m = {m} images, each such group at an ε of its own.",
    "average rise": "The average rise of the loss is under Gaussian noise of {noise:g} times each filter's norm.",
}


def _legend(runs: Sequence[Run], what: Sharpness, titles: Sequence[str]) -> str:
    """What the columns are."""
    noisy = any(run.config.label_noise for run in runs)
    images = {"train": "training images" + ", with the noisy labels of training" * noisy, "test": "test images"}
    lines = [LEGEND, *(f"{words}\n" for title, words in EXPLAINED.items() if title in titles), "\n"]
    return "".join(lines).format(**{**asdict(what), "images": images[what.split]})


def write_sharpness(
    runs: Sequence[Run],
    measured: Sequence[Mapping[str, Any]],
    left_out: Sequence[str],
    what: Sharpness,
    out: Path,
    command: str,
) -> Group:
    """Write sharpness.md, sharpness.json, spectra.png and filters.png into `out`, and return the terminal's tables.

    Args:
        runs: finished runs.
        measured: the figures of each, from `measure_sharpness`.
        left_out: runs that were not measured, with the reason.
        what: the options of the measurements.
        out: folder of the report.
        command: the command line that made it.

    Raises:
        OSError: if a file cannot be written.
    """
    groups = grouped(runs)
    tables = [_overview(groups, runs, measured), *_by_component(groups, runs, measured)]
    records = [
        {"run": str(run.folder), **asdict(run.config), "accuracy": run.accuracy, "measured": found}
        for run, found in zip(runs, measured, strict=True)
    ]
    write(out / "sharpness.json", json.dumps({"options": asdict(what), "runs": records}) + "\n")
    write(out / "spectra.png", spectra({label: _spectrum([measured[i] for i in groups[label]]) for label in groups}))
    write(out / "filters.png", filters({label: _norms([measured[i] for i in groups[label]]) for label in groups}))
    (header, body), *others = tables
    write(
        out / "sharpness.md",
        f"# Sharpness\n\n{markdown(header, body)}{_legend(runs, what, header)}"
        + "".join(f"- left out: {line}\n" for line in left_out)
        + "".join(f"\n## λmax by component\n\n{markdown(*other)}\n" for other in others)
        + "![Spectral densities](spectra.png)\n\n![Filter norms](filters.png)\n\n"
        + f"    {command}\n\n{datetime.date.today().isoformat()}, {machine()}.\n",
    )
    return Group(*(table(*each) for each in tables))


Cells = tuple[list[str], list[list[str]]]


def _overview(groups: Mapping[str, Sequence[int]], runs: Sequence[Run], measured: Sequence[Mapping[str, Any]]) -> Cells:
    titles = list(_figures(measured[0]))
    body = []
    for label, places in groups.items():
        rows = [_figures(measured[i]) for i in places]
        accuracy = percent(estimate([runs[i].accuracy or 0.0 for i in places]))
        body.append([label, str(len(places)), accuracy, *(text([row[title] for row in rows]) for title in titles)])
    return ["method", "seeds", "test accuracy (%)", *titles], body


def _by_component(
    groups: Mapping[str, Sequence[int]], runs: Sequence[Run], measured: Sequence[Mapping[str, Any]]
) -> list[Cells]:
    """A table for each kind of network among the runs."""
    tables: dict[tuple[str, ...], list[list[str]]] = {}
    for label, places in groups.items():
        parts = tuple(measured[places[0]]["components"])
        cells = [text([_eigenvalue(measured[i]["components"][part]) for i in places]) for part in parts]
        whole = text([_eigenvalue(measured[i]["eigenvalues"]) for i in places])
        tables.setdefault(parts, []).append([label, *cells, whole])
    return [(["λmax of", *parts, "whole"], body) for parts, body in tables.items()]


def _spectrum(found: Sequence[Mapping[str, Any]]) -> curvature.Spectrum:
    """The spectrum of all seeds together: each draw of each seed counts alike."""
    nodes, weights = (
        torch.tensor([draw for each in found for draw in each["spectrum"][name]], dtype=torch.float64)
        for name in ("nodes", "weights")
    )
    return curvature.Spectrum(nodes, weights, math.nan)


def _norms(found: Sequence[Mapping[str, Any]]) -> curvature.FilterNorms:
    names = found[0]["filters"]
    return curvature.FilterNorms(
        {
            name: torch.tensor([x for each in found for x in each["filters"][name]], dtype=torch.float64)
            for name in names
        }
    )
