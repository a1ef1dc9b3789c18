"""Newton's method on two ranks is that of one process."""

from __future__ import annotations

import pytest
import torch

from launch import launch
from newton_work import newton, one_bad_rank


@pytest.mark.parametrize("method", [None, "sam()"])
def test_two_ranks_are_one_process(method):
    wanted = newton(method, 3)
    first, second = launch(2, newton, method, 3)
    assert torch.equal(first, second)
    torch.testing.assert_close(first, wanted, rtol=0, atol=1e-8)


def test_ranks_with_an_ascent_of_their_own_stay_together():
    first, second = launch(2, newton, "m_sharpness(sam(), 4)", 3, True)
    assert torch.equal(first, second)


def test_a_bad_rank_stops_both():
    first, second = launch(2, one_bad_rank)
    assert "not finite" in first
    assert "another rank" in second
