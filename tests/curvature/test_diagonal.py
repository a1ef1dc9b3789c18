"""The estimated diagonal against the true one."""

from __future__ import annotations

import pytest
import torch

from dense import diagonal_of, network_like, with_spectrum
from steppe.curvature.diagonal import diagonal


def test_entries_lie_within_their_standard_errors():
    A = with_spectrum(network_like())
    found = diagonal(A, 200)
    z = (found.values - A.matrix.diagonal()) / found.errors
    assert z.abs().max() < 4.5  # of 300
    assert float(z.std()) == pytest.approx(1, abs=0.15)
    assert found.products == found.passes == A.passes == 200


def test_standard_errors_are_those_of_theory():
    A = with_spectrum(network_like())
    off = A.matrix - A.matrix.diagonal().diag()
    assert torch.allclose(diagonal(A, 400).errors, off.norm(dim=1) / 20, rtol=0.2)


def test_is_exact_on_a_diagonal_matrix():
    found = diagonal(diagonal_of(1, -2, 3), 2)
    assert found.values.tolist() == [1, -2, 3]
    assert found.errors.tolist() == [0, 0, 0]


def test_float32_progress_and_plot():
    shares = []
    A = with_spectrum(network_like(), dtype=torch.float32)
    found = diagonal(A, progress=shares.append)
    assert found.values.dtype == torch.float32
    assert shares == sorted(shares)
    assert shares[-1] == 1
    assert found.plot().get_yscale() == "log"


def test_bad_arguments():
    with pytest.raises(ValueError, match="products=1 must be at least 2"):
        diagonal(diagonal_of(1, 2), 1)
