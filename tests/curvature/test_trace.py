"""Hutchinson's estimator and Hutch++ against traces that are known."""

from __future__ import annotations

import pytest
import torch

from dense import Dense, diagonal_of, network_like, with_spectrum
from steppe.curvature.trace import trace

METHODS = ["hutchinson", "hutch++"]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("products", [60, 61, 100])
def test_the_trace_lies_within_its_standard_error(method, products):
    A = with_spectrum(network_like())
    found = trace(A, products, method)
    assert abs(found.value - float(A.matrix.trace())) < 4 * found.error
    assert found.products == found.passes == A.passes == products


@pytest.mark.parametrize("method", METHODS)
def test_is_unbiased_and_its_standard_error_is_right(method):
    A = with_spectrum(network_like(60))
    found = [trace(A, 18, method, seed=seed) for seed in range(400)]
    values = torch.tensor([each.value for each in found]).double()
    errors = torch.tensor([each.error for each in found]).double()
    assert abs(values.mean() - A.matrix.trace()) < 4 * values.std() / 20
    assert float(values.std()) == pytest.approx(float(errors.square().mean().sqrt()), rel=0.15)


def test_hutch_is_exact_on_low_rank():
    A = with_spectrum([5.0, -3.0, 2.0, 1.0] + [0.0] * 196)
    found = trace(A, 12, "hutch++")
    assert found.value == pytest.approx(5, abs=1e-10)
    assert found.error < 1e-10
    assert trace(A, 12, "hutchinson").error > 0.1


def test_hutch_is_the_better_one_where_few_eigenvalues_are_large():
    A = with_spectrum(10 / torch.arange(1, 301).double() ** 2)
    assert trace(A, 60, "hutch++").error < 0.1 * trace(A, 60, "hutchinson").error


def test_on_a_diagonal_matrix_every_probe_is_exact():
    found = trace(diagonal_of(1, 2, 3, 4), 2, "hutchinson")
    assert (found.value, found.error) == (10, 0)


def test_more_products_than_rows_and_the_zero_matrix():
    found = trace(with_spectrum([1.0, 2.0, 3.0]), 60)
    assert found.value == pytest.approx(6)
    assert found.error < 1e-12
    zero = trace(Dense(torch.zeros(4, 4).double()))
    assert (zero.value, zero.error) == (0, 0)


def test_float32_and_progress():
    shares = []
    found = trace(with_spectrum(network_like(), dtype=torch.float32), progress=shares.append)
    assert abs(found.value - 22) < 4 * found.error
    assert shares == sorted(shares)
    assert shares[-1] == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"products": 1, "method": "hutchinson"}, "products=1 must be at least 2 for hutchinson"),
        ({"products": 5}, r"products=5 must be at least 6 for hutch\+\+"),
        ({"method": "hutch"}, "method='hutch' must be"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        trace(diagonal_of(1, 2), **arguments)
