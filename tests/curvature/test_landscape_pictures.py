"""Pictures and pages of landscapes."""

from __future__ import annotations

import json
import math
import re
import sys
from dataclasses import replace

import matplotlib as mpl
import numpy as np
import pytest
import torch

mpl.use("Agg")

from matplotlib import pyplot as plt

from steppe.curvature.landscape import Landscape
from steppe.curvature.pictures import draw, plot_landscapes
from steppe.curvature.surface import write_surfaces

X = torch.linspace(-1, 1, 21, dtype=torch.float64)


@pytest.fixture(autouse=True)
def _closed():
    yield
    plt.close("all")


def bowl(dims, depth=1.0, draws=1, accuracies=True):
    """``L = depth·|x|² + 0.01`` along one or two axes, a little more in each further draw."""
    squares = X**2 if dims == 1 else X[:, None] ** 2 + 2 * X**2
    losses = torch.stack([(depth + draw / 10) * squares + 0.01 for draw in range(draws)])
    names = ("filter-normalised direction",) if dims == 1 else ("direction 1", "direction 2")
    return Landscape(X, losses, torch.exp(-losses) if accuracies else None, names, True, 1.0)


def files(figure, folder):
    for kind, start in (("png", b"\x89PNG"), ("svg", b"<?xml")):
        figure.savefig(folder / f"picture.{kind}", dpi=50)
        assert (folder / f"picture.{kind}").read_bytes().startswith(start)


@pytest.mark.parametrize("value", ["loss", "accuracy"])
@pytest.mark.parametrize("dims", [1, 2])
def test_pictures_are_files(dims, value, tmp_path):
    axes = bowl(dims, draws=3).plot(value=value)
    files(axes.figure, tmp_path)
    files(plot_landscapes({"sgd": bowl(dims), "sam": bowl(dims, 0.2)}, value=value), tmp_path)


def test_curves_show_mean_and_spread():
    landscape = bowl(1, draws=3)
    axes = landscape.plot()
    np.testing.assert_array_equal(axes.lines[0].get_xydata(), torch.stack([X, landscape.loss], 1))
    band = axes.collections[0].get_paths()[0].vertices
    assert band[:, 1].max() == pytest.approx((landscape.loss + landscape.spread).max())
    assert not bowl(1).plot().collections
    assert axes.get_yscale() == "log"
    assert bowl(1).plot(value="accuracy").get_yscale() == "linear"
    assert axes.get_xlabel() == "filter-normalised direction"
    assert axes.get_ylabel() == "loss, mean ± deviation of 3 draws"
    assert bowl(1).plot().get_ylabel() == "loss"


def test_models_share_a_pair_of_axes():
    landscapes = {name: bowl(1, depth) for name, depth in (("sgd", 3.0), ("sam", 1.0), ("rwp", 0.3))}
    (axes,) = plot_landscapes(landscapes).axes
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["sgd", "sam", "rwp"]
    assert len({line.get_color() for line in axes.lines}) == 3
    one = bowl(1).plot(label="first")
    assert bowl(1).plot(one, label="second") is one
    assert len({line.get_color() for line in one.lines}) == 2


def test_maps_of_models_share_the_scale():
    figure = plot_landscapes({"sgd": bowl(2, 9.0), "sam": bowl(2)})
    sgd, sam, bar = figure.axes
    assert (sgd.get_title(), sam.get_title()) == ("sgd", "sam")
    assert bar.get_yscale() == "log"
    scales = [(axes.collections[0].norm.vmin, axes.collections[0].norm.vmax) for axes in (sgd, sam)]
    assert scales[0] == scales[1] == pytest.approx((0.01, 27.01), rel=1e-5)
    assert sgd.get_aspect() == sam.get_aspect() == 1


def test_what_did_not_converge_says_so_in_the_picture(tmp_path):
    unsure = {
        name: replace(
            bowl(2), names=("eigenvector 1 (not converged), λ = 2", f"eigenvector 2, λ = {i}"), converged=False
        )
        for i, name in enumerate(("sgd", "sam"))
    }
    sgd, sam, _ = plot_landscapes(unsure).axes
    assert [sgd.get_title(), sam.get_title()] == ["sgd (not converged)", "sam (not converged)"]
    assert (sam.get_xlabel(), sam.get_ylabel()) == ("eigenvector 1 (not converged), λ = 2", "eigenvector 2, λ = 1")
    axes = plt.subplots()[1]
    plot_landscapes(unsure, axes)
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["sgd (not converged)", "sam (not converged)"]
    assert axes.get_ylabel() == "eigenvector 2"
    write_surfaces(unsure, tmp_path / "page.html")
    assert "sam (not converged)" in (tmp_path / "page.html").read_text(encoding="utf-8")


def test_maps_on_one_pair_of_axes_are_lines_at_the_same_levels():
    figure, axes = plt.subplots()
    assert plot_landscapes({"sgd": bowl(2, 9.0), "sam": bowl(2)}, axes) is figure
    levels = [set(each.levels) for each in axes.collections if hasattr(each, "levels")]
    assert len(levels) == 2
    assert levels[1] < levels[0]
    assert len(axes.get_legend().get_texts()) == 2


