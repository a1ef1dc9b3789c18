"""A small classifier trained by Lightning and by a plain loop of steppe."""

from __future__ import annotations

import warnings

import lightning as L
import torch
from lightning.pytorch.plugins import MixedPrecision
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import steppe

K, CLASSES, BATCH, EPOCHS = 3, 3, 6, 2

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
