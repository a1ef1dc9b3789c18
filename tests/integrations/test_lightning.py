"""Lightning's Trainer against a plain loop of steppe, and what Lightning's own loop would do wrong."""

from __future__ import annotations

import copy
import os
import runpy
from functools import partial
from pathlib import Path

import lightning as L
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, DistributedSampler

import steppe
from lightning_runs import EPOCHS, K, Net, assert_same, data, fit, fp16, loader, losses, network, plain, sgd, trainer
from ranks.launch import launch
from steppe.integrations.lightning import SharpnessAwareCallback

EXAMPLES = Path(__file__).parents[2] / "examples"


class TestWithoutTheCallback:
    @pytest.mark.parametrize("method", ["sam(0.1)", "gsam(0.1)", "rwp()", "looksam(0.1)"])
    def test_a_bare_closure_equals_a_plain_loop(self, method):
        net, model = Net(network(), steppe.parse(method)), network()
        run = fit(net)
        opt = plain(model, steppe.parse(method))
        assert_same(net.model, model)
        assert run.global_step == opt.stats.steps == run.optimizers[0].stats.steps == 14

    def test_bf16(self):
        net, model = Net(network(), steppe.sam(0.1)), network()
        fit(net, precision="bf16-mixed")
        plain(model, steppe.sam(0.1), autocast=torch.bfloat16)
        assert_same(net.model, model)
        assert net.runs == 2 * 14

    def test_clipping_of_sam(self):
        net, model = Net(network(), steppe.sam(0.1)), network()
        fit(net, gradient_clip_val=0.05)
        plain(model, steppe.sam(0.1), clip=0.05)
        assert_same(net.model, model)

    @pytest.mark.parametrize(
        ("model", "method", "how"),
        [
            (network(), steppe.sam(), {"accumulate_grad_batches": K}),
            (network(nn.BatchNorm1d(8)), steppe.sam(), {}),
            (network(), steppe.sam(), {"plugins": fp16()}),
            (network(), steppe.esam(), {}),
        ],
        ids=["accumulation", "batch norm", "fp16", "selection"],
    )
    def test_too_little_is_refused_with_the_name_of_the_integration(self, model, method, how):
        before = copy.deepcopy(model.state_dict())
        with pytest.raises(TypeError, match=r"steppe\.integrations"):
            fit(Net(model, method), **how)
        if not any("running" in name for name in before):
            torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)

    def test_an_optimizer_step_hook_reaches_the_groups(self):
        class WarmUp(Net):
            def optimizer_step(self, epoch, batch_idx, optimizer, optimizer_closure):
                for group in optimizer.param_groups:
                    group["lr"] = 0.0
                optimizer.step(closure=optimizer_closure)

        net = WarmUp(network(), steppe.sam())
        fit(net)
        assert_same(net.model, network())


CASES = {
    "accumulation": ("sam(0.1)", {"accumulate_grad_batches": K}, {"k": K}),
    "one batch a step": ("gsam(0.1)", {}, {}),
    "bf16": ("sam(0.1)", {"accumulate_grad_batches": K, "precision": "bf16-mixed"}, {"k": K}),
    "bf16 clipped": ("sam(0.1)", {"gradient_clip_val": 0.05, "precision": "bf16-mixed"}, {"clip": 0.05}),
    "norm clipped": ("gsam(0.1)", {"accumulate_grad_batches": K, "gradient_clip_val": 0.05}, {"k": K, "clip": 0.05}),
    "value clipped": (
        "rwp()",
        {"gradient_clip_val": 0.01, "gradient_clip_algorithm": "value"},
        {"clip": partial(nn.utils.clip_grad_value_, clip_value=0.01)},
    ),
    "selection": ("esam(0.1)", {"accumulate_grad_batches": K}, {"k": K}),
    "groups": ("m_sharpness(sam(0.1), 5)", {"accumulate_grad_batches": K}, {"k": K}),
    "no pass one": ("rwp(alpha=0)", {"accumulate_grad_batches": K}, {"k": K}),
    "memory": ("looksam(0.1)", {"accumulate_grad_batches": K}, {"k": K}),
    "squares": ("ssam(n=4, refresh=2)", {"accumulate_grad_batches": K}, {"k": K}),
}


