"""The line between two checkpoints."""

from __future__ import annotations

import copy

import pytest
import torch

import nets
from steppe.curvature.line import line
from steppe.curvature.objective import Objective
from test_landscape import assert_same, cut, right, snapshot, used


def pair(make):
    """Two models whose weights and running statistics differ, and the data."""
    (one, data), (other, more) = make(0), make(1)
    for model, (x, _) in ((one, data), (other, more)):
        model.train()(3 * x + 1)
    return one, other, cut(data)


@pytest.mark.parametrize("make", [nets.mlp, nets.convnet, nets.transformer])
def test_the_ends_are_the_checkpoints(make):
    one, other, data = pair(make)
    found = line(Objective(one, nets.losses, data), other.state_dict(), points=7, accuracy_fn=right)
    assert found.coordinates.tolist() == [-0.25, 0, 0.25, 0.5, 0.75, 1, 1.25]
    assert found.losses.shape == found.accuracies.shape == (1, 7)
    assert found.loss[1] == Objective(one, nets.losses, data).loss()
    assert found.loss[5] == Objective(other, nets.losses, data).loss()
    assert found.loss[1] != found.loss[5]


@pytest.mark.parametrize("mode", ["eval", "train"])
@pytest.mark.parametrize("make", [nets.mlp, nets.convnet])
def test_between_lie_all_floating_tensors(make, mode):
    one, other, data = pair(make)
    found = line(Objective(one, nets.losses, data, mode=mode), other.state_dict(), points=4, start=0.0, stop=0.75)
    assert found.coordinates.tolist() == [0, 0.25, 0.5, 0.75]
    for t, loss in zip(found.coordinates, found.loss, strict=True):
        middle = copy.deepcopy(one)
        with torch.no_grad():
            for here, there in zip(middle.state_dict().values(), other.state_dict().values(), strict=True):
                here.copy_((1 - t) * here + t * there)
        torch.testing.assert_close(loss, Objective(middle, nets.losses, data, mode=mode).loss(), rtol=1e-12, atol=0)


def test_integers_are_those_of_the_nearer_end():
    model, data = nets.mlp()
    model.register_buffer("steps", torch.tensor(3))
    seen = []

    def watching(model, batch):
        seen.append(int(model.steps))
        return nets.losses(model, batch)

    line(Objective(model, watching, [data]), {**model.state_dict(), "steps": torch.tensor(8)}, points=7)
    assert seen == [3, 3, 3, 8, 8, 8, 8]
    assert model.steps == 3


def test_ends_are_added_where_the_points_miss_them():
    one, other, data = pair(nets.mlp)
    here = Objective(one, nets.losses, data)
    assert line(here, other.state_dict(), points=2).coordinates.tolist() == [-0.25, 0, 1, 1.25]
    assert line(here, other.state_dict(), points=2, start=0.2, stop=0.8).coordinates.tolist() == [0.2, 0.8]
    default = line(here, other.state_dict())
    assert len(default.coordinates) == 31
    assert default.passes == pytest.approx(31 / 3, abs=1e-9)


def test_a_parameter_that_is_frozen_or_not_chosen_moves_too():
    one, other, data = pair(nets.mlp)
    next(one.parameters()).requires_grad_(False)
    found = line(Objective(one, nets.losses, data, params=r"^4\."), other.state_dict(), points=2, start=0.0, stop=1.0)
    assert found.loss[1] == Objective(other, nets.losses, data).loss()


def test_types_of_the_other_checkpoint_do_not_matter():
    one, other, data = pair(nets.mlp)
    other = other.float()
    found = line(Objective(one, nets.losses, data), other.state_dict(), points=2, start=0.0, stop=1.0)
    assert found.loss[1] == Objective(other.double(), nets.losses, data).loss()


@pytest.mark.parametrize("mode", ["eval", "train"])
@pytest.mark.parametrize("fail", [False, True])
@pytest.mark.parametrize("make", [nets.mlp, nets.convnet, nets.transformer])
def test_the_model_is_as_it_was(make, fail, mode):
    here, other = used(make, mode), make(1)[0]
    with torch.no_grad():
        next(here.model.parameters()).view(-1)[0] = -0.0
    before, calls = snapshot(here.model), []

    def maybe_broken(output, batch):
        calls.append(1)
        if fail and len(calls) == 4:
            raise RuntimeError("stop")
        return right(output, batch)

    try:
        line(here, other.state_dict(), points=5, accuracy_fn=maybe_broken)
    except RuntimeError as error:
        assert fail and str(error) == "stop"  # noqa: PT017, PT018
    assert len(calls) == (4 if fail else 21)
    assert_same(before, snapshot(here.model))
    assert next(here.model.parameters()).view(-1)[0].signbit()


def test_the_models_own_state_dict_is_a_line_of_no_length():
    one, _, data = pair(nets.convnet)
    here = Objective(one, nets.losses, data)
    torch.testing.assert_close(line(here, one.state_dict(), points=5).loss, here.loss().expand(7), rtol=1e-12, atol=0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: {k: v for k, v in s.items() if k != "2.bias"}, "the checkpoint has no 2.bias"),
        (lambda s: {**s, "9.bias": torch.ones(3)}, "the checkpoint has 9.bias, and the Sequential has not"),
        (
            lambda s: {**s, "2.weight": torch.ones(8, 9), "4.weight": torch.ones(1)},
            r"2.weight has shape \(8, 9\) in the checkpoint and \(8, 8\) in the Sequential",
        ),
        (lambda s: {f"module.{k}": v for k, v in s.items()}, "the checkpoint has no 0.weight"),
    ],
)
def test_a_checkpoint_that_does_not_match_is_refused(change, message):
    one, other, data = pair(nets.mlp)
    with pytest.raises(ValueError, match=message):
        line(Objective(one, nets.losses, data), change(other.state_dict()))


@pytest.mark.parametrize("how", [{"points": 1}, {"start": 1.0, "stop": 1.0}])
def test_bad_ranges(how):
    one, other, data = pair(nets.mlp)
    with pytest.raises(ValueError, match="points="):
        line(Objective(one, nets.losses, data), other.state_dict(), **how)
