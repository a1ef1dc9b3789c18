"""What the ranks train: AdaHessian on a model in DDP, or on one process with all the data."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import nets
import steppe
from ddp_work import part, stream
from recipes_list import weights
from steppe.optim.adahessian import AdaHessian

STEPS = 6


class Forked(nn.Module):
    """A network whose second half each rank uses by its own data."""

    def __init__(self) -> None:
        super().__init__()
        self.net, _ = nets.mlp()
        self.other = nn.Linear(6, 3).double()

    def forward(self, x: Tensor) -> Tensor:
        out = self.net(x)
        return out + self.other(x) if float(x[0, 0]) > 0 else out


def everything(model: nn.Module, opt: AdaHessian) -> list[Tensor]:
    state = opt.state_dict()["state"]
    return [*weights(model), *[t.clone() for kept in state.values() for _, t in sorted(kept.items())]]


def alone(name: str, options: dict[str, Any]) -> list[Tensor]:
    """Weights and state of one process with all the data."""
    model = getattr(nets, name)()[0]
    opt = AdaHessian(model.parameters(), lr=0.01, **options)
    for step in range(STEPS):
        opt.step(steppe.Batch(model, nets.losses, stream(name, step)))
    return everything(model, opt)


def together(name: str, options: dict[str, Any], ddp: dict[str, Any], micro: int = 1) -> list[Tensor]:
    """Weights and state of a rank with its part."""
    model = getattr(nets, name)()[0]
    opt = AdaHessian(model.parameters(), lr=0.01, **options)
    network = DistributedDataParallel(model, **ddp)
    for step in range(STEPS):
        data = part(stream(name, step), dist.get_rank(), dist.get_world_size())
        opt.step(steppe.Batch(network, nets.losses, data, micro=micro))
    return everything(model, opt)


def estimates() -> list[Tensor]:
    """The diagonal over all ranks, and what the rank's own data alone say."""
    model, data = nets.mlp()
    mine = part(data, dist.get_rank(), dist.get_world_size())
    found = []
    for network in (DistributedDataParallel(model), model):
        opt = AdaHessian(model.parameters())
        with torch.no_grad():
            opt.backward(steppe.Batch(network, nets.losses, mine), None, reduce=False)
        found.append(torch.cat([opt._seen[p].reshape(-1) for p in model.parameters()]))
    return found


def forked(n: int) -> list[Tensor]:
    """Weights after steps in which a part of the model runs on some of the ranks only."""
    torch.manual_seed(0)
    model = Forked()
    opt = AdaHessian(model.parameters(), lr=0.01, n=n)
    network = DistributedDataParallel(model, find_unused_parameters=True)
    for step in range(STEPS):
        opt.step(steppe.Batch(network, nets.losses, part(stream("mlp", step), dist.get_rank(), 2)))
    return everything(model, opt)


def broken() -> list[str]:
    """What each rank says of a product that is not finite on one of them."""
    model, (x, y) = nets.mlp()
    network, opt = DistributedDataParallel(model), AdaHessian(model.parameters())
    before = weights(model)

    def loss_fn(model: nn.Module, batch: nets.Data) -> Tensor:
        losses = nets.losses(model, batch)
        rough = (losses - losses.detach()).abs().pow(1.5)  # its second derivative at 0 is infinite
        return losses + rough if dist.get_rank() == 1 else losses

    try:
        opt.step(steppe.Batch(network, loss_fn, part((x, y), dist.get_rank(), 2)))
    except ValueError as error:
        assert all(map(torch.equal, before, weights(model)))
        return [str(error)]
    return []
