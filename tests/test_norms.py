"""Running statistics: held in further passes, and moved once by a pass in micro-batches, as by the whole batch."""

from __future__ import annotations

import copy
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, spectral_norm

import nets
import steppe
from recipes_list import same, step, wrap
from steppe.norms import held, pooled


class Centred(nn.Module):
    """A layer with a running mean that torch does not know."""

    def __init__(self, size: int = 3) -> None:
        super().__init__()
        self.moves = True
        self.register_buffer("mean", torch.zeros(size, dtype=torch.float64))
        self.register_buffer("count", torch.zeros((), dtype=torch.int64))

    def forward(self, x: Tensor) -> Tensor:
        if self.training and self.moves:
            self.count += 1
            self.mean.lerp_(x.detach().mean(0), 0.1)
        return x - (x.mean(0) if self.training else self.mean)


@contextmanager
def holding(model: nn.Module):
    """What a user writes for ``Centred``."""
    layers = [m for m in model.modules() if isinstance(m, Centred)]
    for layer in layers:
        layer.moves = False
    yield
    for layer in layers:
        layer.moves = True


class Twice(nn.Module):
    """One layer called on two views, as in siamese networks."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x) + self.layer(2 * x + 1)


KNOWN = {
    "batch": lambda: nn.BatchNorm1d(3),
    "batch 2d": lambda: nn.Sequential(nn.Unflatten(1, (3, 1, 1)), nn.BatchNorm2d(3), nn.Flatten()),
    "cumulative": lambda: nn.BatchNorm1d(3, momentum=None),
    "sync": lambda: nn.SyncBatchNorm(3),
    "instance": lambda: nn.Sequential(nn.Unflatten(1, (1, 3)), nn.InstanceNorm1d(1, track_running_stats=True)),
    "lazy": lambda: nn.LazyBatchNorm1d(),
    "shared": lambda: Twice(nn.BatchNorm1d(3)),
    "spectral": lambda: parametrizations.spectral_norm(nn.Linear(3, 4)),
    "spectral hook": lambda: spectral_norm(nn.Linear(3, 4)),
}
AVERAGED = {name: KNOWN[name] for name in ("batch", "batch 2d", "cumulative", "sync", "shared")}


def build(make) -> nn.Module:
    torch.manual_seed(0)
    layer = make().double()
    layer(examples(5))
    return layer


def examples(seed: int, rows: int = 12) -> Tensor:
    return torch.randn(rows, 3, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * 2 + 1


def buffers(model: nn.Module) -> dict[str, Tensor]:
    return {name: t.clone() for name, t in model.named_buffers()}


def in_pieces(model: nn.Module, x: Tensor, sizes: list[int], hold=None) -> None:
    with pooled(model, sizes, hold) as before:
        for i, piece in enumerate(x.split(sizes)):
            before(i)
            model(piece)


@pytest.mark.parametrize("bad", [1.0, float("nan"), float("inf")])
@pytest.mark.parametrize("name", KNOWN)
def test_held_layers_normalise_by_the_batch_and_keep_their_statistics(name, bad):
    layer = build(KNOWN[name])
    x, before = examples(1) * bad, buffers(layer)
    with held(layer):
        out = layer(x)
    assert same(buffers(layer), before)
    if "spectral" not in name and bad == 1:  # whose power iteration goes on
        assert torch.equal(out, layer(x))
    layer(x)
    assert not same(buffers(layer), before), "it moves again"


@pytest.mark.parametrize("name", KNOWN)
def test_held_twice_or_inside_another_freezes_nothing(name):
    layer = build(KNOWN[name])
    before = buffers(layer)
    with held(layer), held(layer), pooled(layer, [6, 6]) as start:
        for i in range(2):
            start(i)
            layer(examples(1))
    with held(layer):
        with held(layer):
            pass
        layer(examples(2))
    with held(layer):
        layer(examples(3))
    assert same(buffers(layer), before)
    layer(examples(4))
    assert not same(buffers(layer), before)


@pytest.mark.parametrize("name", KNOWN)
def test_an_exception_lets_the_statistics_go(name):
    layer = build(KNOWN[name])
    before = buffers(layer)
    with pytest.raises(RuntimeError), held(layer):
        raise RuntimeError
    layer(examples(4))
    assert not same(buffers(layer), before)


@pytest.mark.parametrize("name", KNOWN)
def test_layers_in_eval_mode_are_left_alone(name):
    layer = build(KNOWN[name]).eval()
    before, out = buffers(layer), layer(examples(1))
    with held(layer):
        assert torch.equal(layer(examples(1)), out)
    in_pieces(layer, examples(2), [6, 6])
    assert same(buffers(layer), before)


def test_what_was_found_is_put_back():
    tracking, other = nn.BatchNorm1d(3), nn.BatchNorm1d(3, track_running_stats=False)
    switched = nn.BatchNorm1d(3)
    switched.track_running_stats = False
    with held(nn.Sequential(tracking, other, switched)):
        assert not tracking.track_running_stats
    assert tracking.track_running_stats
    assert not other.track_running_stats
    assert not switched.track_running_stats
    hook = spectral_norm(nn.Linear(3, 4), n_power_iterations=3)
    with held(hook):
        pass
    assert next(iter(hook._forward_pre_hooks.values())).n_power_iterations == 3


def test_the_user_holds_what_torch_does_not_know():
    layer = Centred()
    with held(layer, holding):
        layer(examples(1))
    assert layer.count == 0
    in_pieces(layer, examples(1), [4, 4, 4], holding)
    assert layer.count == 1
    assert torch.equal(layer.mean, 0.1 * examples(1)[:4].mean(0))
    in_pieces(layer, examples(1), [4, 4, 4])
    assert layer.count == 4, "without the hook, each micro-batch moves them"


@pytest.mark.parametrize("name", KNOWN)
def test_one_micro_batch_is_plain_torch(name):
    layer, plain = build(KNOWN[name]), build(KNOWN[name])
    in_pieces(layer, examples(1), [12])
    plain(examples(1))
    assert same(buffers(layer), buffers(plain))


@pytest.mark.parametrize("sizes", [[6, 6], [3, 3, 3, 3], [7, 3, 2]])
@pytest.mark.parametrize("name", AVERAGED)
def test_micro_batches_move_the_mean_as_the_whole_batch_does(name, sizes):
    layer, plain = build(AVERAGED[name]), build(AVERAGED[name])
    for seed in (1, 2):
        in_pieces(layer, examples(seed), sizes)
        plain(examples(seed))
    for key, one in buffers(plain).items():
        if "running_var" not in key:
            torch.testing.assert_close(buffers(layer)[key], one, rtol=1e-13, atol=0, msg=key)


@pytest.mark.parametrize("momentum", [0.0, 0.1, 0.7, 1.0, None])
@pytest.mark.parametrize("sizes", [[6, 6], [3, 3, 3, 3], [7, 3, 2]])
def test_the_pooled_variance_is_the_stated_one(sizes, momentum):
    layer, x = nn.BatchNorm1d(3, momentum=momentum).double(), examples(1)
    layer(examples(0))
    start = layer.running_var.clone()
    w = torch.tensor(sizes, dtype=torch.float64).unsqueeze(1) / 12
    pieces = x.split(sizes)
    means, variances = (torch.stack([take(t) for t in pieces]) for take in (lambda t: t.mean(0), lambda t: t.var(0)))
    pooled_variance = (w * (variances + (means - (w * means).sum(0)).square())).sum(0)
    in_pieces(layer, x, sizes)
    share = 0.5 if momentum is None else momentum
    torch.testing.assert_close(layer.running_var, start.lerp(pooled_variance, share), rtol=1e-12, atol=0)


@pytest.mark.parametrize("pieces", [2, 4, 6])
@pytest.mark.parametrize("shift", [0.0, 3.0])
def test_the_pooled_variance_is_within_the_stated_bounds(pieces, shift):
    """At 12 examples; at 128 images of 8 × 8 in four pieces, the upper bound is 1.0004."""
    x = examples(1) + shift * torch.arange(12).unsqueeze(1)
    layer, plain = nn.BatchNorm1d(3, momentum=1.0).double(), nn.BatchNorm1d(3, momentum=1.0).double()
    in_pieces(layer, x, [12 // pieces] * pieces)
    plain(x)
    ratio = layer.running_var / plain.running_var
    assert ((ratio > 1 - 1 / 12) & (ratio < 1 + (pieces - 1) / (12 - pieces))).all()


@pytest.mark.parametrize("sizes", [[6, 6], [7, 3, 2]])
@pytest.mark.parametrize("name", ["instance", "spectral", "spectral hook"])
def test_where_examples_are_apart_micro_batches_are_the_whole_batch(name, sizes):
    layer, plain = build(KNOWN[name]), build(KNOWN[name])
    in_pieces(layer, examples(1), sizes)
    plain(examples(1))
    for key, one in buffers(plain).items():
        torch.testing.assert_close(buffers(layer)[key], one, rtol=1e-13, atol=0, msg=key)


def test_a_layer_that_some_micro_batches_skip_moves_by_its_share():
    layer = nn.BatchNorm1d(3).double()
    with pooled(layer, [9, 3]) as before:
        for i, piece in enumerate(examples(1).split([9, 3])):
            before(i)
            if i == 1:
                layer(piece)
    torch.testing.assert_close(layer.running_mean, 0.25 * 0.1 * examples(1)[9:].mean(0))
    assert layer.num_batches_tracked == 1


@pytest.mark.parametrize("at", [0, 1, 2])
@pytest.mark.parametrize("name", AVERAGED)
def test_a_failing_micro_batch_puts_the_statistics_back(name, at):
    layer, calls = build(AVERAGED[name]), []
    before = buffers(layer)

    def fail():
        raise RuntimeError("out of memory")

    hook = layer.register_forward_hook(lambda *_: calls.append(1) or (len(calls) == at + 1 and fail()))
    with pytest.raises(RuntimeError, match="memory"):
        in_pieces(layer, examples(1), [4, 4, 4])
    hook.remove()
    assert same(buffers(layer), before)
    in_pieces(layer, examples(1), [4, 4, 4])
    assert not same(buffers(layer), before)


def kin() -> tuple[nn.Module, nets.Data]:
    """Every layer whose statistics move, the one that torch does not know included."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.BatchNorm1d(6),
        parametrizations.spectral_norm(nn.Linear(6, 8)),
        nn.Unflatten(1, (2, 4)),
        nn.InstanceNorm1d(2, affine=True, track_running_stats=True),
        nn.Flatten(),
        Centred(8),
        nn.Tanh(),
        nn.Linear(8, nets.CLASSES),
        nn.BatchNorm1d(nets.CLASSES, momentum=None),
    )
    return model.double(), nets.data(6)


