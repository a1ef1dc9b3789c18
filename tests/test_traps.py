"""The traps that published implementations fell into, one short test each; what surrounds them is tested elsewhere.

Trap 6 and 10 stand again in ``ranks/test_ddp.py``, where there are ranks; trap 15 in ``ranks/test_fsdp.py``.
"""

from __future__ import annotations

import gc
import io

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.optim import SGD
from torch.optim.lr_scheduler import StepLR

import nets
import steppe
from recipes_list import same, step, weights, wrap


def test_trap_01_momentum_and_memories_survive_the_checkpoint():
    ends = []
    for stop in (False, True):
        model, data = nets.mlp()
        opt = wrap(model, "rst(looksam(k=3), p=0.7)", seed=5)
        for i in range(8):
            if stop and i == 4:
                file = io.BytesIO()
                torch.save([model.state_dict(), opt.state_dict()], file)
                file.seek(0)
                saved = torch.load(file, weights_only=True)
                model, _ = nets.mlp(seed=1)
                opt = wrap(model, "rst(looksam(k=3), p=0.7)")
                model.load_state_dict(saved[0])
                opt.load_state_dict(saved[1])
            step(opt, model, data)
        ends.append(weights(model))
    assert same(*ends)


@pytest.mark.parametrize("lacking", [1, 2])
def test_trap_02_a_gradient_that_is_none_in_one_pass_leaves_nothing_behind(lacking):
    model, data = nets.mlp()
    extra, calls = nn.Parameter(torch.ones(3, dtype=torch.float64)), []
    opt = steppe.SharpnessAware(SGD([*model.parameters(), extra], lr=0.1), steppe.sam(0.5))

    def losses(model, batch):
        calls.append(None)
        return nets.losses(model, batch) + (0 if len(calls) % 2 == lacking % 2 else extra.square().sum())

    for _ in range(4):
        before = extra.detach().clone()
        step(opt, model, data, losses)
        expected = before if lacking == 2 else before - 0.1 * 2 * before
        torch.testing.assert_close(extra.detach(), expected, rtol=0, atol=1e-12)


def test_trap_03_weights_are_restored_to_the_bit_and_in_place():
    model, (x, y) = nets.mlp()
    model, data = model.bfloat16(), (x.bfloat16(), y)
    opt = wrap(model, "sam(rho=1)")
    for group in opt.param_groups:
        group.update(lr=0.0, weight_decay=0.0)
    before, places = weights(model), [p.data_ptr() for p in model.parameters()]
    for _ in range(100):
        step(opt, model, data)
    assert same(before, weights(model))
    assert places == [p.data_ptr() for p in model.parameters()]


def test_trap_04_an_exception_or_an_overflow_leaves_the_weights_unperturbed():
    model, data = nets.mlp()
    for fault in (lambda losses: 1 / 0, lambda losses: losses * float("nan")):
        for call in (1, 2):
            opt, calls, before = wrap(model, "sam()"), [], weights(model)

            def losses(model, batch, calls=calls, call=call, fault=fault):
                calls.append(None)
                found = nets.losses(model, batch)
                return fault(found) if len(calls) == call else found

            with pytest.raises((ZeroDivisionError, ValueError)):
                step(opt, model, data, losses)
            assert same(before, weights(model))


def test_trap_05_no_scaled_gradient_is_left_in_the_update():
    (one, data), (two, _) = nets.mlp(), nets.mlp()
    plain, scaled = wrap(one, "sam()"), wrap(two, "sam()", scaler=torch.amp.GradScaler("cpu"))
    step(plain, one, data)
    step(scaled, two, data)
    for p, q in zip(one.parameters(), two.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-6, atol=1e-12)
    scaler, before = torch.amp.GradScaler("cpu"), weights(one)

    def closure():
        plain.zero_grad()
        loss = nets.losses(one, data).mean()
        scaler.scale(loss).backward()
        return loss

    closure()
    with pytest.raises(TypeError, match="scaler=scaler"):
        scaler.step(plain, closure)
    assert same(before, weights(one))


def test_trap_06_each_group_of_m_examples_has_its_own_perturbation():
    model, (x, y) = nets.mlp()
    opt, seen = wrap(model, "m_sharpness(sam(), 6)"), []

    def losses(model, batch):
        seen.append(model[0].weight.detach().clone())
        return nets.losses(model, batch)

    step(opt, model, (x, y), losses)
    assert len(seen) == 4
    assert torch.equal(seen[0], seen[2])
    assert not torch.equal(seen[1], seen[3])


def test_trap_07_both_passes_span_all_micro_batches():
    model, data = nets.mlp()
    opt, seen = wrap(model, "sam()"), []

    def losses(model, batch):
        seen.append(len(batch[1]))
        return nets.losses(model, batch)

    opt.step(steppe.Batch.from_micro_batches(model, losses, [tuple(t[:5] for t in data), tuple(t[5:] for t in data)]))
    assert seen == [5, 7, 5, 7]


def test_trap_08_statistics_move_once_and_from_the_unperturbed_pass():
    (one, data), (two, _) = nets.convnet(), nets.convnet()
    sharp, base = wrap(one, "sam(rho=2)"), wrap(two, "sgd()")
    for _ in range(3):
        two.load_state_dict(one.state_dict())
        step(sharp, one, data)
        step(base, two, data)
        assert same([*one.buffers()], [*two.buffers()])
    assert int(one[1].num_batches_tracked) == 3


