"""A bare PyTorch closure: the same step where it is enough, a refusal where it is not."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations
from torch.optim import SGD

import nets
import steppe
from recipes_list import EVERY, same, step, weights, wrap

ALONE = [text for text in EVERY if not steppe.parse(text).needs_examples]
"""Methods that a bare closure is enough for."""


def closure_of(opt, model, data):
    def closure():
        opt.zero_grad()
        loss = nets.losses(model, data).mean()
        loss.backward()
        return loss

    return closure


@pytest.mark.parametrize("net", [nets.mlp, nets.transformer])
@pytest.mark.parametrize("text", ALONE)
def test_a_closure_takes_the_same_step(text, net):
    ends = []
    for bare in (True, False):
        model, data = net()
        base = SGD(model.named_parameters(), lr=0.05, momentum=0.9)
        opt = steppe.SharpnessAware(base, steppe.parse(text), total_steps=20)
        losses = [opt.step(closure_of(opt, model, data)) if bare else step(opt, model, data) for _ in range(3)]
        ends.append([weights(model), [loss.detach() for loss in losses]])
        assert all(p.requires_grad for p in model.parameters())
        assert all(loss.ndim == 0 and not loss.requires_grad for loss in losses)
    assert same(*ends)


@pytest.mark.parametrize("text", [t for t in EVERY if t not in ALONE])
def test_a_closure_is_too_little_where_examples_are_looked_at(text):
    model, data = nets.mlp()
    opt = wrap(model, text)
    with pytest.raises(TypeError, match=r"Batch|batch"):
        opt.step(closure_of(opt, model, data))


@pytest.mark.parametrize("text", ALONE)
def test_a_closure_with_running_statistics_is_refused_where_it_repeats(text):
    model, data = nets.convnet()
    base = SGD(model.named_parameters(), lr=0.05)
    opt = steppe.SharpnessAware(base, steppe.parse(text), total_steps=20)
    before = weights(model)
    if text in ("sgd()", "rwp(alpha=0)"):
        opt.step(closure_of(opt, model, data))
        return
    with pytest.raises(TypeError, match=r"BatchNorm2d.*steppe\.Batch"):
        opt.step(closure_of(opt, model, data))
    assert same(weights(model), before)
    model.eval()
    opt.step(closure_of(opt, model, data))


@pytest.mark.parametrize("norm", [parametrizations.spectral_norm, nn.utils.spectral_norm])
def test_a_closure_with_a_spectral_norm_is_refused_where_it_repeats(norm):
    """Its power iteration would move twice; in eval mode it rests."""
    model, data = nets.mlp()
    norm(model[0])
    opt = wrap(model, "sam()")
    before = weights(model)
    with pytest.raises(TypeError, match=r"statistics of .*steppe\.Batch"):
        opt.step(closure_of(opt, model, data))
    assert same(weights(model), before)
    model.eval()
    opt.step(closure_of(opt, model, data))


@pytest.mark.parametrize("set_to_none", [True, False])
def test_gradients_cleared_before_a_closure_are_none_accumulated(set_to_none):
    model, data = nets.mlp()
    opt = wrap(model, "sam()")
    for _ in range(3):
        opt.zero_grad(set_to_none=set_to_none)
        opt.step(closure_of(opt, model, data))


@pytest.mark.parametrize("layer", [0, 2, 4])
def test_gradients_accumulated_on_any_layer_are_refused(layer):
    model, data = nets.mlp()
    opt = wrap(model, "sam()")
    opt.step(closure_of(opt, model, data))
    nets.losses(model, data).mean().backward(inputs=list(model[layer].parameters()))
    with pytest.raises(TypeError, match="accumulated"):
        opt.step(closure_of(opt, model, data))


@pytest.mark.parametrize("place", ["loss", "pass two"])
def test_a_closure_goes_on_after_a_step_that_failed(place):
    model, data = nets.mlp()
    opt, calls = wrap(model, "sam()"), []

    def closure():
        calls.append(0)
        opt.zero_grad()
        loss = nets.losses(model, data).mean() * (float("nan") if place == "loss" and len(calls) < 3 else 1)
        loss.backward()
        if place == "pass two" and len(calls) == 2:
            raise RuntimeError("no more data")
        return loss

    before = weights(model)
    with pytest.raises((ValueError, RuntimeError), match=r"the loss is nan|no more data"):
        opt.step(closure)
    assert same(weights(model), before)
    assert all(p.grad is None for p in model.parameters())
    opt.step(closure)
    assert opt.stats.steps == 1
    assert opt.stats.propagations == (2 if place == "loss" else 1.5)


def test_a_compiled_network_hides_no_running_statistics():
    """It calls no hook of its layers once it is compiled."""
    model, data = nets.convnet()
    compiled = torch.compile(model, backend="eager")
    nets.losses(compiled, data)
    opt, before = wrap(model, "sam()"), weights(model)
    with pytest.raises(TypeError, match=r"BatchNorm2d.*steppe\.Batch"):
        opt.step(closure_of(opt, compiled, data))
    assert same(weights(model), before)
