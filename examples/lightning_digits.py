"""ESAM under Lightning's Trainer: digits, BatchNorm, two micro-batches a step, clipping and a schedule.

Needs ``pip install 'steppe[lightning]' scikit-learn``; runs in seconds on a CPU.
"""

from __future__ import annotations

import logging

import lightning as L
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset, random_split
from torchmetrics.classification import MulticlassAccuracy

import steppe
from steppe.integrations.lightning import SharpnessAwareCallback

EPOCHS, BATCH, MICRO = 5, 64, 2


class Digits(L.LightningModule):
    """A small convolutional network for 8 x 8 images of digits."""

    def __init__(self, method: str) -> None:
        super().__init__()
        self.method = method
        self.model = nn.Sequential(
            nn.Conv2d(1, 16, 3, padding=1),
            nn.BatchNorm2d(16),
            nn.ReLU(),
            nn.Conv2d(16, 32, 3, stride=2, padding=1),
            nn.BatchNorm2d(32),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(512, 10),
        )
        self.accuracy = MulticlassAccuracy(10, average="micro")

    def training_step(self, batch: list[Tensor], batch_idx: int) -> dict[str, Tensor]:
        """Return the mean loss, and the examples' own for methods that select some of them."""
        x, y = batch
        losses = F.cross_entropy(self.model(x), y, reduction="none")
        self.log("loss", losses.mean())
        return {"loss": losses.mean(), "losses": losses}

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        """Count the hits."""
        x, y = batch
        self.accuracy(self.model(x), y)
        self.log("accuracy", self.accuracy)

    def configure_optimizers(self) -> dict[str, object]:
        """Return the sharpness-aware optimizer, with a schedule built on it."""
        base = torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-4)
        steps = int(self.trainer.estimated_stepping_batches)
        opt = steppe.SharpnessAware(base, steppe.parse(self.method), total_steps=steps)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(opt, steps)
        return {"optimizer": opt, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def main() -> None:
    """Train, and print the accuracy and what it cost."""
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    L.seed_everything(0, verbose=False)
    images, labels = load_digits(return_X_y=True)
    whole = TensorDataset(torch.tensor(images, dtype=torch.float32).view(-1, 1, 8, 8) / 16, torch.tensor(labels))
    train, test = random_split(whole, [1437, 360])
    loader = DataLoader(train, BATCH, shuffle=True, drop_last=True)
    net = Digits("esam(rho=0.05)")
    trainer = L.Trainer(
        max_epochs=EPOCHS,
        accelerator="cpu",
        accumulate_grad_batches=MICRO,
        gradient_clip_val=1.0,
        callbacks=[SharpnessAwareCallback()],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(net, loader, DataLoader(test, 360))
    stats = trainer.optimizers[0].stats
    print(
        f"accuracy {trainer.callback_metrics['accuracy']:.3f} after {trainer.global_step} steps "
        f"of {stats.propagations:.2f} propagations"
    )


if __name__ == "__main__":
    main()
