"""What the tests of DDP run: a training on one process, and the same on the ranks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import nets
import steppe
from recipes_list import BASES, weights

STEPS = 20
NETS: dict[str, Callable[[], tuple[nn.Module, nets.Data]]] = {
    "mlp": nets.mlp,
    "convnet": nets.convnet,
    "transformer": nets.transformer,
}


def stream(name: str, step: int) -> nets.Data:
    """The examples of a step, other ones at every step."""
    _, (x, y) = NETS[name]()
    with torch.random.fork_rng():
        torch.manual_seed(step)
        return torch.randn_like(x), y[torch.randperm(len(y))]


def part(data: nets.Data, rank: int, world: int) -> nets.Data:
    """The rank's examples, consecutive ones."""
    x, y = data
    return x.chunk(world)[rank], y.chunk(world)[rank]


def wrap(model: nn.Module, text: str, **kwargs: Any) -> steppe.SharpnessAware:
    return steppe.SharpnessAware(BASES["sgd"](model.parameters()), steppe.parse(text), total_steps=STEPS, **kwargs)


def batches(opt: steppe.SharpnessAware, make: Callable[[nets.Data], Any], name: str, step: int) -> tuple[Any, Any]:
    """The batch of a step, and the second one where the method takes one."""
    second = make(stream(name, step + 1000)) if opt.method.needs_second else None
    return make(stream(name, step)), second


def alone(text: str, name: str = "mlp", **kwargs: Any) -> list[Tensor]:
    """Weights after a training on one process."""
    model, _ = NETS[name]()
    opt = wrap(model, text, **kwargs)
    for step in range(STEPS):
        opt.step(*batches(opt, lambda data: steppe.Batch(model, nets.losses, data), name, step))
    return weights(model)


def together(
    text: str, name: str = "mlp", ascent: str = "global", micro: int = 1, ddp: dict[str, Any] | None = None
) -> list[Tensor]:
    """Weights after a training on the ranks, each with its part of every batch."""
    model, _ = NETS[name]()
    opt = wrap(model, text, ascent=ascent)
    network = DistributedDataParallel(model, **(ddp or {}))

    def make(data: nets.Data) -> steppe.Batch:
        return steppe.Batch(network, nets.losses, part(data, dist.get_rank(), dist.get_world_size()), micro=micro)

    for step in range(STEPS):
        opt.step(*batches(opt, make, name, step))
    return weights(model)


def assert_close(a: list[Tensor], b: list[Tensor]) -> None:
    for p, q in zip(a, b, strict=True):
        torch.testing.assert_close(p, q, rtol=0, atol=1e-9)
