"""Radii of parameter groups: whose key ``"rho"`` is, and what a group that stands still is left with."""

from __future__ import annotations

import pytest
import torch
from torch.optim import SGD, Adadelta

import nets
import steppe
from recipes_list import EVERY, same, step, weights, wrap


def gradients(model, data):
    return list(torch.autograd.grad(nets.losses(model, data).mean(), list(model.parameters())))


def test_the_rho_of_adadelta_is_no_radius():
    model, data = nets.mlp()
    params, rho = list(model.parameters()), 0.05
    home, g0 = [p.detach().clone() for p in params], gradients(model, data)
    norm = torch.cat([g.reshape(-1) for g in g0]).norm()
    other, _ = nets.mlp()
    with torch.no_grad():
        for p, w, g in zip(other.parameters(), home, g0, strict=True):
            p.copy_(w + rho / norm * g)
    expected = gradients(other, data)
    step(steppe.SharpnessAware(Adadelta(params), steppe.sam(rho)), model, data)
    for p, g in zip(params, expected, strict=True):
        torch.testing.assert_close(p.grad, g, rtol=1e-10, atol=1e-13)


def test_inner_steps_leave_nothing_on_a_group_that_stands_still():
    """The gradients of its inner passes would add up under the last one's."""
    model, data = nets.mlp()
    still, seen = model[4].weight, []
    still.register_hook(lambda g: seen.append(g.clone()))
    groups = [{"params": [*model[0].parameters(), *model[2].parameters()]}, {"params": still, "rho": 0.0}]
    step(steppe.SharpnessAware(SGD(groups, lr=0.1), steppe.parse("mixed_sam(sam(steps=4), alpha=0.25)")), model, data)
    assert len(seen) == 5
    torch.testing.assert_close(still.grad, 0.25 * seen[0] + 0.75 * seen[-1], rtol=1e-12, atol=0)


def test_inner_steps_add_nothing_up_for_a_parameter_that_pass_one_does_not_use():
    model, data = nets.mlp()
    late, seen = torch.nn.Parameter(torch.ones(nets.CLASSES, dtype=torch.float64)), []
    late.register_hook(lambda g: seen.append(g.clone()))
    passes = []

    def losses(network, batch):
        passes.append(0)
        out = network(batch[0]) + (late if len(passes) > 1 else 0)
        return torch.nn.functional.cross_entropy(out, batch[1], reduction="none")

    opt = steppe.SharpnessAware(SGD([*model.parameters(), late], lr=0.1), steppe.sam(steps=3))
    opt.step(steppe.Batch(model, losses, data))
    assert (len(passes), len(seen)) == (4, 3)
    assert torch.equal(late.grad, seen[-1])


@pytest.mark.parametrize("text", EVERY)
def test_radii_of_0_everywhere_are_the_base_to_the_bit(text):
    ends = []
    for method in (text, "sgd()"):
        model, data = nets.mlp()
        groups = [{"params": [(n, p) for n, p in model.named_parameters()], "rho": 0.0}]
        opt = steppe.SharpnessAware(SGD(groups, lr=0.05, momentum=0.9), steppe.parse(method), total_steps=4)
        for _ in range(4):
            if method == "sgd()" and steppe.parse(text).needs_second:
                opt.step(steppe.Batch(model, nets.losses, data))
            else:
                step(opt, model, data)
        ends.append(weights(model))
        assert opt.stats.sharp == 0
    assert same(*ends)


def test_a_step_is_sharp_where_any_group_of_examples_perturbs():
    model, data = nets.mlp()
    opt = wrap(model, "m_sharpness(esam_swp(beta=0.3), 3)")
    moved = 0
    for _ in range(40):
        home, hits = weights(model), []

        def losses(network, batch, home=home, hits=hits):
            hits.append(not same(weights(network), home))
            return nets.losses(network, batch)

        opt.step(steppe.Batch(model, losses, data))
        moved += any(hits)
    assert opt.stats.sharp == moved


@pytest.mark.parametrize("rho", ["0.1", -1, float("nan"), float("inf")])
def test_a_radius_that_is_none_is_refused_by_the_name_of_its_group(rho):
    model, data = nets.mlp()
    groups = [{"params": model[0].parameters()}, {"params": model[2].parameters(), "rho": rho}]
    opt = steppe.SharpnessAware(SGD(groups, lr=0.1), steppe.sam())
    with pytest.raises(ValueError, match="group 1 must be a finite number"):
        step(opt, model, data)


def test_a_base_that_maximizes_is_refused():
    model, _ = nets.mlp()
    with pytest.raises(ValueError, match="maximize=True"):
        steppe.SharpnessAware(SGD(model.parameters(), lr=0.1, maximize=True), steppe.sam())
    opt = steppe.SharpnessAware(SGD(model[0].parameters(), lr=0.1), steppe.sam())
    with pytest.raises(ValueError, match="maximize=True"):
        opt.add_param_group({"params": model[2].parameters(), "maximize": True})
    assert len(opt.param_groups) == 1


def test_adadelta_takes_the_rho_of_no_group_for_a_radius_of_0():
    model, data = nets.mlp()
    groups = [{"params": model[0].parameters()}, {"params": model[2].parameters(), "rho": 0.0}]
    with pytest.raises(ValueError, match="Adadelta takes the rho=0"):
        step(steppe.SharpnessAware(Adadelta(groups), steppe.sam()), model, data)
