"""SAM's step needs one copy of the weights beyond SGD's while it runs, and nothing between steps."""

from __future__ import annotations

import gc

import pytest
import torch
from torch import nn

import steppe
from nets import losses
from steppe.lab.memory import peak_memory

BATCH = (torch.randn(2, 256), torch.randint(256, (2,)))


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 256))


SIZE = sum(p.numel() * p.element_size() for p in network().parameters())


def train(text, steps=3):
    """Return what is left after some steps: plain SGD's loop, or a method."""
    model = network()
    base = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    opt = None if text is None else steppe.SharpnessAware(base, steppe.parse(text))
    for _ in range(steps):
        if opt is None:
            base.zero_grad()
            losses(model, BATCH).mean().backward()
            base.step()
        else:
            opt.step(steppe.Batch(model, losses, BATCH))
    return model, base, opt


def peak(text):
    return peak_memory(lambda: train(text))


@pytest.mark.parametrize(
    ("text", "copies"),
    [("sgd()", 0), ("sam()", 1), ("esam()", 1), ("rwp(alpha=0)", 2), ("gsam()", 2), ("looksam(k=5)", 2), ("asam()", 2)],
)
def test_peak_beyond_plain_sgd(text, copies):
    slack = SIZE // 50  # activations and losses of the second pass
    assert peak(text) - peak(None) <= copies * SIZE + slack


def test_the_measure_sees_a_copy():
    assert peak("gsam()") - peak("sam()") > SIZE // 2


def held(text):
    """Bytes of all tensors that are alive after training, beyond those before it."""
    gc.collect()
    before = {id(t) for t in gc.get_objects() if issubclass(type(t), torch.Tensor)}
    kept = train(text)
    gc.collect()
    alive = [t for t in gc.get_objects() if issubclass(type(t), torch.Tensor) and id(t) not in before]
    parts = {t.data_ptr(): t.numel() * t.element_size() for t in alive}
    del kept
    return sum(parts.values())


@pytest.mark.parametrize("text", ["sam()", "esam()", "gsam()", "rwp()", "asam()", "rst(sam())", "sam(steps=2)"])
def test_nothing_is_held_between_steps(text):
    assert held(text) - held(None) < SIZE // 100


def test_looksam_holds_one_vector():
    assert held("looksam(k=5)") - held(None) == pytest.approx(SIZE, rel=0.01)
