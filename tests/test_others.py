"""Parameters of the model that the base does not hold: the last pass's gradient, and what was there before."""

from __future__ import annotations

import weakref

import pytest
import torch
from torch.optim import SGD

import nets
import steppe
from recipes_list import DETERMINISTIC, TOTAL, same, step, weights

SCALE = 2.0**16


def divided(text: str, **kwargs):
    """An MLP whose head another optimizer trains, and a hook's record of the head's gradients."""
    model, data = nets.mlp()
    head, seen = model[4].weight, []
    head.register_hook(lambda g: seen.append(g.clone()))
    base = SGD(model[:4].parameters(), lr=0.05)
    return model, data, head, seen, steppe.SharpnessAware(base, steppe.parse(text), total_steps=TOTAL, **kwargs)


@pytest.mark.parametrize("text", [text for text in DETERMINISTIC if "m_sharpness" not in text])
def test_they_get_the_gradient_of_the_last_pass_only(text):
    model, data, head, seen, opt = divided(text)
    for _ in range(3):
        head.grad = None
        seen.clear()
        step(opt, model, data)
        if "second_order" not in text:  # whose hooks see the product too
            assert torch.equal(head.grad, seen[-1])


def test_the_last_pass_is_the_one_at_the_perturbed_weights():
    model, data, head, _, opt = divided("sam()")
    home = [p.detach().clone() for p in model.parameters()]
    g0 = torch.autograd.grad(nets.losses(model, data).mean(), list(model[:4].parameters()))
    norm = torch.stack([g.norm() for g in g0]).norm()
    step(opt, model, data)
    twin, _ = nets.mlp()
    with torch.no_grad():
        for p, w in zip(twin.parameters(), home, strict=True):
            p.copy_(w)
        for p, g in zip(twin[:4].parameters(), g0, strict=True):
            p.add_(0.05 / norm * g)
    nets.losses(twin, data).mean().backward()
    torch.testing.assert_close(head.grad, twin[4].weight.grad, rtol=1e-12, atol=0)


def test_groups_of_examples_are_averaged():
    model, data, head, seen, opt = divided("m_sharpness(sam(), 5)")
    step(opt, model, data)
    last = seen[1::2]
    torch.testing.assert_close(head.grad, (5 * last[0] + 5 * last[1] + 2 * last[2]) / 12, rtol=1e-12, atol=0)


def test_what_was_there_stays():
    model, data, head, seen, opt = divided("sam()")
    head.grad = torch.ones_like(head)
    step(opt, model, data)
    torch.testing.assert_close(head.grad, 1 + seen[-1], rtol=1e-12, atol=0)


@pytest.mark.parametrize("overflow", [False, True])
def test_they_are_unscaled_and_those_of_a_skipped_step_are_dropped(overflow):
    scaler = torch.amp.GradScaler("cpu", init_scale=SCALE)
    model, data, head, seen, opt = divided("sam()", scaler=scaler)
    head.grad = torch.ones_like(head)
    step(opt, model, data, loss_fn=lambda m, d: nets.losses(m, d) * (float("inf") if overflow else 1))
    expected = torch.ones_like(head) if overflow else 1 + seen[-1] / SCALE
    torch.testing.assert_close(head.grad, expected, rtol=1e-12, atol=0)


def test_a_step_that_failed_leaves_what_was_there():
    model, data, head, _, opt = divided("sam()")
    calls = []

    def losses(model, batch):
        calls.append(0)
        if len(calls) == 2:
            raise RuntimeError("no")
        return nets.losses(model, batch)

    head.grad = torch.ones_like(head)
    with pytest.raises(RuntimeError, match="no"):
        step(opt, model, data, loss_fn=losses)
    assert torch.equal(head.grad, torch.ones_like(head))


def test_two_optimizers_are_one_whose_second_group_stands_still():
    ends = []
    for together in (True, False):
        model, data = nets.mlp()
        groups = [{"params": model[:4].parameters()}, {"params": model[4].parameters(), "rho": 0.0}]
        opt = steppe.SharpnessAware(SGD(groups if together else groups[:1], lr=0.1), steppe.sam())
        other = None if together else SGD(model[4].parameters(), lr=0.1)
        for _ in range(5):
            model.zero_grad()
            step(opt, model, data)
            if other is not None:
                other.step()
        ends.append(weights(model))
    assert same(*ends)


def test_no_gradient_is_held_after_the_step():
    model, data, head, _, opt = divided("sam()")
    head.grad = torch.ones_like(head)
    step(opt, model, data)
    left = weakref.ref(head.grad)
    model.zero_grad()
    assert left() is None


def test_an_overflow_that_only_they_have_skips_the_step():
    scaler = torch.amp.GradScaler("cpu", init_scale=SCALE)
    model, data, head, _, opt = divided("sam()", scaler=scaler)
    before = weights(model)
    hook = head.register_hook(lambda g: g * float("inf"))
    step(opt, model, data)
    assert (opt.stats.skipped, head.grad) == (1, None)
    assert same(weights(model), before)
    hook.remove()
    step(opt, model, data)
    assert opt.stats.steps == 1


@pytest.mark.parametrize("text", ["sgd()", "sam()"])
@pytest.mark.parametrize("how", [{}, {"at": "weights"}, {"product": "difference"}], ids=str)
def test_under_a_base_that_looks_at_the_curvature_they_get_the_same(text, how):
    found = []
    for base in (SGD, lambda params, lr: steppe.optim.AdaHessian(params, lr, **how)):
        model, data = nets.mlp()
        opt = steppe.SharpnessAware(base(model[:4].parameters(), lr=0.1), steppe.parse(text))
        step(opt, model, data)
        found.append(model[4].weight.grad)
    torch.testing.assert_close(*found, rtol=1e-9, atol=1e-12)
