"""Lightning's Trainer against a plain loop of steppe, and what Lightning's own loop would do wrong."""

from __future__ import annotations

import copy
import csv
import os
import runpy
import warnings
from functools import partial
from pathlib import Path

import lightning as L
import pytest
import torch
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.plugins import MixedPrecision
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset
from torchmetrics import MetricCollection
from torchmetrics.classification import MulticlassAccuracy, MulticlassAUROC

import steppe
from ranks.launch import launch
from steppe.integrations.lightning import SharpnessAwareCallback

EXAMPLES = Path(__file__).parents[2] / "examples"
K, CLASSES, BATCH, EPOCHS = 3, 3, 6, 2
MILESTONE = 3

torch.set_num_threads(1)


def data(size: int = 40) -> TensorDataset:
    """40 examples: 7 batches, the last one of 4; with K = 3 an epoch is two whole groups and one short one."""
    g = torch.Generator().manual_seed(1)
    return TensorDataset(torch.randn(size, 6, generator=g), torch.randint(CLASSES, (size,), generator=g))


def loader(size: int = 40) -> DataLoader:
    return DataLoader(data(size), BATCH)


def network(*extra: nn.Module) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(6, 8), *extra, nn.Tanh(), nn.Linear(8, CLASSES))


def sgd(model: nn.Module, lr: float = 0.1) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9, weight_decay=1e-3)


class Net(L.LightningModule):
    """A classifier whose training step returns the mean loss, or the losses of its examples beside it."""

    def __init__(self, model: nn.Module, method: steppe.Method | None, base=sgd, each: bool = False, **how) -> None:
        super().__init__()
        self.model, self.method, self.base, self.each, self.how = model, method, base, each, how
        self.runs = 0

    def training_step(self, batch, batch_idx):
        self.runs += 1
        x, y = batch
        losses = F.cross_entropy(self.model(x), y, reduction="none")
        return {"loss": losses.mean(), "losses": losses} if self.each else losses.mean()

    def configure_optimizers(self):
        base = self.base(self.model)
        return base if self.method is None else steppe.SharpnessAware(base, self.method, **self.how)

    def forward(self, x):
        return self.model(x)


def trainer(*callbacks, **how) -> L.Trainer:
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    given = {"max_epochs": EPOCHS, "accelerator": "cpu", "devices": 1, "enable_model_summary": False, **quiet, **how}
    return L.Trainer(callbacks=list(callbacks), **given)


def fit(net: Net, *callbacks, **how) -> L.Trainer:
    run = trainer(*callbacks, **how)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*does not have many workers.*|.*logging interval.*")
        run.fit(net, loader())
    return run


def losses(model: nn.Module, batch) -> torch.Tensor:
    return F.cross_entropy(model(batch[0]), batch[1], reduction="none")


def plain(model: nn.Module, method: steppe.Method, base=sgd, k: int = 1, autocast=None, **how) -> steppe.SharpnessAware:
    """The same training as ten lines of steppe."""
    opt = steppe.SharpnessAware(base(model), method, **how)
    batches = list(loader())
    for _ in range(EPOCHS):
        for i in range(0, len(batches), k):
            opt.step(steppe.Batch.from_micro_batches(model, losses, batches[i : i + k], autocast=autocast))
    return opt


def assert_same(net: nn.Module, model: nn.Module) -> None:
    torch.testing.assert_close(net.state_dict(), model.state_dict(), rtol=0, atol=1e-6)


def fp16(scale: float = 1024.0) -> MixedPrecision:
    return MixedPrecision("16-mixed", "cpu", scaler=torch.amp.GradScaler("cpu", init_scale=scale))


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


class Logged(Net):
    """Logs a loss a step and an epoch, and metrics with tensor and with list states."""

    def __init__(self, *args, **how) -> None:
        super().__init__(*args, **how)
        self.accuracy = MulticlassAccuracy(CLASSES, average="micro")
        self.others = MetricCollection({"auroc": MulticlassAUROC(CLASSES), "macro": MulticlassAccuracy(CLASSES)})

    def training_step(self, batch, batch_idx):
        x, y = batch
        logits = self.model(x)
        loss = F.cross_entropy(logits, y)
        self.log("loss", loss, on_step=True, on_epoch=True)
        self.accuracy(logits, y)
        self.log("accuracy", self.accuracy, on_step=True, on_epoch=True)
        self.others.update(logits, y)
        return {"loss": loss, "rows": len(y)}

    def on_train_epoch_end(self):
        self.log_dict(self.others.compute())
        self.others.reset()


