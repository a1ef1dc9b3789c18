"""The references against hand-computed values, finite differences and one another."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import nn

from nets import convnet, losses, mlp, transformer
from reference import (
    ASAM,
    ESAM,
    GNR,
    GSAM,
    RST,
    RWP,
    SAM,
    SDS,
    SWP,
    GSAMMinFH,
    GSAMPenalty,
    LookSAM,
    MixedSAM,
    MSharpness,
    SSAMDynamic,
    SSAMFisher,
)
from reference.common import dot, gradient, norm, rows
from reference.sam import sam_epsilon


class Quadratic(nn.Module):
    """(w1^2 + 2 w2^2) / 2 at w = (3, 2): the gradient is (3, 4), its norm 5."""

    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.tensor([3.0, 2.0], dtype=torch.float64))

    def forward(self, x):
        return x * (self.w[0] ** 2 + 2 * self.w[1] ** 2) / 2


def quadratic():
    ones = torch.ones(4, dtype=torch.float64)
    return Quadratic(), (ones, ones), lambda model, batch: model(batch[0])


def sgd(model, lr=0.1):
    return torch.optim.SGD(model.parameters(), lr=lr)


def drawn(model, cls):
    """The draws that a step of the class needs."""
    g = torch.Generator().manual_seed(1)
    params = list(model.parameters())
    if cls in (ESAM, SWP):
        return {"picks": [i % 3 != 1 for i in range(len(params))]}
    if cls is RWP:
        return {"noise": [torch.randn(p.shape, generator=g, dtype=p.dtype) for p in params]}
    if cls is SSAMDynamic:
        return {"scores": [torch.rand(p.shape, generator=g, dtype=p.dtype) for p in params]}
    return {}


def halves(model):
    """A mask with every second entry."""
    return [(torch.arange(p.numel()) % 2).reshape(p.shape) for p in model.parameters()]


METHODS = {
    "SAM": (SAM, {}),
    "SAM inf": (SAM, {"p": math.inf, "rho": 0.01}),
    "SAM p=3": (SAM, {"p": 3}),
    "SAM K=3": (SAM, {"k": 3}),
    "SAM second order": (SAM, {"second_order": True}),
    "ASAM": (ASAM, {}),
    "MixedSAM": (MixedSAM, {}),
    "GNR": (GNR, {"strength": 1.5}),
    "GSAM": (GSAM, {"rho_min": 0.01}),
    "GSAMMinFH": (GSAMMinFH, {}),
    "GSAMPenalty": (GSAMPenalty, {"lam": 0.3}),
    "ESAM": (ESAM, {}),
    "SWP": (SWP, {}),
    "SDS": (SDS, {}),
    "RWP": (RWP, {}),
    "LookSAM": (LookSAM, {"k": 2}),
    "SSAMFisher": (SSAMFisher, {}),
    "SSAMDynamic": (SSAMDynamic, {"total": 20}),
}


def build(name, model, base):
    cls, options = METHODS[name]
    if cls is SSAMDynamic:
        options = options | {"mask": halves(model)}
    return cls(model, base, **options), drawn(model, cls)


def assert_same(a, b, tol=1e-12):
    for x, y in zip(a, b, strict=True):
        torch.testing.assert_close(x, y, rtol=tol, atol=tol)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, (3.3, 4.8)),  # eps = (0.3, 0.4)
        ({"p": math.inf}, (3.5, 5.0)),  # eps = (0.5, 0.5)
        ({"k": 2}, (3.0 + 0.15 + 0.25 * 3.15 / 5.411330705104159, 4.0 + 0.4 + 0.5 * 4.4 / 5.411330705104159)),
    ],
)
def test_sam_by_hand(options, expected):
    model, batch, loss = quadratic()
    ref = SAM(model, sgd(model), rho=0.5, **options)
    d = torch.tensor(expected, dtype=torch.float64)
    ref.step(loss, batch)
    assert_same([model.w.grad], [d])
    assert_same([model.w.data], [torch.tensor([3.0, 2.0], dtype=torch.float64) - 0.1 * d])


def test_asam_by_hand():
    model, batch, loss = quadratic()
    # T = (3, 2): T g = (9, 8), T^2 g = (27, 16)
    length = math.sqrt(145)
    d = ASAM(model, sgd(model), rho=0.5, eta=0.0, names=["my.weight"]).direction(loss, batch)
    assert_same(d, [torch.tensor([3 + 13.5 / length, 4 + 16 / length], dtype=torch.float64)])
    d = ASAM(model, sgd(model), rho=0.5).direction(loss, batch)  # a vector: T = 1
    assert_same(d, [torch.tensor([3.3, 4.8], dtype=torch.float64)])


def test_mixtures_by_hand():
    model, batch, loss = quadratic()
    d = MixedSAM(model, sgd(model), rho=0.5, alpha=0.2).direction(loss, batch)
    assert_same(d, [torch.tensor([3.24, 4.64], dtype=torch.float64)])
    d = GNR(model, sgd(model), rho=0.5, strength=2).direction(loss, batch)
    assert_same(d, [torch.tensor([3.6, 5.6], dtype=torch.float64)])
    d = GSAMPenalty(model, sgd(model), rho=0.5, lam=0.5).direction(loss, batch)
    assert_same(d, [torch.tensor([3.45, 5.2], dtype=torch.float64)])
    follow = GSAM(model, sgd(model, lr=0.4), rho=0.5, rho_min=0.1, lr_min=0.2, lr_max=1.0)
    assert follow.radius() == pytest.approx(0.2)


@pytest.mark.parametrize("p", [1.5, 2, 3, 10, math.inf])
def test_epsilon_attains_the_dual_norm(p):
    g = [torch.randn(3, 4, dtype=torch.float64), torch.randn(5, dtype=torch.float64)]
    eps = sam_epsilon(g, 0.3, p)
    v, w = torch.cat([e.flatten() for e in eps]), torch.cat([x.flatten() for x in g])
    q = 1 if p == math.inf else p / (p - 1)
    torch.testing.assert_close(v.norm(p).item(), 0.3)
    torch.testing.assert_close(v @ w, 0.3 * w.norm(q))


@pytest.mark.parametrize("net", [mlp, convnet, transformer])
def test_methods_that_are_sam(net):
    model, batch = net()
    everything = {"picks": [True] * len(list(model.parameters()))}
    g0 = gradient(losses(model, batch).mean(), list(model.parameters()))
    sam = SAM(model, sgd(model)).direction(losses, batch)
    assert norm([a - b for a, b in zip(sam, g0, strict=True)]) > 1e-4
    assert_same(SAM(model, sgd(model), k=1, p=2.0).direction(losses, batch), sam)
    assert_same(GNR(model, sgd(model), strength=1).direction(losses, batch), sam)
    assert_same(ESAM(model, sgd(model), beta=1, gamma=1).direction(losses, batch, **everything), sam)
    assert_same(SDS(model, sgd(model), gamma=1).direction(losses, batch), sam)
    assert_same(SWP(model, sgd(model), beta=1).direction(losses, batch, **everything), sam)
    assert_same(GSAM(model, sgd(model), alpha=0).direction(losses, batch), sam)
    assert_same(LookSAM(model, sgd(model)).direction(losses, batch), sam)
    assert_same(SSAMFisher(model, sgd(model)).direction(losses, batch), sam)
    assert_same(MSharpness(SAM(model, sgd(model)), m=12).direction(losses, batch), sam)
    assert_same(RST(SAM(model, sgd(model))).direction(losses, batch, coin=True), sam)
    assert_same(RST(SAM(model, sgd(model)), strength=2).direction(losses, batch, coin=False), g0)
    assert_same(
        RST(SAM(model, sgd(model)), strength=2).direction(losses, batch, coin=True),
        GNR(model, sgd(model), strength=2).direction(losses, batch),
    )


def test_gsam_decompositions():
    model, batch = mlp()
    params = list(model.parameters())
    g0 = gradient(losses(model, batch).mean(), params)
    g1 = SAM(model, sgd(model)).direction(losses, batch)
    d = GSAM(model, sgd(model)).direction(losses, batch)
    moved_by = [a - b for a, b in zip(d, g1, strict=True)]
    assert abs(dot(moved_by, g1)) < 1e-14
    assert dot(moved_by, g0) < -1e-8  # ascent on f
    d = GSAMMinFH(model, sgd(model)).direction(losses, batch)
    moved_by = [a - b for a, b in zip(d, g0, strict=True)]
    assert abs(dot(moved_by, g0)) < 1e-14
    assert dot(moved_by, g1) > 1e-8  # descent on f_p


@pytest.mark.parametrize("net", [mlp, convnet, transformer])
def test_second_order_is_the_gradient_of_the_sam_loss(net):
    model, batch = net()
    rho, h = 0.1, 1e-5
    d = SAM(model, sgd(model), rho=rho, second_order=True).direction(losses, batch)
    vector = nn.utils.parameters_to_vector(model.parameters()).detach()

    def sam_loss(w):
        twin = copy.deepcopy(model)
        nn.utils.vector_to_parameters(w, twin.parameters())
        g = gradient(losses(twin, batch).mean(), list(twin.parameters()))
        g = torch.cat([x.flatten() for x in g])
        nn.utils.vector_to_parameters(w + rho * g / g.norm(), twin.parameters())
        return losses(twin, batch).mean().item()

    d = torch.cat([x.flatten() for x in d])
    for i in range(0, len(vector), 11):
        e = torch.zeros_like(vector)
        e[i] = h
        assert (sam_loss(vector + e) - sam_loss(vector - e)) / (2 * h) == pytest.approx(d[i].item(), abs=1e-6)


def test_m_sharpness_is_the_weighted_mean_of_groups():
    model, batch = mlp()
    sam = SAM(model, sgd(model))
    groups = [sam.direction(losses, rows(batch, slice(a, b))) for a, b in [(0, 5), (5, 10), (10, 12)]]
    expected = [(5 * a + 5 * b + 2 * c) / 12 for a, b, c in zip(*groups, strict=True)]
    assert_same(MSharpness(sam, m=5).direction(losses, batch), expected)


def test_esam_parts():
    model, batch = mlp()
    assert SDS(model, sgd(model), gamma=0.4).sharpest([0.1, 0.9, -1.0, 0.5, 0.3, 0.2]) == [1, 3]
    assert SDS(model, sgd(model), gamma=0.1).sharpest([0.1, 0.9, -1.0]) == [1]
    # SWP on the second tensor alone is SAM with the others frozen, rho / beta wide
    picks = [i == 1 for i in range(6)]
    d = SWP(model, sgd(model), rho=0.05, beta=0.5).direction(losses, batch, picks=picks)
    bias = list(model.parameters())[1]
    g = gradient(losses(model, batch).mean(), [bias])[0]
    with torch.no_grad():
        bias += 0.1 * g / g.norm()
    assert_same(d, gradient(losses(model, batch).mean(), list(model.parameters())))


def test_rwp_noise_is_per_filter():
    model, batch = mlp()
    params = list(model.parameters())
    eps = RWP(model, sgd(model), gamma=0.1).epsilon([torch.ones_like(p) for p in params])
    assert_same([eps[0][3]], [torch.full((6,), 0.1 * params[0][3].norm().item(), dtype=torch.float64)])
    assert_same([eps[1]], [torch.full((8,), 0.1 * params[1].norm().item(), dtype=torch.float64)])
    other = (batch[0].flip(0) + 1, batch[1])
    still = [torch.zeros_like(p) for p in params]
    d = RWP(model, sgd(model), alpha=0.25).direction(losses, batch, noise=still, other=other)
    a, b = (gradient(losses(model, x).mean(), params) for x in (batch, other))
    assert_same(d, [0.25 * x + 0.75 * y for x, y in zip(a, b, strict=True)])


def test_looksam_between_sharp_steps():
    model, batch = mlp()
    params = list(model.parameters())
    ref = RST(LookSAM(model, sgd(model), k=3, alpha=0.7))
    ref.step(losses, batch, coin=False)  # t = 0 would have been sharp
    for t in range(1, 8):
        g0 = gradient(losses(model, batch).mean(), params)
        ref.step(losses, batch, coin=True)
        extra = [p.grad - g for p, g in zip(params, g0, strict=True)]
        if t < 3:
            assert norm(extra) == 0
        elif t in (3, 6):
            assert norm(extra) > 0
            kept = extra, g0
        else:
            torch.testing.assert_close(norm(extra), 0.7 * norm(g0))
            assert abs(dot(extra, kept[1])) < 1e-14
            assert dot(extra, kept[0]) > 0


def test_ssam_masks():
    model, batch = convnet()
    entries = sum(p.numel() for p in model.parameters())
    ref = SSAMFisher(model, sgd(model), s=0.7, n=5, refresh=3)
    masks = []
    for _ in range(7):
        ref.step(losses, batch)
        masks.append(torch.cat([m.flatten() for m in ref.mask]))
    densities = [entries] * 3 + [round(0.3 * entries)] * 4
    assert [int(m.sum()) for m in masks] == densities
    assert torch.equal(masks[3], masks[5])
    assert model.training
    assert model[1].num_batches_tracked == 7

    ref, draws = build("SSAMDynamic", model, sgd(model))
    before = torch.cat([m.flatten() for m in ref.mask])
    kept = int(before.sum())
    ref.step(losses, batch, **draws)
    assert torch.equal(torch.cat([m.flatten() for m in ref.mask]), before)
    ref.step(losses, batch, **draws)
    after = torch.cat([m.flatten() for m in ref.mask])
    n = math.floor(0.5 * (1 + math.cos(math.pi / 20)) / 2 * kept)
    assert int(after.sum()) == kept
    assert int(((before == 1) & (after == 0)).sum()) == n


def test_fisher_mask_by_hand():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.w = nn.Parameter(torch.ones(2, dtype=torch.float64))

    # gradients (2, 1), (-2, 1), (0, 9): the sum favours entry 1, the squares of the first two entry 0
    x = torch.tensor([[2.0, 1.0], [-2.0, 1.0], [0.0, 9.0]], dtype=torch.float64)
    model = Two()
    ref = SSAMFisher(model, sgd(model, 0.0), s=0.5, n=2)
    for mask in ([1, 1], [1, 0]):
        ref.step(lambda m, b: b[0] @ m.w, (x, x))
        assert ref.mask[0].tolist() == mask


def test_dynamic_mask_by_hand():
    class Four(nn.Module):
        def __init__(self):
            super().__init__()
            self.w = nn.Parameter(torch.tensor([4.0, 1.0, 3.0, 2.0], dtype=torch.float64))

    ones = torch.ones(1, dtype=torch.float64)
    model = Four()
    ref = SSAMDynamic(model, sgd(model, 0.0), [torch.tensor([1, 1, 0, 0])], total=2, d0=1.0, rho=1.0)
    square = lambda m, b: b[0] * (m.w**2).sum() / 2  # noqa: E731
    ref.step(square, (ones, ones))
    # t = 1 of 2: half of the kept go: entry 1, the flatter; the better score of entries 2, 3 comes
    ref.step(square, (ones, ones), scores=[torch.tensor([0.9, 1.0, 0.1, 0.2], dtype=torch.float64)])
    assert ref.mask[0].tolist() == [1, 0, 0, 1]
    length = math.sqrt(30)
    d = [4 + 4 / length, 1, 3, 2 + 2 / length]
    assert_same([model.w.grad], [torch.tensor(d, dtype=torch.float64)])


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("wrap", [None, "RST", "G-RST"])
def test_statistics_move_once_and_weights_return(name, wrap):
    model, batch = convnet()
    twin = copy.deepcopy(model)
    losses(twin, batch)
    ref, draws = build(name, model, sgd(model, lr=0.0))
    if wrap:
        ref, draws = RST(ref, strength=2.0 if wrap == "G-RST" else 1.0), draws | {"coin": True}
    ref.step(losses, batch, **draws)
    for key, value in model.state_dict().items():
        assert torch.equal(value, twin.state_dict()[key]), key
    assert all(p.grad is not None for p in model.parameters())


def test_statistics_of_the_remaining_cases():
    model, batch = convnet()
    MSharpness(SAM(model, sgd(model, 0.0)), m=5).step(losses, batch)
    assert model[1].num_batches_tracked == 1
    RWP(model, sgd(model, 0.0), alpha=0.0).step(losses, batch, **drawn(model, RWP))
    assert model[1].num_batches_tracked == 2


@pytest.mark.parametrize("name", METHODS)
def test_weights_return_when_the_perturbed_pass_fails(name):
    model, batch = mlp()
    before = copy.deepcopy(model.state_dict())
    ref, draws = build(name, model, sgd(model))
    calls = []

    def failing(m, b):
        calls.append(not all(torch.equal(v, before[k]) for k, v in m.state_dict().items()))
        if len(calls) > 1:
            raise RuntimeError("out of luck")
        return losses(m, b)

    with pytest.raises(RuntimeError, match="out of luck"):
        ref.step(failing, batch, **draws)
    assert calls == [False, True]  # failed at w + eps
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


@pytest.mark.parametrize("net", [mlp, convnet, transformer])
def test_nets_have_no_dead_gradients(net):
    model, batch = net(seed=3)
    params = list(model.parameters())
    for g in gradient(losses(model, batch).mean(), params):
        assert (g.abs() > 1e-9).all()
    again, same = net(seed=3)
    assert torch.equal(batch[0], same[0])
    assert all(torch.equal(a, b) for a, b in zip(params, again.parameters(), strict=True))


@pytest.mark.parametrize("name", METHODS)
def test_ten_steps_train(name):
    model, batch = mlp()
    ref, draws = build(name, model, torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9))
    first = losses(model, batch).mean().item()
    for _ in range(10):
        ref.step(losses, batch, **draws)
    assert losses(model, batch).mean().item() < first
