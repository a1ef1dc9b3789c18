import json
from dataclasses import replace

import pytest
import torch
from parquet_files import solid, write

from steppe.lab import files, run
from steppe.lab.config import Config
from steppe.lab.run import Run
from steppe.lab.train import Training, warm_up_then_cosine

TINY = Config(width=4, epochs=4, train_size=65, batch_size=16)


def finish(config, out):
    found = Run(config, out)
    while found.result is None:
        found.advance()
    return found


def weights(found):
    state = torch.load(found.folder / "checkpoint.pt", weights_only=True)
    return state["training"]["model"]


def untimed(records):
    return [{name: value for name, value in record.items() if name not in ("seconds", "at")} for record in records]


@pytest.mark.parametrize("method", ["sgd()", "sam(rho=0.5)", "esam()", "rst(sam())", "looksam(k=3)", "rwp(other=True)"])
def test_a_stopped_run_goes_on_to_the_same_last_bit(tmp_path, method):
    config = replace(TINY, method=method)
    whole = finish(config, tmp_path / "whole")
    first = Run(config, tmp_path / "parts")
    first.advance()
    first.advance()
    torch.manual_seed(1234)
    second = finish(config, tmp_path / "parts")
    assert untimed(second.records) == untimed(whole.records)
    assert len(second.records) == 4
    for name, value in weights(whole).items():
        assert torch.equal(value, weights(second)[name]), name
    figures = ("test_accuracy", "test_loss", "train_loss", "propagations", "peak_memory", "parameters")
    assert [whole.result[figure] for figure in figures] == [second.result[figure] for figure in figures]


@pytest.mark.parametrize("lost", ["metrics.jsonl", "result.json"])
def test_files_agree_after_a_stop_between_two_of_them(tmp_path, monkeypatch, lost):
    """The process dies just before it writes `lost` after the last epoch."""
    config = replace(TINY, epochs=2)
    whole = finish(config, tmp_path / "whole")
    first = Run(config, tmp_path / "parts")
    first.advance()

    def die(path, content):
        if path.name == lost:
            raise KeyboardInterrupt
        files.write(path, content)

    monkeypatch.setattr(run, "write", die)
    with pytest.raises(KeyboardInterrupt):
        first.advance()
    monkeypatch.undo()
    second = finish(config, tmp_path / "parts")
    lines = (second.folder / "metrics.jsonl").read_text().splitlines()
    assert untimed(map(json.loads, lines)) == untimed(whole.records)
    assert second.result["test_loss"] == whole.result["test_loss"]


def test_a_finished_run_is_not_run_again(tmp_path):
    first = finish(replace(TINY, epochs=1), tmp_path)
    before = {path: path.stat().st_mtime_ns for path in first.folder.iterdir()}
    second = Run(replace(TINY, epochs=1), tmp_path)
    assert second.result == first.result
    assert second.records == first.records
    second.advance()
    assert {path: path.stat().st_mtime_ns for path in first.folder.iterdir()} == before


def data_of(batch):
    return next(batch.chunks())[0]


def test_methods_of_a_seed_see_the_same_weights_and_batches():
    plain, other = (Training(replace(TINY, method=method)) for method in ("sgd()", "rwp(other=True)"))
    for one, two in zip(plain.model.parameters(), other.model.parameters(), strict=True):
        assert torch.equal(one, two)
    assert plain.epoch(0)["steps"] == other.epoch(0)["steps"] == 4  # the 65th image alone is left out
    for one, two in zip(plain._batches(3, "first"), other._batches(3, "first"), strict=True):
        assert all(torch.equal(a, b) for a, b in zip(data_of(one), data_of(two), strict=True))
    first, second = (data_of(next(other._batches(3, purpose))) for purpose in ("first", "second"))
    assert not torch.equal(first[0], second[0])


def test_no_perturbation_is_sgd_bit_for_bit(tmp_path):
    plain = finish(replace(TINY, epochs=2), tmp_path)
    none = finish(replace(TINY, epochs=2, method="sam(rho=0.0)"), tmp_path)
    assert plain.result["test_loss"] == none.result["test_loss"]


