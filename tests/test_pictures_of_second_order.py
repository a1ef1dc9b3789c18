"""The scripts that draw the pictures of ``docs/second-order.md`` run, and what they print holds."""

from __future__ import annotations

import re
import runpy
from pathlib import Path

import pytest

DOCS = Path(__file__).parents[1] / "docs"
PAGE = DOCS / "second-order.md"
SCRIPTS = sorted(path.stem for path in (DOCS / "second_order").glob("*.py") if path.stem != "drawing")


@pytest.fixture
def printed(tmp_path, monkeypatch, capsys):
    """Runs a script, checks for its picture, and returns its lines."""
    monkeypatch.syspath_prepend(str(DOCS / "second_order"))

    def run(name):
        runpy.run_path(str(DOCS / "second_order" / f"{name}.py"), run_name=name)["main"](tmp_path)
        (picture,) = tmp_path.iterdir()
        assert picture.read_bytes().startswith(b"\x89PNG")
        assert f"pictures/{picture.name}" in PAGE.read_text(encoding="utf-8")
        return capsys.readouterr().out.splitlines()

    return run


def number(lines, start, end=""):
    """The number between the start and the end of the one line that has both."""
    pattern = re.compile(re.escape(start) + r"(-?[\d.]+(?:e-?\d+)?)" + re.escape(end))
    (found,) = [match[1] for line in lines if (match := pattern.search(line))]
    return float(found)


def test_every_script_is_tested_here():
    source = Path(__file__).read_text(encoding="utf-8")
    assert sorted(re.findall(r'printed\("(\w+)"\)', source)) == SCRIPTS


def steps_of_gradient_descent(factors, start=(1.0, 1.0), near=1e-6):
    place, steps = list(start), 0
    while sum(x * x for x in place) > near * near:
        place, steps = [(1 - a / 11) * x for a, x in zip(factors, place, strict=True)], steps + 1
    return steps


def test_paths_on_the_valleys(printed):
    lines = printed("gradient_and_newton")
    steps = {
        (valley, method): number(lines, f"{valley}, {method}: steps to within 1e-06 of the minimum: ")
        for valley in ("10x² + y²", "the same, turned by 45°")
        for method in ("gradient descent", "AdaHessian", "NewtonCG")
    }
    straight, turned = "10x² + y²", "the same, turned by 45°"
    wanted = steps_of_gradient_descent((20, 2))
    assert steps[straight, "gradient descent"] == steps[turned, "gradient descent"] == wanted
    assert steps[straight, "AdaHessian"] == steps[straight, "NewtonCG"] == steps[turned, "NewtonCG"] == 1
    assert steps[turned, "AdaHessian"] > wanted / 2


def test_the_moving_average(printed):
    lines = printed("moving_average")
    lowest = number(lines, "the two lowest points are at ±")
    assert number(lines, "of a lowest point from step ", " on;") <= 10
    assert abs(number(lines, "after 50 steps x = ")) == pytest.approx(lowest, abs=1e-3)
    assert abs(number(lines, "without the moving average: at no lowest point; after 1000 steps x = ")) > lowest + 0.05


def test_rates_and_the_ball(printed):
    lines = printed("fisher")
    rates = re.findall(r"falls by ([\d.]+) a step; \|1 − α\| is ([\d.]+)", "\n".join(lines))
    assert len(rates) == 3
    assert all(float(found) == pytest.approx(float(wanted), abs=1e-6) for found, wanted in rates)
    assert number(lines, "|θ| stays between ") > 0.01
    assert number(lines, "½dᵀFd of the step is ") == pytest.approx(0.01, abs=1e-5)
    assert number(lines, "and its KL ") == pytest.approx(0.01, rel=0.1)
    near, far = (number(lines, f"within {radius} nats lies ") for radius in (0.0001, 0.01))
    assert near < 0.3
    assert near < far < 3
    assert number([line for line in lines if "0.0001 nats" in line], "and ", "° from −g") > 45


def test_blocks_of_the_fisher_matrix(printed):
    lines = printed("kfac")
    assert number(lines, "the network has learnt ", " %") > 80
    error = {
        (what, name): number(lines, f"{what}, {name}: relative error ")
        for what in ("F", "(F + λI)⁻¹")
        for name in ("K-FAC", "EKFAC", "diagonal")
    }
    assert 0 < error["F", "EKFAC"] < error["F", "K-FAC"] < error["F", "diagonal"] < 1
    assert max(error["(F + λI)⁻¹", "K-FAC"], error["(F + λI)⁻¹", "EKFAC"]) < error["(F + λI)⁻¹", "diagonal"]


def test_diagonals(printed):
    lines = printed("adam")
    for place in ("at the start", "trained"):
        assert number(lines, f"{place}: Adam's v, batches of 1: relative error of the formula ") < 1e-3
        assert number(lines, f"{place}: Adam's v, batches of 20: relative error of the formula ") < 0.1
        assert number(lines, f"{place}: Adam's v, batches of 20: ", " of the Fisher's sum") < 0.2
    assert number(lines, "at the start: empirical Fisher: ", " of the Fisher's sum") == pytest.approx(1, abs=0.1)
    assert number(lines, "trained: empirical Fisher: ", " of the Fisher's sum") < 0.3
    assert number(lines, "trained: Hessian: ", " of the Fisher's sum") == pytest.approx(1, abs=0.3)
    fit = "of the Fisher's sum, rank correlation with it "
    by = {}
    for name in ("empirical Fisher", "Hessian", "AdaHessian's"):
        (line,) = [line for line in lines if line.startswith(f"trained: {name}: ")]
        by[name] = number([line], fit)
    assert by["empirical Fisher"] < by["AdaHessian's"] < by["Hessian"]
