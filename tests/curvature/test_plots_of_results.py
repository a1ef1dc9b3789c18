"""Pictures of results."""

from __future__ import annotations

import math
import warnings
from dataclasses import replace

import matplotlib as mpl
import pytest
import torch

mpl.use("Agg")

from matplotlib import pyplot as plt

from steppe.curvature import (
    Activity,
    AverageSharpness,
    Bound,
    Cosines,
    Diagonal,
    Eigenvalues,
    FilterNorms,
    Kernel,
    Linearity,
    MSharpness,
    Spectrum,
    SurrogateGap,
    Trace,
)
from steppe.curvature.landscape import Landscape


def vector(*values):
    return torch.tensor(values, dtype=torch.float64)


RISES = vector(0.1, 0.3, 0.3, 0.7)
POINTS = torch.linspace(-1, 1, 5, dtype=torch.float64)
GAP = SurrogateGap(rho=0.1, steps=1, loss=0.5, gap=0.3, slope=0.2, sharpness=60.0, curvature=20.0, passes=1.0)
GROUPS = MSharpness(rho=0.05, m=8, steps=1, sharpness=0.35, error=0.125, values=RISES, passes=1.0)
DRAWS = AverageSharpness(
    noise="filter", deviation=0.01, draws=4, loss=0.5, sharpness=0.35, error=0.125, values=RISES, passes=1.0
)
BATCHES = Linearity(rho=0.05, beta=1.0, zeta=0.35, error=0.125, values=RISES, passes=1.0)
COSINES = Cosines(
    rho=0.05,
    gamma=0.5,
    sharpest=0.9,
    flattest=0.2,
    random=0.6,
    errors=(0.01, 0.02, 0.03),
    values=torch.zeros(2, 3),
    passes=1.0,
)
BOUND = Bound(
    rho=0.05,
    delta=0.05,
    examples=9,
    parameters=3,
    norm=1.0,
    perturbed=0.25,
    complexity=0.5,
    bound=0.75,
    vacuous=False,
    passes=1.0,
)
KERNEL = Kernel(kernel=torch.zeros(4, 4), eigenvalues=vector(100, 10, 1, 0.1), rank=4, examples=2, passes=1.0)
TRACE = Trace(value=5.0, error=0.5, products=60, passes=1.0)
RESULTS = [
    GAP,
    GROUPS,
    DRAWS,
    BATCHES,
    COSINES,
    BOUND,
    KERNEL,
    TRACE,
    FilterNorms({"weight": RISES}),
    Activity(shares={"relu": 0.5}, neurons={"relu": 4}, share=0.5, passes=1.0),
    Spectrum(nodes=RISES[None], weights=torch.full((1, 4), 0.25), passes=1.0),
    Diagonal(values=RISES, errors=RISES, products=2, passes=1.0),
    Eigenvalues(
        values=RISES,
        bounds=RISES,
        errors=RISES,
        limit=1.0,
        converged=RISES > 0,
        vectors=torch.zeros(4, 4),
        products=4,
        passes=1.0,
    ),
    Landscape(POINTS, POINTS.square()[None], None, ("u",), True, 1.0),
]


@pytest.fixture(autouse=True)
def _closed():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield
    plt.close("all")


def legend(axes):
    return [text.get_text() for text in axes.get_legend().get_texts()]


def ticks(axes):
    return [text.get_text() for text in axes.get_xticklabels()]


def bars(axes):
    """The ends of the error bars, one row for each."""
    return torch.tensor([[y for _, y in bar] for bar in axes.collections[0].get_segments()], dtype=torch.float64)


@pytest.mark.parametrize("result", RESULTS, ids=lambda result: type(result).__name__)
def test_every_result_has_its_cost_and_a_picture_on_new_or_given_axes(result):
    assert result.passes == (0 if isinstance(result, FilterNorms) else 1)
    new = result.plot()
    assert new.has_data()
    new.figure.canvas.draw()
    assert new.get_ylabel()
    assert new.get_xlabel() or ticks(new)
    _, (other, given) = plt.subplots(1, 2)
    before = plt.get_fignums()
    assert result.plot(given) is given
    assert given.has_data()
    assert not other.has_data()
    assert plt.get_fignums() == before


