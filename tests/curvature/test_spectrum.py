"""Stochastic Lanczos quadrature against the same probes and the known spectrum."""

from __future__ import annotations

import pytest
import torch

from dense import Dense, diagonal_of, network_like, with_spectrum
from steppe.curvature.matrix import signs
from steppe.curvature.spectrum import spectrum


@pytest.mark.parametrize("steps", [3, 20, 80])
def test_moments_are_those_of_the_same_probes(steps):
    A = with_spectrum(network_like() / 5)
    found = spectrum(A, steps, draws=4, seed=7)
    generator = torch.Generator().manual_seed(7)
    probes = torch.cat([signs(A, generator, 1) for _ in range(4)], 1)
    image = probes
    for p in range(1, 6):
        image = A.matrix @ image
        forms = (probes * image).sum(0) / 300
        value, error = found.moment(p)
        assert value == pytest.approx(float(forms.mean()), rel=1e-10)
        assert error == pytest.approx(float(forms.std() / 2), rel=1e-10)
    assert found.passes == 4 * steps


def test_moments_lie_within_their_standard_errors():
    true = network_like() / 5
    found = spectrum(with_spectrum(true), 20, draws=40)
    for p in range(1, 6):
        value, error = found.moment(p)
        assert abs(value - float((true**p).mean())) < 4 * error


def test_density_is_the_broadened_spectrum():
    true = network_like() / 5
    grid = torch.linspace(-1, 2.5, 400).double()
    value, error = spectrum(with_spectrum(true), 60, draws=40).density(grid, 0.1)
    exact = torch.exp(-(((grid[:, None] - true) / 0.1) ** 2) / 2).mean(1) / (0.1 * (2 * torch.pi) ** 0.5)
    assert ((value - exact).abs() < 4 * error + 1e-9).double().mean() > 0.99
    assert (value - exact).abs().max() < 0.05 * exact.max()
    assert float(torch.trapezoid(value, grid)) == pytest.approx(1, abs=1e-3)


def test_a_draw_that_needs_fewer_steps_is_exact():
    found = spectrum(diagonal_of(*[1.0] * 5, *[3.0] * 15), steps=10, draws=3)
    assert found.passes == 6
    assert torch.allclose(found.weights.sum(1), torch.ones(3).double())
    assert (found.weights[:, 2:] == 0).all()
    assert found.nodes.diff(dim=1).min() >= 0
    assert found.moment(2) == (pytest.approx(7), pytest.approx(0, abs=1e-12))
    assert found.density(torch.linspace(0, 4, 9).double())[0].isfinite().all()


def test_more_steps_than_rows():
    found = spectrum(diagonal_of(1, 2, 3), steps=80, draws=2)
    assert found.nodes.shape == (2, 3)
    assert found.moment(3)[0] == pytest.approx(12)


def test_single_draw_has_no_error():
    value, error = spectrum(diagonal_of(1, 2, 3), draws=1).moment(1)
    assert value == pytest.approx(2)
    assert error != error


def test_a_multiple_of_the_identity():
    found = spectrum(Dense(2 * torch.eye(6).double()), draws=2)
    assert found.moment(2) == (pytest.approx(4), pytest.approx(0))
    assert found.density(torch.tensor([2.0]))[0].isfinite().all()
    found.plot()


def test_plot_and_progress():
    shares = []
    found = spectrum(with_spectrum(network_like()), 10, 3, progress=shares.append)
    assert shares == sorted(shares)
    assert shares[-1] == 1
    axes = found.plot(label="a")
    assert axes.get_yscale() == "log"
    assert found.plot(axes, label="b") is axes
    assert len(axes.lines) == 2


@pytest.mark.parametrize("arguments", [{"steps": 0}, {"draws": 0}])
def test_bad_arguments(arguments):
    with pytest.raises(ValueError, match="must be a whole number"):
        spectrum(diagonal_of(1, 2), **arguments)


def test_bad_width():
    with pytest.raises(ValueError, match="width=0"):
        spectrum(diagonal_of(1, 2)).density(torch.zeros(1), 0.0)
