"""A run that was stopped at any step goes on, to the bit, as if it had not been."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import OneCycleLR

import nets
import steppe
from recipes_list import EVERY, same, snapshot, step, weights, wrap

NETS = {"sgd": nets.convnet, "adamw": nets.mlp}
STEPS = 5
REMEMBERING = {"looksam(k=3)": "gv", "ssam(refresh=3)": "mask", "ssam_dynamic(refresh=3)": "mask"}


def through_disk(state):
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def everything(model: nn.Module, opt: steppe.SharpnessAware):
    return copy.deepcopy([weights(model), opt.state_dict()])


@pytest.mark.parametrize("base", NETS)
@pytest.mark.parametrize("text", EVERY)
def test_a_run_goes_on_from_any_step(text, base):
    model, data = NETS[base]()
    opt = wrap(model, text, base, seed=3)
    saved, states = [], []
    for _ in range(STEPS):
        saved.append(through_disk({"model": model.state_dict(), "opt": opt.state_dict()}))
        states.append(everything(model, opt))
        step(opt, model, data)
    states.append(everything(model, opt))
    for at, checkpoint in enumerate(saved):
        fresh, _ = NETS[base](seed=1)
        other = wrap(fresh, text, base)
        if at % 2:
            step(other, fresh, data)  # what it has seen of its own is forgotten
        fresh.load_state_dict(checkpoint["model"])
        other.load_state_dict(checkpoint["opt"])
        assert same(everything(fresh, other), states[at])
        for expected in states[at + 1 : at + 3]:
            step(other, fresh, data)
            assert same(everything(fresh, other), expected)


@pytest.mark.parametrize("text", EVERY)
def test_a_copy_and_a_pickle_go_on_too(text):
    model, data = nets.mlp()
    opt = wrap(model, text, "adamw", seed=3)
    for _ in range(3):
        step(opt, model, data)
    pairs = [copy.deepcopy((model, opt)), pickle.loads(pickle.dumps((model, opt)))]
    for _ in range(3):
        step(opt, model, data)
    for net, runner in pairs:
        for _ in range(3):
            step(runner, net, data)
        assert same(everything(net, runner), everything(model, opt))


def test_a_copy_takes_a_closure():
    model, (x, y) = nets.mlp()
    opt = wrap(model, "sam()")
    step(opt, model, (x, y))
    for net, runner in (copy.deepcopy((model, opt)), pickle.loads(pickle.dumps((model, opt)))):

        def closure(net=net, runner=runner):
            runner.zero_grad()
            loss = nets.losses(net, (x, y)).mean()
            loss.backward()
            return loss

        runner.zero_grad()
        runner.step(closure)
        assert runner.stats.steps == 2


@pytest.mark.parametrize("text", ["sam()", "gsam(rho_min=0.01)", "rst(esam(), p=linear(0, 1))"])
def test_with_a_scheduler_and_dropout(text):
    """The scheduler and the global generator are the caller's to save, as ever in torch."""
    nets_ends = []
    for stop in (None, 2, 5):
        torch.manual_seed(7)
        body, data = nets.mlp()
        model = nn.Sequential(nn.Dropout(0.3), body)
        opt = wrap(model, text)
        schedule = OneCycleLR(opt, 0.1, total_steps=12)
        for t in range(8):
            if t == stop:
                kept = through_disk([x.state_dict() for x in (model, schedule, opt)] + [torch.get_rng_state()])
                model = nn.Sequential(nn.Dropout(0.3), nets.mlp(seed=1)[0])
                opt = wrap(model, text, seed=5)
                schedule = OneCycleLR(opt, 0.1, total_steps=12)
                torch.manual_seed(1)
                for part, state in zip((model, schedule, opt), kept, strict=False):
                    part.load_state_dict(state)
                torch.set_rng_state(kept[-1])
            step(opt, model, data)
            schedule.step()
        nets_ends.append(weights(model))
    assert same(nets_ends[0], nets_ends[1])
    assert same(nets_ends[0], nets_ends[2])


