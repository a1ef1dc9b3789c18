"""What a pass does to the model, to the statistics and to the random numbers; what really runs."""

from __future__ import annotations

from collections import UserDict
from contextlib import nullcontext
from itertools import pairwise
from types import MappingProxyType

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

import nets
import steppe
from recipes_list import DETERMINISTIC, EVERY, TOTAL, same, step, weights, wrap


class Mask(nn.Module):
    """Dropout that keeps its masks."""

    def __init__(self) -> None:
        super().__init__()
        self.masks: list[Tensor] = []

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return x
        mask = torch.rand(x.shape) < 0.5
        self.masks.append(mask)
        return x * mask


def dropout_net() -> tuple[nn.Sequential, Mask, nets.Data]:
    mlp, data = nets.mlp()
    mask = Mask()
    return nn.Sequential(*mlp[:2], mask, *mlp[2:]), mask, data


class Forwards:
    """Counts examples that go forward and come back through a model."""

    def __init__(self, model: nn.Module) -> None:
        self.calls, self.forward, self.backward = 0, 0, 0
        model.register_forward_hook(self._count)

    def _count(self, _module, _inputs, output: Tensor) -> None:
        self.calls += 1
        self.forward += len(output)
        if output.requires_grad:
            output.register_hook(lambda grad: self._count_back(len(output)))

    def _count_back(self, examples: int) -> None:
        self.backward += examples


class WeightGradients(TorchDispatchMode):
    """Counts the entries of the convolution weights whose gradients are computed."""

    def __init__(self) -> None:
        super().__init__()
        self.entries: list[int] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten.convolution_backward.default and args[-1][1]:
            self.entries.append(args[2].numel())
        return func(*args, **(kwargs or {}))


def twice(text: str, net, rows: int, micro: int) -> tuple[list[Tensor], list[Tensor]]:
    """Weights after three steps with one micro-batch and with several."""
    ends = []
    for pieces in (1, micro):
        model, data = net()
        opt = wrap(model, text)
        for _ in range(3):
            step(opt, model, tuple(t[:rows] for t in data), micro=pieces)
        ends.append(weights(model))
    return ends[0], ends[1]


@pytest.mark.parametrize("rows", [12, 10])
@pytest.mark.parametrize("net", [nets.mlp, nets.transformer])
@pytest.mark.parametrize(
    "text", ["sam()", "esam()", "rwp()", "gsam()", "sam(second_order=True)", "m_sharpness(esam(), 5)"]
)
def test_micro_batches_change_nothing(text, net, rows):
    for one, many in zip(*twice(text, net, rows, micro=4), strict=True):
        torch.testing.assert_close(many, one, rtol=0, atol=1e-12)


@pytest.mark.parametrize("text", EVERY)
def test_statistics_move_once_a_step(text):
    model, data = nets.convnet()
    opt = wrap(model, text)
    for _ in range(3):
        plain, _ = nets.convnet()
        plain.load_state_dict(model.state_dict())
        examples = data[0][:5] if text.startswith("m_sharpness") else data[0]
        plain(examples)
        before = model[1].running_mean.clone()
        step(opt, model, data)
        for moved, once in ((model[1], plain[1]), (model[4], plain[4])):
            assert moved.num_batches_tracked == once.num_batches_tracked
            if text != "rwp(alpha=0)":
                assert torch.equal(moved.running_mean, once.running_mean)
                assert torch.equal(moved.running_var, once.running_var)
        assert not torch.equal(model[1].running_mean, before)
        assert model[1].track_running_stats
        assert all(module.training for module in model.modules())


def test_statistics_of_rwp_alone_are_those_of_the_perturbed_pass():
    model, data = nets.convnet()
    plain, _ = nets.convnet()
    plain(data[0])
    step(wrap(model, "rwp(gamma=0.5, alpha=0)"), model, data)
    assert not torch.equal(model[1].running_mean, plain[1].running_mean)


@pytest.mark.parametrize("text", ["sam()", "sam(steps=2)", "sam(second_order=True)", "esam()", "ssam(refresh=1)"])
def test_modes_and_statistics_come_back_after_an_exception(text):
    model, data = nets.convnet()
    opt, calls = wrap(model, text), []
    step(opt, model, data)

    def failing(model, data):
        losses = nets.losses(model, data)
        calls.append(1)
        if len(calls) == 2:
            raise RuntimeError("in the second call")
        return losses

    random = torch.get_rng_state()
    with pytest.raises(RuntimeError, match="in the second call"):
        step(opt, model, data, failing)
    assert torch.equal(torch.get_rng_state(), random)
    assert all(m.training for m in model.modules())
    assert all(m.track_running_stats for m in model if isinstance(m, nn.BatchNorm2d))


