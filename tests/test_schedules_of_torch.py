"""Torch's learning-rate schedulers and averaged models beside a sharpness-aware optimizer, without a warning."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD, lr_scheduler
from torch.optim.swa_utils import SWALR, AveragedModel, get_ema_multi_avg_fn, update_bn

import nets
import steppe
from recipes_list import same, step, weights, wrap

STEPS = 8
SCHEDULERS = {
    "lambda": lambda opt: lr_scheduler.LambdaLR(opt, lambda t: 1 / (1 + t)),
    "multiplicative": lambda opt: lr_scheduler.MultiplicativeLR(opt, lambda t: 0.9),
    "multi_step": lambda opt: lr_scheduler.MultiStepLR(opt, [2, 5]),
    "constant": lambda opt: lr_scheduler.ConstantLR(opt, 0.5, total_iters=3),
    "exponential": lambda opt: lr_scheduler.ExponentialLR(opt, 0.9),
    "polynomial": lambda opt: lr_scheduler.PolynomialLR(opt, total_iters=6),
    "restarts": lambda opt: lr_scheduler.CosineAnnealingWarmRestarts(opt, T_0=3),
    "cyclic": lambda opt: lr_scheduler.CyclicLR(opt, 0.01, 0.1, step_size_up=3),
    "one_cycle": lambda opt: lr_scheduler.OneCycleLR(opt, 0.1, total_steps=10),
    "plateau": lambda opt: lr_scheduler.ReduceLROnPlateau(opt, patience=0, threshold=10.0),
    "chained": lambda opt: lr_scheduler.ChainedScheduler(
        [lr_scheduler.LinearLR(opt, 0.1, total_iters=2), lr_scheduler.ExponentialLR(opt, 0.9)]
    ),
    "sequential": lambda opt: lr_scheduler.SequentialLR(
        opt,
        [lr_scheduler.LinearLR(opt, 0.1, total_iters=2), lr_scheduler.CosineAnnealingLR(opt, 6)],
        milestones=[2],
    ),
    "swa": lambda opt: SWALR(opt, swa_lr=0.01, anneal_epochs=4),
}


@pytest.fixture(autouse=True)
def _no_warnings():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", message="The epoch parameter in")  # SequentialLR's own
        yield


class Run:
    """A model in training, with a scheduler on the wrapper, on the base, or on torch's own optimizer."""

    def __init__(self, text: str, name: str, on: str) -> None:
        self.model, self.data = nets.convnet()
        self.opt = wrap(self.model, text)
        self.plain = on == "plain"
        self.schedule = SCHEDULERS[name](self.opt if on == "wrapper" else self.opt.base)
        self.seen: list[tuple[float, float]] = []

    def step(self) -> None:
        if self.plain:
            self.opt.base.zero_grad()
            loss = nets.losses(self.model, self.data).mean()
            loss.backward()
            loss = loss.detach()
            self.opt.base.step()
        else:
            loss = step(self.opt, self.model, self.data)
        plateau = isinstance(self.schedule, lr_scheduler.ReduceLROnPlateau)
        self.schedule.step(*[loss.item()] if plateau else [])
        group = self.opt.base.param_groups[0]
        self.seen.append((float(group["lr"]), group["momentum"]))


@pytest.mark.parametrize("on", ["wrapper", "base"])
@pytest.mark.parametrize("name", SCHEDULERS)
def test_without_perturbation_it_is_torch_alone(name, on):
    """Learning rates, cycled momenta and weights, to the bit."""
    runs = [Run("sgd()", name, where) for where in (on, "plain")]
    for run in runs:
        for _ in range(STEPS):
            run.step()
    assert len(set(runs[1].seen)) > 1
    assert runs[0].seen == runs[1].seen
    assert same(weights(runs[0].model), weights(runs[1].model))


@pytest.mark.parametrize("text", ["sam()", "esam()", "looksam(k=2)", "rwp(other=True)"])
@pytest.mark.parametrize("name", SCHEDULERS)
def test_on_the_wrapper_or_on_the_base_is_the_same_run(name, text):
    runs = [Run(text, name, where) for where in ("wrapper", "base")]
    for run in runs:
        for _ in range(STEPS):
            run.step()
    assert len(set(runs[0].seen)) > 1
    assert runs[0].seen == runs[1].seen
    assert same(weights(runs[0].model), weights(runs[1].model))