class TestAgainstAPlainLoop:
    @pytest.mark.parametrize("case", CASES)
    def test_weights_and_cost(self, case):
        text, lightning, loop = CASES[case]
        loop = {"autocast": torch.bfloat16, **loop} if "precision" in lightning else loop
        method = steppe.parse(text)
        net, model = Net(network(), method, each=method.needs_examples), network()
        run = fit(net, SharpnessAwareCallback(), **lightning)
        opt = plain(model, method, **loop)
        assert_same(net.model, model)
        assert run.optimizers[0].stats == opt.stats
        assert run.global_step == opt.stats.steps == (6 if loop.get("k") else 14)

    def test_no_pass_runs_twice(self):
        for method, passes in ((steppe.sam(), 2), (steppe.rwp(alpha=0), 1)):
            net = Net(network(), method)
            fit(net, SharpnessAwareCallback(), accumulate_grad_batches=K)
            assert net.runs == passes * 7 * EPOCHS

    def test_batch_norm_moves_once(self):
        net, model = Net(network(nn.BatchNorm1d(8)), steppe.sam(0.1)), network(nn.BatchNorm1d(8))
        fit(net, SharpnessAwareCallback(), accumulate_grad_batches=K)
        plain(model, steppe.sam(0.1), k=K)
        assert_same(net.model, model)
        assert model[1].num_batches_tracked == 6

    def test_dropout_replays_unless_told_otherwise(self):
        for fresh in (False, True):
            seen = []
            net = Net(network(nn.Dropout(0.5)), steppe.sam(0.1))
            net.model[1].register_forward_hook(lambda _, x, y, seen=seen: seen.append((y == 0).detach()))
            fit(net, SharpnessAwareCallback(replay=not fresh))
            assert all(torch.equal(a, b) for a, b in zip(seen[::2], seen[1::2], strict=True)) != fresh

    def test_custom_norm_layers_are_held(self):
        held = []

        class Hold:
            def __init__(self, model) -> None:
                held.append(model)

            def __enter__(self) -> None: ...

            def __exit__(self, *_) -> None: ...

        net = Net(network(), steppe.sam(0.1))
        fit(net, SharpnessAwareCallback(hold=Hold))
        assert len(held) == 14

    def test_fp16_scaler_is_the_trainers(self):
        net, model = Net(network(), steppe.gsam(0.1)), network()
        run = fit(net, SharpnessAwareCallback(), plugins=fp16(), accumulate_grad_batches=K, gradient_clip_val=0.05)
        scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
        plain(model, steppe.gsam(0.1), k=K, autocast=torch.float16, scaler=scaler, clip=0.05)
        assert_same(net.model, model)
        assert run.precision_plugin.scaler.state_dict() == scaler.state_dict()
        assert scaler.state_dict()["_growth_tracker"] == 6
        assert run.optimizers[0].scaler is None

    def test_an_overflow_skips_the_step(self):
        net = Net(network(), steppe.sam(0.1))
        run = fit(net, SharpnessAwareCallback(), plugins=fp16(2.0**60), accumulate_grad_batches=K, max_epochs=1)
        assert_same(net.model, network())
        assert run.precision_plugin.scaler.get_scale() == 2.0**57
        assert run.optimizers[0].stats.steps == 0

    def test_the_base_alone_is_lightnings(self):
        ours, theirs = Net(network(), steppe.sgd()), Net(network(), None)
        few = {"accumulate_grad_batches": 2, "limit_train_batches": 6}
        fit(ours, SharpnessAwareCallback(), **few)
        fit(theirs, SharpnessAwareCallback(), **few)
        assert_same(ours.model, theirs.model)


