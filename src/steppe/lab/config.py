"""What a training run is made from, as plain JSON-able values."""

import hashlib
import json
import re
from dataclasses import asdict, dataclass

__all__ = ["Config", "Setting", "titled"]


def titled(method: str, base: str) -> str:
    """What a method on a base is called; plain sgd goes without saying."""
    return method if base == "sgd" else f"{method} on {base}"


@dataclass(frozen=True)
class Setting:
    """What all runs of one study share."""

    data: str = "digits"
    """Images to train on: "digits" (8x8, built in), or a folder of Parquet files with images and labels."""
    model: str = "cnn"
    """Network: cnn, resnet18, resnet20, vgg16, wrn-16-8, wrn-28-10, pyramidnet-110, vit or mixer."""
    width: int | None = None
    """The network's own measure of width; None takes the published one."""
    epochs: int = 40
    """Passes over the training images."""
    batch_size: int = 64
    """Training images a step."""
    lr: float | None = None
    """Peak learning rate: warm-up over the first 5 % of the steps, then a cosine down to 0. None takes the base's."""
    momentum: float | None = None
    """Momentum of the base, for adamw and adahessian their β1; None takes the base's."""
    weight_decay: float | None = None
    """Weight decay of the base, decoupled from the gradient but in sgd; None takes the base's."""
    train_size: int | None = None
    """Number of training images to use; None takes all."""
    label_noise: float = 0.4
    """Share of the training labels replaced by a wrong class, in [0, 1). Test labels are never touched."""
    flip: bool = False
    """Mirror training images at random."""
    crop: int = 0
    """Shift training images at random by up to this many pixels."""
    cutout: int = 0
    """Blank out a square of this side in each training image."""
    eval_every: int = 4
    """Epochs between evaluations on the test images; the last epoch is always evaluated."""
    device: str = "cpu"
    """Where to train: cpu, cuda or cuda:N."""


@dataclass(frozen=True)
class Config(Setting):
    """One training run: a setting, a method, a base and a seed."""

    lr: float = 0.1
    momentum: float = 0.9
    weight_decay: float = 5e-4
    method: str = "sgd()"
    """Expression of the method, as `repr(method)` writes it."""
    seed: int = 0
    """Fixes the weights, the batches, the augmentation and the label noise, whatever the method."""
    validation: float = 0.0
    """Share of the training images held out and evaluated on in place of the test images."""
    base: str = "sgd"
    """Expression of the optimizer that takes the step, without the learning rate, momentum and weight decay above."""

    def __post_init__(self) -> None:
        for name in ("epochs", "eval_every", "width", "train_size"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        if self.batch_size < 2:
            raise ValueError(f"batch_size must be at least 2, got {self.batch_size}")
        if not self.lr > 0:
            raise ValueError(f"lr must be positive, got {self.lr}")
        if not 0 <= self.momentum < 1:
            raise ValueError(f"momentum must be in [0, 1), got {self.momentum}")
        if not 0 <= self.label_noise < 1:
            raise ValueError(f"label_noise must be in [0, 1), got {self.label_noise}")
        for name in ("weight_decay", "crop", "cutout"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name} must not be negative, got {getattr(self, name)}")
        if not 0 <= self.seed < 2**63:
            raise ValueError(f"seed must lie in [0, 2**63), got {self.seed}")
        if not 0 <= self.validation < 1:
            raise ValueError(f"validation must be in [0, 1), got {self.validation}")

    @property
    def title(self) -> str:
        """The method, and the base where it is not plain sgd."""
        return titled(self.method, self.base)

    @property
    def name(self) -> str:
        """Folder name of the run: method, base, seed and a hash of every value."""
        slug = re.sub(r"[^a-z0-9.]+", "-", self.title.lower()).strip("-")[:60]
        values = {name: value for name, value in asdict(self).items() if (name, value) != ("base", "sgd")}
        digest = hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()
        return f"{slug}-s{self.seed}-{digest[:8]}"
