"""fp16 with a gradient scaler: one scale, one unscale, one check and one update a step, whatever overflows."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import clip_grad_norm_, clip_grad_value_
from torch.optim import SGD, AdamW

import nets
import steppe
from recipes_list import EVERY, same, snapshot, step, weights, wrap

SCALE = 2.0**16


def scaler(**kwargs) -> torch.amp.GradScaler:
    return torch.amp.GradScaler("cpu", **{"init_scale": SCALE, **kwargs})


def small(seed: int = 0):
    """A float32 MLP: a scale that is a power of two passes through it to the bit, nearly."""
    model, (x, y) = nets.mlp(seed)
    return model.float(), (x.float(), y)


@pytest.mark.parametrize("base", ["sgd", "adamw"])
@pytest.mark.parametrize("text", EVERY)
def test_the_scale_passes_through_every_method(text, base):
    (one, data), (two, _) = nets.mlp(), nets.mlp()
    plain, scaled = wrap(one, text, base), wrap(two, text, base, scaler=scaler())
    for _ in range(6):
        a, b = step(plain, one, data), step(scaled, two, data)
        torch.testing.assert_close(a, b, rtol=1e-9, atol=0)
    for p, q in zip(one.parameters(), two.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=0, atol=1e-9)
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-6, atol=1e-9)
    assert plain.stats == scaled.stats


def overflowing(model: nn.Module, batch, *, call: int, calls: list[int]):
    """Losses whose gradient is infinite at the given call."""
    calls[0] += 1
    losses = nets.losses(model, batch)
    return losses * torch.tensor(3e38, dtype=losses.dtype) * 1e10 if calls[0] == call else losses


@pytest.mark.parametrize("call", [1, 2])
@pytest.mark.parametrize("base", ["sgd", "adamw"])
@pytest.mark.parametrize(
    "text",
    [
        "sam()",
        "sam(p=inf)",
        "asam()",
        "gsam()",
        "mixed_sam()",
        "looksam(k=2)",
        "rwp()",
        "ssam_dynamic(refresh=1)",
        "grst(gsam(), p=1)",
    ],
)
def test_an_overflow_in_either_pass_changes_nothing(text, base, call):
    model, data = small()
    opt = wrap(model, text, base, scaler=scaler())
    step(opt, model, data)
    step(opt, model, data)
    before, state, taken = weights(model), snapshot(opt), opt.stats.steps
    step(opt, model, data, loss_fn=partial(overflowing, call=call, calls=[0]))
    assert same(before, weights(model))
    assert same(state, snapshot(opt))
    assert opt.stats.steps == taken
    assert opt.stats.skipped == 1
    assert opt.scaler.get_scale() == SCALE / 2
    step(opt, model, data)
    assert opt.stats.steps == taken + 1
    assert not same(before, weights(model))


def test_the_scale_grows_once_in_its_interval_and_counts_steps_not_passes():
    model, data = small()
    opt = wrap(model, "sam(steps=3)", scaler=scaler(growth_interval=4))
    scales = []
    for _ in range(8):
        step(opt, model, data)
        scales.append(opt.scaler.get_scale())
    assert scales == [SCALE] * 3 + [2 * SCALE] * 4 + [4 * SCALE]


@pytest.mark.parametrize("text", ["sgd()", "sam()", "gsam()"])
def test_clipping_comes_after_the_unscaling(text):
    norms = {}
    for name, kwargs in {"plain": {}, "scaled": {"scaler": scaler()}}.items():
        model, data = nets.mlp()
        opt = wrap(model, text, clip=0.05, **kwargs)
        for _ in range(3):
            step(opt, model, data)
        norms[name] = torch.cat([p.grad.reshape(-1) for p in model.parameters()])
        assert float(norms[name].norm()) == pytest.approx(0.05, rel=1e-4)
    torch.testing.assert_close(norms["plain"], norms["scaled"], rtol=0, atol=1e-9)


def test_clipping_by_value_and_by_the_users_own_hook():
    model, data = nets.mlp()
    opt = wrap(model, "sam()", clip=partial(clip_grad_value_, clip_value=1e-3), scaler=scaler())
    step(opt, model, data)
    assert max(float(p.grad.abs().max()) for p in model.parameters()) == pytest.approx(1e-3)
    seen = []
    opt = wrap(model, "sam()", clip=lambda params: seen.append(clip_grad_norm_(params, 0.01)), scaler=scaler())
    opt.base.register_step_pre_hook(
        lambda base, *_: seen.append(torch.stack([p.grad.norm() for p in model.parameters()]).norm())
    )
    step(opt, model, data)
    assert float(seen[0]) > 0.01
    assert float(seen[1]) == pytest.approx(0.01, rel=1e-3)


@pytest.mark.parametrize("clip", [0, -1.0, float("nan"), "norm", True])
def test_a_clip_that_means_nothing_is_refused(clip):
    with pytest.raises(ValueError if type(clip) in (int, float) else TypeError, match="clip="):
        wrap(nets.mlp()[0], "sam()", clip=clip)


def test_a_scale_that_has_fallen_to_0_lets_no_step_count():
    model, data = nets.mlp()
    model, data = model.float(), (data[0].float(), data[1])
    opt = wrap(model, "looksam(k=1)", scaler=torch.amp.GradScaler("cpu"))
    for _ in range(200):
        opt.step(steppe.Batch(model, lambda m, d: nets.losses(m, d) * float("nan"), data))
    assert opt.scaler.get_scale() == 0
    assert (opt.stats.steps, opt.stats.skipped) == (0, 200)
    assert not opt._memory


def test_a_scaler_that_calls_the_step_itself_is_refused():
    """Trap 5: a closure handed over positionally would leave gradients 65 536 times too large in the update."""
    model, data = small()
    opt, outer = wrap(model, "sam()"), scaler()

    def closure():
        opt.zero_grad()
        loss = nets.losses(model, data).mean()
        outer.scale(loss).backward()
        return loss

    before = weights(model)
    closure()
    with pytest.raises(TypeError, match=r"scaler=scaler.*steppe\.integrations"):
        outer.step(opt, closure)
    assert same(before, weights(model))


def test_a_closure_beside_a_scaler_is_refused():
    model, data = small()
    opt = wrap(model, "sam()", scaler=scaler())
    with pytest.raises(TypeError, match=r"scaled.*steppe\.Batch"):
        opt.step(lambda: nets.losses(model, data).mean())


def test_a_scaler_that_is_switched_off_is_as_none():
    (one, data), (two, _) = small(), small()
    plain, off = wrap(one, "sam()"), wrap(two, "sam()", scaler=torch.amp.GradScaler("cpu", enabled=False))
    for _ in range(3):
        step(plain, one, data)
        step(off, two, data)
    assert same(weights(one), weights(two))
    with pytest.raises(ValueError, match="nan"):
        step(off, two, (data[0] * float("nan"), data[1]))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("text", ["sam()", "esam()", "gsam()", "rwp()"])
def test_autocast_trains_and_sees_the_perturbed_weights(text, dtype):
    model, data = small()
    opt = steppe.SharpnessAware(SGD(model.parameters(), lr=0.3, momentum=0.9), steppe.parse(text), scaler=scaler())
    seen = []

    def losses(model, batch):
        logits = model(batch[0])
        seen.append((len(batch[0]), logits.detach()))
        return F.cross_entropy(logits.float(), batch[1], reduction="none")

    first = step(opt, model, data, loss_fn=losses, autocast=dtype)
    for _ in range(30):
        last = step(opt, model, data, loss_fn=losses, autocast=dtype)
    assert last < 0.7 * first
    assert opt.stats.skipped == 0
    assert all(logits.dtype == dtype for _, logits in seen)
    whole = [logits for size, logits in seen if size == nets.B]
    if text != "esam()":  # which may pick no tensor
        assert not any(torch.equal(*pair) for pair in zip(whole[::2], whole[1::2], strict=True))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("text", ["sam()", "esam()", "gsam()"])
def test_fp16_on_cuda(text):
    model, (x, y) = small()
    model, data = model.cuda(), (x.cuda(), y.cuda())
    opt = steppe.SharpnessAware(
        AdamW(model.parameters(), fused=True), steppe.parse(text), scaler=torch.amp.GradScaler("cuda")
    )
    first = step(opt, model, data, autocast=torch.float16)
    for _ in range(60):
        last = step(opt, model, data, autocast=torch.float16)
    assert last < first
    assert opt.stats.steps + opt.stats.skipped == 61


def test_a_disabled_scaler_is_none_to_a_closure():
    model, data = nets.mlp()
    opt = wrap(model, "sam()", scaler=torch.amp.GradScaler("cpu", enabled=False))

    def closure():
        opt.zero_grad()
        loss = nets.losses(model, data).mean()
        loss.backward()
        return loss

    opt.step(closure)
    assert opt.stats.steps == 1


def test_the_step_after_a_clip_that_raised_is_a_step():
    model, data = small()
    strict = partial(clip_grad_norm_, max_norm=1.0, error_if_nonfinite=True)
    opt, calls = wrap(model, "sam()", scaler=scaler(), clip=strict), [0]
    before = weights(model)
    with pytest.raises(RuntimeError, match="non-finite"):
        step(opt, model, data, loss_fn=partial(overflowing, call=2, calls=calls))
    assert same(weights(model), before)
    step(opt, model, data)
    assert (opt.stats.steps, opt.scaler.get_scale()) == (1, SCALE / 2)


def test_the_step_after_one_that_a_scaler_called_is_a_step():
    model, data = nets.mlp()
    opt, outside = wrap(model, "sam()"), scaler()
    outside.scale(nets.losses(model, data).mean()).backward()
    with pytest.raises(TypeError, match="GradScaler called the step"):
        outside.step(opt)
    step(opt, model, data)
    assert opt.stats.steps == 1


class Hesitant(SGD):
    """Its first step raises."""

    def step(self, closure=None):
        if not hasattr(self, "asked"):
            self.asked = True
            raise ValueError("not yet")
        return super().step(closure)


def test_the_step_after_one_in_which_the_base_raised_is_a_step():
    model, data = nets.mlp()
    opt = steppe.SharpnessAware(Hesitant(model.parameters(), lr=0.1), steppe.sam(), scaler=scaler())
    with pytest.raises(ValueError, match="not yet"):
        step(opt, model, data)
    step(opt, model, data)
    assert (opt.stats.steps, opt.scaler.get_scale()) == (1, SCALE)
