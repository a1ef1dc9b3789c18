import io
import json

import pytest
from rich.console import Console

from steppe.lab.config import Config
from steppe.lab.plots import Point, accuracy_against_cost
from steppe.lab.report import rows, table, write_report
from steppe.lab.run import Run
from steppe.lab.stats import Estimate


def finished(out, method, seed, accuracy, seconds, at=0.0, **result):
    run = Run(Config(method=method, seed=seed, epochs=2), out)
    run.records = [
        {"epoch": 1, "train_loss": 2.0, "seconds": seconds[0], "at": at},
        {"epoch": 2, "train_loss": 1.5, "seconds": seconds[1], "at": at + 100.0, "test_accuracy": accuracy},
    ]
    run.result = {"test_accuracy": accuracy, "propagations": 2.0, "peak_memory": 3_400_000, **result}
    return run


@pytest.fixture
def study(tmp_path):
    failed = Run(Config(method="sam(rho=9.0)", seed=1, epochs=2), tmp_path)
    failed.result = {"failed": "epoch 1: the loss is nan"}
    return [
        finished(tmp_path, "sam(rho=9.0)", 0, 0.85, (4.0, 60.0)),
        finished(tmp_path, "sgd()", 0, 0.80, (2.0, 20.0), propagations=1.0),
        failed,
        finished(tmp_path, "sgd()", 1, 0.84, (2.0, 2.0), propagations=1.0),
    ]


def test_rows_pair_seeds_and_epochs(study):
    sam, sgd = rows(study)
    assert sam.accuracy == Estimate(0.85, None, 1)
    assert sam.difference.mean == pytest.approx(0.05)
    assert sam.difference.n == 1
    assert sam.time == 2.5  # the median of 4/2 and 60/20; an epoch that was slow for both does not count
    assert sam.failures == ("sam(rho=9.0) seed 1: epoch 1: the loss is nan",)
    assert sgd.difference is None
    assert sgd.time == 1.0
    assert sgd.accuracy.n == 2


def test_the_first_method_is_the_baseline_where_sgd_is_missing(tmp_path):
    one = finished(tmp_path, "sam()", 0, 0.5, (1.0, 1.0))
    two = finished(tmp_path, "esam()", 0, 0.6, (2.0, 2.0))
    first, second = rows([one, two])
    assert first.difference is None
    assert second.difference.mean == pytest.approx(0.1)
    assert second.time == 2.0


def test_epochs_of_another_hour_are_not_compared(tmp_path):
    sgd = finished(tmp_path, "sgd()", 0, 0.8, (2.0, 2.0))
    later = finished(tmp_path, "sam()", 0, 0.9, (3.0, 5.0), at=3600.0)
    assert rows([sgd, later])[1].time is None
    later.records[1]["at"] = sgd.records[1]["at"] + 4.0
    assert rows([sgd, later])[1].time == 2.5
    del later.records[1]["at"]
    assert rows([sgd, later])[1].time is None


def test_a_difference_says_on_how_many_pairs_it_rests_and_whether_they_spread(tmp_path):
    sgd = [finished(tmp_path, "sgd()", seed, 0.5 + seed / 8, (1.0, 1.0)) for seed in range(2)]
    sam = [finished(tmp_path, "sam()", seed, 0.625 + seed / 8, (2.0, 2.0)) for seed in range(3)]
    write_report([*sgd, *sam], tmp_path, "steppe compare")
    assert "| 3 | +12.50 ± 0.00 (no spread, 2 pairs) |" in (tmp_path / "report.md").read_text()


def test_names_of_methods_are_whole_on_a_narrow_terminal(study):
    console = Console(width=80, file=io.StringIO())
    console.print(
        table(
            ["method", "accuracy", "difference", "memory"],
            [["gsam(rho=0.4, alpha=0.25)", "9" * 30, "9" * 30, "9" * 20]],
        )
    )
    shown = [line[:20] for line in console.file.getvalue().splitlines()]
    assert "…" not in console.file.getvalue()
    assert "gsam" in "".join(shown)


def test_report_files(study, tmp_path):
    write_report(study, tmp_path, "steppe compare --seeds 2")
    text = (tmp_path / "report.md").read_text()
    lines = text.splitlines()
    assert "| sam(rho=9.0) | sgd | 85.00 | 1 (1 failed) | +5.00 | 2.00 | 2.50 | 3.4 |" in lines
    assert "no spread" not in text
    assert any(line.startswith("| sgd() | sgd | 82.00 ± 25.41 | 2 | — | 1.00 | 1.00 | 3.4 |") for line in lines)
    assert "- failed: sam(rho=9.0) seed 1: epoch 1: the loss is nan" in lines
    assert "    steppe compare --seeds 2" in lines
    assert "(report.png)" in text
    assert "(curves.png)" in text
    assert "torch" in lines[-1]
    for picture in ("report.png", "curves.png"):
        assert (tmp_path / picture).read_bytes().startswith(b"\x89PNG")
    records = [json.loads(line) for line in (tmp_path / "runs.jsonl").read_text().splitlines()]
    assert [(record["method"], record["seed"]) for record in records] == [
        ("sam(rho=9.0)", 0),
        ("sgd()", 0),
        ("sam(rho=9.0)", 1),
        ("sgd()", 1),
    ]


def test_a_report_of_nothing_but_failures(tmp_path):
    failed = Run(Config(), tmp_path)
    failed.result = {"failed": "the loss is nan"}
    write_report([failed], tmp_path, "steppe compare")
    text = (tmp_path / "report.md").read_text()
    assert "| sgd() | sgd | failed | 0 | — | — | — | — |" in text
    assert "png" not in text


def test_names_of_close_points_do_not_overlap():
    """Placed anew on the same picture, the names' boxes are disjoint and inside it."""
    from matplotlib.text import Annotation, Text

    from steppe.lab import plots

    names = ["sgd()", "sam(rho=0.6)", "gsam(rho=0.6, alpha=0.1)", "rwp(gamma=0.05)", "asam(rho=2.0)", "esam(rho=0.6)"]
    points = [
        Point(name, 1.0 if name == "sgd()" else 2.0, Estimate(0.8 + 0.001 * number, 0.002, 5))
        for number, name in enumerate(names)
    ]
    assert accuracy_against_cost(points).startswith(b"\x89PNG")
    figure, (axes,) = plots.new_figure(1)
    marks = [(point.cost, 100 * point.accuracy.mean, 0.2) for point in points]
    for x, y, half in marks:
        axes.errorbar(x, y, yerr=half)
    axes.margins(0.2)
    plots._label(figure, axes, names, marks)
    figure.canvas.draw()
    boxes = [Text.get_window_extent(child) for child in axes.get_children() if isinstance(child, Annotation)]
    assert len(boxes) == len(names)
    for number, one in enumerate(boxes):
        assert all(plots._area(one, other) < 1 for other in boxes[number + 1 :])
        assert plots._area(one, axes.get_window_extent()) == pytest.approx(one.width * one.height)
