"""AdaHessian on gloo ranks: the run of one process, with the mean of the ranks' estimates."""

from __future__ import annotations

import pytest
import torch

from adahessian_work import alone, broken, estimates, forked, together
from launch import launch


@pytest.mark.parametrize(
    ("name", "options", "ddp", "micro"),
    [
        ("mlp", {}, {}, 1),
        ("transformer", {"n": 3, "probes": 2, "block": 2}, {"gradient_as_bucket_view": True}, 3),
        ("mlp", {"product": "difference", "n": 2}, {"gradient_as_bucket_view": True}, 1),
    ],
)
def test_two_ranks_are_one_process(name, options, ddp, micro):
    wanted = alone(name, options)
    first, second = launch(2, together, name, options, ddp, micro)
    assert all(map(torch.equal, first, second))
    for a, b in zip(first, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6 if "product" in options else 1e-9, atol=1e-8)


def test_the_estimate_is_the_mean_of_the_ranks_estimates():
    (mean, one), (same, two) = launch(2, estimates)
    assert torch.equal(mean, same)
    torch.testing.assert_close(mean, (one + two) / 2)
    assert float((one - two).norm()) > 0.1 * float(mean.norm())


@pytest.mark.parametrize("n", [1, 3])
def test_a_part_that_only_one_rank_uses(n):
    first, second = launch(2, forked, n)
    assert all(map(torch.equal, first, second))
    assert all(bool(t.isfinite().all()) for t in first)


def test_all_ranks_refuse_alike():
    first, second = launch(2, broken)
    for said in (first, second):
        assert len(said) == 1
        assert "not finite at parameter module.0.weight" in said[0]
