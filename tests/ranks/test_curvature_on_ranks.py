"""Operators on ranks with uneven shards are those of one process, by a group or by DDP."""

from __future__ import annotations

import pytest
import torch

from curvature_work import MEASUREMENTS, alone, drawn, failing, share, together
from launch import launch


@pytest.mark.parametrize(
    ("shards", "net", "weights", "wrapped"),
    [
        ("uneven", "mlp", None, False),
        ("uneven", "transformer", share, True),
        ("a rank with one example", "convnet", share, False),
        ("three ranks", "mlp", share, True),
    ],
)
def test_ranks_with_uneven_shards_are_one_process(shards, net, weights, wrapped):
    wanted = alone(shards, net, weights)
    first, *others = launch(3 if "three" in shards else 2, together, shards, net, weights, wrapped)
    assert not [other for other in others if not all(map(torch.equal, first[: len(wanted)], other[: len(wanted)]))]
    for a, b in zip(first, wanted, strict=False):
        assert float((a - b).norm()) <= 1e-12 * float(b.norm())
    for other in others:
        assert all(map(torch.equal, first[len(wanted) :], other[len(wanted) :]))
    assert len(first) > len(wanted) or not wrapped


def test_ranks_draw_labels_of_their_own():
    (whole, mine), (again, other) = launch(2, drawn, 0)
    assert torch.equal(whole, again)
    assert torch.equal(mine, other)  # the same seed, data and place: the same labels
    assert not torch.allclose(whole, mine)  # rank 1 of two draws others than rank 0 has


def test_what_fails_on_one_rank_fails_on_all():
    """Rank 1 alone has a loss that is not finite. Nobody waits for it, and the ranks stay in step."""
    first, second = launch(2, failing, seconds=60)
    assert first.keys() == second.keys() == set(MEASUREMENTS)
    for name in MEASUREMENTS:
        assert first[name] == "the measurement fails on another rank: its own error says why", name
        assert second[name].startswith("the loss is nan in batch 1"), name
