"""Measures of sharpness on two ranks with uneven shards, and on one process."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.distributed as dist

import nets
from launch import launch
from steppe.curvature.activity import active_neurons
from steppe.curvature.average import average_sharpness
from steppe.curvature.bound import pac_bayes
from steppe.curvature.cosines import cosines
from steppe.curvature.linearity import linearity
from steppe.curvature.objective import Objective
from steppe.curvature.sharpness import m_sharpness, surrogate_gap

SHARDS = [[(0, 4), (4, 7)], [(7, 12)]]


def objective(shards: list[list[tuple[int, int]]], group: Any = None) -> Objective:
    model, (x, y) = nets.mlp()
    model.insert(2, torch.nn.ReLU())
    loader = [(x[a:b], y[a:b]) for shard in shards for a, b in shard]
    return Objective(model, nets.losses, loader, weights=lambda batch: batch[0][:, 0].abs(), group=group)


def figures(one: Objective) -> list[float]:
    """Everything that does not depend on draws for each batch."""
    plain = copy.copy(one)
    plain.weights = None
    gap, groups, around = surrogate_gap(one, 0.1, steps=2), m_sharpness(one, 0.1, 2), average_sharpness(one, draws=3)
    line, angles, bound, active = linearity(one, 0.1), cosines(one, 0.1), pac_bayes(plain, 0.1), active_neurons(one)
    found = [gap.loss, gap.gap, gap.slope, groups.sharpness, groups.error, *groups.values.tolist()]
    found += [around.sharpness, around.error, line.zeta, line.error, *line.values.tolist()]
    found += [angles.sharpest, angles.flattest, *angles.errors[:2], bound.bound, active.share]
    return found


def on_a_rank() -> list[float]:
    return figures(objective([SHARDS[dist.get_rank()]], dist.group.WORLD))


def test_two_ranks_with_uneven_shards_are_one_process():
    alone = figures(objective(SHARDS))
    first, second = launch(2, on_a_rank)
    assert first == second
    assert first == pytest.approx(alone, rel=1e-12, abs=1e-15)