@pytest.mark.parametrize(
    ("result", "across", "up"),
    [
        (GROUPS, "rise of a group's loss, ρ = 0.05", "groups of 8"),
        (DRAWS, "rise of the loss under filter-wise noise, γ = 0.01", "draws"),
        (replace(DRAWS, noise="gaussian"), "rise of the loss under Gaussian noise, σ = 0.01", "draws"),
        (BATCHES, "ζ, distance of the loss from linear, ρ = 0.05", "batches"),
    ],
)
def test_histograms_hold_every_value_and_their_mean(result, across, up):
    axes = result.plot()
    assert (axes.get_xlabel(), axes.get_ylabel()) == (across, up)
    outline, band = axes.patches
    counts, edges, _ = outline.get_data()
    for value, count in ((0.1, 1), (0.3, 2), (0.7, 1)):
        assert counts[(edges[:-1] <= value) & (value < edges[1:])].tolist() == [count]
    assert counts.sum() == 4
    assert axes.lines[0].get_xdata() == [0.35, 0.35]
    assert (band.get_x(), band.get_width()) == pytest.approx((0.225, 0.25))
    assert legend(axes) == ["mean 0.35 ± 0.12"]


@pytest.mark.parametrize("value", [0.0, 0.3, -1e-9, 1e6])
@pytest.mark.parametrize("count", [1, 3])
def test_histogram_of_equal_values_has_no_error_to_show(value, count):
    values = torch.full((count,), value, dtype=torch.float64)
    values[-1] *= 1 + 1e-16
    axes = replace(GROUPS, sharpness=value, error=math.nan, values=values).plot()
    (outline,) = axes.patches
    assert max(outline.get_data().values) == count
    assert legend(axes) == [f"mean {value:.3g}"]


def test_a_second_histogram_on_the_axes_has_its_own_colour():
    axes = GROUPS.plot()
    replace(GROUPS, sharpness=0.4).plot(axes)
    first, second = (line.get_color() for line in axes.lines)
    assert first != second
    assert legend(axes) == ["mean 0.35 ± 0.12", "mean 0.4 ± 0.12"]


def test_surrogate_gap_is_slope_and_curvature():
    axes = GAP.plot()
    tangent, points = axes.lines
    assert list(tangent.get_ydata()) == pytest.approx([0.5, 0.7])
    assert list(points.get_ydata()) == pytest.approx([0.5, 0.8])
    assert bars(axes).tolist() == [pytest.approx([0.7, 0.8])]
    assert legend(axes) == ["slope: 0.2", "curvature: 0.1", "gap: 0.3"]
    assert ticks(axes) == ["w", "w + ε"]


def test_cosines_with_their_errors():
    axes = COSINES.plot()
    assert list(axes.lines[0].get_ydata()) == [0.9, 0.2, 0.6]
    assert ticks(axes) == ["B⁺", "B⁻", "random"]
    assert (bars(axes).diff(dim=1)[:, 0] / 2).tolist() == pytest.approx([0.01, 0.02, 0.03])
    replace(COSINES, errors=(math.nan,) * 3).plot().figure.canvas.draw()


@pytest.mark.parametrize("perturbed", [0.25, 25.0])
def test_bound_is_the_height_of_the_bar(perturbed):
    axes = replace(BOUND, perturbed=perturbed, bound=perturbed + 0.5).plot()
    loss, complexity = axes.patches
    assert (loss.get_y(), loss.get_height()) == (0, perturbed)
    assert (complexity.get_y(), complexity.get_height()) == (perturbed, 0.5)
    assert list(axes.lines[0].get_ydata()) == [1, 1]
    assert axes.get_ylim()[1] > max(1, perturbed + 0.5)
    assert axes.get_ylabel() == "bound on the loss, with probability 95 %"
    assert ticks(axes) == ["ρ = 0.05"]
    assert sorted(legend(axes)) == ["complexity", "loss at w + ε", "vacuous from here"]


def test_kernel_in_order_on_a_logarithmic_scale():
    axes = KERNEL.plot()
    (points,) = axes.lines
    assert axes.get_yscale() == "log"
    assert list(points.get_xdata()) == [1, 2, 3, 4]
    assert list(points.get_ydata()) == [100, 10, 1, 0.1]
    assert legend(axes) == ["κ = 1e+03"]


def test_eigenvalues_of_a_singular_kernel_that_are_not_told_from_0_are_hollow():
    axes = replace(KERNEL, eigenvalues=vector(100, 10, 1e-15, -1e-14), rank=2).plot()
    full, hollow = axes.lines
    assert list(full.get_ydata()) == [100, 10]
    assert list(hollow.get_xdata()) == [3, 4]
    assert list(hollow.get_ydata()) == [1e-15, 1e-14]
    assert hollow.get_markerfacecolor() == "none"
    assert legend(axes) == ["κ = inf", "not told from 0"]
    replace(KERNEL, eigenvalues=vector(1, 0, 0, 0), rank=1).plot().figure.canvas.draw()


def test_trace_over_its_products():
    axes = TRACE.plot()
    assert axes.lines[0].get_xydata().tolist() == [[60, 5]]
    assert bars(axes).tolist() == [[4.5, 5.5]]
    replace(TRACE, error=math.nan).plot().figure.canvas.draw()
