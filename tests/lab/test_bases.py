import json
from dataclasses import replace

import pytest
import torch

import steppe
from steppe.cli import main
from steppe.lab import data, models
from steppe.lab.augment import normalize
from steppe.lab.bases import BASES, read, write
from steppe.lab.config import Config, Setting
from steppe.lab.report import rows, write_report
from steppe.lab.run import Run
from steppe.lab.study import compare, configure
from steppe.lab.train import cross_entropy, step_memory
from steppe.lab.trained import find, grouped
from steppe.lab.tune import tune, write_choice

TINY = Setting(width=2, epochs=2, train_size=64, batch_size=32)
FIRST_ORDER = ("sgd", "adamw")
OPTIONS = ["--train-size", "64", "--batch-size", "32", "--width", "2", "--epochs", "2"]


@pytest.fixture(scope="module")
def two_bases(tmp_path_factory):
    """Never to be written into."""
    out = tmp_path_factory.mktemp("bases")
    runs = compare(TINY, ["sam", "sgd"], 2, out, base=["adamw", "sgd", "adamw(lr=0.01)", "adamw()"])
    write_report(runs, out, "steppe compare")
    return out, runs


def finish(config, out):
    run = Run(config, out)
    while run.result is None:
        run.advance()
    return run


@pytest.mark.parametrize("method", ["sgd", "sam(rho=0.5)"])
@pytest.mark.parametrize("base", BASES)
def test_every_base_trains_and_a_stopped_run_goes_on_to_the_same_last_bit(tmp_path, base, method):
    config = configure(TINY, method, 0, base=base)
    whole = finish(config, tmp_path / "whole")
    assert whole.failure is None
    assert whole.records[1]["train_loss"] < 3
    least = steppe.parse(method).cost()
    counted = whole.result["propagations"]
    assert counted == pytest.approx(least) if base in FIRST_ORDER else counted > least + 0.05
    Run(config, tmp_path / "parts").advance()
    torch.manual_seed(1234)
    parts = finish(config, tmp_path / "parts")
    states = [torch.load(run.folder / "checkpoint.pt", weights_only=True)["training"] for run in (whole, parts)]
    for name, value in states[0]["model"].items():
        assert torch.equal(value, states[1]["model"][name]), name
    torch.testing.assert_close(*(state["opt"]["state"] for state in states), rtol=0, atol=0)
    assert whole.result["propagations"] == parts.result["propagations"]


def test_curvature_counts_among_the_propagations(tmp_path):
    run = finish(configure(TINY, "sam", 0, base="adahessian"), tmp_path)
    assert run.result["propagations"] == pytest.approx(4)


def test_an_expression_has_one_way_to_be_written():
    assert write(*read(" kfac( lr = 3e-2,damping=1e-2 )")) == "kfac(damping=0.01, lr=0.03)"
    assert write(*read("adahessian(n=5.0, at=weights)")) == "adahessian(at=weights, n=5)"
    assert write(*read("newton-cg()")) == "newton-cg"
    assert read("kfac(kl=None)") == ("kfac", {"kl": None})


def test_values_come_from_the_expression_then_the_setting_then_the_preset():
    def values(setting, base):
        config = configure(setting, "sgd", 0, base=base)
        return config.base, config.lr, config.momentum, config.weight_decay

    adamw = (0.0003, 0.9, 0.01)
    assert values(TINY, "sgd") == ("sgd", 0.1, 0.9, 5e-4)
    assert values(TINY, "adamw") == ("adamw", *adamw)
    assert values(replace(TINY, lr=0.5), "adamw") == ("adamw", 0.5, *adamw[1:])
    assert values(replace(TINY, lr=0.5), "adamw(lr=1, eps=1e-6)") == ("adamw(eps=1e-06)", 1.0, *adamw[1:])
    assert values(replace(TINY, data="elsewhere"), "sgd") == ("sgd", 0.2, 0.9, 5e-4)


