"""Checkpoints through ``torch.distributed.checkpoint``: it goes by names, and loads only what is there already."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.optim import SGD, AdamW

import nets
import steppe
from recipes_list import same, step, weights, wrap

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
TEXTS = ["sgd()", "sam()", "rst(esam(), p=0.5)", "looksam(k=3)", "ssam(refresh=2)", "ssam_dynamic(refresh=2)"]
NETS = {"sgd": nets.convnet, "adamw": nets.mlp}


def save(folder, model, opt, **how) -> None:
    options = StateDictOptions(**how)
    state = dict(zip(("model", "opt"), get_state_dict(model, opt, options=options), strict=True))
    dcp.save(state, checkpoint_id=folder)


def load(folder, model, opt, **how) -> None:
    options = StateDictOptions(**how)
    state = dict(zip(("model", "opt"), get_state_dict(model, opt, options=options), strict=True))
    dcp.load(state, checkpoint_id=folder)
    set_state_dict(model, opt, model_state_dict=state["model"], optim_state_dict=state["opt"], options=options)


def everything(model: nn.Module, opt: steppe.SharpnessAware):
    return copy.deepcopy([weights(model), opt.state_dict()])


@pytest.mark.parametrize("base", NETS)
@pytest.mark.parametrize("text", TEXTS)
def test_a_run_goes_on(tmp_path, text, base):
    """Saved before anything is remembered and after; loaded into one that has stepped, and into one that has not."""
    model, data = NETS[base]()
    opt = wrap(model, text, base, seed=3)
    for at in range(4):
        save(tmp_path / str(at), model, opt)
        fresh, _ = NETS[base](seed=1)
        other = wrap(fresh, text, base)
        if at == 3:
            step(other, fresh, data)
        load(tmp_path / str(at), fresh, other)
        assert same(everything(fresh, other), everything(model, opt))
        step(opt, model, data)
        step(other, fresh, data)
        assert same(everything(fresh, other), everything(model, opt))


@pytest.mark.parametrize("base", NETS)
@pytest.mark.parametrize("text", ["sam()", "looksam(k=3)", "ssam(refresh=2)"])
def test_saving_disturbs_no_run(tmp_path, text, base):
    ends = []
    for saves in (False, True):
        model, data = NETS[base]()
        opt = wrap(model, text, base)
        for at in range(4):
            if saves and at > 0:  # before the first step, torch takes one of its own: base.state is no more empty
                save(tmp_path / str(at), model, opt)
            step(opt, model, data)
        ends.append(everything(model, opt))
    assert same(*ends)


def two_groups(model: nn.Module, reverse: bool) -> list:
    groups = [
        {"params": model[0].parameters(), "lr": 0.02, "rho": 0.1},
        {"params": model[2:].parameters(), "rho": 0.01},
    ]
    return groups[::-1] if reverse else groups


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("text", ["looksam(k=3)", "ssam_dynamic(refresh=2)"])
def test_parameters_go_by_name(tmp_path, text, reverse):
    """Groups in another order, as after a change of the code, or of the mesh."""
    runs = []
    for seed, turned in ((0, False), (1, reverse)):
        model, data = nets.mlp(seed)
        runs.append((model, steppe.SharpnessAware(AdamW(two_groups(model, turned)), steppe.parse(text), total_steps=9)))
    (model, opt), (fresh, other) = runs
    for _ in range(3):
        step(opt, model, data)
    save(tmp_path, model, opt)
    load(tmp_path, fresh, other)
    assert other.stats == opt.stats
    assert [group["rho"] for group in other.param_groups] == ([0.01, 0.1] if reverse else [0.1, 0.01])
    name = "steppe.gv" if text.startswith("look") else "steppe.mask"
    for (_, p), (_, q) in zip(model.named_parameters(), fresh.named_parameters(), strict=True):
        ours, theirs = (dict(zip(o.params(), o.state_dict()["state"].values(), strict=True)) for o in (opt, other))
        assert same(theirs[q][name], ours[p][name])


@pytest.mark.parametrize("how", [{"full_state_dict": True}, {"cpu_offload": True}])
def test_other_forms(tmp_path, how):
    model, data = nets.mlp()
    opt = wrap(model, "looksam(k=2)", "adamw")
    step(opt, model, data)
    save(tmp_path, model, opt, **how)
    fresh, _ = nets.mlp(seed=1)
    other = wrap(fresh, "looksam(k=2)", "adamw")
    load(tmp_path, fresh, other, **how)
    assert same(everything(fresh, other), everything(model, opt))


def test_the_flattened_form_is_refused_before_it_changes_anything(tmp_path):
    """It keeps of a group and of a parameter only what the loading optimizer's own have."""
    model, data = nets.mlp()
    opt = wrap(model, "looksam(k=2)", "adamw")
    step(opt, model, data)
    save(tmp_path, model, opt, flatten_optimizer_state_dict=True)
    stats = copy.copy(opt.stats)
    with pytest.raises(ValueError, match="flatten_optimizer_state_dict=False"):
        load(tmp_path, model, opt, flatten_optimizer_state_dict=True)
    assert opt.stats == stats


