"""Spatial averaging, for tensors of any rank."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from steppe.optim.averaging import averaged

SHAPES = st.lists(st.integers(1, 4), min_size=0, max_size=5)
BLOCKS = st.one_of(st.integers(1, 5), st.just("row"))


def labels(shape, block):
    """The number of the block that each entry lies in."""
    places = torch.arange(torch.Size(shape).numel()).reshape(shape)
    if len(shape) < 2:
        return places
    if len(shape) > 2:
        return (places // torch.Size(shape[2:]).numel()).reshape(shape)
    b = shape[1] if block == "row" else block
    row, column = places // shape[1], places % shape[1]
    return row * shape[1] + column // b


@settings(max_examples=60, deadline=None)
@given(SHAPES, BLOCKS, st.integers(0, 9))
def test_every_entry_is_the_mean_of_its_block(shape, block, seed):
    x = torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    found = averaged(x, block)
    assert found.shape == x.shape
    same = labels(shape, block).reshape(-1)
    same = (same[:, None] == same).double()
    torch.testing.assert_close(found.reshape(-1), same @ x.reshape(-1) / same.sum(1), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(averaged(found, block), found, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("shape", [(), (6,), (0,), (0, 3), (3, 0), (2, 0, 3)])
def test_no_neighbours(shape):
    x = torch.randn(shape)
    assert torch.equal(averaged(x, 3), x)


def test_a_row_that_the_block_does_not_divide():
    x = torch.tensor([[1.0, 3.0, 5.0, 7.0, 20.0], [2.0, 2.0, 0.0, 4.0, 6.0]])
    wanted = torch.tensor([[2.0, 2.0, 6.0, 6.0, 20.0], [2.0, 2.0, 2.0, 2.0, 6.0]])
    assert torch.equal(averaged(x, 2), wanted)
    assert torch.equal(averaged(x, 9), averaged(x, "row"))


def test_a_layout_in_memory_changes_nothing():
    x = torch.randn(4, 3, 5, 5)
    torch.testing.assert_close(averaged(x.to(memory_format=torch.channels_last), 1), averaged(x, 1))