METHODS = ["sgd()", "sam()", "sam(steps=2)", "gsam()", "esam()", "rwp()", "ssam(refresh=1)", "m_sharpness(sam(), 6)"]


@pytest.mark.parametrize("text", METHODS)
def test_statistics_of_every_kind_move_once_a_step_from_the_unperturbed_pass(text):
    model, data = kin()
    opt = wrap(model, text)
    for _ in range(3):
        plain = copy.deepcopy(model)
        plain(data[0][:6] if "m_sharpness" in text else data[0])
        step(opt, model, data, hold=holding)
        assert same(buffers(model), buffers(plain))


@pytest.mark.parametrize("text", METHODS)
def test_micro_batches_move_the_statistics_once_a_step(text):
    model, data = kin()
    opt = wrap(model, text)
    for _ in range(3):
        plain = copy.deepcopy(model)
        plain(data[0][:6] if "m_sharpness" in text else data[0])
        step(opt, model, data, hold=holding, micro=2)
        ours, once = buffers(model), buffers(plain)
        for key in ("0.running_mean", "0.num_batches_tracked", "5.count", "8.num_batches_tracked"):
            torch.testing.assert_close(ours[key], once[key], rtol=1e-12, atol=0, msg=key)
        for key in ("_u", "_v"):
            torch.testing.assert_close(
                ours[f"1.parametrizations.weight.0.{key}"], once[f"1.parametrizations.weight.0.{key}"]
            )


