"""bf16 and fp16 weights: the perturbation must not round away, and what became of it is reported (trap 13)."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.optim import SGD

import nets
import steppe
from recipes_list import same, step, weights, wrap
from steppe import rounding

RHO = 0.05


class Million(nn.Module):
    """A million weights of deviation 0.05, whose gradient has independent normal entries."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.weight = nn.Parameter(normal(0).mul_(0.05).to(dtype))

    def forward(self, x):
        return (x * self.weight).sum(1)


def normal(seed: int) -> torch.Tensor:
    return torch.randn(1000, 1000, generator=torch.Generator().manual_seed(seed))


def million(dtype: torch.dtype, **kwargs) -> steppe.SharpnessAware:
    """One step of SAM on such weights."""
    model = Million(dtype)
    opt = steppe.SharpnessAware(SGD(model.parameters(), lr=0.1), steppe.sam(RHO), **kwargs)
    opt.step(steppe.Batch(model, lambda model, x: model(x), normal(1).to(dtype)))
    return opt


def test_rounding_to_the_nearest_loses_most_of_the_perturbation():
    model = Million(torch.bfloat16)
    seen = []

    def losses(model, x):
        seen.append(model.weight.detach().clone())
        return model(x)

    opt = steppe.SharpnessAware(SGD(model.parameters(), lr=0.1), steppe.sam(RHO), rounding="nearest")
    opt.step(steppe.Batch(model, losses, normal(1).bfloat16()))
    assert float((seen[0] != seen[1]).float().mean()) == pytest.approx(0.22, abs=0.01)
    assert opt.stats.moved == pytest.approx(0.82 * RHO, abs=0.01 * RHO)
    assert opt.stats.moved == pytest.approx(float((seen[1].float() - seen[0].float()).norm()), rel=1e-5)
    assert opt.stats.projected < 0.6 * RHO


def test_stochastic_rounding_keeps_the_projection():
    stats = million(torch.bfloat16).stats
    assert stats.projected == pytest.approx(RHO, rel=0.02)
    assert stats.moved > 1.02 * RHO


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_float32_copy_keeps_the_norm(dtype):
    stats = million(dtype, rounding="float32").stats
    assert stats.moved == pytest.approx(RHO, rel=0.02)
    assert stats.projected == pytest.approx(RHO, rel=0.02)


def test_full_precision_is_not_measured():
    stats = million(torch.float32).stats
    assert stats.moved is None
    assert stats.projected is None


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("how", ["stochastic", "nearest", "float32"])
@pytest.mark.parametrize("text", ["sam()", "sam(steps=2)", "esam()", "gsam()", "rwp()"])
def test_steps_without_learning_leave_the_weights_to_the_bit(text, how, dtype):
    model, (x, y) = nets.convnet()
    model, data = model.to(dtype), (x.to(dtype), y)
    opt = wrap(model, text, rounding=how)
    for group in opt.param_groups:
        group.update(lr=0.0, weight_decay=0.0)
    kept = [p.detach().clone() for p in model.parameters()]
    for _ in range(20):
        step(opt, model, data)
        assert all(p.dtype == dtype and p.grad.dtype == dtype for p in model.parameters())
    assert same(kept, [p.detach() for p in model.parameters()])


@pytest.mark.parametrize("how", ["stochastic", "float32"])
def test_an_exception_in_pass_two_gives_the_weights_back(how):
    model, (x, y) = nets.convnet()
    model, data = model.bfloat16(), (x.bfloat16(), y)
    opt, calls = wrap(model, "sam()", rounding=how), []

    def losses(model, batch):
        calls.append(model[0].weight.dtype)
        if len(calls) == 2:
            raise RuntimeError("no")
        return nets.losses(model, batch)

    before = [p.detach().clone() for p in model.parameters()]
    with pytest.raises(RuntimeError, match="no"):
        step(opt, model, data, loss_fn=losses)
    assert calls == [torch.bfloat16, torch.float32 if how == "float32" else torch.bfloat16]
    assert same(before, [p.detach() for p in model.parameters()])
    assert all(t.dtype in (torch.bfloat16, torch.int64) for t in model.state_dict().values())


