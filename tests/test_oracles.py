"""Twenty steps of every method against the plain reference written from its paper: float64, 1e-10."""

from __future__ import annotations

import copy
import math

import pytest
import torch

import reference
import steppe
from nets import convnet, losses, mlp, transformer
from steppe.point import Memory, Point

STEPS = 20
NETS = {"mlp": mlp, "convnet": convnet, "transformer": transformer}
BASES = {
    "sgd": lambda params: torch.optim.SGD(params, lr=0.1, momentum=0.9, weight_decay=1e-3),
    "adamw": lambda params: torch.optim.AdamW(params, lr=3e-3, eps=1e-6),
}


def point(step, seed=0):
    return Point(step, STEPS, 0.1, 0.1, seed, 0, Memory({}, []))


def coin(step, p):
    return torch.rand((), generator=point(step).generator("coin"), dtype=torch.float64).item() < p


def picks(step, params, beta):
    draws = torch.rand(len(params), generator=point(step).generator("swp"), dtype=torch.float64)
    return (draws < beta).tolist()


def noise(step, params):
    generator = point(step).generator("noise")
    return [torch.randn(p.shape, dtype=p.dtype, generator=generator) for p in params]


def scores(step, params):
    flat = torch.rand(sum(p.numel() for p in params), generator=point(step).generator("ssam"))
    return [s.view(p.shape) for s, p in zip(flat.split([p.numel() for p in params]), params, strict=True)]


def first_mask(params, s):
    flat = torch.cat([t.flatten() for t in scores(0, params)])
    kept = torch.zeros(len(flat), dtype=torch.float64)
    kept[flat.argsort(descending=True)[: round((1 - s) * len(flat))]] = 1
    return [m.view(p.shape) for m, p in zip(kept.split([p.numel() for p in params]), params, strict=True)]


def names(model):
    return [name for name, _ in model.named_parameters()]


# expression of the method, its reference, and the draws of a step
CASES = {
    "sam()": (lambda m, b: reference.SAM(m, b), None),
    "sam(rho=0.3)": (lambda m, b: reference.SAM(m, b, rho=0.3), None),
    "sam(rho=0.01, p=inf)": (lambda m, b: reference.SAM(m, b, rho=0.01, p=math.inf), None),
    "sam(p=3)": (lambda m, b: reference.SAM(m, b, p=3), None),
    "sam(p=1.5)": (lambda m, b: reference.SAM(m, b, p=1.5), None),
    "sam(rho=0.2, steps=3)": (lambda m, b: reference.SAM(m, b, rho=0.2, k=3), None),
    "sam(second_order=True)": (lambda m, b: reference.SAM(m, b, second_order=True), None),
    "m_sharpness(sam(), 5)": (lambda m, b: reference.MSharpness(reference.SAM(m, b), 5), None),
    "m_sharpness(gsam(), 4)": (lambda m, b: reference.MSharpness(reference.GSAM(m, b), 4), None),
    "asam()": (lambda m, b: reference.ASAM(m, b), None),
    "asam(by_name=True)": (lambda m, b: reference.ASAM(m, b, names=names(m)), None),
    "mixed_sam()": (lambda m, b: reference.MixedSAM(m, b), None),
    "gnr(strength=0.7)": (lambda m, b: reference.GNR(m, b, strength=0.7), None),
    "gsam()": (lambda m, b: reference.GSAM(m, b), None),
    "gsam_min()": (lambda m, b: reference.GSAMMinFH(m, b), None),
    "gsam_penalty(lam=0.3)": (lambda m, b: reference.GSAMPenalty(m, b, lam=0.3), None),
    "esam()": (lambda m, b: reference.ESAM(m, b), lambda t, ps: {"picks": picks(t, ps, 0.6)}),
    "esam_swp(beta=0.5)": (lambda m, b: reference.SWP(m, b, beta=0.5), lambda t, ps: {"picks": picks(t, ps, 0.5)}),
    "esam_sds(gamma=0.3)": (lambda m, b: reference.SDS(m, b, gamma=0.3), None),
    "rwp()": (lambda m, b: reference.RWP(m, b), lambda t, ps: {"noise": noise(t, ps)}),
    "rwp(gamma=0.05, alpha=0.2)": (
        lambda m, b: reference.RWP(m, b, gamma=0.05, alpha=0.2),
        lambda t, ps: {"noise": noise(t, ps)},
    ),
    "rwp(alpha=0)": (lambda m, b: reference.RWP(m, b, alpha=0), lambda t, ps: {"noise": noise(t, ps)}),
    "rst(sam())": (lambda m, b: reference.RST(reference.SAM(m, b)), lambda t, ps: {"coin": coin(t, 0.5)}),
    "rst(esam(), p=0.7)": (
        lambda m, b: reference.RST(reference.ESAM(m, b)),
        lambda t, ps: {"coin": coin(t, 0.7), "picks": picks(t, ps, 0.6)},
    ),
    "rst(looksam(k=3), p=linear(0, 1))": (
        lambda m, b: reference.RST(reference.LookSAM(m, b, k=3)),
        lambda t, ps: {"coin": coin(t, t / STEPS)},
    ),
    "grst(sam())": (lambda m, b: reference.RST(reference.SAM(m, b), strength=2), lambda t, ps: {"coin": coin(t, 0.5)}),
    "grst(gsam(), p=0.5, strength=1.5)": (
        lambda m, b: reference.RST(reference.GSAM(m, b), strength=1.5),
        lambda t, ps: {"coin": coin(t, 0.5)},
    ),
    "looksam()": (lambda m, b: reference.LookSAM(m, b), None),
    "looksam(alpha=0.3, k=3)": (lambda m, b: reference.LookSAM(m, b, k=3, alpha=0.3), None),
    "ssam(refresh=4, n=7)": (lambda m, b: reference.SSAMFisher(m, b, refresh=4, n=7), None),
    "ssam_dynamic(refresh=4, s=0.3)": (
        lambda m, b: reference.SSAMDynamic(m, b, first_mask(list(m.parameters()), 0.3), STEPS, refresh=4),
        lambda t, ps: {"scores": scores(t, ps)},
    ),
}


