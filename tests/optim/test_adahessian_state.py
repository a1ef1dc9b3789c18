"""AdaHessian as an ordinary optimizer: checkpoints, groups, schedulers, copies, low precision."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
from torch import nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.optim.lr_scheduler import LambdaLR

import nets
import steppe
from steppe.optim.adahessian import AdaHessian

NETS = {"mlp": nets.mlp, "convnet": nets.convnet}


def bits(model, opt):
    return [
        *[t.clone() for t in model.state_dict().values()],
        *[t.clone() for kept in opt.state_dict()["state"].values() for _, t in sorted(kept.items())],
    ]


def same(one, two):
    return len(one) == len(two) and all(a.dtype == b.dtype and torch.equal(a, b) for a, b in zip(one, two, strict=True))


@pytest.mark.parametrize("net", NETS)
@pytest.mark.parametrize("at", [1, 3, 5])
@pytest.mark.parametrize("options", [{}, {"n": 5, "probes": 2}, {"n": 2, "product": "difference"}], ids=str)
def test_a_resumed_run_is_the_same_run(options, at, net):
    model, data = NETS[net]()
    opt = AdaHessian(model.parameters(), lr=0.01, seed=7, **options)
    for _ in range(at):
        opt.step(steppe.Batch(model, nets.losses, data))
    buffer = io.BytesIO()
    torch.save((model.state_dict(), opt.state_dict()), buffer)
    other, _ = NETS[net](seed=1)
    fresh = AdaHessian(other.parameters(), lr=0.5, seed=7, **options)
    weights, saved = torch.load(io.BytesIO(buffer.getvalue()), weights_only=True)
    other.load_state_dict(weights)
    fresh.load_state_dict(saved)
    assert same(bits(model, opt), bits(other, fresh))
    for _ in range(6):
        a = opt.step(steppe.Batch(model, nets.losses, data))
        b = fresh.step(steppe.Batch(other, nets.losses, data))
        assert torch.equal(a, b)
        assert same(bits(model, opt), bits(other, fresh))


def test_a_checkpoint_that_goes_by_names():
    model, data = nets.mlp()
    opt = AdaHessian(model.parameters(), lr=0.01, n=5)
    for _ in range(3):
        opt.step(steppe.Batch(model, nets.losses, data))
    weights, saved = copy.deepcopy(get_state_dict(model, opt))
    other, _ = nets.mlp(seed=1)
    fresh = AdaHessian(other.parameters(), lr=0.01, n=5)
    before = [p.detach().clone() for p in other.parameters()]
    get_state_dict(other, fresh)  # prepares the state by a step at lr = 0
    assert all(map(torch.equal, before, other.parameters()))
    assert fresh.steps == 0
    set_state_dict(other, fresh, model_state_dict=weights, optim_state_dict=saved)
    for _ in range(4):
        opt.step(steppe.Batch(model, nets.losses, data))
        fresh.step(steppe.Batch(other, nets.losses, data))
    assert same(bits(model, opt), bits(other, fresh))


def test_groups_have_values_of_their_own():
    model, data = nets.mlp()
    opt = AdaHessian(
        [
            {"params": model[0].parameters(), "lr": 0.0},
            {"params": model[2].parameters(), "betas": (0.0, 0.0), "eps": 1.0, "power": 0.0},
            {"params": model[4].parameters(), "weight_decay": 0.5, "block": "row"},
        ],
        lr=0.1,
    )
    start = [p.detach().clone() for p in model.parameters()]
    opt.step(steppe.Batch(model, nets.losses, data))
    for p, before in zip(model[0].parameters(), start[:2], strict=True):
        assert torch.equal(p, before)
    for p, before in zip(model[2].parameters(), start[2:4], strict=True):
        torch.testing.assert_close(p.detach(), before - 0.1 * p.grad / 2)
    square = opt.state[model[4].weight]["exp_diagonal_sq"]
    torch.testing.assert_close(square, square[:, :1].expand_as(square))
    size = (square / (1 - 0.999)).sqrt() + 1e-4
    torch.testing.assert_close(model[4].weight.detach(), start[4] * 0.95 - 0.1 * model[4].weight.grad / size)


def test_a_schedule_reaches_it():
    (one, data), (two, _) = nets.mlp(), nets.mlp()
    scheduled, by_hand = AdaHessian(one.parameters(), lr=0.2), AdaHessian(two.parameters(), lr=0.2)
    schedule = LambdaLR(scheduled, lambda epoch: 0.5**epoch)
    for i in range(4):
        by_hand.param_groups[0]["lr"] = 0.2 * 0.5**i
        scheduled.step(steppe.Batch(one, nets.losses, data))
        by_hand.step(steppe.Batch(two, nets.losses, data))
        schedule.step()
    assert same(bits(one, scheduled), bits(two, by_hand))
    copied = pickle.loads(pickle.dumps(scheduled))
    assert copied.steps == 4


@pytest.mark.parametrize("how", [copy.deepcopy, lambda pair: pickle.loads(pickle.dumps(pair))], ids=["copy", "pickle"])
def test_a_copy_goes_its_own_way(how):
    model, data = nets.mlp()
    opt = AdaHessian(model.parameters(), n=3)
    for _ in range(2):
        opt.step(steppe.Batch(model, nets.losses, data))
    other, copied = how((model, opt))
    assert same(bits(model, opt), bits(other, copied))
    kept = bits(model, opt)
    for _ in range(3):
        copied.step(steppe.Batch(other, nets.losses, data))
    assert same(bits(model, opt), kept)
    for _ in range(3):
        opt.step(steppe.Batch(model, nets.losses, data))
    assert same(bits(model, opt), bits(other, copied))


def smooth():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 16), nn.LayerNorm(16), nn.GELU(), nn.Linear(16, 3))
    return model, (torch.randn(12, 6), torch.randint(3, (12,)))


def test_moments_of_bf16_weights_are_float32_and_survive_a_checkpoint():
    model, (x, y) = smooth()
    model, data = model.bfloat16(), (x.bfloat16(), y)
    opt = AdaHessian(model.parameters(), n=2)
    start = [p.detach().clone() for p in model.parameters()]
    for _ in range(3):
        opt.step(steppe.Batch(model, nets.losses, data))
    assert {t.dtype for kept in opt.state.values() for t in kept.values()} == {torch.float32}
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert not any(map(torch.equal, start, model.parameters()))
    other = copy.deepcopy(model)
    fresh = AdaHessian(other.parameters(), n=2)
    fresh.load_state_dict(copy.deepcopy(opt.state_dict()))
    assert same(bits(model, opt), bits(other, fresh))
    for _ in range(3):
        opt.step(steppe.Batch(model, nets.losses, data))
        fresh.step(steppe.Batch(other, nets.losses, data))
    assert same(bits(model, opt), bits(other, fresh))


def test_bf16_weights_move_as_float32_ones_but_for_their_rounding():
    (one, (x, y)), (two, _) = smooth(), smooth()
    for p in two.parameters():
        p.data = p.data.bfloat16()
    for p, q in zip(one.parameters(), two.parameters(), strict=True):
        p.data = q.data.float()
    wide, narrow = AdaHessian(one.parameters()), AdaHessian(two.parameters())
    wide.step(steppe.Batch(one, nets.losses, (x, y)))
    narrow.step(steppe.Batch(two, nets.losses, (x.bfloat16(), y)))
    far = [
        (a.float() - b.float()).norm() / b.float().norm()
        for a, b in (
            (narrow.state[q]["exp_avg"], wide.state[p]["exp_avg"])
            for p, q in zip(one.parameters(), two.parameters(), strict=True)
        )
    ]
    assert max(far) < 0.05


def test_under_bf16_autocast_moments_are_float32_and_near_those_without():
    (one, data), (two, _) = smooth(), smooth()
    plain, mixed = AdaHessian(one.parameters()), AdaHessian(two.parameters())
    plain.step(steppe.Batch(one, nets.losses, data))
    mixed.step(steppe.Batch(two, nets.losses, data, autocast=torch.bfloat16))
    for p, q in zip(one.parameters(), two.parameters(), strict=True):
        for name in ("exp_avg", "exp_diagonal_sq"):
            a, b = plain.state[p][name], mixed.state[q][name]
            assert b.dtype == torch.float32
            assert float((a - b).norm()) < 0.1 * float(a.norm())


def test_fp32_in_float32_is_near_float64():
    (one, data), (two, _) = smooth(), smooth()
    narrow, wide = AdaHessian(one.parameters()), AdaHessian(two.double().parameters())
    for _ in range(3):
        narrow.step(steppe.Batch(one, nets.losses, data))
        wide.step(steppe.Batch(two, nets.losses, (data[0].double(), data[1])))
    for p, q in zip(one.parameters(), two.parameters(), strict=True):
        torch.testing.assert_close(p.double(), q, rtol=1e-3, atol=1e-3)