@pytest.mark.parametrize("text", [t for t in EVERY if "m_sharpness" not in t and "other" not in t])
def test_all_passes_draw_the_masks_of_the_first(text):
    model, mask, data = dropout_net()
    opt = wrap(model, text)
    for _ in range(3):
        mask.masks.clear()
        before = torch.get_rng_state()
        step(opt, model, data)
        after = torch.get_rng_state()
        first = mask.masks[0]
        assert all(torch.equal(m, first) for m in mask.masks if len(m) == len(first))
        torch.set_rng_state(before)
        model(data[0])
        assert torch.equal(torch.get_rng_state(), after), "the step draws other numbers than one forward pass"


def test_micro_batches_replay_their_masks():
    model, mask, data = dropout_net()
    step(wrap(model, "sam()"), model, data, micro=3)
    assert len(mask.masks) == 6
    assert same(mask.masks[:3], mask.masks[3:])
    assert not torch.equal(mask.masks[0], mask.masks[1])


def test_draws_of_the_method_do_not_touch_the_global_generator():
    model, data = nets.mlp()
    for text in EVERY:
        before = torch.get_rng_state()
        opt = wrap(model, text)
        for _ in range(3):
            step(opt, model, data)
        assert torch.equal(torch.get_rng_state(), before), text


class Pair(UserDict):
    """A mapping with attributes, as tokenizers return them."""

    def __getattr__(self, name):
        if name == "data":
            raise AttributeError(name)
        return self.data[name]


@pytest.mark.parametrize("text", ["esam()", "ssam(refresh=1)"])
@pytest.mark.parametrize("micro", [1, 4])
@pytest.mark.parametrize(
    ("pack", "x", "y"),
    [
        (lambda x, y: {"x": x, "y": y, "name": "train", "epoch": 3}, lambda d: d["x"], lambda d: d["y"]),
        (lambda x, y: Pair(x=x, y=y), lambda d: d.x, lambda d: d["y"]),
        (lambda x, y: MappingProxyType({"x": x, "y": y}), lambda d: d["x"], lambda d: d["y"]),
        (lambda x, y: (x, y, range(12), "name"), lambda d: d[0], lambda d: d[1]),
        (lambda x, y: ({"x": x}, [y, None]), lambda d: d[0]["x"], lambda d: d[1][0]),
        (lambda x, y: [torch.tensor(1.0), x, y], lambda d: d[1], lambda d: d[2]),
    ],
    ids=["dict", "mapping", "fixed", "range", "nest", "scalar"],
)
def test_any_nest_of_tensors_is_a_batch(text, micro, pack, x, y):
    ends = []
    for loss_fn, wrapped in (
        (nets.losses, lambda *data: data),
        (lambda model, data: F.cross_entropy(model(x(data)), y(data), reduction="none"), pack),
    ):
        model, data = nets.mlp()
        opt = wrap(model, text)
        for _ in range(3):
            opt.step(steppe.Batch(model, loss_fn, wrapped(*data), micro=micro))
        ends.append(weights(model))
    assert same(*ends)


@pytest.mark.parametrize("text", EVERY)
def test_autocast_runs(text):
    model, (x, y) = nets.convnet()
    model.float()
    opt = wrap(model, text)
    for _ in range(2):
        loss = step(opt, model, (x.float(), y), autocast=torch.bfloat16)
        assert loss.isfinite()
    assert all(p.dtype == torch.float32 and p.grad.isfinite().all() for p in model.parameters())


def test_an_outer_autocast_does_not_hide_the_perturbation():
    """Autocast caches its casts of the weights; pass two must see the moved ones."""
    ends = []
    for outer in (True, False):
        model, (x, y) = nets.mlp()
        model.float()
        opt, data = wrap(model, "sam(rho=0.5)"), (x.float(), y)
        if outer:
            with torch.autocast("cpu", torch.bfloat16):
                step(opt, model, data)
        else:
            step(opt, model, data, autocast=torch.bfloat16)
        ends.append(weights(model))
    assert same(*ends)


def bare_convs() -> tuple[nn.Module, nets.Data]:
    """Four convolutions without bias: their weights are all the parameters."""
    torch.manual_seed(0)
    sizes = [2, 4, 6, 5, 3]
    layers = [m for a, b in pairwise(sizes) for m in (nn.Conv2d(a, b, 3, bias=False), nn.Tanh())]
    return nn.Sequential(*layers[:-1], nn.AdaptiveAvgPool2d(1), nn.Flatten()).double(), nets.data(2, 10, 10)


