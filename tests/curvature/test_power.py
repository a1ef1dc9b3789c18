"""Power iteration, the cross-check of the Lanczos process."""

from __future__ import annotations

import pytest
import torch

from dense import Dense, diagonal_of, network_like, normal, with_spectrum
from steppe.curvature.eigenvalues import eigenvalues
from steppe.curvature.power import power


def test_agrees_with_lanczos():
    A = with_spectrum(network_like())
    found, other = power(A), eigenvalues(A)
    assert found.converged.all()
    assert other.converged.all()
    assert float(found.values[0]) == pytest.approx(float(other.values[0]), rel=1e-3)
    assert found.passes == found.products > other.products


@pytest.mark.parametrize(
    ("values", "largest", "magnitude"),
    [
        ((2.0, -5.0, 1.0, 0.5), 2.0, -5.0),
        ((-1.0, -2.0, -5.0), -1.0, -5.0),
        ((3.0, -2.9, 1.0), 3.0, 3.0),
        ((-2.0, -2.0, -2.0), -2.0, -2.0),
        ((0.0, 0.0), 0.0, 0.0),
    ],
)
def test_is_shifted_past_negative_eigenvalues(values, largest, magnitude):
    for which, true in (("largest", largest), ("magnitude", magnitude)):
        found = power(diagonal_of(*values), which, tol=1e-6)
        assert found.converged.all()
        assert float(found.values[0]) == pytest.approx(true, rel=1e-6)


def test_two_of_opposite_sign():
    A = diagonal_of(3, -3, 1, 0.5)
    assert float(power(A, tol=1e-6).values[0]) == pytest.approx(3, rel=1e-6)
    stuck = power(A, "magnitude")
    assert not stuck.converged.any()
    assert stuck.products == 1000


@pytest.mark.parametrize("seed", range(20))
def test_the_bound_holds_an_eigenvalue_whether_converged_or_not(seed):
    M = normal(30, 30, seed=seed)
    A = Dense(M + M.T)
    for products in (3, 10, 200):
        found = power(A, tol=1e-4, max_products=products, seed=seed)
        distance = (torch.linalg.eigvalsh(A.matrix) - found.values).abs().min()
        assert distance <= found.bounds[0]
        assert bool(found.converged[0]) <= bool(found.bounds[0] <= 1e-4 * abs(found.values[0]))


def test_out_of_products_before_the_shift_is_not_converged():
    A = diagonal_of(-2, -2, -2)
    assert not power(A, max_products=1).converged.any()
    assert power(A, "magnitude", max_products=1).converged.all()


def test_slow_convergence_is_not_taken_for_convergence():
    """Successive values differ by 1e-6 of the value long before it is right to 1e-3."""
    A = diagonal_of(*torch.linspace(0, 1, 100).tolist())
    short = power(A, tol=1e-5, max_products=150)
    assert not short.converged.any()
    assert float(short.values[0]) < 1 - 1e-4


def test_bad_arguments():
    with pytest.raises(ValueError, match="which='smallest' must be 'largest' or 'magnitude'"):
        power(diagonal_of(1, 2), "smallest")
