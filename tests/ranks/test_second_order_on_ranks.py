"""A sharpness-aware method on a second-order base, on gloo ranks."""

from __future__ import annotations

import pytest
import torch

from launch import launch
from second_order_work import BASES, together, train


@pytest.mark.parametrize("name", BASES)
@pytest.mark.parametrize(("text", "at"), [("sam()", "perturbed"), ("gsam()", "weights"), ("esam_swp()", "weights")])
def test_two_ranks_are_one_process(name, text, at):
    wanted = train(name, text, at, "global")
    first, second = launch(2, together, name, text, at, "global")
    assert all(map(torch.equal, first, second))
    for a, b in zip(first, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("name", BASES)
def test_an_ascent_of_its_own_for_each_rank_keeps_them_together(name):
    everywhere, _ = launch(2, together, name, "sam()", "perturbed", "global")
    first, second = launch(2, together, name, "sam()", "perturbed", "local")
    assert all(map(torch.equal, first, second))
    assert not all(map(torch.equal, first, everywhere))