@pytest.mark.parametrize(
    ("base", "words"),
    [
        ("adam", "no base is called 'adam'; did you mean 'adamw'?"),
        ("kfca(lr=1)", "did you mean 'kfac'?"),
        ("zzz", "there are sgd, adamw"),
        ("", "no base such as"),
        ("adamw(lr=0.1", "no base such as"),
        ("adamw(0.1)", "write each argument of a base once"),
        ("adamw(lr=0.1,)", "write each argument of a base once"),
        ("adamw(lr=0.1, lr=0.2)", "write each argument of a base once"),
        ("adamw(lr=large)", "lr must be a number"),
        ("adamw(lr=0)", "lr must be positive"),
        ("adamw(damping=1)", "damping"),
        ("adamw(eps=-1)", "adamw(eps=-1): Invalid epsilon"),
    ],
)
def test_a_bad_base_is_one_line(capsys, tmp_path, base, words):
    assert main(["train", *OPTIONS, "--base", base, "--out", str(tmp_path / "out")]) == 2
    message = capsys.readouterr().err
    assert message.startswith("steppe: ")
    assert message.count("\n") == 1
    assert words in message
    assert not (tmp_path / "out").exists()


def test_a_comparison_needs_a_base(tmp_path):
    with pytest.raises(ValueError, match="no base"):
        compare(TINY, ["sgd"], 1, tmp_path, base=[])


def test_runs_from_before_there_were_bases_are_found_and_go_on(tmp_path):
    """The hash is that of the settings without a base, and a missing base is sgd."""
    assert Config().name == "sgd-s0-d39b96b5"
    config = configure(TINY, "sgd", 0)
    whole = finish(config, tmp_path / "whole")
    old = Run(config, tmp_path / "old")
    old.advance()
    values = json.loads((old.folder / "config.json").read_text())
    assert values.pop("base") == "sgd"
    (old.folder / "config.json").write_text(json.dumps(values))
    assert Run.at(old.folder).config == config
    again = finish(config, tmp_path / "old")
    assert again.folder == old.folder
    assert again.result["test_loss"] == whole.result["test_loss"]


def test_bases_have_folders_of_their_own():
    names = [configure(TINY, "sam", 0, base=base).name for base in (*BASES, "adamw(lr=0.01)", "kfac(damping=0.5)")]
    assert len(set(names)) == len(BASES) + 2
    assert names[0].startswith("sam-s0-")
    assert names[1].startswith("sam-on-adamw-s0-")


def test_every_method_runs_on_every_base_beside_the_others(two_bases):
    _, runs = two_bases
    assert [(run.config.base, run.config.lr, run.config.method) for run in runs if run.config.seed == 1] == [
        (base, lr, method)
        for base, lr in (("adamw", 0.0003), ("sgd", 0.1), ("adamw", 0.01))
        for method in ("sam()", "sgd()")
    ]


def test_all_are_held_against_sgd_on_the_first_base(two_bases):
    _, runs = two_bases
    found = {row.label: row for row in rows(runs)}
    assert list(found) == [
        "sam() on adamw, lr=0.0003",
        "sgd() on adamw, lr=0.0003",
        "sam()",
        "sgd()",
        "sam() on adamw, lr=0.01",
        "sgd() on adamw, lr=0.01",
    ]
    assert [label for label, row in found.items() if row.difference is None] == ["sgd() on adamw, lr=0.0003"]
    accuracy = {(run.config.title, run.config.lr, run.config.seed): run.accuracy for run in runs}
    for label, (title, lr) in {"sgd()": ("sgd()", 0.1), "sam() on adamw, lr=0.01": ("sam() on adamw", 0.01)}.items():
        pairs = [accuracy[title, lr, seed] - accuracy["sgd() on adamw", 0.0003, seed] for seed in (0, 1)]
        assert found[label].difference.mean == pytest.approx(sum(pairs) / 2)
        assert found[label].difference.n == 2


