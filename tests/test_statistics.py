"""What is random has the distribution that the papers state; each bound is a z-score over fixed seeds."""

from __future__ import annotations

import copy
import itertools
import math

import pytest
import torch

import steppe
from nets import losses, mlp
from steppe.parts import FilterNoise, Masked
from steppe.parts.perturb import Ascent
from steppe.point import Memory, Point
from steppe.products import squared_gradients


def point(step=0, w=(), total=None):
    return Point(step, total, 0.1, 0.1, 0, 0, Memory({}, []), w=list(w))


def eps(at, rho):
    vector, factor = FilterNoise()(at, rho)
    return [factor * v for v in vector]


def test_noise_has_the_stated_deviation_on_each_filter():
    torch.manual_seed(0)
    conv, linear, bias = torch.randn(4, 8, 5, 5), torch.randn(3, 500) * 4, torch.randn(700) * 0.1
    conv[1] *= 7
    noise = eps(point(w=[conv, linear, bias]), 0.02)
    for w, e in zip([conv, linear, bias.view(1, -1)], [noise[0], noise[1], noise[2].view(1, -1)], strict=True):
        for filter_weights, filter_noise in zip(w, e, strict=True):
            n = filter_noise.numel()
            deviation = 0.02 * float(filter_weights.norm())
            chi = float((filter_noise / deviation).square().sum())
            assert abs(chi - n) / math.sqrt(2 * n) < 4
            assert abs(float(filter_noise.sum()) / (deviation * math.sqrt(n))) < 4


def test_noise_differs_between_steps_groups_and_seeds_and_repeats_itself():
    w = [torch.ones(5, 5)]
    first = eps(point(0, w), 1.0)[0]
    assert torch.equal(first, eps(point(0, w), 1.0)[0])
    assert not torch.equal(first, eps(point(1, w), 1.0)[0])
    for change in ({"seed": 1}, {"group": 1}):
        other = point(0, w)
        for name, value in change.items():
            setattr(other, name, value)
        assert not torch.equal(first, eps(other, 1.0)[0])


def test_nothing_is_drawn_from_the_global_generator():
    model, batch = mlp()
    state = torch.get_rng_state()
    for text in ("rwp()", "esam()", "rst(sam())", "ssam_dynamic(refresh=1)"):
        opt = steppe.SharpnessAware(torch.optim.SGD(model.parameters(), lr=0.1), steppe.parse(text), total_steps=4)
        for _ in range(4):
            opt.step(steppe.Batch(model, losses, batch))
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("beta", [0.1, 0.5, 0.6, 0.9])
def test_the_picked_share_is_beta(beta):
    masked, n = Masked(Ascent(), beta), 60
    picked = sum(sum(masked.picks(point(step), n)) for step in range(400))
    assert abs(picked - 400 * n * beta) / math.sqrt(400 * n * beta * (1 - beta)) < 4


SCHEDULES = {
    "0.3": lambda x: 0.3,
    "piecewise(0.2, 0.4)": lambda x: 0.2 if x < 0.4 else 0.8,
    "linear(0, 0.6)": lambda x: 0.6 * x,  # through (T/2, 0.3) and (0, 0)
    "linear(0.4, 1)": lambda x: 0.4 + 0.6 * x,  # through (T/2, 0.7) and (T, 1)
    "linear(0.9, 0.1)": lambda x: 0.9 - 0.8 * x,  # through (0, 0.9) and (T/2, 0.5)
    "cosine()": lambda x: 0.5 + 0.5 * math.cos(math.pi * x),
    "cosine(flipped=True)": lambda x: 0.5 - 0.5 * math.cos(math.pi * x),
    "sine()": lambda x: math.sin(math.pi * x),
    "sine(flipped=True)": lambda x: 1 - math.sin(math.pi * x),
}
MEANS = {
    "0.3": 0.3,
    "piecewise(0.2, 0.4)": 0.4 * 0.2 + 0.6 * 0.8,
    "linear(0, 0.6)": 0.3,
    "linear(0.4, 1)": 0.7,
    "linear(0.9, 0.1)": 0.5,
    "cosine()": 0.5,
    "cosine(flipped=True)": 0.5,
    "sine()": 2 / math.pi,
    "sine(flipped=True)": 1 - 2 / math.pi,
}