@pytest.mark.parametrize("method", ["looksam(0.1)", "ssam_dynamic(0.1)", "rst(sam(0.1))"])
@pytest.mark.parametrize(
    "base", [sgd, lambda model: torch.optim.AdamW(model.parameters(), lr=0.01)], ids=["sgd", "adamw"]
)
def test_resume_goes_on_as_if_never_stopped(tmp_path, method, base):
    how = {"total_steps": 12}
    make = lambda: Net(network(nn.BatchNorm1d(8)), steppe.parse(method), base, **how)  # noqa: E731
    whole, half, rest = make(), make(), make()
    fit(whole, SharpnessAwareCallback(), accumulate_grad_batches=K, max_epochs=4, plugins=fp16())
    run = fit(half, SharpnessAwareCallback(), accumulate_grad_batches=K, max_epochs=2, plugins=fp16())
    run.save_checkpoint(tmp_path / "half.ckpt")
    run = trainer(SharpnessAwareCallback(), accumulate_grad_batches=K, max_epochs=4, plugins=fp16())
    run.fit(rest, loader(), ckpt_path=tmp_path / "half.ckpt")
    assert run.global_step == run.optimizers[0].stats.steps == 12
    torch.testing.assert_close(rest.state_dict(), whole.state_dict(), rtol=0, atol=0)


RANKS = {
    "closure": ("sam(0.1)", {}, {}),
    "closure clipped": ("sam(0.1)", {"gradient_clip_val": 0.05}, {"clip": 0.05}),
    "accumulation": ("sam(0.1)", {"accumulate_grad_batches": 2}, {}),
    "clipped": ("gsam(0.1)", {"accumulate_grad_batches": 2, "gradient_clip_val": 0.05}, {"clip": 0.05}),
    "bf16": ("sam(0.1)", {"accumulate_grad_batches": 2, "precision": "bf16-mixed"}, {}),
    "selection": ("esam(0.1)", {"accumulate_grad_batches": 2}, {}),
    "drawn": ("rst(rwp())", {"accumulate_grad_batches": 2}, {}),
    "local": ("sam(0.1)", {"accumulate_grad_batches": 2}, {}),
}


def _on_a_rank() -> dict[str, tuple]:
    import torch.distributed as dist

    os.environ.update(LOCAL_RANK=str(dist.get_rank()), MASTER_ADDR="localhost", MASTER_PORT="0")
    found = {}
    for case, (text, lightning, _) in RANKS.items():
        method = steppe.parse(text)
        ascent = "local" if case == "local" else "global"
        net = Net(network(), method, each=method.needs_examples, ascent=ascent)
        callbacks = [] if case.startswith("closure") else [SharpnessAwareCallback()]
        run = trainer(*callbacks, strategy="ddp", devices=2, **lightning)
        run.fit(net, DataLoader(data(48), 4, sampler=DistributedSampler(data(48), shuffle=False)))
        assert isinstance(run.strategy, L.pytorch.strategies.DDPStrategy)
        assert run.world_size == 2
        found[case] = net.model.state_dict(), run.global_step
    return found


def test_two_ranks():
    first, other = launch(2, _on_a_rank, seconds=120)
    x, y = data(48).tensors
    for case, (text, lightning, loop) in RANKS.items():
        torch.testing.assert_close(first[case], other[case], rtol=0, atol=0)
        k = lightning.get("accumulate_grad_batches", 1)
        model = network()
        method = steppe.parse(text if case != "local" else f"m_sharpness({text}, 8)")  # a rank has 8 examples a step
        opt = steppe.SharpnessAware(sgd(model), method, **loop)
        autocast = torch.bfloat16 if "precision" in lightning else None
        for _ in range(EPOCHS):
            for i in range(0, 48, 8 * k):  # rank r has the examples r, r + 2, ...
                rows = [torch.arange(i + 8 * j + r, i + 8 * (j + 1), 2) for r in (0, 1) for j in range(k)]
                batches = [(x[row], y[row]) for row in rows]
                opt.step(steppe.Batch.from_micro_batches(model, losses, batches, autocast=autocast))
        weights, steps = first[case]
        assert steps == opt.stats.steps, case
        torch.testing.assert_close(weights, model.state_dict(), rtol=0, atol=1e-6, msg=case)


def test_the_example_runs(capsys):
    runpy.run_path(str(EXAMPLES / "lightning_digits.py"), run_name="__main__")
    out = capsys.readouterr().out
    assert float(out.split()[1]) > 0.9, out
