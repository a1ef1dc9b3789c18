"""Layers whose block of the Fisher matrix is known in a short form, and a look at what passes through them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor, nn
from torch.autograd.graph import get_gradient_edge
from torch.nn.utils import parametrize

from ..vec import Vec
from .blocks import Seen
from .eigen import EigenKronecker
from .embedding import EmbeddingBlock
from .kronecker import Form, Kronecker, Sharing
from .norm_blocks import NormBlock

LINEAR = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
NORMS = (nn.LayerNorm, nn.RMSNorm, nn.GroupNorm, nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
KNOWN: tuple[type[nn.Module], ...] = (*LINEAR, *NORMS, nn.Embedding)
KnownBlock: TypeAlias = Kronecker | NormBlock | EmbeddingBlock


def blocks(
    model: nn.Module,
    trainable: Vec,
    *,
    corrected: bool = False,
    sharing: Sharing = "expand",
    norms: Literal["diagonal", "full"] = "diagonal",
    form: Form = "tikhonov",
) -> tuple[list[KnownBlock], dict[str, str]]:
    """Return the blocks of the layers that are known, and why the other parameters have none.

    Known are linear layers, convolutions of 1 to 3 dimensions, embeddings, and layer, RMS, group and batch norms, and
    what derives from them without a forward pass of its own.

    Args:
        model: the network, maybe wrapped.
        trainable: the parameters wanted. Of a layer whose weight is frozen, or has no block, it is that of its bias.
        corrected: whether linear layers, convolutions and embeddings get EKFAC's blocks in place of K-FAC's.
        sharing: how the positions that share a weight are counted, see `Kronecker`.
        norms: of normalisation layers the ``"diagonal"`` of the block, or the ``"full"`` block.
        form: of the damping of K-FAC's blocks, see `Kronecker`.

    Returns:
        The blocks in the model's order, and for the name of every other parameter the reason, as a clause.
    """
    wanted, found, fallback = set(trainable), list[KnownBlock](), dict[str, str]()
    owners: dict[Tensor, list[str]] = {}
    for path, module in model.named_modules():
        for p in module._parameters.values():
            if p is not None:
                owners.setdefault(p, []).append(path or type(module).__name__)
    inside = _inside(model)
    for path, module in model.named_modules():
        own, name = {}, path or type(module).__name__
        for key, p in module._parameters.items():
            if p is None or p not in wanted:
                continue
            wanted.remove(p)  # those that are shared come again
            reason = inside.get(module) or _unknown(module, key, owners[p])
            if reason:
                fallback[f"{path}.{key}" if path else key] = reason
            else:
                own[key] = p
        if own and isinstance(module, nn.Embedding):
            found.append(EmbeddingBlock(module, name, corrected=corrected, form=form))
        elif own and isinstance(module, LINEAR):
            kind = EigenKronecker if corrected else Kronecker
            found.append(kind(module, name, own, sharing=sharing, form=form))
        elif own:
            found.append(NormBlock(module, name, own, full=norms == "full"))
    return found, fallback


@contextmanager
def capture(known: Sequence[KnownBlock], size: int) -> Iterator[list[Seen]]:
    """Note what the layers are given, and where the gradients of their outputs will be had, in a forward pass.

    To be left before any backward pass: checkpointed activations are computed anew there, and would be noted twice.

    Args:
        known: the blocks whose layers are watched.
        size: examples in the pass.

    Returns:
        What each block's layer saw, in the order of the blocks; gradients are for the caller to add.
    """
    seen = [Seen(size) for _ in known]
    handles = [
        block.layer.register_forward_hook(_noting(each), with_kwargs=True)
        for block, each in zip(known, seen, strict=True)
    ]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def _noting(seen: Seen) -> Any:
    def note(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> None:
        if torch.is_grad_enabled() and output.requires_grad:
            seen.inputs.append((args[0] if args else next(iter(kwargs.values()))).detach())
            # What changes a view in place, as ReLU may, takes it off the graph; what it is a view of stays there.
            base = output._base if output._is_view() else None
            whole = output if base is None or base.numel() != output.numel() else base
            seen.edges.append(get_gradient_edge(whole))

    return note


def _inside(model: nn.Module) -> dict[nn.Module, str]:
    """Return the modules whose own forward pass does not run, or not on the parameters as they are."""
    found: dict[nn.Module, str] = {}
    for module in model.modules():
        if isinstance(module, nn.MultiheadAttention):
            reason = "nn.MultiheadAttention does not show its matrix products"
            found.update(dict.fromkeys(module.modules(), reason))
        elif parametrize.is_parametrized(module):
            reason = f"{type(module).__name__.removeprefix('Parametrized')} is parametrized, and computes its weight"
            found.update(dict.fromkeys([module, *module.get_submodule("parametrizations").modules()], reason))
    return found


def _unknown(module: nn.Module, key: str, owners: list[str]) -> str:
    """Return why the parameter of a module has no block of the module's, or nothing."""
    kind = type(module).__name__
    base = next((each for each in KNOWN if isinstance(module, each)), None)
    if len(owners) > 1:
        return f"it is shared by {' and '.join(owners)}"
    if base is None:
        return f"{kind} is no layer that K-FAC knows"
    if any(getattr(type(module), f, None) is not getattr(base, f, None) for f in ("forward", "_conv_forward")):
        return f"{kind} has a forward pass of its own"
    if key not in ("weight", "bias") or not (isinstance(module, NORMS) or module._parameters.get("weight") is not None):
        return f"{kind} computes its weight"
    if isinstance(module, nn.Embedding) and (module.sparse or module.scale_grad_by_freq):
        return "the gradient of this nn.Embedding is sparse or scaled by frequency"
    return ""
