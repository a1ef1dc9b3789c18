"""A bare PyTorch closure: the same step where it is enough, a refusal where it is not."""

from __future__ import annotations

import pytest
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
