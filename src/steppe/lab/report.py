"""What a comparison found: the table, in the terminal and as Markdown, and the figures behind it."""

import datetime
import json
import os
import platform
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from rich.box import SIMPLE_HEAD
from rich.table import Table

import steppe
from steppe.lab.files import write
from steppe.lab.plots import Curve, Point, accuracy_against_cost, curves
from steppe.lab.run import Run
from steppe.lab.stats import Difference, Estimate, difference, estimate
from steppe.lab.trained import baseline_of, grouped

__all__ = ["Columns", "Row", "machine", "markdown", "rows", "table", "write_report"]

MISSING = "—"
MOMENT = 100
"""Lengths of an epoch that two epochs of the same moment may lie apart."""


@dataclass(frozen=True)
class Row:
    """What the finished runs of one method on one base say. Shares are in [0, 1]; None is what is not known."""

    label: str
    """Method and base in one, see `grouped`."""
    method: str
    base: str
    accuracy: Estimate | None
    difference: Difference | None
    """Accuracy less the baseline's, over the seeds that both have."""
    propagations: float | None
    """Propagations a step, as counted."""
    time: float | None
    """Median, over seeds and epochs, of the seconds a step over the baseline's in the same epoch and at that moment."""
    memory: int | None
    """Peak bytes of a training step."""
    failures: tuple[str, ...]


class Columns(NamedTuple):
    """Further columns of the table."""

    titles: Sequence[str]
    cells: Mapping[str, Sequence[str]]
    """Those of each row that has any, by its label."""
    legend: str


def rows(runs: Sequence[Run]) -> list[Row]:
    """One row for each method on each base, in the order of the runs; the first of sgd, or of all, is the baseline."""
    places = grouped(runs)
    groups = {label: [runs[i] for i in places[label]] for label in places}
    against = groups[baseline_of(runs, places)]
    return [_row(label, group, against) for label, group in groups.items()]


def _row(label: str, runs: Sequence[Run], baseline: Sequence[Run]) -> Row:
    config = runs[0].config
    names = (label, config.method, config.base + label.removeprefix(config.title))
    failures = tuple(run.failure for run in runs if run.failure)
    accuracies = _accuracies(runs)
    if not accuracies:
        return Row(*names, None, None, None, None, None, failures)
    results = [run.result for run in runs if run.result and run.accuracy is not None]
    return Row(
        *names,
        estimate(list(accuracies.values())),
        None if runs is baseline else difference(accuracies, _accuracies(baseline)),
        statistics.fmean(result["propagations"] for result in results),
        _time(runs, baseline),
        results[0]["peak_memory"],
        failures,
    )


def _accuracies(runs: Sequence[Run]) -> dict[int, float]:
    return {run.config.seed: run.accuracy for run in runs if run.accuracy is not None}


def _time(runs: Sequence[Run], baseline: Sequence[Run]) -> float | None:
    """Only epochs that ran close to the baseline's count: at another hour the machine may be another."""
    others = {(run.config.seed, record["epoch"]): record for run in baseline for record in run.records}
    pairs = [
        (record, others[key])
        for run in runs
        for record in run.records
        if (key := (run.config.seed, record["epoch"])) in others
    ]
    ratios = [a["seconds"] / b["seconds"] for a, b in pairs if _are_close(a, b)]
    return statistics.median(ratios) if ratios else None


def _are_close(a: Mapping[str, float], b: Mapping[str, float]) -> bool:
    longest = max(a["seconds"], b["seconds"])
    return "at" in a and "at" in b and abs(a["at"] - b["at"]) <= MOMENT * longest


HEADER = (
    "method",
    "base",
    "test accuracy (%)",
    "seeds",
    "difference to {baseline}",
    "propagations / step",
    "time / step (× {baseline})",
    "peak memory (MB)",
)
NAMES = 2
"""Columns at the left that are names."""

LEGEND = """
± is half a 95 % t-interval over seeds; differences are paired by seed, p is two-sided (paired t-test).
A propagation is one forward and one backward pass over the batch.
Time is the median ratio over epochs run at about the same moment, — where there are none.
Peak memory is that of a training step: weights, gradients, optimizer state, activations and the batch.
"""


def _cells(found: Sequence[Row]) -> tuple[list[str], list[list[str]]]:
    row = next((row for row in found if row.method == "sgd()"), found[0])
    header = [title.format(baseline=row.label.replace("()", "", 1)) for title in HEADER]
    return header, [_texts(row) for row in found]