def test_the_first_axis_is_horizontal():
    losses = (1 + X[:, None] + 0 * X)[None]
    axes = Landscape(X, losses, None, ("u", "v"), True, 1.0).plot()
    path = axes.collections[0].get_paths()[0].vertices
    assert path[:, 0].max() < -0.8
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("u", "v")


@pytest.mark.parametrize("dims", [1, 2])
def test_gaps_are_drawn_as_gaps(dims, tmp_path):
    landscape = bowl(dims)
    landscape.losses[0, 0] = math.inf
    landscape.losses[0, 3] = math.nan
    axes = landscape.plot()
    files(axes.figure, tmp_path)
    if dims == 1:
        assert np.isnan(axes.lines[0].get_ydata()[[0, 3]]).all()
    else:
        files(plot_landscapes({"a": landscape, "b": bowl(2)}), tmp_path)
        write_surfaces({"a": landscape}, tmp_path / "page.html")


@pytest.mark.parametrize("dims", [1, 2])
def test_flat_landscapes_are_drawn(dims, tmp_path):
    flat = Landscape(X, torch.full((1, *[21] * dims), 2.5).double(), None, ("u", "v")[:dims], True, 1.0)
    axes = flat.plot()
    assert dims == 2 or (axes.lines[0].get_ydata() == 2.5).all()
    files(axes.figure, tmp_path)
    files(flat.plot(label="flat").figure, tmp_path)


def test_a_page_holds_all_and_fetches_nothing(tmp_path):
    write_surfaces({"sgd": bowl(2, 9.0), "sam": bowl(2)}, tmp_path / "page.html")
    page = (tmp_path / "page.html").read_text(encoding="utf-8")
    scripts = re.findall(r"<script[^>]*>", page)
    assert scripts
    assert not [tag for tag in scripts if "src" in tag]
    assert not re.findall(r"<(?:link|iframe|img|object|embed)\b[^>]*(?:src|href|data)\s*=", page)
    assert not re.findall(r"@import|url\(\s*['\"]?https?:", page)
    own = page[page.rindex("Plotly.newPlot") :]
    assert "http" not in own
    assert "sgd" in own
    assert "sam" in own


def test_a_page_has_a_surface_and_a_button_for_each_model(tmp_path):
    write_surfaces({"sgd": bowl(2, 9.0), "sam": bowl(2)}, tmp_path / "page.html")
    page = (tmp_path / "page.html").read_text(encoding="utf-8")
    call = page[page.rindex("Plotly.newPlot(") :]
    decoder, position = json.JSONDecoder(), call.index("[")
    data, length = decoder.raw_decode(call[position:])
    layout, _ = decoder.raw_decode(call[call.index("{", position + length) :])
    assert [(trace["type"], trace["name"]) for trace in data] == [("surface", "sgd"), ("surface", "sam")]
    (menu,) = layout["updatemenus"]
    shown = {button["label"]: button["args"][0]["visible"] for button in menu["buttons"]}
    assert shown == {"all": [True, True], "sgd": [True, False], "sam": [False, True]}
    assert layout["scene"]["zaxis"]["title"]["text"] == "loss"
    axis = layout["scene"]["zaxis"]
    assert axis["range"] == pytest.approx([-2 - 0.1716, math.log10(27.01) + 0.1716], abs=1e-4)
    assert axis["ticktext"] == ["0.01", "0.1", "1", "10"]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda path: plot_landscapes({}), "no landscapes"),
        (lambda path: plot_landscapes({"a": bowl(1), "b": bowl(2)}), "one and of two dimensions"),
        (lambda path: bowl(1, accuracies=False).plot(value="accuracy"), "the accuracy was not measured"),
        (lambda path: bowl(1).plot(value="error"), "value='error'"),
        (lambda path: Landscape(X, (X / 0)[None], None, ("u",), True, 1.0).plot(), "no value"),
        (lambda path: write_surfaces({}, path), "no landscapes"),
        (lambda path: write_surfaces({"a": bowl(1)}, path), "landscape of a has one dimension"),
        (lambda path: write_surfaces({"a": bowl(2, accuracies=False)}, path, value="accuracy"), "not measured"),
    ],
)
def test_bad_input(call, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        call(tmp_path / "page.html")


@pytest.mark.parametrize(
    ("package", "call"),
    [
        ("matplotlib", lambda path: draw(bowl(1), None, label=None, value="loss")),
        ("plotly", lambda path: write_surfaces({"a": bowl(2)}, path)),
    ],
)
def test_a_missing_package_is_named_with_the_extra(package, call, tmp_path, monkeypatch):
    for name in [*filter(re.compile(rf"{package}(\.|$)").match, sys.modules), package]:
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ImportError, match=re.escape(f"{package}: pip install 'steppe[lab]'")):
        call(tmp_path / "page.html")
