"""The natural gradient on two ranks: one result on both, and that of one process where labels are not drawn."""

from __future__ import annotations

import pytest
import torch

from ddp_work import assert_close
from launch import launch
from natural_work import alone, drawn, not_finite, shared_out, together


@pytest.mark.parametrize(
    ("name", "fisher", "method", "how"),
    [
        ("mlp", "exact", None, {}),
        ("mlp", "empirical", "sam()", {"kl": 1e-3}),
        ("mlp", "diagonal", None, {"micro": 2}),
        ("mlp", "kfac", "sam()", {"kl": 1e-3}),
        ("mlp", "ekfac", None, {"micro": 2}),
        ("transformer", "kfac", None, {"norms": "full"}),
        ("transformer", "ekfac", "m_sharpness(sam(), 3)", {}),
    ],
)
def test_two_ranks_are_one_process(name, fisher, method, how):
    first, second = launch(2, together, name, fisher, method, how)
    assert all(map(torch.equal, first, second))
    wanted = alone(name, fisher, method, **{key: value for key, value in how.items() if key != "micro"})
    if method != "m_sharpness(sam(), 3)":  # whose groups are other ones on two ranks
        assert_close(first[: len(wanted)], wanted)


@pytest.mark.parametrize("fisher", ["mc", "diagonal", "kfac"])
def test_ranks_draw_labels_of_their_own_and_share_the_mean(fisher):
    (mine, *first), (other, *second) = launch(2, drawn, fisher)
    assert not torch.allclose(mine, other)
    assert all(map(torch.equal, first, second))


def test_jobs_are_shared_out_by_price():
    (a, found, said), (b, again, heard) = launch(2, shared_out)
    assert (a, b) == ([2], [0, 1, 3, 4])  # 5 here, and 1 + 1 + 1 + 2 there
    for i, (one, other) in enumerate(zip(found, again, strict=True)):
        assert torch.equal(one["rank"], other["rank"])
        assert torch.equal(one["square"], torch.full((2, i), float(i**2)))
        assert torch.equal(one["square"], other["square"])
        assert one["square"].is_contiguous()
        assert other["square"].is_contiguous()
    assert said == heard == "the factor of layer 7 is singular"


@pytest.mark.parametrize("fisher", ["exact", "kfac"])
def test_a_loss_that_is_not_finite_on_one_rank(fisher):
    for said, same in launch(2, not_finite, fisher):
        assert "not finite" in said or "nan" in said
        assert same
