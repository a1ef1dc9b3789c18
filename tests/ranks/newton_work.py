"""What the ranks train with Newton's method."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

import nets
import steppe
from steppe.optim.newton import NewtonCG


def newton(method: str | None, steps: int, local: bool = False) -> Tensor:
    """The weights after some steps, each rank with its half of the data; alone with all of it."""
    model, (x, y) = nets.mlp()
    net, data = model, (x, y)
    if dist.is_initialized():
        net = DistributedDataParallel(model)
        data = (x[dist.get_rank() :: 2], y[dist.get_rank() :: 2])
    opt = NewtonCG(model.parameters())
    if method is not None:
        opt = steppe.SharpnessAware(opt, steppe.parse(method), ascent="local" if local else "global")
    for _ in range(steps):
        opt.step(steppe.Batch(net, nets.losses, data))
    return torch.cat([p.detach().reshape(-1) for p in model.parameters()])


def one_bad_rank() -> str:
    """The message on each rank, where only the first one's data have infinite curvature."""
    model, (x, y) = nets.mlp()

    def loss_fn(model, data):
        z = model(data[0])
        bent = (z - z.detach()).abs().pow(1.5 if dist.get_rank() == 0 else 2).sum(1)
        return bent + nets.losses(model, data)

    net = DistributedDataParallel(model)
    opt = NewtonCG(model.parameters(), curvature="hessian")
    before = torch.cat([p.detach().reshape(-1) for p in model.parameters()])
    try:
        opt.step(steppe.Batch(net, loss_fn, (x, y)))
    except ValueError as error:
        after = torch.cat([p.detach().reshape(-1) for p in model.parameters()])
        return str(error) if torch.equal(before, after) else "moved"
    return "no error"
