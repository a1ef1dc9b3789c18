"""The training of one network in memory: what an epoch does, whatever the method."""

import hashlib
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR

import steppe
from steppe.curvature import heap
from steppe.lab import bases, models
from steppe.lab.augment import augment, normalize
from steppe.lab.config import Config
from steppe.lab.data import Dataset, Split, load
from steppe.lab.memory import peak_memory

__all__ = ["DivergedError", "Training", "cross_entropy", "evaluate", "laid_out", "step_memory"]

WARM_UP = 0.05
"""Share of the steps over which the learning rate rises to its peak."""
EVALUATION_BATCH = 1000
LAYOUT = torch.channels_last
"""Of images and convolutions: a fifth faster on the CPU."""
MEMORY_STEPS = 6
"""Steps whose peak memory is taken, at least."""
MEMORY_SHARP = 2
"""Sharp steps among them: the second one finds what the first has left."""
MEMORY_LIMIT = 60
"""Steps at which the wait for these ends."""


class DivergedError(ArithmeticError):
    """A loss that is not finite."""


class Training:
    """A network, its optimizer, its schedule and its images.

    The initial weights, the batches, the augmentation and the dropout are functions of the seed and the epoch
    alone: all methods of a seed see the same, and between two epochs there is no generator's state to keep. A
    last batch that is smaller is trained on unless it is a single image.

    Args:
        config: what to train.
    """

    def __init__(self, config: Config) -> None:
        self.config = config
        heap.widen()
        _check_device(config.device)
        self.dataset = _dataset(
            config.data, config.seed, config.train_size, config.label_noise, config.validation, config.device
        )
        images = len(self.dataset.train)
        if images < 2:
            raise ValueError(f"{config.data}: {images} training image, but a step takes at least 2: give more of them")
        self.steps = images // config.batch_size + (images % config.batch_size > 1)
        channels, height, width = self.dataset.train.images.shape[1:]
        if height != width:
            raise ValueError(f"{config.data}: images of {height}x{width}, but the networks take square ones")
        self.model, self.opt = _build(config, self.dataset.classes, channels, height, self.steps)
        self.schedule = LambdaLR(self.opt.base, warm_up_then_cosine(config.epochs * self.steps))
        self.needs_second = self.opt.method.needs_second

    def state_dict(self) -> dict[str, Any]:
        """All that the next epoch depends on."""
        return {
            "model": self.model.state_dict(),
            "opt": self.opt.state_dict(),
            "schedule": self.schedule.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go back to where `state_dict` was taken."""
        self.model.load_state_dict(state["model"])
        self.opt.load_state_dict(state["opt"])
        self.schedule.load_state_dict(state["schedule"])

    def epoch(self, epoch: int) -> dict[str, Any]:
        """Train one epoch.

        Args:
            epoch: its number, from 0.

        Returns:
            Its record: number, mean training loss, seconds of the training steps with their augmentation and the
                moment at which they began, steps and propagations a step so far, and the loss and accuracy on the
                test images where they are due.

        Raises:
            DivergedError: at a loss that is not finite.
        """
        config = self.config
        torch.manual_seed(_seed(config.seed, epoch, "dropout"))
        self.model.train()
        total = torch.zeros((), device=config.device)
        examples = 0
        start, moment = _now(config.device), time.time()
        seconds = self._batches(epoch, "second") if self.needs_second else None
        for batch in self._batches(epoch, "first"):
            try:
                loss = self.opt.step(batch, second=next(seconds) if seconds else None)
            except ValueError as error:
                raise DivergedError(f"epoch {epoch + 1}: {error}") from error
            self.schedule.step()
            total += loss * batch.size
            examples += batch.size
        elapsed = _now(config.device) - start
        record: dict[str, Any] = {
            "epoch": epoch + 1,
            "train_loss": total.item() / examples,
            "seconds": elapsed,
            "at": moment,
            "steps": self.opt.stats.steps,
            "propagations": self.opt.stats.propagations,
        }
        if (epoch + 1) % config.eval_every == 0 or epoch + 1 == config.epochs:
            record["test_loss"], record["test_accuracy"] = evaluate(self.model, self.dataset.test, self.dataset)
        for name in ("train_loss", "test_loss"):
            if not math.isfinite(record.get(name, 0.0)):
                raise DivergedError(f"epoch {epoch + 1}: {name} is {record[name]}")
        return record

    def _batches(self, epoch: int, purpose: str) -> Iterator[steppe.Batch]:
        config, dataset = self.config, self.dataset
        order = torch.Generator().manual_seed(_seed(config.seed, epoch, f"{purpose} order"))
        draws = torch.Generator(config.device).manual_seed(_seed(config.seed, epoch, f"{purpose} augmentation"))
        rows = torch.randperm(len(dataset.train), generator=order).to(config.device)
        for chosen in torch.split(rows, config.batch_size)[: self.steps]:
            split = dataset.train[chosen]
            images = augment(
                split.images,
                draws,
                mean=dataset.mean,
                std=dataset.std,
                flip=config.flip,
                crop=config.crop,
                cutout=config.cutout,
            )
            yield steppe.Batch(self.model, cross_entropy, (laid_out(images), split.labels))


def evaluate(model: nn.Module, split: Split, dataset: Dataset) -> tuple[float, float]:
    """Mean cross-entropy and accuracy, a share in [0, 1], in eval mode.

    Args:
        model: on the images' device; left in the mode it was in.
        split: images and labels to evaluate on.
        dataset: whose training statistics normalize the images.
    """
    mode = model.training
    model.eval()
    loss = torch.zeros((), device=split.images.device)
    hits = torch.zeros((), device=split.images.device, dtype=torch.int64)
    with torch.inference_mode():
        for images, labels in zip(
            torch.split(split.images, EVALUATION_BATCH),
            torch.split(split.labels, EVALUATION_BATCH),
            strict=True,
        ):
            logits = model(laid_out(normalize(images, dataset.mean, dataset.std)))
            loss += F.cross_entropy(logits, labels, reduction="sum")
            hits += (logits.argmax(1) == labels).sum()
    model.train(mode)
    return loss.item() / len(split), hits.item() / len(split)


@lru_cache(maxsize=256)
def step_memory(config: Config, classes: int, channels: int, size: int) -> int:
    """Peak bytes of full training steps: weights, gradients, optimizer state, activations and the batch.

    A network of its own takes a few steps on noise, so nothing that is being trained is touched but torch's
    global generator. What a method does in fewer than one of 30 steps may be missed, such as a new mask of `ssam`.

    Args:
        config: as of the run; its images are not read.
        classes: number of classes.
        channels: channels of the images.
        size: side of the images in pixels.
    """

    def program() -> None:
        model, opt = _build(replace(config, epochs=1), classes, channels, size, MEMORY_LIMIT)
        for step in range(MEMORY_LIMIT):
            if step >= MEMORY_STEPS and (opt.stats.sharp >= MEMORY_SHARP or opt.method == steppe.sgd()):
                break
            first = _noise(model, config, classes, channels, size)
            second = _noise(model, config, classes, channels, size) if opt.method.needs_second else None
            opt.step(first, second=second)

    return peak_memory(program, config.device)


def cross_entropy(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    """Loss of each example, shape (B,)."""
    images, labels = batch
    return F.cross_entropy(model(images), labels, reduction="none")


def warm_up_then_cosine(steps: int) -> Callable[[int], float]:
    """Factor of the learning rate at each step: up to 1 over the first 5 %, then a cosine down to 0."""
    rise = max(1, round(WARM_UP * steps))

    def factor(step: int) -> float:
        if step < rise:
            return (step + 1) / rise
        return (1 + math.cos(math.pi * (step - rise + 1) / (steps - rise + 1))) / 2

    return factor


@lru_cache(maxsize=1)
def _dataset(
    source: str, seed: int, train_size: int | None, label_noise: float, validation: float, device: str
) -> Dataset:
    dataset = load(source, seed=seed, train_size=train_size, label_noise=label_noise, validation=validation)
    train, test = (Split(split.images.to(device), split.labels.to(device)) for split in (dataset.train, dataset.test))
    return replace(dataset, train=train, test=test)


def _build(
    config: Config, classes: int, channels: int, size: int, steps: int
) -> tuple[nn.Module, steppe.SharpnessAware]:
    torch.manual_seed(config.seed)
    model = models.build(config.model, classes=classes, channels=channels, size=size, width=config.width)
    model = model.to(config.device).to(memory_format=LAYOUT)  # type: ignore[call-overload]
    base, method = bases.build(config, model.parameters()), steppe.parse(config.method)
    return model, steppe.SharpnessAware(base, method, seed=config.seed, total_steps=config.epochs * steps)


def _noise(model: nn.Module, config: Config, classes: int, channels: int, size: int) -> steppe.Batch:
    images = torch.randn(config.batch_size, channels, size, size, device=config.device)
    labels = torch.arange(config.batch_size, device=config.device) % classes
    return steppe.Batch(model, cross_entropy, (laid_out(images), labels))


def laid_out(images: Tensor) -> Tensor:
    """The images in the memory layout that the networks are trained in."""
    return images.contiguous(memory_format=LAYOUT)


def _check_device(device: str) -> None:
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"device={device!r} cannot be used: {reason}; cpu always can") from error


def _now(device: str) -> float:
    if device.startswith("cuda"):
        torch.cuda.synchronize(device)
    return time.perf_counter()


def _seed(seed: int, epoch: int, purpose: str) -> int:
    digest = hashlib.blake2b(f"{seed} {epoch} {purpose}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1