def test_another_method_is_refused_by_name(tmp_path):
    model, data = nets.mlp()
    opt, other = wrap(model, "rst(sam(), p=0.25)"), wrap(model, "esam(gamma=0.25)")
    step(opt, model, data)
    save(tmp_path, model, opt)
    with pytest.raises(ValueError, match=r"rst\(sam\(\), p=0.25\).*esam\(gamma=0.25\)"):
        load(tmp_path, model, other)


def test_a_checkpoint_of_the_base_goes_into_the_base(tmp_path):
    model, data = nets.mlp()
    base = SGD(model.parameters(), lr=0.1, momentum=0.9)
    steppe.SharpnessAware(base, steppe.sam()).step(steppe.Batch(model, nets.losses, data))
    save(tmp_path, model, base)
    fresh, _ = nets.mlp(seed=1)
    other = wrap(fresh, "sam()")
    load(tmp_path, fresh, other.base)
    assert same(other.base.state_dict(), base.state_dict())
    step(other, fresh, data)
    assert other.stats.steps == 1


def test_initialising_the_state_moves_nothing():
    """``torch.distributed.checkpoint`` calls ``step(closure=None)`` with learning rates of 0."""
    for text in TEXTS:
        model, _ = nets.mlp()
        opt = wrap(model, text)
        before = weights(model)
        get_state_dict(model, opt)
        assert same(weights(model), before)
        assert opt.stats == steppe.Stats()
        assert opt.param_groups[0]["lr"] == 0.05
        assert all(p.grad is None for p in model.parameters())


@pytest.fixture
def one_rank():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize("text", ["looksam(k=3)", "ssam_dynamic(refresh=2)"])
def test_sharded_memories(tmp_path, one_rank, text):
    """They are sharded as the parameters are."""
    runs = []
    for seed in (0, 1):
        model, data = nets.mlp(seed)
        fully_shard(model)
        runs.append((model, wrap(model, text, "adamw")))
    (model, opt), (fresh, other) = runs
    for at in range(4):
        save(tmp_path / str(at), model, opt)
        load(tmp_path / str(at), fresh, other)
        for one, two in zip(opt.state_dict()["state"].values(), other.state_dict()["state"].values(), strict=True):
            assert all(isinstance(t, DTensor) for name, t in two.items() if name != "step")
            assert one.keys() == two.keys()
            assert all(same(one[name], two[name]) for name in one)
        step(opt, model, data)
        step(other, fresh, data)
        assert other.stats == opt.stats
    for p, q in zip(model.parameters(), fresh.parameters(), strict=True):
        assert torch.equal(p.to_local(), q.to_local())