@pytest.mark.parametrize("base", NETS)
@pytest.mark.parametrize("text", REMEMBERING)
def test_the_layout(text, base):
    """What the base knows is where the base has it; the rest has a name that no base uses."""
    model, data = nets.mlp()
    opt = wrap(model, text, base, seed=3)
    name = REMEMBERING[text]
    for t in range(5):
        saved = opt.state_dict()
        header = saved["param_groups"][0]["steppe"]
        assert header["method"] == text
        assert header["seed"] == 3
        assert header["stats"]["steps"] == t
        assert header["memories"] == {name: t > (3 if text.startswith("ssam(") else 0)}
        assert len(saved["state"]) == len(list(model.parameters()))
        for p, state in zip(model.parameters(), saved["state"].values(), strict=True):
            assert state[f"steppe.{name}"].shape == p.shape
            assert state[f"steppe.{name}"].dtype == (torch.bool if name == "mask" else torch.float64)
        plain = opt.base.state_dict()
        assert not any(
            "steppe" in str(keys) for keys in (plain["param_groups"][0], *map(list, plain["state"].values()))
        )
        assert opt.state is opt.base.state
        step(opt, model, data)


def test_methods_without_memories_add_the_header_only():
    model, data = nets.mlp()
    opt = wrap(model, "esam()", "adamw")
    step(opt, model, data)
    saved, plain = opt.state_dict(), opt.base.state_dict()
    assert saved["param_groups"][0].pop("steppe")["memories"] == {}
    assert same(saved, plain)


@pytest.mark.parametrize("text", REMEMBERING)
def test_parameters_go_by_the_order_of_the_groups(text):
    """Whatever the saved state calls them: ``torch.distributed.checkpoint`` calls them by name."""
    model, data = nets.mlp()
    opt = wrap(model, text)
    for _ in range(4):
        step(opt, model, data)
    saved = copy.deepcopy(opt.state_dict())
    named = list(dict(model.named_parameters()))
    saved["state"] = {named[i]: state for i, state in reversed(saved["state"].items())}
    saved["param_groups"][0]["params"] = named
    other = wrap(model, text)
    other.load_state_dict(saved)
    assert same(snapshot(other), snapshot(opt))


def test_loading_copies_the_memories_and_leaves_the_saved_state_as_it_is():
    model, data = nets.mlp()
    opt = wrap(model, "looksam(k=2)")
    step(opt, model, data)
    saved = opt.state_dict()
    kept = copy.deepcopy(saved)
    other = wrap(model, "looksam(k=2)")
    other.load_state_dict(saved)
    assert same(saved, kept)
    for one, two in zip(saved["state"].values(), other.state_dict()["state"].values(), strict=True):
        assert one["steppe.gv"].data_ptr() != two["steppe.gv"].data_ptr()


def test_a_parameter_without_a_memory_gets_what_stands_in_for_it():
    """A gradient that it has only later, a group added on the way."""
    body, data = nets.mlp()
    head = nn.Linear(nets.CLASSES, nets.CLASSES).double()
    model = nn.Sequential(body, head)
    ends = []
    for restart in (False, True):
        twin = copy.deepcopy(model)
        opt = wrap(twin[0], "looksam(k=3)")
        step(opt, twin, data)
        opt.add_param_group({"params": twin[1].parameters(), "lr": 0.01})
        if restart:
            saved, opt = opt.state_dict(), wrap(twin[0], "looksam(k=3)")
            opt.add_param_group({"params": twin[1].parameters()})
            opt.load_state_dict(through_disk(saved))
        for _ in range(4):
            step(opt, twin, data)
        ends.append(everything(twin, opt))
    assert same(*ends)


def test_a_frozen_parameter_has_no_memory():
    model, data = nets.mlp()
    model[0].weight.requires_grad_(False)
    opt = wrap(model, "looksam(k=2)")
    step(opt, model, data)
    assert 0 not in opt.state_dict()["state"]
    other = wrap(model, "looksam(k=2)")
    other.load_state_dict(through_disk(opt.state_dict()))
    assert same(snapshot(other), snapshot(opt))


