from dataclasses import replace

import pytest

from steppe.lab import study
from steppe.lab.config import Setting
from steppe.lab.jobs import divided
from steppe.lab.run import Run
from steppe.lab.study import compare, configure

TINY = Setting(width=4, epochs=2, train_size=64, batch_size=32)


def test_methods_of_a_seed_advance_in_lockstep(tmp_path, monkeypatch):
    order = []

    class Watched(Run):
        def advance(self):
            super().advance()
            order.append((self.config.seed, len(self.records), self.config.method))

    monkeypatch.setattr(study, "Run", Watched)
    runs = compare(TINY, ["sgd", "sam"], 2, tmp_path)
    assert order == [(seed, epoch, method) for seed in (0, 1) for epoch in (1, 2) for method in ("sgd()", "sam()")]
    assert [(run.config.seed, run.config.method) for run in runs] == [
        (0, "sgd()"),
        (0, "sam()"),
        (1, "sgd()"),
        (1, "sam()"),
    ]
    assert all(run.accuracy is not None for run in runs)


def test_one_method_written_in_two_ways_runs_once(tmp_path):
    assert len(compare(TINY, ["sam", "sam(rho=0.05)"], 1, tmp_path)) == 1


def test_a_run_that_lags_behind_catches_up(tmp_path):
    ahead = Run(configure(TINY, "sgd", 0), tmp_path)
    ahead.advance()
    runs = compare(TINY, ["sgd", "sam"], 1, tmp_path)
    assert [len(run.records) for run in runs] == [2, 2]
    assert runs[0].records[0] == ahead.records[0]


def test_a_failed_run_does_not_stop_the_others(tmp_path, capsys):
    runs = compare(TINY, ["gsam(rho=1e30)", "sgd"], 1, tmp_path)
    assert runs[0].failure is not None
    assert runs[1].accuracy is not None
    lines = capsys.readouterr().err.splitlines()
    assert runs[0].failure in lines
    assert f"sgd() seed 0: {runs[1].accuracy:.1%}" in lines


def test_refusals(tmp_path):
    with pytest.raises(ValueError, match="seeds must be at least 1, got 0"):
        compare(TINY, ["sgd"], 0, tmp_path)
    with pytest.raises(ValueError, match="no method"):
        compare(TINY, [], 1, tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_several_processes_train_the_same_as_one(tmp_path):
    methods = ["sgd", "gsam(rho=1e30)", "esam"]
    one = compare(TINY, methods, 3, tmp_path / "one")
    two = compare(TINY, methods, 3, tmp_path / "two", jobs=2)
    assert [run.config for run in one] == [run.config for run in two]
    for ours, theirs in zip(one, two, strict=True):
        assert ours.failure == theirs.failure
        assert [record["train_loss"] for record in ours.records] == [record["train_loss"] for record in theirs.records]
        assert ours.accuracy == theirs.accuracy


def test_processes_without_a_group_of_their_own_share_the_last_ones():
    a, b, c = list("aaaaaaa"), list("bbb"), list("ccc")
    assert divided([a, b], 1) == [a, b]
    assert divided([a, b], 2) == [a, b]
    assert divided([a, b, ["sgd", "sam", "esam"]], 2) == [a, b, ["sgd", "esam"], ["sam"]]
    assert divided([a, b, c, a, b, c, a], 5) == [a, b, c, a, b, ["c", "c"], ["c"], list("aaaa"), list("aaa")]
    assert divided([a, b, c, ["sgd"]], 3) == [a, b, c, ["sgd"]]


def test_a_single_round_stays_in_lockstep():
    assert divided([["sgd", "sam"]], 8) == [["sgd", "sam"]]
    assert divided([list("abc"), list("def")], 4) == [list("abc"), list("def")]


def test_errors_with_several_processes(tmp_path):
    with pytest.raises(ValueError, match="resnet19"):
        compare(replace(TINY, model="resnet19"), ["sgd"], 2, tmp_path, jobs=2)
    (tmp_path / "runs").write_text("no folder")
    with pytest.raises(OSError, match="runs"):
        compare(TINY, ["sgd"], 2, tmp_path, jobs=2)