def _texts(row: Row) -> list[str]:
    if row.accuracy is None:
        return [row.method, row.base, "failed", "0", *[MISSING] * 4]
    return [
        row.method,
        row.base,
        percent(row.accuracy),
        str(row.accuracy.n) + (f" ({len(row.failures)} failed)" if row.failures else ""),
        MISSING if row.difference is None else _difference(row.difference, row.accuracy.n),
        MISSING if row.propagations is None else f"{row.propagations:.2f}",
        MISSING if row.time is None else f"{row.time:.2f}",
        MISSING if row.memory is None else f"{row.memory / 1e6:.1f}",
    ]


def percent(share: Estimate) -> str:
    """A share as per cent, with half its interval where there is one."""
    return f"{100 * share.mean:.2f}" + ("" if share.half is None else f" ± {100 * share.half:.2f}")


def _difference(value: Difference, seeds: int) -> str:
    """The mean, its interval and its p-value where there are any, and the number of pairs where seeds lack some."""
    text = f"{100 * value.mean:+.2f}"
    notes = [f"{value.n} pairs"] if value.n < seeds else []
    if value.half is not None:
        text += f" ± {100 * value.half:.2f}"
        sign = "no spread" if value.p is None else "p < 0.001" if value.p < 0.001 else f"p = {value.p:.3f}"
        notes.insert(0, sign)
    return f"{text} ({', '.join(notes)})" if notes else text


def table(header: Sequence[str], body: Sequence[Sequence[str]], names: int = 1) -> Table:
    """A table for the terminal, its first columns, the names, to the left and the others to the right."""
    result = Table(box=SIMPLE_HEAD)
    for number, title in enumerate(header):
        result.add_column(title, justify="right" if number >= names else "left", overflow="fold")
    for cells in body:
        result.add_row(*cells)
    return result


def markdown(header: Sequence[str], body: Sequence[Sequence[str]], names: int = 1) -> str:
    """The same table in Markdown."""
    rule = ["---"] * names + ["---:"] * (len(header) - names)
    lines = ("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |" for cells in (header, rule, *body))
    return "\n".join(lines) + "\n"


def write_report(runs: Sequence[Run], out: Path, command: str, further: Columns | None = None) -> Table:
    """Write report.md, report.png, curves.png and runs.jsonl into `out`, and return the terminal's table.

    Args:
        runs: finished runs.
        out: folder of the study.
        command: the command line that made them.
        further: columns to add to the table.

    Raises:
        OSError: if a file cannot be written.
    """
    found = rows(runs)
    header, body = _cells(found)
    if further:
        header += further.titles
        for row, cells in zip(found, body, strict=True):
            cells += further.cells.get(row.label, [MISSING] * len(further.titles))
    lines = (json.dumps({**asdict(run.config), **(run.result or {})}) + "\n" for run in runs)
    write(out / "runs.jsonl", "".join(lines))
    points = [
        Point(row.label, row.propagations, row.accuracy)
        for row in found
        if row.accuracy is not None and row.propagations is not None
    ]
    pictures = ""
    if points:
        write(out / "report.png", accuracy_against_cost(points))
        write(out / "curves.png", curves([_curve(row.label, runs) for row in found if row.accuracy]))
        pictures = "![Test accuracy against cost](report.png)\n\n![Training curves](curves.png)\n\n"
    failures = "".join(f"- failed: {failure}\n" for row in found for failure in row.failures)
    write(
        out / "report.md",
        f"# Comparison on {Path(runs[0].config.data).name}\n\n"
        + markdown(header, body, NAMES)
        + LEGEND
        + _rates(runs)
        + (further.legend if further else "")
        + (failures + "\n" if failures else "")
        + pictures
        + f"    {command}\n\n{datetime.date.today().isoformat()}, {machine()}.\n",
    )
    return table(header, body, NAMES)


def _rates(runs: Sequence[Run]) -> str:
    """The learning rates, of which each base has its own."""
    rates = dict.fromkeys((run.config.base, run.config.lr) for run in runs)
    return f"Peak learning rates: {', '.join(f'{base} {lr:g}' for base, lr in rates)}.\n\n"


def _curve(label: str, runs: Sequence[Run]) -> Curve:
    good = [runs[place] for place in grouped(runs)[label] if runs[place].accuracy is not None]
    return Curve(
        label,
        *(
            [(record["epoch"], record[name]) for run in good for record in run.records if name in record]
            for name in ("train_loss", "test_accuracy")
        ),
    )


def machine() -> str:
    """What the figures were made on: processor, cores, threads, versions."""
    name = platform.processor() or platform.machine()
    try:
        with open("/proc/cpuinfo") as info:
            name = next((line.split(":", 1)[1].strip() for line in info if line.startswith("model name")), name)
    except OSError:
        pass
    if torch.cuda.is_available():
        name = f"{torch.cuda.get_device_name()}, {name}"
    return (
        f"{name}, {os.cpu_count()} cores, {torch.get_num_threads()} threads, "
        f"steppe {steppe.__version__}, torch {torch.__version__}, Python {platform.python_version()}"
    )
