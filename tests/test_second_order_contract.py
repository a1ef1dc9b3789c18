"""Every recipe on every second-order base: it runs, repeats, resumes, and ρ = 0 is the base."""

from __future__ import annotations

import copy
import io
import math

import pytest
import torch
from torch.optim.lr_scheduler import StepLR

import nets
import steppe
from recipes_list import EVERY, TOTAL, step, weights
from steppe import optim

BASES = {
    "adahessian": lambda params: optim.AdaHessian(params, lr=0.05, n=2),
    "adahessian by differences": lambda params: optim.AdaHessian(params, lr=0.05, product="difference"),
    "exact": lambda params: optim.NaturalGradient(params, lr=0.05, fisher="exact", damping=0.1, n=2),
    "diagonal": lambda params: optim.NaturalGradient(params, lr=0.05, fisher="diagonal", damping=0.1, n=2),
    "kfac": lambda params: optim.NaturalGradient(params, lr=0.05, fisher="kfac", damping=0.1, n=2, n_inverse=4),
    "ekfac": lambda params: optim.NaturalGradient(params, lr=0.05, fisher="ekfac", damping=0.1, n=2, n_inverse=4),
    "newton": lambda params: optim.NewtonCG(params, lr=0.1, damping=1.0, iterations=3),
}


def made(text: str, name: str, net=nets.mlp, **how):
    model, data = net()
    base = BASES[name](model.parameters())
    return steppe.SharpnessAware(base, steppe.parse(text), total_steps=TOTAL, **how), model, data


@pytest.mark.parametrize("text", EVERY)
@pytest.mark.parametrize("name", BASES)
def test_runs_and_resumes_to_the_bit(text, name):
    opt, model, data = made(text, name)
    before = weights(model)
    for _ in range(3):
        assert math.isfinite(step(opt, model, data))
    assert all(t.isfinite().all() for t in weights(model))
    assert not all(map(torch.equal, before, weights(model)))
    buffer = io.BytesIO()
    torch.save({"model": model.state_dict(), "opt": opt.state_dict()}, buffer)
    buffer.seek(0)
    saved = torch.load(buffer, weights_only=True)
    again, other, _ = made(text, name)
    other.load_state_dict(saved["model"])
    again.load_state_dict(saved["opt"])
    for _ in range(3):
        assert torch.equal(step(opt, model, data), step(again, other, data))
    assert all(map(torch.equal, weights(model), weights(other)))


@pytest.mark.parametrize("net", [nets.convnet, nets.transformer])
@pytest.mark.parametrize("text", ["sam()", "esam()", "rwp(alpha=0)", "looksam(k=2)", "m_sharpness(sam(), 5)", "gsam()"])
@pytest.mark.parametrize("name", BASES)
@pytest.mark.filterwarnings("ignore::UserWarning")  # of parameters that K-FAC does not know
def test_convolutions_norms_and_attention(net, text, name):
    opt, model, data = made(text, name, net)
    for _ in range(3):
        assert math.isfinite(step(opt, model, data))
    assert all(t.isfinite().all() for t in weights(model))


@pytest.mark.parametrize("name", BASES)
def test_no_radius_is_the_base_alone(name):
    opt, model, data = made("sam(rho=0)", name)
    other, _ = nets.mlp()
    base = BASES[name](other.parameters())
    for _ in range(4):
        first = step(opt, model, data)
        assert torch.equal(first, base.step(steppe.Batch(other, nets.losses, data)))
    assert all(map(torch.equal, weights(model), weights(other)))


@pytest.mark.parametrize("name", BASES)
def test_micro_batches_are_one_batch(name):
    opt, model, data = made("sam()", name)
    other, second, _ = made("sam()", name)
    if name in ("diagonal", "kfac", "ekfac"):
        opt.base.draws = other.base.draws = None  # what is drawn depends on how the batch is cut
    for _ in range(3):
        step(opt, model, data)
        step(other, second, data, micro=3)
    for p, q in zip(model.parameters(), second.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-6 if "difference" in name else 1e-9, atol=1e-10)


@pytest.mark.parametrize("name", BASES)
def test_schedulers_groups_and_copies(name):
    model, data = nets.mlp()
    groups = [{"params": [p]} for p in model.parameters()]
    groups[0]["lr"] = 0.0
    base = BASES[name](groups)
    opt = steppe.SharpnessAware(base, steppe.sam())
    scheduler = StepLR(opt, 1, gamma=0.5)
    first, last = (p.detach().clone() for p in (next(model.parameters()), list(model.parameters())[-1]))
    for _ in range(2):
        step(opt, model, data)
        scheduler.step()
    assert torch.equal(first, next(model.parameters()))
    assert not torch.equal(last, list(model.parameters())[-1])
    assert base.param_groups[-1]["lr"] == 0.25 * base.defaults["lr"]
    model2, opt2 = copy.deepcopy((model, opt))
    assert torch.equal(step(opt, model, data), step(opt2, model2, data))
    assert all(map(torch.equal, weights(model), weights(model2)))


@pytest.mark.parametrize("name", ["adahessian", "kfac", "ekfac", "newton"])
def test_fp16_scaling_changes_nothing(name):
    """A scale that is a power of two is taken off again, of gradients and of curvature."""
    opt, model, data = made("sam()", name)
    other, second, _ = made("sam()", name, scaler=torch.amp.GradScaler("cpu", init_scale=2.0**6))
    for _ in range(3):
        step(opt, model, data)
        step(other, second, data)
    assert other.stats.skipped == 0
    for p, q in zip(model.parameters(), second.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-10, atol=1e-13)
