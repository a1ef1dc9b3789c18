"""How far it is, on a terminal and in a file."""

from __future__ import annotations

import io
from dataclasses import replace

import pytest
from rich.console import Console

from steppe.lab import progress
from steppe.lab.config import Config
from steppe.lab.run import Run

SLOW = 400.0
"""Seconds an epoch, as of a large network on a CPU."""


@pytest.fixture
def clock(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    return now


def moving(tmp_path, clock, epochs=10):
    """Runs of two methods in lockstep, and what has moved, epoch by epoch."""
    config = Config(epochs=epochs)
    runs = [Run(replace(config, method=method), tmp_path) for method in ("sgd()", "sam()")]
    for epoch in range(1, epochs):
        for run, accuracy in zip(runs, (0.5, 0.75), strict=True):
            clock[0] += SLOW
            run.records.append({"epoch": epoch, **({"test_accuracy": accuracy} if epoch == 1 else {})})
            yield runs, run


def test_a_terminal_shows_the_time_left_and_each_runs_own_accuracy(tmp_path, clock, monkeypatch):
    console = Console(file=io.StringIO(), force_terminal=True, width=70, force_interactive=True)
    monkeypatch.setattr(progress, "Console", lambda stderr: console)
    steps = moving(tmp_path, clock)
    runs, run = next(steps)
    display = progress.Display(runs)
    display._progress.get_time = display._progress.tasks[0]._get_time = lambda: clock[0]
    display._progress.start_task(display._task)
    display.show(runs, run)
    for runs, run in steps:
        display.show(runs, run)
        task = display._progress.tasks[0]
        assert task.description.endswith("50.0%" if run is runs[0] else "75.0%")
    assert task.time_remaining == pytest.approx(2 * SLOW, rel=0.5)


def test_a_file_gets_a_line_a_minute(tmp_path, clock, capsys):
    steps = moving(tmp_path, clock)
    runs, run = next(steps)
    display = progress.Display(runs)
    for runs, run in steps:
        display.show(runs, run)
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 17
    assert lines[-1].endswith(" left")
    assert lines[-1].startswith("90% done")