@pytest.mark.parametrize(
    "text", ["esam_swp(beta=0.5)", "esam(beta=0.3)", "rst(esam(), p=0.5)", "esam_swp(sam(steps=2))"]
)
def test_weight_gradients_outside_the_mask_are_not_computed(text):
    model, data = bare_convs()
    opt = wrap(model, text)
    total, seen = sum(p.numel() for p in model.parameters()), set()
    for _ in range(12):
        counts, examples = WeightGradients(), Forwards(model)
        before = opt.stats.backward
        with counts:
            step(opt, model, data)
        opt.base.zero_grad()
        model._forward_hooks.clear()
        passes = examples.backward / nets.B
        last = passes % 1 or 1.0  # pass two may see a part of the batch only
        masked = sum(counts.entries) - total  # the last backward pass takes all
        share = masked / total
        inputs = passes / 2
        assert opt.stats.backward - before == pytest.approx(nets.B * (inputs + (share + last) / 2))
        seen.add(round(share, 6))
    assert len(seen) > 3, "the masks vary"
    assert min(seen) < 0.5


def test_sam_takes_all_weight_gradients_twice():
    model, data = bare_convs()
    counts = WeightGradients()
    with counts:
        step(wrap(model, "sam()"), model, data)
    assert sum(counts.entries) == 2 * sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("text", EVERY)
def test_stats_count_what_ran(text):
    model, data = nets.mlp()
    opt, seen = wrap(model, text), Forwards(model)
    for _ in range(8):
        step(opt, model, data)
    assert opt.stats.forward == seen.forward
    assert opt.stats.steps == 8
    assert opt.stats.examples == 8 * nets.B
    if "second_order" not in text and "esam(" not in text and "esam_swp" not in text:
        assert opt.stats.backward == seen.backward


@pytest.mark.parametrize("text", DETERMINISTIC)
def test_the_cost_is_what_ran(text):
    model, data = nets.mlp()
    opt = wrap(model, text)
    for _ in range(TOTAL):
        step(opt, model, data)
    assert opt.stats.propagations == pytest.approx(opt.method.cost(nets.B, TOTAL), abs=1e-9)


@pytest.mark.parametrize(
    ("text", "calls"),
    [
        ("sgd()", [1] * 6),
        ("sam()", [2] * 6),
        ("sam(rho=0)", [1] * 6),
        ("sam(steps=3)", [4] * 6),
        ("esam_sds()", [3] * 6),
        ("rwp(alpha=0)", [1] * 6),
        ("rwp()", [2] * 6),
        ("looksam(k=3)", [2, 1, 1, 2, 1, 1]),
        ("rst(sam(), p=0)", [1] * 6),
        ("rst(sam(), p=1)", [2] * 6),
        ("rst(sam(), p=piecewise(0, 0.3))", [1] * 4 + [2] * 2),
        ("ssam(refresh=4)", [2] * 4 + [2 + nets.B, 2]),
        ("m_sharpness(sam(), 5)", [6] * 6),
    ],
)
def test_no_pass_runs_in_vain(text, calls):
    model, data = nets.mlp()
    opt, seen, ran = wrap(model, text), Forwards(model), []
    for _ in range(6):
        before = seen.calls
        step(opt, model, data)
        ran.append(seen.calls - before)
    assert ran == calls


def test_a_second_batch_of_another_network_is_refused():
    model, data = nets.mlp()
    opt = wrap(model, "rwp(other=True)")
    with pytest.raises(ValueError, match="another model"):
        opt.step(steppe.Batch(model, nets.losses, data), steppe.Batch(nets.mlp()[0], nets.losses, data))


def test_mixed_precision_is_that_of_the_device_the_model_is_on(monkeypatch):
    """Data may be handed over on the CPU and moved by the loss."""
    elsewhere, (model, data), kinds = nn.Linear(6, 3, device="meta"), nets.mlp(), []
    batch = steppe.Batch(elsewhere, lambda _, batch: nets.losses(model, batch), data, autocast=torch.bfloat16)
    monkeypatch.setattr(torch, "autocast", lambda kind, *_: kinds.append(kind) or nullcontext())
    batch.losses()
    assert kinds == ["meta"]


@pytest.mark.parametrize("text", ["sam()", "esam(gamma=0.25)", "m_sharpness(sam(), 5)"])
def test_lists_and_arrays_are_cut_with_the_tensors(text):
    """What a loader makes of strings is a list."""
    model, (x, y) = nets.mlp()
    numbers, sizes = torch.arange(len(y)), []

    def losses(model, batch):
        x, y, numbers, names, (codes,), unit = batch
        assert names == [f"example {i}" for i in numbers.tolist()]
        assert (codes == numbers.numpy()).all()
        assert unit == ("metre",)
        sizes.append(len(names))
        return nets.losses(model, (x, y))

    data = (x, y, numbers, [f"example {i}" for i in numbers.tolist()], (numbers.numpy(),), ("metre",))
    wrap(model, text).step(steppe.Batch(model, losses, data, micro=2))
    assert max(sizes) == 6 if "m_" not in text else 3
