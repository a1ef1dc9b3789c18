"""The eigenvalues at the ends of a matrix: against dense ones and SciPy, with bounds that hold, and no false peace."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.sparse.linalg import eigsh

from dense import Dense, Diagonal, diagonal_of, network_like, normal, with_spectrum
from steppe.curvature.eigenvalues import eigenvalues


@pytest.mark.parametrize(("dtype", "tol"), [(torch.float64, 1e-10), (torch.float32, 1e-5)])
@pytest.mark.parametrize("basis", [60, 18])
def test_of_a_quadratic_with_a_known_spectrum(dtype, tol, basis):
    A = with_spectrum(network_like(), dtype=dtype)
    top = eigenvalues(A, 4, tol=tol, basis=basis)
    bottom = eigenvalues(A, 2, "smallest", tol=tol, basis=basis)
    far = eigenvalues(A, 5, "magnitude", tol=tol, basis=basis)
    for found, true in ((top, [10, 8, 6, 5]), (bottom, [-4, -3]), (far, [10, 8, 6, 5, -4])):
        true = torch.tensor(true).double()
        assert ((found.values - true).abs() <= tol * true.abs()).all()
        assert found.converged.all()
        assert (found.bounds <= tol * true.abs()).all()
        v = found.vectors
        assert torch.allclose(v @ v.T, torch.eye(len(v)).to(v), atol=tol)
        assert ((A.matrix @ v.T - v.T * found.values.to(v)).norm(dim=0) <= found.bounds + 1e-15).all()
    assert 10 <= top.limit < 10 * (1 + tol**0.5)
    assert -4 * (1 + tol**0.5) < bottom.limit <= -4
    assert A.passes == top.products + bottom.products + far.products == top.passes + bottom.passes + far.passes


def test_agrees_with_scipy():
    M = normal(200, 200, seed=3)
    M = M + M.T
    for which, name in (("largest", "LA"), ("smallest", "SA"), ("magnitude", "LM")):
        true = eigsh(M.numpy(), 6, which=name, tol=1e-12)[0]
        key = {"largest": -true, "smallest": true, "magnitude": -abs(true)}[which]
        found = eigenvalues(Dense(M), 6, which, tol=1e-10)
        np.testing.assert_allclose(found.values, true[np.argsort(key)], rtol=1e-10)
        assert found.converged.all()


@st.composite
def spectra(draw):
    """Random, clustered, multiple, negative and low-rank spectra."""
    centres = draw(st.lists(st.integers(-9, 9), min_size=1, max_size=6))
    width = draw(st.sampled_from([0.0, 1e-8, 1e-3, 0.1, 1.0]))
    n = draw(st.integers(1, 60))
    seed = draw(st.integers(0, 100))
    rng = np.random.default_rng(seed)
    return torch.tensor(rng.choice(centres, n) + width * rng.standard_normal(n)), seed


@settings(max_examples=100, deadline=None)
@given(
    spectra(),
    st.sampled_from(["largest", "smallest", "magnitude"]),
    st.integers(1, 6),
    st.sampled_from([1e-1, 1e-2, 1e-4, 1e-10]),
    st.sampled_from([torch.float32, torch.float64]),
)
def test_every_bound_holds_an_eigenvalue(spectrum, which, k, tol, dtype):
    values, seed = spectrum
    A = with_spectrum(values, seed, dtype)
    true = torch.linalg.eigvalsh(A.matrix.double())
    k = min(k, len(values))
    found = eigenvalues(A, k, which, tol=tol, seed=seed, basis=22, max_products=200)
    slack = 20 * torch.finfo(torch.float64).eps * float(true.abs().max())  # rounding in what it is compared with
    distance = (found.values[:, None] - true[None, :]).abs().amin(1)
    assert (distance <= found.bounds + slack).all()
    assert (found.converged <= (found.bounds <= tol * found.values.abs())).all()
    key = {"largest": found.values, "smallest": -found.values, "magnitude": found.values.abs()}[which]
    assert (key.diff() <= 0).all()
    v = found.vectors.double()
    assert torch.allclose(v @ v.T, torch.eye(k).double(), atol=1e-5 if dtype == torch.float32 else 1e-12)
    residuals = (A.matrix.double() @ v.T - v.T * found.values).norm(dim=0)
    assert (residuals <= found.bounds + slack).all()


def test_the_limit_holds_at_every_product_and_closes_in():
    true = torch.cat([torch.linspace(0, 1, 99), torch.tensor([1.3])]).double()
    for products, excess in ((1, 300.0), (4, 1.5), (8, 0.15), (16, 1e-3)):
        found = [eigenvalues(Diagonal(true), max_products=products, tol=0, seed=seed) for seed in range(100)]
        assert sum(each.limit < 1.3 for each in found) <= 4  # 1 is expected at most
        assert sum(each.limit < 1.3 + excess for each in found) >= 95


@pytest.mark.parametrize("which", ["largest", "smallest", "magnitude"])
def test_multiple_eigenvalues_are_found_as_often_as_they_count(which):
    sign = -1 if which == "smallest" else 1
    A = with_spectrum(sign * torch.tensor([5.0, 5, 5, 4, 4] + [1.0] * 15))
    found = eigenvalues(A, 6, which, tol=1e-10)
    assert torch.allclose(sign * found.values, torch.tensor([5.0, 5, 5, 4, 4, 1]).double(), atol=1e-12)
    assert found.converged.all()
    assert eigenvalues(diagonal_of(*[3.0] * 8), 8).values.tolist() == pytest.approx([3.0] * 8)


@pytest.mark.parametrize("vector", [0, 1, 2])
def test_a_start_without_the_wanted_eigenvector_finds_it(vector):
    """An eigenvector as start ends a Lanczos process at once, at whatever its eigenvalue is."""
    A = with_spectrum(network_like())
    v = torch.linalg.eigh(A.matrix).eigenvectors
    start = v[:, -1 - vector] if vector else torch.zeros(300).double()
    found = eigenvalues(A, 1, tol=1e-6, start=start)
    assert float(found.values[0]) == pytest.approx(10, rel=1e-6)
    assert found.converged.all()


def test_a_plateau_at_another_eigenvalue_is_not_taken_for_the_largest():
    """One eigenvalue beyond a narrow bulk: the first residual is below 1 %, and successive values agree to 1e-4."""
    A = Diagonal(torch.cat([torch.linspace(0.999, 1.001, 39_999), torch.tensor([2.0])]).double())
    first = eigenvalues(A, tol=1e-2, max_products=1)
    assert first.bounds[0] < 1e-2 * first.values[0] < first.values[0] < 1.01
    assert not first.converged.any()
    assert first.limit > 2
    found = eigenvalues(A, tol=1e-2)
    assert found.converged.all()
    assert float(found.values[0]) == pytest.approx(2, rel=1e-2)


def test_giving_up_is_said():
    found = eigenvalues(Diagonal(torch.linspace(0, 1, 300).double()), 3, tol=1e-8, max_products=20)
    assert found.products == 20
    assert not found.converged.any()
    assert (found.bounds > 1e-8 * found.values).all()
    partly = eigenvalues(with_spectrum(network_like()), 5, tol=1e-8, max_products=18)
    assert partly.converged.tolist() == [True, True, True, True, False]


def test_rounding_is_part_of_the_bounds():
    A = with_spectrum(network_like(), dtype=torch.float32)
    found = eigenvalues(A, 2, tol=1e-12)
    assert found.products < 40
    assert not found.converged.any()
    assert (found.bounds >= torch.finfo(torch.float32).eps * 10).all()
    assert torch.allclose(found.values, torch.tensor([10.0, 8.0]).double(), rtol=1e-6)


def test_the_zero_matrix():
    found = eigenvalues(Dense(torch.zeros(5, 5).double()), 3)
    assert found.values.tolist() == [0.0] * 3
    assert found.converged.all()
    assert found.limit == 0


def test_ratio_and_order():
    found = eigenvalues(with_spectrum(network_like()), 4, tol=1e-8)
    assert found.ratio(4) == pytest.approx(2)
    with pytest.raises(ValueError, match=r"ratio\(5\) needs 5 eigenvalues, here are 4: call eigenvalues\(k=5\)"):
        found.ratio()


def test_a_seed_and_a_start_are_reproducible():
    A = with_spectrum(network_like())
    one, same, other = (eigenvalues(A, max_products=5, seed=seed) for seed in (1, 1, 2))
    assert torch.equal(one.vectors, same.vectors)
    assert not torch.equal(one.vectors, other.vectors)
    top = torch.linalg.eigh(A.matrix).eigenvectors[:, -1]
    assert eigenvalues(A, tol=1e-8, start=top).products <= eigenvalues(A, tol=1e-8).products


def test_progress_runs_to_one():
    shares = []
    eigenvalues(with_spectrum(network_like()), progress=shares.append)
    assert shares[0] == 0
    assert shares[-1] == 1
    assert shares == sorted(shares)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"k": 5}, "k=5 eigenvalues of a matrix of 4 rows"),
        ({"k": 3, "max_products": 2}, "k=3 eigenvalues of max_products=2"),
        ({"k": 0}, "k=0 must be a whole number"),
        ({"which": "largset"}, "which='largset' must be"),
        ({"tol": -1.0}, "tol=-1.0 must be"),
        ({"start": torch.ones(3)}, r"start must be a finite vector of 4 entries, got shape \(3,\)"),
        ({"start": torch.full((4,), torch.inf)}, "start must be a finite vector"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        eigenvalues(diagonal_of(1, 2, 3, 4), **arguments)


def test_plot():
    axes = eigenvalues(with_spectrum(network_like()), 5, max_products=18, tol=1e-8).plot()
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["converged", "not converged"]
    assert eigenvalues(diagonal_of(1, 2)).plot(axes) is axes
