"""Conjugate gradients, against dense solves."""

from __future__ import annotations

import pytest
import torch

from steppe.optim.cg import conjugate_gradients


def matrix(*eigenvalues, seed=0):
    n = len(eigenvalues)
    q, _ = torch.linalg.qr(torch.randn(n, n, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)))
    return (q * torch.tensor(eigenvalues, dtype=torch.float64)) @ q.T


def vector(n, seed=1):
    return torch.randn(n, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


class Counted:
    def __init__(self, matrix):
        self.matrix, self.calls = matrix, 0

    def __call__(self, v):
        self.calls += 1
        return self.matrix @ v


@pytest.mark.parametrize("started", [False, True])
def test_they_solve(started):
    A, b = matrix(*torch.logspace(-2, 2, 40).tolist()), vector(40)
    exact = torch.linalg.solve(A, b)
    start = exact + 0.01 * vector(40, 2) if started else None
    found = conjugate_gradients(lambda v: A @ v, b, iterations=400, tolerance=0, start=start)
    torch.testing.assert_close(found.x, exact, rtol=1e-10, atol=1e-10)
    assert not found.negative


def test_they_end_after_as_many_steps_as_there_are_eigenvalues():
    A, b = Counted(matrix(1, 1, 1, 7, 7, 30)), vector(6)
    found = conjugate_gradients(A, b, iterations=3, tolerance=0)
    torch.testing.assert_close(found.x, torch.linalg.solve(A.matrix, b), rtol=1e-12, atol=1e-12)
    assert found.iterations == A.calls == 3


def test_each_step_lowers_the_quadratic():
    A, b = matrix(*torch.logspace(-3, 2, 30).tolist()), vector(30)
    found = [conjugate_gradients(lambda v: A @ v, b, iterations=i, tolerance=0).x for i in range(1, 31)]
    values = [float(x @ A @ x / 2 - b @ x) for x in found]
    assert all(after < before for before, after in zip([0.0, *values], values, strict=False))


def test_they_stop_when_little_is_gained():
    A, b = matrix(*torch.logspace(-3, 1, 200).tolist()), vector(200)
    at = {tolerance: conjugate_gradients(lambda v: A @ v, b, iterations=500, tolerance=tolerance).iterations
          for tolerance in (1e-1, 1e-2, 5e-4)}  # fmt: skip
    assert 10 < at[1e-1] < at[1e-2] < at[5e-4] < 500
    i, k = at[1e-2], max(10, at[1e-2] // 10)

    def value(steps):
        x = conjugate_gradients(lambda v: A @ v, b, iterations=steps, tolerance=0).x
        return float(x @ A @ x / 2 - b @ x)

    def gained(i):
        return (value(i) - value(i - k)) / value(i)

    assert gained(i) < k * 1e-2 <= gained(i - 1)


def test_a_start_that_is_worse_than_nothing_is_dropped():
    A, b = matrix(1, 2, 3), vector(3)
    plain = conjugate_gradients(lambda v: A @ v, b, iterations=2, tolerance=0)
    bad = conjugate_gradients(lambda v: A @ v, b, iterations=2, tolerance=0, start=-10 * b)
    assert torch.equal(plain.x, bad.x)


def test_negative_curvature_in_the_first_direction_gives_the_right_hand_side():
    b = vector(3)
    found = conjugate_gradients(lambda v: -v, b, iterations=5)
    assert torch.equal(found.x, b)
    assert (found.negative, found.iterations) == (True, 0)


def test_negative_curvature_later_keeps_the_way_so_far():
    A, b = torch.diag(torch.tensor([10.0, 1.0, -0.1]).double()), torch.tensor([1.0, 1.0, 0.1]).double()
    found = conjugate_gradients(lambda v: A @ v, b, iterations=10, tolerance=0)
    assert found.negative
    assert found.iterations == 2
    again = conjugate_gradients(lambda v: A @ v, b, iterations=2, tolerance=0)
    assert torch.equal(found.x, again.x)
    assert not again.negative
    assert b @ found.x > 0


def test_nothing_to_solve():
    found = conjugate_gradients(lambda v: v, torch.zeros(4), iterations=5)
    assert torch.equal(found.x, torch.zeros(4))
    assert found.iterations == 0
