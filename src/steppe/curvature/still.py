"""A model held still while it is measured."""

from __future__ import annotations

import sys
from collections.abc import Collection, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from .. import caches, norms, rng
from . import heap

Mode: TypeAlias = Literal["eval", "train"]


@contextmanager
def still(model: nn.Module, chosen: Collection[Tensor], mode: Mode) -> Iterator[None]:
    """Run a model such that its loss can be differentiated twice, and leave no trace in it.

    Fused attention has no double backward, and compiled graphs have none: the math kernel runs instead, in eager mode.
    Afterwards the mode of each layer, the buffers, the embeddings that a forward pass renormalises (``max_norm``), what
    requires a gradient, and the global random generators are as they were found, on an exception too. ``.grad`` is
    never touched.

    Args:
        model: the network.
        chosen: its parameters to be differentiated; no other requires a gradient inside.
        mode: ``"eval"``; or ``"train"``, in which normalisation layers use the batch and hold their statistics.
    """
    heap.widen()
    wanted = set(chosen)
    modes = [(module, module.training) for module in model.modules()]
    gradients = [(p, p.requires_grad) for p in model.parameters()]
    buffers = [
        (module, name, buffer, buffer.detach().clone())
        for module in model.modules()
        for name, buffer in module._buffers.items()
        if buffer is not None
    ]
    tables: list[Any] = [m.weight for m in model.modules() if getattr(m, "max_norm", None) is not None]
    before = [table.detach().clone() for table in tables]
    try:
        with ExitStack() as stack:
            stack.enter_context(rng.kept({p.device for p in model.parameters()}))
            stack.enter_context(caches.forgotten())
            if "torch._dynamo" in sys.modules:  # else nothing was compiled, and importing it takes a second
                stack.enter_context(torch.compiler.set_stance("force_eager"))
            stack.enter_context(sdpa_kernel(SDPBackend.MATH))
            model.train(mode == "train")
            if mode == "train":
                stack.enter_context(norms.held(model))
            for p, _ in gradients:
                p.requires_grad_(p in wanted)
            yield
    finally:
        for module, training in modes:
            module.training = training
        for p, required in gradients:
            p.requires_grad_(required)
        with torch.no_grad():
            for table, content in zip(tables, before, strict=True):
                table.copy_(content)
            for module, name, buffer, content in buffers:
                if not torch.equal(buffer, content):
                    buffer.copy_(content)
                module._buffers[name] = buffer