def test_the_float32_copy_is_not_cast_back_by_an_outer_autocast():
    model = Million(torch.bfloat16)
    opt = steppe.SharpnessAware(SGD(model.parameters(), lr=0.0), steppe.sam(RHO), rounding="float32")
    seen = []

    def losses(model, batch):
        seen.append(batch @ model.weight)
        return seen[-1].square().mean(1)

    with torch.autocast("cpu", torch.bfloat16):
        opt.step(steppe.Batch(model, losses, torch.ones(4, 1000, dtype=torch.bfloat16), autocast=torch.bfloat16))
    assert [t.dtype for t in seen] == [torch.bfloat16, torch.float32]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("start", [1.0, -1.0, 0.0, 3e-4, -2.0, 255.0])
def test_stochastic_rounding_has_the_right_mean_and_takes_a_neighbour(start, dtype):
    near = torch.tensor(start).to(dtype)
    n = 200_000
    u = near.expand(n).clone()
    step_size = torch.finfo(dtype).eps * max(abs(float(near)), torch.finfo(dtype).smallest_normal)
    asked = 0.3 * step_size
    generator = torch.Generator().manual_seed(0)
    rounding.add_([u], [torch.ones(n)], asked, lambda _: generator)
    values = u.double().unique()
    assert len(values) == 2
    spread = float((values[1] - values[0]) / 2)
    assert float(u.double().mean()) - float(near) == pytest.approx(asked, abs=5 * spread / n**0.5)


def test_the_same_seed_rounds_the_same_way():
    one, two, three = (million(torch.bfloat16, seed=seed).stats.moved for seed in (0, 0, 1))
    assert one == two != three


def test_a_rounding_that_is_none_is_refused():
    with pytest.raises(ValueError, match=r"rounding='up' must be 'stochastic' or 'nearest' or 'float32'"):
        wrap(nets.mlp()[0], "sam()", rounding="up")


def test_buffers_and_mixed_types_come_back():
    model, (x, y) = nets.convnet()
    model = model.bfloat16()
    model[1].float()
    before = weights(model)
    opt = wrap(model, "rwp(alpha=0)", rounding="float32")
    for group in opt.param_groups:
        group.update(lr=0.0, weight_decay=0.0)

    def losses(model, batch):
        with torch.autocast("cpu", torch.bfloat16):
            return nets.losses(model, batch).float()

    step(opt, model.eval(), (x.bfloat16(), y), loss_fn=losses)
    assert same(before, weights(model))


def test_statistics_that_move_in_a_float32_copy_have_moved():
    """At alpha = 0 the perturbed pass is the only one."""
    model, (x, y) = nets.convnet()
    model, data = model.bfloat16(), (x.bfloat16(), y)
    step(wrap(model, "rwp(alpha=0)", rounding="float32"), model, data)
    assert int(model[1].num_batches_tracked) == 1
    assert float(model[1].running_mean.abs().min()) > 0
    assert model[1].running_mean.dtype == torch.bfloat16


def test_groups_of_unlike_radii_are_rounded_by_draws_of_their_own():
    model = nn.ParameterList([torch.full((1000,), 0.3, dtype=torch.bfloat16) for _ in range(2)])
    moves = []

    def losses(model, x):
        moves.append([p.detach().clone() for p in model])
        return x @ model[0] + x @ model[1]

    base = SGD([{"params": [p], "rho": rho} for p, rho in zip(model, (0.05, 0.0500001), strict=True)], lr=0.1)
    steppe.SharpnessAware(base, steppe.sam()).step(steppe.Batch(model, losses, torch.ones(4, 1000).bfloat16()))
    up = [after > before for before, after in zip(*moves, strict=True)]
    assert 0.2 < float(up[0].float().mean()) < 0.8
    assert 0.3 < float((up[0] == up[1]).float().mean()) < 0.8