def compare(expression, build, draw, net, base, other=None):
    model, batch = NETS[net]()
    twin = copy.deepcopy(model)
    opt = steppe.SharpnessAware(BASES[base](model.parameters()), steppe.parse(expression), total_steps=STEPS)
    oracle = build(twin, BASES[base](twin.parameters()))
    start = [p.detach().clone() for p in model.parameters()]
    for step in range(STEPS):
        params = list(twin.parameters())
        draws = draw(step, params) if draw else {}
        second = None
        if other is not None:
            draws["other"] = other
            second = steppe.Batch(model, losses, other)
        opt.step(steppe.Batch(model, losses, batch), second)
        oracle.step(losses, batch, **draws)
    for (name, t), (_, r) in zip(model.state_dict().items(), twin.state_dict().items(), strict=True):
        torch.testing.assert_close(t, r, rtol=0, atol=1e-10, msg=lambda m, name=name: f"{name}: {m}")
    moved = max(float((p.detach() - s).abs().max()) for p, s in zip(model.parameters(), start, strict=True))
    assert moved > 1e-3, "the run must go somewhere for the comparison to mean anything"


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("net", NETS)
@pytest.mark.parametrize("expression", CASES)
def test_twenty_steps_agree_with_the_reference(expression, net, base):
    build, draw = CASES[expression]
    compare(expression, build, draw, net, base)


@pytest.mark.parametrize("net", NETS)
def test_rwp_on_another_batch_agrees_with_the_reference(net):
    _, (x, y) = NETS[net]()
    other = (x.flip(0) * 1.3, y.flip(0))
    build, draw = (lambda m, b: reference.RWP(m, b)), (lambda t, ps: {"noise": noise(t, ps)})
    compare("rwp(other=True)", build, draw, net, "sgd", other)


@pytest.mark.parametrize("net", NETS)
def test_gsam_radius_follows_the_learning_rate(net):
    model, batch = NETS[net]()
    twin = copy.deepcopy(model)
    base, twin_base = BASES["sgd"](model.parameters()), BASES["sgd"](twin.parameters())
    opt = steppe.SharpnessAware(base, steppe.gsam(rho=0.3, rho_min=0.05, lr_min=0.01))
    oracle = reference.GSAM(twin, twin_base, rho=0.3, rho_min=0.05, lr_min=0.01, lr_max=0.1)
    cosines = [torch.optim.lr_scheduler.CosineAnnealingLR(b, STEPS, eta_min=0.01) for b in (base, twin_base)]
    for _ in range(STEPS):
        opt.step(steppe.Batch(model, losses, batch))
        oracle.step(losses, batch)
        for cosine in cosines:
            cosine.step()
    for p, r in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p, r, rtol=0, atol=1e-10)
