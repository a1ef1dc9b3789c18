import json

import pytest

from steppe.lab.config import Setting
from steppe.lab.presets import GRIDS, METHODS
from steppe.lab.tune import expand, tune, write_choice

TINY = Setting(width=4, epochs=1, train_size=64, batch_size=32)


def test_grids_expand_to_the_product():
    assert expand("gsam(rho={0.2, 0.4}, alpha={0.1,0.3})") == [
        "gsam(rho=0.2, alpha=0.1)",
        "gsam(rho=0.2, alpha=0.3)",
        "gsam(rho=0.4, alpha=0.1)",
        "gsam(rho=0.4, alpha=0.3)",
    ]
    assert expand("sam") == ["sam()"]


@pytest.mark.parametrize(
    "grid", ["sam(rho={0.1)", "sam(rho=0.1})", "sam(rho={{0.1}})", "sam(rho={})", "sam(rho={0.1,})"]
)
def test_bad_braces_are_refused(grid):
    with pytest.raises(ValueError, match="brace"):
        expand(grid)


def test_default_grids_and_methods_parse():
    assert all(expand(grid) for grid in (*GRIDS, *METHODS))


def test_the_best_of_each_grid_is_chosen_on_the_validation_split(tmp_path):
    grids = ["sam(rho={0.1,0.5})", "sgd"]
    candidates = tune(TINY, grids, 2, tmp_path)
    write_choice(candidates, tmp_path, "steppe tune")
    sam = candidates[:2]
    assert [candidate.method for candidate in candidates] == ["sam(rho=0.1)", "sam(rho=0.5)", "sgd()"]
    best = max(sam, key=lambda candidate: candidate.accuracy.mean)
    assert [candidate for candidate in sam if candidate.best] == [best]
    assert json.loads((tmp_path / "tuned.json").read_text()) == {grids[0]: best.method, "sgd": "sgd()"}
    assert all(candidate.accuracy.n == 2 for candidate in candidates)
    # 13 of 64 images are held out: accuracies are multiples of 1/13
    accuracy = 13 * 2 * best.accuracy.mean
    assert accuracy == pytest.approx(round(accuracy))
    configs = [json.loads(path.read_text()) for path in tmp_path.glob("runs/*/config.json")]
    assert {config["validation"] for config in configs} == {0.2}


def test_a_candidate_that_fails_is_never_the_best(tmp_path):
    candidates = tune(TINY, ["gsam(rho={1e30,0.1})"], 1, tmp_path)
    assert [(candidate.accuracy is None, candidate.best) for candidate in candidates] == [(True, False), (False, True)]
    assert "failed" in str(write_choice(candidates, tmp_path, "").columns[2]._cells)


def test_a_comma_inside_a_value_parts_nothing():
    assert expand("rst(sam(), p={linear(0,1),0.3})") == ["rst(sam(), p=linear(0, 1))", "rst(sam(), p=0.3)"]


@pytest.mark.parametrize(("grids", "base"), [([], ["sgd"]), (["sam"], [])])
def test_nothing_to_try_is_refused(tmp_path, grids, base):
    with pytest.raises(ValueError, match="no grid"):
        tune(TINY, grids, 1, tmp_path, base=base)
