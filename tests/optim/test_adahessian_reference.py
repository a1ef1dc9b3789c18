"""AdaHessian against the plain reference: 20 steps, every option."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import nets
import steppe
from reference.adahessian import AdaHessian as Reference
from steppe.optim import adahessian
from steppe.optim.adahessian import AdaHessian


@pytest.fixture
def drawn(monkeypatch):
    """Every tensor of signs that is drawn."""
    found, draw = [], adahessian._signs
    monkeypatch.setattr(adahessian, "_signs", lambda *args: (found.append(draw(*args)), found[-1])[1])
    return found


def words(seed=0):
    """A table of words, tied to nothing, and a convolution over the words of a sentence."""
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Embedding(7, 4), nn.Conv1d(5, 3, 3), nn.Tanh(), nn.Flatten(), nn.Linear(6, 3)).double()
    return model, (torch.randint(7, (12, 5)), torch.randint(3, (12,)))


def volumes(seed=0):
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Conv3d(2, 2, 2), nn.Tanh(), nn.Flatten(), nn.Linear(2 * 8, 3)).double()
    return model, (torch.randn(6, 2, 3, 3, 3).double(), torch.randint(3, (6,)))


NETS = {"mlp": nets.mlp, "convnet": nets.convnet, "transformer": nets.transformer, "words": words, "volumes": volumes}
NAMES = {"weight_decay": "decay", "power": "k", "block": "b"}


@pytest.mark.parametrize(
    ("names", "options"),
    [
        ("mlp convnet transformer words volumes", {}),
        ("mlp volumes", {"betas": (0.0, 0.0), "weight_decay": 0.1, "eps": 1e-2}),
        ("mlp words convnet", {"block": 3, "probes": 2, "betas": (0.8, 0.99)}),
        ("transformer volumes", {"block": "row", "n": 3, "power": 0.5}),
        ("mlp words", {"average": "signed", "block": 2, "n": 5, "eps": 1e-2, "weight_decay": 0.01}),
        ("words", {"power": 0.0, "lr": 0.5}),
    ],
    ids=str,
)
def test_twenty_steps(names, options, drawn):
    for net in names.split():
        agree(*NETS[net](), {"lr": 0.01, **options}, drawn)


def agree(model, data, options, drawn):
    twin = copy.deepcopy(model)
    opt = AdaHessian(model.parameters(), **options)
    plain = {NAMES.get(key, key): value for key, value in options.items() if key not in ("n", "probes")}
    tables = [m.weight for m in twin.modules() if isinstance(m, nn.Embedding)]
    reference = Reference(list(twin.parameters()), **plain, tables=tables)
    start = [p.detach().clone() for p in model.parameters()]
    for _ in range(20):
        drawn.clear()
        opt.step(steppe.Batch(model, nets.losses, data))
        probes = [drawn[i : i + len(start)] for i in range(0, len(drawn), len(start))]
        assert len(probes) in (0, options.get("probes", 1))
        reference.step(twin, nets.losses, data, probes or None)
    for p, q, before in zip(model.parameters(), twin.parameters(), start, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-10, atol=1e-10)
        assert (p - before).abs().max() > 1e-3


def test_probes_are_signs_and_new_in_every_step(drawn):
    model, data = nets.mlp()
    opt = AdaHessian(model.parameters(), probes=2)
    for _ in range(3):
        opt.step(steppe.Batch(model, nets.losses, data))
    flat = [torch.cat([t.reshape(-1) for t in drawn[i : i + 6]]) for i in range(0, 36, 6)]
    assert all(bool((z.abs() == 1).all()) for z in flat)
    assert all(abs(float(z.mean())) < 0.3 for z in flat)
    assert all(abs(float(a @ b)) / len(a) < 0.3 for i, a in enumerate(flat) for b in flat[:i])


def test_a_closure_is_a_batch_of_one_mean_loss():
    (one, data), (two, _) = nets.mlp(), nets.mlp()
    first, second = AdaHessian(one.parameters()), AdaHessian(two.parameters())
    for _ in range(3):
        a = first.step(steppe.Batch(one, nets.losses, data))
        b = second.step(lambda: F.cross_entropy(two(data[0]), data[1]))
        torch.testing.assert_close(a, b)
    assert not b.requires_grad
    for p, q in zip(one.parameters(), two.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-10, atol=1e-10)


def test_micro_batches_are_one_batch():
    (one, (x, y)), (two, _) = nets.mlp(), nets.mlp()
    for model, batch in (
        (one, steppe.Batch(one, nets.losses, (x, y))),
        (two, steppe.Batch.from_micro_batches(two, nets.losses, [(x[:5], y[:5]), (x[5:], y[5:])])),
    ):
        opt = AdaHessian(model.parameters())
        for _ in range(3):
            opt.step(batch)
    for p, q in zip(one.parameters(), two.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-10, atol=1e-10)
