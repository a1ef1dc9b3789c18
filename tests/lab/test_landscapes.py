import json
import re
import shutil
from dataclasses import replace

import pytest
import torch

from steppe.lab import measure
from steppe.lab.atlas import write_landscapes
from steppe.lab.landscapes import measure_landscapes
from steppe.lab.options import Landscapes
from steppe.lab.train import cross_entropy
from steppe.lab.trained import find, load

QUICK = Landscapes(examples=64, batch_size=64, points=5, draws=3)


@pytest.fixture(scope="module")
def runs(finished_study, tmp_path_factory):
    return find([shutil.copytree(finished_study, tmp_path_factory.mktemp("drawn") / "study")])[0]


@pytest.fixture(scope="module")
def drawn(runs):
    return measure_landscapes(runs, QUICK)


def loss_and_accuracy(run):
    model, ((images, labels),) = load(run, QUICK)
    with torch.no_grad():
        hits = (model(images).argmax(1) == labels).double().mean()
        return float(cross_entropy(model, (images, labels)).mean()), float(hits)


def test_curves_have_the_seeds_of_a_method_together_and_maps_are_one_a_run(runs, drawn):
    curves, maps = drawn
    assert {name: tuple(curve.losses.shape) for name, curve in curves.items()} == {
        "sgd()": (6, 5),
        "sam(rho=0.5)": (6, 5),
    }
    assert list(maps) == ["sgd() seed 0", "sgd() seed 1", "sam(rho=0.5) seed 0", "sam(rho=0.5) seed 1"]
    for run, plane in zip(runs, maps.values(), strict=True):
        assert plane.losses.shape == (1, 5, 5)
        assert (float(plane.loss[2, 2]), float(plane.accuracy[2, 2])) == pytest.approx(loss_and_accuracy(run), rel=1e-5)
    middle = [loss_and_accuracy(run)[0] for run in runs[2:] for _ in range(3)]
    assert curves["sam(rho=0.5)"].losses[:, 2].tolist() == pytest.approx(middle, rel=1e-5)


def test_nothing_is_measured_twice(runs, drawn, monkeypatch):
    monkeypatch.setattr(measure, "load", None)
    again = measure_landscapes(runs, QUICK)
    for one, two in zip(drawn, again, strict=True):
        assert all(torch.equal(one[name].losses, two[name].losses) for name in one)
    assert list(measure_landscapes(runs[:1], replace(QUICK, dims=(1,)))[0]) == ["sgd()"]
    with pytest.raises(TypeError):
        measure_landscapes(runs, replace(QUICK, radius=0.5))


@pytest.mark.parametrize("directions", ["adversarial", "eigenvectors"])
def test_other_directions(runs, directions):
    curves, maps = measure_landscapes(runs[:1], replace(QUICK, directions=directions, points=3, draws=2, radius=0.1))
    assert len(curves["sgd()"].losses) == (2 if directions == "adversarial" else 1)
    assert all(directions.removesuffix("s") in name for name in maps["sgd() seed 0"].names)


def test_a_line_leads_from_the_first_run_to_the_others(runs):
    lines, maps = measure_landscapes(runs[:3], replace(QUICK, directions="line", points=7))
    assert maps == {}
    assert list(lines) == ["sgd() seed 0 to sgd() seed 1", "sgd() seed 0 to sam(rho=0.5) seed 0"]
    line = lines["sgd() seed 0 to sam(rho=0.5) seed 0"]
    ends = [int((line.coordinates - t).abs().argmin()) for t in (0.0, 1.0)]
    model, batches = load(runs[0], QUICK)
    model.load_state_dict(load(runs[2], QUICK)[0].state_dict())
    with torch.no_grad():
        other = float(cross_entropy(model, batches[0]).mean())
    assert line.loss[ends].tolist() == pytest.approx([loss_and_accuracy(runs[0])[0], other], rel=1e-5)


def test_lines_need_two_runs_of_one_network(runs):
    what = replace(QUICK, directions="line")
    with pytest.raises(ValueError, match="two ends"):
        measure_landscapes(runs[:1], what)
    wide = type(runs[1]).at(runs[1].folder)
    wide.config = replace(wide.config, width=8)
    with pytest.raises(ValueError, match=r"no line leads.*cnn of width 2.*cnn of width 8"):
        measure_landscapes([runs[0], wide], what)


def test_files(drawn, tmp_path):
    files = write_landscapes(*drawn, ["runs/x: the run failed"], QUICK, tmp_path, "steppe landscape x")
    pictures = ("curves", "map-loss", "map-accuracy")
    expected = {f"{name}.{kind}" for name in pictures for kind in ("png", "svg")}
    expected |= {"surfaces.html", "landscape.json", "landscape.md"}
    assert {file.name for file in files} == {file.name for file in tmp_path.iterdir()} == expected
    for name in pictures:
        assert (tmp_path / f"{name}.png").read_bytes().startswith(b"\x89PNG")
        assert "</svg>" in (tmp_path / f"{name}.svg").read_text()
    lines = (tmp_path / "landscape.md").read_text().splitlines()
    assert [name for name in pictures if any(f"({name}.png)" in line for line in lines)] == list(pictures)
    assert "- left out: runs/x: the run failed" in lines
    assert "    steppe landscape x" in lines
    kept = json.loads((tmp_path / "landscape.json").read_text())
    assert kept["curves"]["sgd()"]["losses"] == drawn[0]["sgd()"].losses.tolist()
    page = (tmp_path / "surfaces.html").read_text()
    assert not re.findall(r"<(?:script|link|img)[^>]+(?:src|href)=", page)
    assert all(f'"{name}"' in page for name in drawn[1])


def test_curves_alone_have_no_page(drawn, tmp_path):
    write_landscapes(drawn[0], {}, [], replace(QUICK, dims=(1,)), tmp_path, "steppe landscape x")
    assert not list(tmp_path.glob("*map*")) + list(tmp_path.glob("*.html"))


def test_eigenvectors_that_did_not_converge_are_named(drawn, tmp_path):
    curves = {"sgd()": replace(drawn[0]["sgd()"], converged=False)}
    write_landscapes(curves, {}, [], replace(QUICK, directions="eigenvectors"), tmp_path, "steppe landscape x")
    assert "- sgd(): the eigenvectors did not converge" in (tmp_path / "landscape.md").read_text().splitlines()
