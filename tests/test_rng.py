"""The global generators: replayed in further passes, and left as one pass leaves them."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import nets
import steppe
from recipes_list import EVERY, same, step, wrap
from steppe import rng

CPU = torch.device("cpu")
DEVICES = [CPU, *([torch.device("cuda", 0)] if torch.cuda.is_available() else [])]


def draw(device: torch.device = CPU) -> Tensor:
    return torch.rand(3, device=device)


@pytest.mark.parametrize("device", DEVICES, ids=str)
def test_replay_draws_the_same_numbers_and_goes_on_as_if_nothing_had_been(device):
    before = rng.states({device})
    first, later = draw(device), None
    with rng.replay(before):
        assert torch.equal(draw(device), first)
        draw(device)
    later = draw(device)
    with rng.replay(before):
        assert torch.equal(draw(device), first)
        assert torch.equal(draw(device), later)


@pytest.mark.parametrize("device", DEVICES, ids=str)
def test_kept_leaves_no_trace_even_after_an_exception(device):
    torch.manual_seed(0)
    expected = draw(device)
    torch.manual_seed(0)
    with rng.kept({device}):
        draw(device)
    with pytest.raises(ZeroDivisionError), rng.kept({device}):
        draw(device)[0] / (1 // 0)
    assert torch.equal(draw(device), expected)


def test_the_cpu_is_always_among_them():
    for devices in ([], [CPU], [CPU, torch.device("meta")]):
        assert list(rng.states(devices)) == [CPU]
    before = rng.states([])
    first = draw()
    with rng.replay(before):
        assert torch.equal(draw(), first)


class OtherModule:
    """What torch calls a device module, of a backend that this machine lacks."""

    def __init__(self, one_generator: bool) -> None:
        self.state, self.one_generator, self.calls = torch.zeros(2), one_generator, []

    def get_rng_state(self, *device):
        assert len(device) == (0 if self.one_generator else 1)
        self.calls.append(("get", *device))
        return self.state.clone()

    def set_rng_state(self, state, *device):
        assert len(device) == (0 if self.one_generator else 1)
        self.calls.append(("set", *device))
        self.state = state.clone()


@pytest.mark.parametrize("name", ["mps", "xpu:1", "cuda:1"])
def test_other_accelerators_are_asked_through_their_module(monkeypatch, name):
    module, device = OtherModule(name == "mps"), torch.device(name)
    monkeypatch.setattr(torch, "get_device_module", lambda asked: module if asked == device else None)
    before = rng.states({device})
    module.state += 1
    with rng.replay(before):
        assert module.state.sum() == 0
        module.state += 5
    assert module.state.sum() == 2
    assert all(call[1:] in ((), (device,)) for call in module.calls)


class Noisy(nn.Module):
    """Dropout and stochastic depth that keep what they drew."""

    def __init__(self, device: torch.device = CPU) -> None:
        super().__init__()
        self.body, _ = nets.mlp()
        self.device = device
        self.drawn: list[Tensor] = []

    def forward(self, x: Tensor) -> Tensor:
        keep = torch.rand(x.shape, device=self.device) < 0.7
        depth = torch.rand((), device=self.device) < 0.5
        self.drawn.append(torch.cat([keep.flatten(), depth.reshape(1)]))
        return self.body(x * keep.to(x.device)) * (1 + depth.to(x.device))


@pytest.mark.parametrize("micro", [1, 3])
@pytest.mark.parametrize("device", DEVICES, ids=str)
def test_dropout_and_stochastic_depth_are_the_same_in_both_passes(device, micro):
    """The weights' device is not the generator's: all devices of the model and of the data are replayed."""
    model = Noisy(device)
    model.anchor = nn.Parameter(torch.ones((), device=device))
    _, data = nets.mlp()
    step(wrap(model, "sam()"), model, data, micro=micro)
    assert len(model.drawn) == 2 * micro
    assert same(model.drawn[:micro], model.drawn[micro:])


@pytest.mark.parametrize("text", ["sam()", "sam(steps=2)", "gsam()", "rwp()"])
def test_masks_are_drawn_anew_on_request(text):
    model, data = Noisy(), nets.mlp()[1]
    opt = wrap(model, text)
    step(opt, model, data, replay=False)
    first, *further = model.drawn
    assert further
    assert all(not torch.equal(first, other) for other in further)
    assert len({tuple(t.tolist()) for t in model.drawn}) == len(model.drawn), "each pass its own"


@pytest.mark.parametrize("micro", [1, 3])
@pytest.mark.parametrize("text", [t for t in EVERY if "m_sharpness" not in t and "other" not in t])
def test_a_step_leaves_the_generator_where_one_pass_does(text, micro):
    model, data = Noisy(), nets.mlp()[1]
    opt = wrap(model, text)
    for _ in range(2):
        before = torch.get_rng_state()
        step(opt, model, data, micro=micro)
        after = torch.get_rng_state()
        torch.set_rng_state(before)
        for piece in data[0].split(nets.B // micro):
            model(piece)
        assert torch.equal(torch.get_rng_state(), after)


def test_a_closure_replays_too():
    model, (x, y) = Noisy(), nets.mlp()[1]
    opt = wrap(model, "sam()")

    def closure():
        opt.zero_grad()
        loss = nets.losses(model, (x, y)).mean()
        loss.backward()
        return loss

    opt.step(closure)
    assert same(model.drawn[0], model.drawn[1])
    after = torch.get_rng_state()
    opt.zero_grad()
    opt.step(steppe.Batch(model, nets.losses, (x, y)))
    assert not torch.equal(torch.get_rng_state(), after)
    assert not same(model.drawn[2], model.drawn[1])


def test_pass_two_on_another_batch_draws_what_pass_one_drew():
    model = nn.Sequential(nn.Linear(6, 8), nn.Dropout(0.5), nn.Linear(8, 3)).double()
    _, data = nets.mlp()
    seen = []
    model[1].register_forward_hook(lambda _m, inputs, out: seen.append(out != 0))
    opt = wrap(model, "rwp(other=True)")
    one, two = (steppe.Batch(model, nets.losses, data) for _ in range(2))
    for first, second in ((one, two), (two, one), (two, one)):
        opt.step(first, second)
    assert same(seen[0::2], seen[1::2])
    assert not same(seen[2], seen[4])
