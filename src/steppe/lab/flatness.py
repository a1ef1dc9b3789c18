"""What measurements of flatness found: tables, pictures, and the figures behind them."""

import datetime
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from rich.console import Group

from steppe import curvature
from steppe.lab.figures import ACTIVE, Figure, active, eigenvalue, explained, further, legend, over, overview, text
from steppe.lab.files import write
from steppe.lab.options import Sharpness
from steppe.lab.plots import filters, spectra
from steppe.lab.report import Columns, machine, markdown, percent, table
from steppe.lab.run import Run
from steppe.lab.sharpness import measure_sharpness
from steppe.lab.stats import estimate
from steppe.lab.trained import baseline_of, grouped

__all__ = ["columns", "write_sharpness"]

BRIEF = ("λmax", "λmax/λ5", "surrogate gap", "m-sharpness")
"""What a comparison shows beside accuracy and cost, and what has to be measured for it."""
MEASUREMENTS = ("surrogate gap", "m-sharpness", "eigenvalues")
RATIOS = """
Geometric means of the ratios on the same seed, with their 95 % t-intervals over seeds.
"""


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
    every = dict(
        zip((run.config for run in good), map(overview, measure_sharpness(good, what, MEASUREMENTS)), strict=True)
    )
    cells = {
        label: [text([every[config][title] for i in places if (config := runs[i].config) in every]) for title in BRIEF]
        for label, places in grouped(runs).items()
    }
    return Columns(BRIEF, cells, legend(good, what, BRIEF))


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
    (header, body), (more, others) = _overview(groups, runs, measured), _further(groups, measured)
    components, layers = _by_component(groups, measured), _by_layer(groups, measured)
    ratios = _against(groups, runs, measured)
    records = [
        {"run": str(run.folder), **asdict(run.config), "accuracy": run.accuracy, "measured": found}
        for run, found in zip(runs, measured, strict=True)
    ]
    write(out / "sharpness.json", json.dumps({"options": asdict(what), "runs": records}) + "\n")
    write(out / "spectra.png", spectra({label: _spectrum([measured[i] for i in groups[label]]) for label in groups}))
    write(out / "filters.png", filters({label: _norms([measured[i] for i in groups[label]]) for label in groups}))
    write(
        out / "sharpness.md",
        f"# Sharpness\n\n{markdown(header, body)}{legend(runs, what, header)}"
        + "".join(f"- left out: {line}\n" for line in left_out)
        + "".join(f"\n## Over the baseline's\n\n{markdown(*each)}{RATIOS}" for each in ratios)
        + f"\n## Further measures\n\n{markdown(more, others)}\n{explained(what, more)}"
        + "".join(f"## λmax by component\n\n{markdown(*each)}\n" for each in components)
        + "".join(f"## Active neurons by layer\n\n{markdown(*each)}{ACTIVE}\n" for each in layers)
        + "![Spectral densities](spectra.png)\n\n![Filter norms](filters.png)\n\n"
        + f"    {command}\n\n{datetime.date.today().isoformat()}, {machine()}.\n",
    )
    return Group(*(table(*each) for each in ((header, body), *ratios, (more, others), *components, *layers)))


Groups = Mapping[str, Sequence[int]]
Found = Sequence[Mapping[str, Any]]
Cells = tuple[list[str], list[list[str]]]


def _overview(groups: Groups, runs: Sequence[Run], measured: Found) -> Cells:
    titles = list(overview(measured[0]))
    body = []
    for label, places in groups.items():
        accuracy = percent(estimate([runs[i].accuracy or 0.0 for i in places]))
        body.append([label, str(len(places)), accuracy, *_row([overview(measured[i]) for i in places], titles)])
    return ["method", "seeds", "test accuracy (%)", *titles], body


def _against(groups: Groups, runs: Sequence[Run], measured: Found) -> list[Cells]:
    """A table of each measure over the baseline's on the same seed; none if there is nothing but the baseline."""
    against = baseline_of(runs, groups)
    seeds = {label: {runs[i].config.seed: overview(measured[i]) for i in places} for label, places in groups.items()}
    below = seeds.pop(against)
    titles = [title for title in next(iter(below.values())) if "ρ²" not in title]  # which are the gap again
    body = []
    for label, above in seeds.items():
        shared = [seed for seed in above if seed in below]
        cells = [over([(above[seed][title], below[seed][title]) for seed in shared]) for title in titles]
        body.append([label, str(len(shared)), *cells])
    return [([f"over {against}", "seeds", *titles], body)] if body else []


def _further(groups: Groups, measured: Found) -> Cells:
    titles = list(further(measured[0]))
    body = [[label, *_row([further(measured[i]) for i in places], titles)] for label, places in groups.items()]
    return ["method", *titles], body


def _row(seeds: Sequence[Mapping[str, Figure | None]], titles: Sequence[str]) -> list[str]:
    return [text([figures[title] for figures in seeds]) for title in titles]


def _by_component(groups: Groups, measured: Found) -> list[Cells]:
    """A table for each kind of network among the runs."""
    tables: dict[tuple[str, ...], list[list[str]]] = {}
    for label, places in groups.items():
        parts = tuple(measured[places[0]]["components"])
        cells = [text([eigenvalue(measured[i]["components"][part]) for i in places]) for part in parts]
        whole = text([eigenvalue(measured[i]["eigenvalues"]) for i in places])
        tables.setdefault(parts, []).append([label, *cells, whole])
    return [(["λmax of", *parts, "whole"], body) for parts, body in tables.items()]


def _by_layer(groups: Groups, measured: Found) -> list[Cells]:
    """A table for each kind of network; the layers, of which there may be many, are its rows."""
    tables: dict[tuple[str, ...], dict[str, list[str]]] = {}
    for label, places in groups.items():
        seeds = [active(measured[i]["active neurons"]) for i in places]
        layers = tuple(seeds[0])
        tables.setdefault(layers, {})[label] = _row(seeds, layers)
    return [
        (["active neurons (%) of", *columns], [list(row) for row in zip(layers, *columns.values(), strict=True)])
        for layers, columns in tables.items()
    ]


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
