"""What loggers, metrics, hooks and schedulers see of a sharpness-aware step under Lightning: one step."""

from __future__ import annotations

import csv
import warnings
from functools import partial

import lightning as L
import pytest
import torch
from lightning.pytorch.loggers import CSVLogger
from torch.nn import functional as F
from torchmetrics import MetricCollection
from torchmetrics.classification import MulticlassAccuracy, MulticlassAUROC

import steppe
from lightning_runs import BATCH, CLASSES, K, Net, fit, loader, losses, network, sgd
from steppe.integrations.lightning import SharpnessAwareCallback

MILESTONE = 3


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

    @pytest.mark.parametrize("product", ["exact", "difference"])
    def test_a_base_that_looks_at_the_curvature_logs_too(self, product):
        net = Logged(network(), steppe.sgd(), lambda m: steppe.optim.AdaHessian(m.parameters(), 0.01, product=product))
        run = fit(net, SharpnessAwareCallback(), max_epochs=1)
        assert float(run.callback_metrics["loss_epoch"]) > 0

    def test_a_backward_of_ones_own_is_refused(self):
        class Own(Net):
            def backward(self, loss):
                loss.backward()

        with pytest.raises(ValueError, match=r"Own\.backward would not be called"):
            fit(Own(network(), steppe.sam()), SharpnessAwareCallback())