@pytest.mark.parametrize("on", ["wrapper", "base"])
@pytest.mark.parametrize("name", SCHEDULERS)
def test_a_restart_with_its_scheduler(name, on):
    end = None
    for stop in (None, 3):
        run = Run("sam()", name, on)
        for t in range(STEPS):
            if t == stop:
                saved = [copy.deepcopy(part.state_dict()) for part in (run.model, run.schedule, run.opt)]
                run = Run("sam()", name, on)
                for part, state in zip((run.model, run.schedule, run.opt), saved, strict=True):
                    part.load_state_dict(state)
            run.step()
        end = end or weights(run.model)
    assert same(weights(run.model), end)


def test_learning_rates_as_tensors():
    model, data = nets.mlp()
    opt = steppe.SharpnessAware(SGD(model.parameters(), lr=torch.tensor(0.1)), steppe.gsam(rho_min=0.01))
    schedule = lr_scheduler.ExponentialLR(opt, 0.5)
    for _ in range(3):
        step(opt, model, data)
        schedule.step()
    assert float(opt.base.param_groups[0]["lr"]) == pytest.approx(0.0125)


def train(average, text: str, **how) -> tuple[nn.Module, AveragedModel, list[list[Tensor]]]:
    model, data = nets.convnet()
    opt, averaged, seen = wrap(model, text), average(model), []
    for _ in range(4):
        step(opt, model, data, **how)
        averaged.update_parameters(model)
        seen.append([p.detach().clone() for p in model.parameters()])
    return model, averaged, seen


@pytest.mark.parametrize("how", [{}, {"micro": 3}])
@pytest.mark.parametrize("text", ["sam()", "esam()", "rwp()"])
def test_averages_are_those_of_the_unperturbed_weights(text, how):
    _, swa, seen = train(AveragedModel, text, **how)
    for p, each in zip(swa.module.parameters(), zip(*seen, strict=True), strict=True):
        torch.testing.assert_close(p.detach(), torch.stack(each).mean(0), rtol=1e-12, atol=1e-14)
    _, ema, seen = train(
        lambda model: AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9), use_buffers=True), text, **how
    )
    for p, each in zip(ema.module.parameters(), zip(*seen, strict=True), strict=True):
        expected = each[0]
        for one in each[1:]:
            expected = expected.lerp(one, 0.1)
        torch.testing.assert_close(p.detach(), expected, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("how", [{}, {"micro": 3}])
def test_statistics_of_an_average_are_taken_afresh(how):
    """``update_bn`` needs layers that track; the training model goes on with its own."""
    model, swa, _ = train(AveragedModel, "sam()", **how)
    own = model[1].running_mean.clone()
    batches = [nets.data(2, 6, 6)[0] for _ in range(3)]
    update_bn(batches, swa)
    inputs = torch.stack([swa.module[0](x).mean((0, 2, 3)) for x in batches])
    torch.testing.assert_close(swa.module[1].running_mean, inputs.mean(0).detach(), rtol=1e-12, atol=1e-14)
    assert swa.module[1].num_batches_tracked == 3
    assert torch.equal(model[1].running_mean, own)


def test_the_usual_loop_of_stochastic_weight_averaging():
    model, data = nets.convnet()
    opt = wrap(model, "sam()")
    swa = AveragedModel(model)
    schedule, late = lr_scheduler.CosineAnnealingLR(opt, T_max=4), SWALR(opt, swa_lr=0.02, anneal_epochs=2)
    for t in range(6):
        step(opt, model, data)
        if t >= 3:
            swa.update_parameters(model)
            late.step()
        else:
            schedule.step()
    update_bn([data], swa)
    assert opt.base.param_groups[0]["lr"] == 0.02
    assert swa.n_averaged == 3
    assert swa.eval()(data[0]).isfinite().all()
    step(opt, model, data)