class TestCountsAndLogs:
    @pytest.mark.parametrize("k", [1, K])
    @pytest.mark.parametrize("method", [steppe.sam(2.0), steppe.m_sharpness(steppe.sam(2.0), BATCH)], ids=["sam", "m"])
    def test_loggers_see_what_they_see_of_the_base(self, tmp_path, k, method):
        """At lr = 0 all passes one are those of SGD, and passes two are far away."""
        rows = []
        for name, each in (("theirs", None), ("ours", method)):
            net = Logged(network(), each, partial(sgd, lr=0.0))
            logger = CSVLogger(tmp_path, name, version=0)
            callbacks = [SharpnessAwareCallback()] if each else []
            run = fit(net, *callbacks, logger=logger, log_every_n_steps=1, accumulate_grad_batches=k)
            with (tmp_path / name / "version_0" / "metrics.csv").open() as f:
                rows.append(list(csv.DictReader(f)))
            assert run.global_step == {1: 14, K: 6}[k]
            assert run.fit_loop.epoch_loop.batch_progress.total.completed == 14
        theirs, ours = rows
        assert len(theirs) == len(ours) == {1: 16, K: 8}[k]
        for a, b in zip(theirs, ours, strict=True):
            assert {n: float(v) for n, v in a.items() if v} == pytest.approx({n: float(v) for n, v in b.items() if v})

    def test_hooks(self):
        class Spy(L.Callback):
            def __init__(self) -> None:
                self.calls = []

            def on_before_zero_grad(self, trainer, module, optimizer):
                self.calls.append("zero_grad")

            def on_before_backward(self, trainer, module, loss):
                assert loss.requires_grad
                self.calls.append("before_backward")

            def on_after_backward(self, trainer, module):
                self.calls.append("after_backward")

            def on_before_optimizer_step(self, trainer, module, optimizer):
                assert optimizer is trainer.optimizers[0]
                self.direction = [p.grad.clone() for p in module.parameters()]
                self.calls.append("before_step")

            def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
                self.calls.append(sorted(outputs))

        spy, net = Spy(), Logged(network(), steppe.sam(0.1))
        run = fit(net, SharpnessAwareCallback(), spy, accumulate_grad_batches=2, max_steps=1)
        step = ["before_backward", "before_backward", "after_backward", "before_step"]
        assert spy.calls == [[], "zero_grad", *step, ["loss", "rows"]]
        model = network()
        steppe.SharpnessAware(sgd(model), steppe.sam(0.1)).step(
            steppe.Batch.from_micro_batches(model, losses, list(loader())[:2])
        )
        torch.testing.assert_close(spy.direction, [p.grad for p in model.parameters()], rtol=0, atol=1e-6)
        assert run.optimizers[0].clip is None

    @pytest.mark.parametrize("callback", [True, False])
    def test_a_scheduler_steps_with_the_optimizer(self, callback):
        rates = []

        class Scheduled(Net):
            def configure_optimizers(self):
                opt = super().configure_optimizers()
                scheduler = torch.optim.lr_scheduler.StepLR(opt, MILESTONE, 0.5)
                return {"optimizer": opt, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

            def on_train_batch_end(self, *_):
                rates.append(self.trainer.optimizers[0].base.param_groups[0]["lr"])

        k = 2 if callback else 1
        callbacks = [SharpnessAwareCallback()] if callback else []
        with warnings.catch_warnings():
            warnings.filterwarnings("error", ".*lr_scheduler.*")
            fit(Scheduled(network(), steppe.sam()), *callbacks, accumulate_grad_batches=k, limit_train_batches=6)
        steps = [0.1 * 0.5 ** ((i + 1) // k // MILESTONE) for i in range(12)]
        assert rates == pytest.approx(steps)

    def test_own_clip_or_scaler_is_refused(self):
        for how in ({"clip": 1.0}, {"scaler": torch.amp.GradScaler("cpu")}):
            with pytest.raises(ValueError, match="Trainer"):
                fit(Net(network(), steppe.sam(), **how), SharpnessAwareCallback())

    def test_a_training_step_without_a_loss_is_refused(self):
        class Skips(Net):
            def training_step(self, batch, batch_idx):
                return None

        with pytest.raises(TypeError, match="training_step returned None"):
            fit(Skips(network(), steppe.sam()), SharpnessAwareCallback())

    def test_a_mean_is_too_little_for_a_selection(self):
        with pytest.raises(TypeError, match="each example"):
            fit(Net(network(), steppe.esam()), SharpnessAwareCallback())


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