def test_schedule_rises_then_falls_to_zero():
    factor = warm_up_then_cosine(100)
    values = [factor(step) for step in range(101)]
    assert values[:5] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])
    assert max(values) == 1.0
    assert values[4:] == sorted(values[4:], reverse=True)
    assert values[100] == pytest.approx(0.0, abs=1e-12)
    assert warm_up_then_cosine(1)(0) == 1.0


def test_evaluation_when_it_is_due(tmp_path):
    found = finish(replace(TINY, epochs=3, eval_every=2), tmp_path)
    assert ["test_accuracy" in record for record in found.records] == [False, True, True]


def test_a_loss_that_is_not_finite_ends_the_run(tmp_path):
    found = finish(replace(TINY, lr=1e30), tmp_path)
    assert "finite" in found.result["failed"] or "nan" in found.result["failed"]
    assert found.accuracy is None
    assert found.failure.startswith("sgd() seed 0: epoch")
    assert Run(found.config, tmp_path).failure == found.failure


def test_a_validation_split_takes_the_place_of_the_test_images():
    assert len(Training(replace(TINY, validation=0.2)).dataset.test) == 13


def test_every_value_is_part_of_the_name():
    names = {TINY.name, *(replace(TINY, **change).name for change in ({"lr": 0.2}, {"seed": 1}, {"method": "sam()"}))}
    assert len(names) == 4
    assert Config(method="rst(esam(rho=0.05), p=0.5)").name.startswith("rst-esam-rho-0.05-p-0.5-s0-")


@pytest.mark.parametrize(
    "change",
    [
        {"epochs": 0},
        {"batch_size": 1},
        {"lr": 0.0},
        {"lr": float("nan")},
        {"momentum": 1.0},
        {"label_noise": 1.0},
        {"label_noise": -0.1},
        {"weight_decay": -1.0},
        {"crop": -1},
        {"seed": -1},
        {"validation": 1.0},
        {"eval_every": 0},
        {"width": 0},
    ],
)
def test_values_out_of_range_are_refused_by_name(change):
    (name,) = change
    with pytest.raises(ValueError, match=rf"^{name} .*got {change[name]}"):
        replace(TINY, **change)


def test_a_write_that_fails_leaves_what_was_there(tmp_path, monkeypatch):
    path = tmp_path / "deep" / "file"
    files.write(path, "old")

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(files.os, "replace", full)
    with pytest.raises(OSError, match="deep/file"):
        files.write(path, "new")
    assert [child.name for child in path.parent.iterdir()] == ["file"]
    assert path.read_text() == "old"


@pytest.mark.parametrize("content", [b"", b"not a checkpoint", b"PK\x03\x04 cut off"])
def test_a_damaged_checkpoint_is_named(tmp_path, content):
    found = Run(TINY, tmp_path)
    found.advance()
    (found.folder / "checkpoint.pt").write_bytes(content)
    with pytest.raises(ValueError, match=r"checkpoint\.pt is damaged .*delete it"):
        Run(TINY, tmp_path).advance()


@pytest.mark.parametrize("content", ["", "{", "[]", "{}", '{"propagations": 1}'])
def test_a_damaged_result_is_named(tmp_path, content):
    found = Run(TINY, tmp_path)
    found.advance()
    (found.folder / "result.json").write_text(content)
    with pytest.raises(ValueError, match=r"result\.json is damaged"):
        Run(TINY, tmp_path)


@pytest.mark.parametrize("content", [b"{}\n", b"\xff\xfe", b'{"epoch": 1'])
def test_damaged_metrics_stop_a_finished_run_only(tmp_path, content):
    found = Run(TINY, tmp_path)
    found.advance()
    (found.folder / "metrics.jsonl").write_bytes(content)
    again = finish(TINY, tmp_path)
    assert [record["epoch"] for record in again.records] == [1, 2, 3, 4]
    (found.folder / "metrics.jsonl").write_bytes(content)
    with pytest.raises(ValueError, match=r"metrics\.jsonl is damaged"):
        Run(TINY, tmp_path)


def test_one_image_is_no_batch(tmp_path):
    for split in ("train", "test"):
        write(tmp_path / f"{split}.parquet", [solid(1, (8, 8))], [0])
    with pytest.raises(ValueError, match="1 training image"):
        Training(replace(TINY, data=str(tmp_path), train_size=None, label_noise=0.0))