def test_a_state_that_goes_by_names_and_lost_its_header_is_refused():
    """Flattening drops what is in no parameter group and no state of the loading optimizer: the method's part."""
    model, data = nets.mlp()
    opt = wrap(model, "looksam(k=2)")
    step(opt, model, data)
    saved = opt.base.state_dict()
    named = list(dict(model.named_parameters()))
    saved["state"] = {named[i]: state for i, state in saved["state"].items()}
    saved["param_groups"][0]["params"] = named
    before = everything(model, opt)
    with pytest.raises(ValueError, match="flatten_optimizer_state_dict=False"):
        opt.load_state_dict(saved)
    assert same(everything(model, opt), before)


class Plain(torch.optim.Optimizer):
    """A base whose state is not only tensors beside parameters."""

    def __init__(self, params) -> None:
        super().__init__(params, {"lr": 0.1})
        self.state["count"] = 0

    def step(self, closure=None) -> None:
        self.state["count"] += 1
        for group in self.param_groups:
            for p in group["params"]:
                p.data.add_(p.grad, alpha=-group["lr"])


def test_what_a_base_keeps_beside_its_parameters_comes_back():
    model, data = nets.mlp()
    opt = steppe.SharpnessAware(Plain(model.parameters()), steppe.looksam(k=2))
    for _ in range(3):
        step(opt, model, data)
    other = steppe.SharpnessAware(Plain(model.parameters()), steppe.looksam(k=2))
    other.load_state_dict(through_disk(opt.state_dict()))
    assert other.base.state["count"] == 3
    assert same(snapshot(other), snapshot(opt))


def test_hooks_of_an_optimizer_fire():
    model, data = nets.mlp()
    opt, calls = wrap(model, "looksam(k=2)"), []
    step(opt, model, data)
    for owner, name in ((opt, "wrapper"), (opt.base, "base")):
        owner.register_state_dict_pre_hook(lambda _, name=name: calls.append(f"{name} before saving"))
        owner.register_state_dict_post_hook(lambda _, state, name=name: calls.append(f"{name} after saving"))
        owner.register_load_state_dict_pre_hook(lambda _, state, name=name: calls.append(f"{name} before loading"))
        owner.register_load_state_dict_post_hook(lambda _, name=name: calls.append(f"{name} after loading"))
    opt.register_state_dict_post_hook(lambda _, state: {**state, "mine": 1})
    saved = opt.state_dict()
    assert saved["mine"] == 1
    opt.load_state_dict(saved)
    assert calls == [
        *["wrapper before saving", "base before saving", "base after saving", "wrapper after saving"],
        *["wrapper before loading", "base before loading", "base after loading", "wrapper after loading"],
    ]


def test_nothing_of_the_step_in_progress_is_saved():
    """A checkpoint taken inside a loss, as a preemption signal may do, is the state before the step but the weights."""
    model, data = nets.mlp()
    opt, seen = wrap(model, "looksam(k=2)"), []
    step(opt, model, data)

    def loss(model, data) -> Tensor:
        seen.append(snapshot(opt))
        return nets.losses(model, data)

    before = snapshot(opt)
    for _ in range(2):
        seen.clear()
        before = snapshot(opt)
        step(opt, model, data, loss)
        assert all(same(state, before) for state in seen)


@pytest.mark.parametrize(("one", "other"), [("gsam()", "gsam(sam())"), ("esam(beta=1)", "esam_sds()")])
def test_one_method_written_in_two_ways_is_one_method(one, other):
    model, data = nets.mlp()
    opt = wrap(model, one)
    step(opt, model, data)
    again = wrap(model, other)
    again.load_state_dict(opt.state_dict())
    assert again.stats.steps == 1
    with pytest.raises(ValueError, match=r"saved by .*, and this optimizer runs sam\(\)"):
        wrap(model, "sam()").load_state_dict(opt.state_dict())
