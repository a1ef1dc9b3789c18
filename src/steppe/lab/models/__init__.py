"""The laboratory's networks, built by name."""

from collections.abc import Callable
from difflib import get_close_matches
from functools import partial

from torch import nn

from steppe.lab.models.cnn import CNN
from steppe.lab.models.mixer import Mixer
from steppe.lab.models.pyramidnet import PyramidNet
from steppe.lab.models.resnet import ResNet18, ResNet20
from steppe.lab.models.vgg import VGG16
from steppe.lab.models.vit import ViT
from steppe.lab.models.wrn import WideResNet

__all__ = ["NAMES", "build"]

_NETWORKS: dict[str, tuple[Callable[..., nn.Module], int]] = {  # with the smallest image side, in pixels
    "cnn": (CNN, 4),
    "resnet18": (ResNet18, 8),
    "resnet20": (ResNet20, 4),
    "vgg16": (VGG16, 32),
    "wrn-16-8": (partial(WideResNet, depth=16, width=8), 4),
    "wrn-28-10": (partial(WideResNet, depth=28, width=10), 4),
    "pyramidnet-110": (partial(PyramidNet, depth=110), 4),
    "vit": (ViT, 4),
    "mixer": (Mixer, 4),
}
NAMES = tuple(_NETWORKS)


def build(name: str, *, classes: int = 10, channels: int = 3, size: int = 32, width: int | None = None) -> nn.Module:
    """Build a freshly initialised network that maps images (B, channels, size, size) to logits (B, classes).

    Args:
        name: one of `NAMES`.
        classes: number of logits.
        channels: channels of the images.
        size: side of the images in pixels.
        width: the network's own measure of width; None takes its default. Channels of the first stage for
            cnn (16), resnet18 (64), resnet20 (16) and vgg16 (64); the widening factor for wrn-16-8 (8) and
            wrn-28-10 (10); the widening α for pyramidnet-110 (270); dimensions of a token for vit (192, in
            multiples of 64) and mixer (512, even).

    Raises:
        ValueError: if the name is unknown, a number is not positive, the image is too small for the network,
            or vit or mixer cannot have that width or that size.
    """
    if name not in _NETWORKS:
        near = get_close_matches(name.lower(), NAMES, n=1, cutoff=0)[0]
        raise ValueError(f"build: unknown network {name!r}; did you mean {near!r}? The names are {', '.join(NAMES)}")
    for what, number in {"classes": classes, "channels": channels, "width": width}.items():
        if number is not None and number < 1:
            raise ValueError(f"build: {what} of {name} must be at least 1, got {number}")
    network, smallest = _NETWORKS[name]
    if size < smallest:
        raise ValueError(f"build: {name} needs images of at least {smallest}×{smallest} pixels, got size {size}")
    options = {"classes": classes, "channels": channels}
    if width is not None:
        options["width"] = width
    if network in (ViT, Mixer):  # the others average over any number of pixels
        options["size"] = size
    return network(**options)
