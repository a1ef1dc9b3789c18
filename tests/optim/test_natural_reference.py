"""NaturalGradient against plain dense formulas, 20 steps in float64."""

from __future__ import annotations

import hashlib
from itertools import pairwise

import pytest
import torch
from torch import nn

import nets
import steppe
from reference.common import gradient
from reference.natural import Kronecker, Natural, dense_fisher, drawn, flat, scores
from steppe.optim import NaturalGradient

STEPS = 20


def squared(model, batch):
    return 0.5 * ((model(batch[0]) - batch[1]) ** 2).sum(1)


def problem(likelihood="categorical"):
    """A perceptron 4 - 5 - 3 twice, and 20 batches of 9 examples."""
    with torch.random.fork_rng():
        torch.manual_seed(3)
        model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double()
        x = torch.randn(STEPS, 9, 4, dtype=torch.float64)
        y = torch.randint(3, (STEPS, 9)) if likelihood == "categorical" else torch.randn(STEPS, 9, 3).double()
        other = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double()
    other.load_state_dict(model.state_dict())
    return model, other, list(zip(x, y, strict=True)), nets.losses if likelihood == "categorical" else squared


def grouped(params):
    """Two parameter groups in another order, and the learning rates and dampings of all weights in the model's."""
    groups = [{"params": list(params[2:]), "lr": 0.05, "damping": 0.7}, {"params": list(params[:2])}]
    pairs = [(0.1, 0.3)] * 2 + [(0.05, 0.7)] * 2
    return groups, *(
        flat([torch.full_like(p, x[i]) for p, x in zip(params, pairs, strict=True)]).detach() for i in (0, 1)
    )


def labels_of(opt, z, likelihood, draws):
    """Labels, or slopes of means, as the optimizer is about to draw them."""
    generator = opt.generator("labels/0/0")
    if opt.fisher == "mc":  # the operator of steppe.curvature draws them
        digest = hashlib.blake2b(f"{generator.initial_seed()} labels 0 0".encode(), digest_size=8).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)
    if likelihood == "gaussian":
        return [torch.randn(z.shape, dtype=z.dtype, generator=generator) for _ in range(draws)]
    return [torch.multinomial(z.softmax(1), 1, generator=generator)[:, 0] for _ in range(draws)]


OPTIONS = {
    "plain": {"momentum": 0.0, "decay": 0.0, "n": 1},
    "momentum": {"momentum": 0.9, "decay": 0.0, "n": 1, "weight_decay": 0.05},
    "averages": {"momentum": 0.5, "decay": 0.8, "n": 3},
    "trust region": {"momentum": 0.9, "decay": 0.5, "n": 2, "kl": 1e-3, "weight_decay": 0.05},
}


@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize(
    ("fisher", "likelihood", "more"),
    [
        ("exact", "categorical", {}),
        ("exact", "gaussian", {}),
        ("mc", "categorical", {"draws": 2}),
        ("mc", "gaussian", {"draws": 1}),
        ("empirical", "categorical", {}),
        ("diagonal", "categorical", {"draws": 2}),
        ("diagonal", "gaussian", {"draws": 1}),
        ("diagonal", "categorical", {"draws": None}),
        ("diagonal", "gaussian", {"draws": None}),
        ("diagonal", "categorical", {"labels": "data"}),
        ("diagonal", "categorical", {"labels": "data", "draws": None}),
    ],
)
def test_dense_and_diagonal(fisher, likelihood, more, option):
    model, other, batches, loss_fn = problem(likelihood)
    how = OPTIONS[option]
    groups, lr, damping = grouped(list(model.parameters()))
    opt = NaturalGradient(groups, 0.1, fisher=fisher, likelihood=likelihood, damping=0.3, **{"kl": None, **how, **more})
    params = list(other.parameters())
    wd, n = how.get("weight_decay", 0.0), how["n"]
    reference = Natural(params, lr, damping, how["momentum"], wd, how["decay"], n, how.get("kl"))
    for t, batch in enumerate(batches):
        if t % n == 0:
            draws = labels_of(opt, other(batch[0]).detach(), likelihood, more.get("draws") or 1)
            reference.average("F", wanted(other, params, batch, loss_fn, fisher, likelihood, draws, more))
        g = flat(gradient(loss_fn(other, batch).mean(), params))
        reference.step(g)
        opt.step(steppe.Batch(model, loss_fn, batch))
        for p, q in zip(model.parameters(), params, strict=True):
            torch.testing.assert_close(p, q, rtol=0, atol=1e-10)


def wanted(model, params, batch, loss_fn, fisher, likelihood, draws, more):
    """The Fisher matrix of a batch, or its diagonal, written out."""
    x = batch[0]
    each = [[(torch.tensor(1.0), loss)] for loss in loss_fn(model, batch)]
    if fisher == "empirical":
        return dense_fisher(params, each)
    if fisher == "exact":
        return dense_fisher(params, scores(model, x, likelihood))
    if fisher == "mc":
        return dense_fisher(params, drawn(model, x, draws, likelihood))
    if more.get("draws", 1) is None:
        return dense_fisher(params, each if "labels" in more else scores(model, x, likelihood)).diag().diag()
    if "labels" in more:
        sums = [sum(loss for ((_, loss),) in each)]
    else:
        sums = [sum(loss for ((_, loss),) in drawn(model, x, [y], likelihood)) for y in draws]
    return torch.diag(sum(flat(gradient(loss, params)) ** 2 for loss in sums) / len(sums) / len(x))


@pytest.mark.parametrize("option", [*OPTIONS, "stale inverses"])
@pytest.mark.parametrize("fisher", ["kfac", "ekfac"])
@pytest.mark.parametrize("labels", ["model", "data"])
def test_layers(fisher, labels, option):
    model, other, batches, loss_fn = problem()
    how = {"momentum": 0.9, "decay": 0.7, "n": 2, "kl": 1e-2} if option == "stale inverses" else OPTIONS[option]
    every = 6 if option == "stale inverses" else how["n"]
    groups, lr, damping = grouped(list(model.parameters()))
    opt = NaturalGradient(
        groups, 0.1, fisher=fisher, damping=0.3, labels=labels, n_inverse=every, **{"kl": None, **how}
    )
    params = list(other.parameters())
    wd, n = how.get("weight_decay", 0.0), how["n"]
    reference = Kronecker(params, lr, damping, how["momentum"], wd, how["decay"], n, how.get("kl"))
    reference.corrected, reference.every = fisher == "ekfac", every
    for t, batch in enumerate(batches):
        if t % n == 0:
            x, y = batch
            (draw,) = labels_of(opt, other(x).detach(), "categorical", 1) if labels == "model" else [y]
            inputs, outputs = [x], []
            for layer, after in pairwise([*other, None]):
                if isinstance(layer, nn.Linear):
                    outputs.append(layer(inputs[-1]))
                    if after is not None:
                        inputs.append(after(outputs[-1]))
            slopes = gradient(nn.functional.cross_entropy(outputs[-1], draw, reduction="sum"), outputs)
            reference.look([a.detach() for a in inputs], [slopes])
        reference.step(flat(gradient(loss_fn(other, batch).mean(), params)))
        opt.step(steppe.Batch(model, loss_fn, batch))
        for p, q in zip(model.parameters(), params, strict=True):
            torch.testing.assert_close(p, q, rtol=0, atol=1e-10)