def test_the_table_has_the_base_as_a_column(two_bases):
    out, _ = two_bases
    lines = (out / "report.md").read_text().splitlines()
    assert lines[2].startswith("| method | base | test accuracy (%) | seeds | difference to sgd on adamw, lr=0.0003 |")
    assert lines[3].startswith("| --- | --- | ---: |")
    names = [tuple(cell.strip() for cell in line.split("|")[1:3]) for line in lines[4:10]]
    assert names == [
        (method, base) for base in ("adamw, lr=0.0003", "sgd", "adamw, lr=0.01") for method in ("sam()", "sgd()")
    ]
    assert "Peak learning rates: adamw 0.0003, sgd 0.1, adamw 0.01." in lines
    records = [json.loads(line) for line in (out / "runs.jsonl").read_text().splitlines()]
    assert {record["base"] for record in records} == {"adamw", "sgd"}


def test_measurements_tell_bases_apart(two_bases):
    runs, _ = find([two_bases[0]])
    assert [run.config.title for run in runs[:2]] == ["sgd()", "sgd()"]
    groups = grouped(runs)
    assert set(groups) == {row.label for row in rows(runs)} == {row.label for row in rows(two_bases[1])}
    assert {len(places) for places in groups.values()} == {2}


def test_learning_rates_of_a_base_are_chosen_on_the_validation_split(tmp_path):
    grid = "adamw(lr={0.0001,0.01}, eps=1e-6)"
    candidates = tune(TINY, ["sgd", "sam"], 1, tmp_path, base=[grid, "sgd"])
    assert [(candidate.method, candidate.base) for candidate in candidates] == [
        ("sgd()", "adamw(eps=1e-06, lr=0.0001)"),
        ("sgd()", "adamw(eps=1e-06, lr=0.01)"),
        ("sam()", "adamw(eps=1e-06, lr=0.0001)"),
        ("sam()", "adamw(eps=1e-06, lr=0.01)"),
        ("sgd()", "sgd"),
        ("sam()", "sgd"),
    ]
    shown = write_choice(candidates, tmp_path, "steppe tune")
    assert [column.header for column in shown.columns][:2] == ["method", "base"]
    best = max(candidates[:2], key=lambda candidate: candidate.accuracy.mean)
    chosen = json.loads((tmp_path / "tuned.json").read_text())
    assert chosen[f"sgd on {grid}"] == f"sgd() on {best.base}"
    assert (list(chosen)[2:], chosen["sam"]) == (["sgd", "sam"], "sam()")
    configs = [json.loads(path.read_text()) for path in tmp_path.glob("runs/*/config.json")]
    assert {(config["base"], config["lr"], config["validation"]) for config in configs} == {
        ("adamw(eps=1e-06)", 0.0001, 0.2),
        ("adamw(eps=1e-06)", 0.01, 0.2),
        ("sgd", 0.1, 0.2),
    }


def test_memory_of_a_step_is_that_of_its_base():
    config = Config(width=16, batch_size=4)
    weights = 4 * sum(p.numel() for p in models.build("cnn", classes=10, channels=1, size=4, width=16).parameters())
    plain, adamw = (step_memory(replace(config, base=base), classes=10, channels=1, size=4) for base in FIRST_ORDER)
    assert adamw - plain >= 0.9 * weights  # the mean of squares


def test_the_bases_are_listed(capsys):
    assert main(["methods"]) == 0
    written = capsys.readouterr().out
    for name in BASES:
        assert f"{name}(" in written
    assert "adamw(lr=0.0003, momentum=0.9, weight_decay=0.01)" in written


@pytest.mark.parametrize("kl", [None, "default"])
def test_a_natural_gradient_as_it_comes_learns_the_digits_and_diverges_without_its_trust_region(kl):
    digits = data.load("digits", seed=0, label_noise=0.0)
    images = normalize(digits.train.images, digits.mean, digits.std)
    torch.manual_seed(0)
    network = models.build("cnn", channels=1, size=8)
    opt = steppe.optim.NaturalGradient(network.parameters(), **({"kl": None} if kl is None else {}))
    losses = [
        opt.step(steppe.Batch(network, cross_entropy, (images[i : i + 64], digits.train.labels[i : i + 64])))
        for i in 2 * list(range(0, 960, 64))
    ]
    assert (losses[-1] > 100) if kl is None else (losses[-1] < 1)
