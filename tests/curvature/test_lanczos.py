"""The Lanczos process against dense eigenproblems."""

from __future__ import annotations

import pytest
import torch

from dense import Dense, network_like, normal, with_spectrum
from steppe.curvature.lanczos import Lanczos


def grown(A: Dense, start: torch.Tensor, steps: int) -> Lanczos:
    process = Lanczos(A, start, steps)
    for _ in range(steps):
        process.step()
    return process


def test_basis_is_orthonormal_and_the_small_matrix_is_its_projection():
    A = with_spectrum(network_like())
    process = grown(A, normal(300), 120)
    Q = process.basis[:120]
    assert torch.allclose(Q @ Q.T, torch.eye(120).double(), atol=1e-13)
    assert torch.allclose(process.H, Q @ A.matrix @ Q.T, atol=1e-13)
    off = process.H - process.H.tril(1).triu(-1)
    assert off.abs().max() < 1e-13  # tridiagonal, as theory says
    assert A.passes == 120


def test_residual_norms_are_those_of_the_vectors():
    A = with_spectrum(network_like())
    process = grown(A, normal(300), 15)
    values, residuals, coordinates = process.ritz()
    Y = process.vectors(coordinates)
    true = (A.matrix @ Y.T - Y.T * values).norm(dim=0)
    assert torch.allclose(residuals, true, atol=1e-13)
    assert residuals.min() < 0.1 * residuals.max()


def test_after_a_restart_the_residual_norms_still_are():
    A = with_spectrum(network_like())
    process = Lanczos(A, normal(300), 20)
    for round in range(4):
        while process.rows < 20:
            process.step()
        values, residuals, coordinates = process.ritz()
        Y = process.vectors(coordinates)
        assert torch.allclose(residuals, (A.matrix @ Y.T - Y.T * values).norm(dim=0), atol=1e-12), round
        assert torch.allclose(process.basis @ process.basis.T, torch.eye(20).double(), atol=1e-13)
        process.keep(torch.arange(10, 20), locked=0)
    assert float(values[-1]) == pytest.approx(10, abs=1e-12)


def test_with_locked_vectors_the_residual_norms_still_are():
    """The locked ones are rough, and the rest couples to them."""
    A = with_spectrum(network_like())
    process = Lanczos(A, normal(300), 20)
    for round in range(3):
        while process.rows < 20:
            process.step()
        values, residuals, coordinates = process.ritz()
        Y = process.vectors(coordinates)
        assert torch.allclose(residuals, (A.matrix @ Y.T - Y.T * values).norm(dim=0), atol=1e-12)
        if round:
            process.keep(torch.tensor([0, 1, 2, *range(12, 20)]), locked=3)
        else:
            assert residuals[[5, 10, 15]].min() > 1e-3
            process.keep(torch.tensor([5, 10, 15]), locked=3)
            process.begin(normal(300, seed=1))


def test_full_space_gives_all_eigenvalues():
    true = torch.linspace(-1, 2, 40).double()
    process = grown(with_spectrum(true), normal(40), 40)
    values, residuals, _ = process.ritz()
    assert process.exhausted
    assert torch.allclose(values, true, atol=1e-13)
    assert residuals.max() == 0


def test_an_invariant_space_is_noticed():
    A = with_spectrum([1.0] * 10 + [2.0] * 10 + [5.0] * 10)
    process = grown(A, normal(30), 2)
    assert not process.exhausted
    process = grown(A, normal(30), 3)
    assert process.exhausted
    assert torch.allclose(process.ritz()[0], torch.tensor([1.0, 2.0, 5.0]).double(), atol=1e-13)


@pytest.mark.parametrize("restarted", [False, True])
def test_an_eigenvalue_beyond_the_limit_takes_a_smaller_share(restarted):
    """The largest eigenvector is taken out of the start but for a given share; the limit has to allow for it."""
    true = network_like()
    A = with_spectrum(true)
    v = torch.linalg.eigh(A.matrix).eigenvectors[:, -1]
    for share in (1e-4, 1e-8, 1e-12):
        start = normal(300)
        start = start - v * (v @ start)
        start = share**0.5 * v + (1 - share) ** 0.5 * start / start.norm()
        process = Lanczos(A, start, 8 if restarted else 60)
        closer = []
        for _ in range(40):
            if process.rows == process.room:
                process.keep(torch.arange(4, 8), locked=0)
            process.step()
            assert process.limit(1, share) >= 10 - 1e-9
            assert process.limit(-1, 1e-3 / 300) >= 4 - 1e-9
            closer.append(process.limit(1, share))
        assert closer[-1] == pytest.approx(10, rel=1e-3)
        assert closer[0] > 11


def test_a_matrix_that_is_not_finite_is_refused():
    A = Dense(torch.full((4, 4), torch.nan).double())
    with pytest.raises(ValueError, match="not finite"):
        Lanczos(A, normal(4), 4).step()
