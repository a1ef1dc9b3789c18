"""The runs kept in results/ are whole, and of the settings that docs/results.md states."""

import json
from pathlib import Path

import pytest

from steppe.lab.config import Config

RESULTS = Path(__file__).parents[2] / "results"
RUNS = sorted(path.parent for path in RESULTS.glob("*/runs/*/result.json"))


def test_there_are_some():
    assert RUNS


@pytest.mark.parametrize("folder", RUNS, ids=lambda folder: folder.name)
def test_a_kept_run_is_finished_and_found_again(folder):
    config = Config(**json.loads((folder / "config.json").read_text()))
    assert config.name == folder.name, "the command would not find this run, and train it again"
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [record["epoch"] for record in records] == list(range(1, config.epochs + 1))
    result = json.loads((folder / "result.json").read_text())
    assert result["test_accuracy"] == records[-1]["test_accuracy"]
    assert (config.model, config.width) == ("resnet18", 16)