@pytest.mark.parametrize("text", METHODS)
def test_a_list_of_micro_batches_moves_the_statistics_once_a_step(text):
    model, (x, y) = nets.convnet()
    opt, plain = wrap(model, text), copy.deepcopy(model)
    plain(x[:6] if "m_sharpness" in text else x)
    pieces = [(x[:2], y[:2]), (x[2:9], y[2:9]), (x[9:], y[9:])]
    opt.step(steppe.Batch.from_micro_batches(model, nets.losses, pieces))
    torch.testing.assert_close(model[1].running_mean, plain[1].running_mean, rtol=1e-12, atol=0)
    torch.testing.assert_close(model[1].running_var, plain[1].running_var, rtol=0.02, atol=0)
    assert [model[i].num_batches_tracked.item() for i in (1, 4)] == [1, 1]


def test_evaluation_agrees_with_that_after_one_large_batch():
    """Without pooling, the statistics are those of the last micro-batches."""
    outs = []
    for micro in (1, 4):
        model, data = nets.convnet()
        opt = steppe.SharpnessAware(torch.optim.SGD(model.parameters(), lr=0.0), steppe.sam())
        for _ in range(40):
            step(opt, model, data, micro=micro)
        outs.append(model[0:2].eval()(data[0]))
    assert (outs[0] - outs[1]).norm() / outs[0].norm() < 0.02


def test_a_scripted_network_is_refused_where_its_statistics_would_move_twice():
    model, data = nets.convnet()
    scripted = torch.jit.script(model)
    opt = wrap(scripted, "sam()")
    before = [p.detach().clone() for p in scripted.parameters()]
    with pytest.raises(ValueError, match=r"torch\.jit\.script"):
        step(opt, scripted, data)
    assert same(before, [p.detach() for p in scripted.parameters()])
    scripted.eval()
    step(opt, scripted, data)
    assert opt.stats.steps == 1