@pytest.mark.parametrize("p", SCHEDULES)
def test_the_frequency_of_sharp_steps_follows_the_schedule(p):
    total = 4000
    when = steppe.parse(f"rst(sam(), p={p})").when
    heads = torch.tensor([float(when(point(step, total=total)) > 0) for step in range(total)])
    expected = torch.tensor([SCHEDULES[p](t / total) for t in range(total)])
    for part in (slice(None), slice(0, 1000), slice(1000, 2000), slice(2000, 3000), slice(3000, 4000)):
        deviation = (expected[part] * (1 - expected[part])).sum().sqrt()
        assert abs(float(heads[part].sum() - expected[part].sum())) / float(deviation) < 4


@pytest.mark.parametrize("p", MEANS)
def test_the_mean_of_every_schedule_matches_its_formula(p):
    method = steppe.parse(f"rst(sam(), p={p})")
    assert method.cost() == pytest.approx(1 + MEANS[p], abs=1e-12)
    assert method.cost(total_steps=100_000) == pytest.approx(1 + MEANS[p], abs=1e-4)


def test_the_density_of_a_dynamic_mask_never_changes():
    model, batch = mlp()
    method = steppe.ssam_dynamic(s=0.3, refresh=1)
    opt = steppe.SharpnessAware(torch.optim.SGD(model.parameters(), lr=0.1), method, total_steps=30)
    size = sum(p.numel() for p in model.parameters())
    masks = []
    for _ in range(30):
        opt.step(steppe.Batch(model, losses, batch))
        masks.append(torch.cat([state["steppe.mask"].flatten() for state in opt.state_dict()["state"].values()]))
        assert int(masks[-1].sum()) == round(0.7 * size)
    changes = [int((a != b).sum()) for a, b in itertools.pairwise(masks)]
    assert changes[0] > changes[15] > changes[-1] >= 0


def test_the_density_of_a_dynamic_mask_comes_back_after_layers_were_unfrozen():
    model, batch = mlp()
    method = steppe.ssam_dynamic(s=0.5, refresh=2)
    opt = steppe.SharpnessAware(torch.optim.SGD(model.parameters(), lr=0.1), method, total_steps=30)
    model[:4].requires_grad_(False)
    for _ in range(3):
        opt.step(steppe.Batch(model, losses, batch))
    model.requires_grad_(True)
    for _ in range(2):
        opt.step(steppe.Batch(model, losses, batch))
    mask = torch.cat([state["steppe.mask"].flatten() for state in opt.state_dict()["state"].values()])
    assert int(mask.sum()) == round(0.5 * len(mask))


@pytest.mark.parametrize("text", ["ssam_dynamic(refresh=1)", "ssam_dynamic(sam(steps=3), refresh=1)"])
def test_a_dynamic_mask_changes_by_its_share_once_a_step(text):
    model, batch = mlp()
    opt = steppe.SharpnessAware(torch.optim.SGD(model.parameters(), lr=0.1), steppe.parse(text), total_steps=10)
    masks = []
    for _ in range(6):
        opt.step(steppe.Batch(model, losses, batch))
        masks.append(torch.cat([state["steppe.mask"].flatten() for state in opt.state_dict()["state"].values()]))
    kept = int(masks[0].sum())
    for step, (before, after) in enumerate(itertools.pairwise(masks), 1):
        dropped = math.floor(0.5 * (1 + math.cos(math.pi * step / 10)) / 2 * kept)
        assert int((before & ~after).sum()) == dropped


def test_a_dynamic_mask_over_noise_has_its_gradient():
    model, batch = mlp()
    method = steppe.parse("ssam_dynamic(rwp(alpha=0), refresh=1)")
    opt = steppe.SharpnessAware(torch.optim.SGD(model.parameters(), lr=0.1), method, total_steps=5)
    for _ in range(5):
        opt.step(steppe.Batch(model, losses, batch))
    assert opt.stats.propagations == method.cost() == 2


def test_squared_gradients_of_fp16_weights_do_not_vanish():
    """A gradient of 1e-4 has a square that fp16 has not."""
    model, (x, y) = mlp()
    model = model.half()
    twin, squares = copy.deepcopy(model).double(), []
    for network, inputs in ((model, x.half()), (twin, x.half().double())):
        batch = steppe.Batch(network, lambda m, d: 1e-3 * losses(m, d), (inputs, y))
        squares.append(squared_gradients(batch, list(network.parameters()), len(y)))
    for low, wide in zip(*squares, strict=True):
        assert low.dtype == torch.float32
        torch.testing.assert_close(low.double(), wide, rtol=0.1, atol=0.02 * float(wide.max()))