def test_trap_09_dropout_draws_the_same_mask_in_both_passes_and_the_generator_goes_on():
    model = nn.Sequential(nn.Linear(6, 50), nn.Dropout(0.5), nn.Linear(50, 3)).double()
    _, data = nets.mlp()
    for replay in (True, False):
        masks, opt = [], wrap(model, "sam()")
        hook = model[1].register_forward_hook(lambda _, __, out, masks=masks: masks.append(out == 0))
        torch.manual_seed(1)
        step(opt, model, data, replay=replay)
        after = torch.rand(1)
        torch.manual_seed(1)
        with torch.no_grad():
            model(data[0])
        assert torch.equal(masks[0], masks[1]) is replay
        assert torch.equal(after, torch.rand(1)) is replay
        hook.remove()


def test_trap_10_noise_is_a_function_of_seed_and_step_alone():
    ends = []
    for noise in (0, 1):
        model, data = nets.mlp()
        opt = wrap(model, "rst(rwp(), p=0.7)", seed=3)
        torch.manual_seed(noise)
        before = torch.get_rng_state()
        for _ in range(4):
            step(opt, model, data)
        assert torch.equal(before, torch.get_rng_state())
        ends.append(weights(model))
    assert same(*ends)


def test_trap_11_the_saving_is_real():
    model, data = nets.mlp()
    for text, passes in {"looksam(k=4)": 8 + 2, "rst(sam(), p=0)": 8, "rwp(alpha=0)": 8, "sam()": 16}.items():
        opt, calls = wrap(model, text), []
        for _ in range(8):
            step(opt, model, data, lambda model, batch, calls=calls: (calls.append(None), nets.losses(model, batch))[1])
        assert len(calls) == passes
    opt, computed = wrap(model, "esam_swp(beta=0.5)"), []
    for p in model.parameters():
        p.register_post_accumulate_grad_hook(lambda p: computed.append(p))
    step(opt, model, data)
    assert len(computed) < 2 * len(list(model.parameters()))


@pytest.mark.parametrize("text", ["esam(gamma=0.01)", "sam(rho=0)", "gsam()", "rwp()"])
def test_trap_12_small_and_empty_things(text):
    model, (x, y) = nets.mlp()
    model[2].requires_grad_(False)
    opt = wrap(model, text)
    assert step(opt, model, (x[:1], y[:1])).isfinite()
    assert step(opt, model, (x, y)).isfinite()
    frozen = model[2].weight.detach().clone()
    step(opt, model, (x * 0, y))
    assert torch.equal(frozen, model[2].weight)


def test_trap_13_bf16_weights_do_move():
    weight = nn.Parameter((torch.randn(300, 300, generator=torch.Generator().manual_seed(0)) * 0.05).bfloat16())
    model = nn.Module()
    model.weight = weight
    z = torch.randn(300, 300, generator=torch.Generator().manual_seed(1)).bfloat16()
    moved = {}
    for how in ("nearest", "stochastic", "float32"):
        opt = steppe.SharpnessAware(SGD([weight], lr=0.0), steppe.sam(0.015), rounding=how)
        opt.step(steppe.Batch(model, lambda model, z: (z * model.weight).sum(1), z))
        moved[how] = opt.stats.projected / 0.015
    assert moved["nearest"] < 0.6
    assert moved["stochastic"] == pytest.approx(1, abs=0.05)
    assert moved["float32"] == pytest.approx(1, abs=1e-3)


def test_trap_14_schedulers_see_the_groups_of_the_base(recwarn):
    model, data = nets.mlp()
    opt = wrap(model, "sam()")
    schedule = StepLR(opt, 1, gamma=0.5)
    opt.add_param_group({"params": [nn.Parameter(torch.ones(2, dtype=torch.float64))], "lr": 1.0, "initial_lr": 1.0})
    schedule.base_lrs.append(1.0)
    step(opt, model, data)
    schedule.step()
    assert [group["lr"] for group in opt.base.param_groups] == [0.025, 0.5]
    assert opt.param_groups is opt.base.param_groups
    assert not recwarn.list


def test_an_outer_autocast_or_a_cached_parametrization_would_hide_the_perturbation():
    model = nn.utils.parametrizations.weight_norm(nn.Linear(6, 3)).float()
    x, y = nets.mlp()[1]
    opt, seen = wrap(model, "sam(rho=1)"), []

    def losses(model, batch):
        out = model(batch[0])
        seen.append(out.detach())
        return F.cross_entropy(out, batch[1], reduction="none")

    with nn.utils.parametrize.cached(), torch.autocast("cpu", torch.bfloat16):
        step(opt, model, (x.float(), y), losses)
    assert not torch.equal(*seen)


@pytest.mark.parametrize("what", ["step", "curvature"])
def test_trap_16_second_derivatives_leave_no_graph_behind_and_take_tensors_of_any_rank(what):
    """A graph that ``backward(create_graph=True)`` hangs on ``.grad`` lives until the garbage collector finds it."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv1d(2, 3, 3), nn.Tanh(), nn.Flatten(), nn.Linear(9, 2)).double()
    assert {p.ndim for p in model.parameters()} == {1, 2, 3}
    data = torch.randn(4, 2, 5).double(), torch.randint(2, (4,))
    loss_fn = nets.losses
    opt = wrap(model, "sam(second_order=True)")
    objective = steppe.curvature.Objective(model, loss_fn, [data])
    v = torch.randn(objective.size).double()

    def run():
        if what == "step":
            step(opt, model, data)
        else:
            steppe.curvature.Operator(objective) @ v

    def graphs():
        return sum(issubclass(type(t), torch.Tensor) and t.grad_fn is not None for t in gc.get_objects())

    run()
    gc.collect()
    gc.disable()
    try:
        before = graphs()
        for _ in range(5):
            run()
        assert graphs() == before
    finally:
        gc.enable()
    assert all(p.grad is None or p.grad.grad_fn is None for p in model.parameters())
