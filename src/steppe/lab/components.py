"""The components of the laboratory's networks, whose curvatures are held against each other."""

import re
from collections.abc import Iterable, Mapping, Sequence

from torch import nn

__all__ = ["components"]

STAGES = {"resnet18": 4, "resnet20": 3, "wrn-16-8": 3, "wrn-28-10": 3, "pyramidnet-110": 3}


def components(name: str, model: nn.Module) -> Mapping[str, str]:
    """Names of a network's components, each with a regular expression on the names of its parameters.

    Transformers and mixers are cut as in the table of Chen et al. 2022: the embedding, what mixes the patches, what
    mixes the channels, and single blocks. The others are cut into stem, stages and head.

    Args:
        name: of the network, see `steppe.lab.models.NAMES`.
        model: the network.

    Source: Chen, Hsieh & Gong 2022, "When vision transformers outperform ResNets without pre-training or strong data
        augmentations", table 3.
    """
    if name in ("vit", "mixer"):
        spatial = ("attention", r"(qkv|project)\.") if name == "vit" else ("token MLP", r"across_tokens\.")
        channel = ("MLP", r"mlp\.") if name == "vit" else ("channel MLP", r"across_channels\.")
        mixing = {label: rf"^blocks\.\d+\.{pattern}" for label, pattern in (spatial, channel)}
        depth = len(list(model.get_submodule("blocks").children()))
        single = {f"block {k}": rf"^blocks\.{k - 1}\." for k in (1, max(1, depth // 2), depth)}
        return {"embedding": r"^embed\.", **mixing, **single, "head": _any(["norm", "head"])}
    if name in STAGES:
        blocks = [f"blocks.{k}" for k in range(len(list(model.get_submodule("blocks").children())))]
        deep = len(blocks) // STAGES[name]
        stages = [blocks[start : start + deep] for start in range(0, len(blocks), deep)]
        stem, head = (
            (["stem", "norm"], ["head"])
            if name in ("resnet18", "resnet20")
            else (["stem", "stem_norm"], ["norm", "head"])
        )
        return {"stem": _any(stem), **_numbered("stage", stages), "head": _any(head)}
    if name == "vgg16":
        stages = _split(model.get_submodule("features"), nn.MaxPool2d, "features.")
        return {**_numbered("stage", stages), "head": _any(["head"])}
    *convolutions, last = _split(model, nn.ReLU, "")
    return {**_numbered("convolution", convolutions), "head": _any(last)}


def _numbered(label: str, parts: Iterable[Sequence[str]]) -> dict[str, str]:
    return {f"{label} {number}": _any(names) for number, names in enumerate(parts, 1)}


def _any(modules: Sequence[str]) -> str:
    """Regular expression for the parameters of any of the modules."""
    return rf"^({'|'.join(map(re.escape, modules))})\."


def _split(layers: nn.Module, end: type[nn.Module], prefix: str) -> list[list[str]]:
    """Names of the layers that have parameters, cut after each layer of the type `end`."""
    found: list[list[str]] = [[]]
    for name, layer in layers.named_children():
        found[-1] += [prefix + name] if list(layer.parameters()) else []
        found += [[]] if isinstance(layer, end) else []
    return [names for names in found if names]
