"""What the ranks of a natural gradient run: a training, what is drawn, who inverts what, and failures."""

from __future__ import annotations

import warnings
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

import nets
import steppe
from ddp_work import NETS, part, stream
from steppe.optim import NaturalGradient
from steppe.ranks import Ranks

STEPS = 6


def made(name: str, fisher: str, **how: Any) -> tuple[Any, NaturalGradient]:
    warnings.simplefilter("ignore", UserWarning)  # of parameters that K-FAC does not know
    model, _ = NETS[name]()
    how = {"damping": 0.1, "n": 2, "n_inverse": 4, "draws": None, **how}
    return model, NaturalGradient(model.parameters(), 0.05, fisher=fisher, **how)


def run(model: Any, network: Any, opt: Any, name: str, world: int = 1, rank: int = 0, **how: Any) -> list[Tensor]:
    """Weights after a training."""
    for step in range(STEPS):
        opt.step(steppe.Batch(network, nets.losses, part(stream(name, step), rank, world), **how))
    return [t.detach().clone() for t in model.state_dict().values()]


def alone(name: str, fisher: str, method: str | None, **how: Any) -> list[Tensor]:
    model, opt = made(name, fisher, **how)
    return run(model, model, opt if method is None else steppe.SharpnessAware(opt, steppe.parse(method)), name)


def together(name: str, fisher: str, method: str | None, how: dict[str, Any]) -> list[Tensor]:
    """The weights, and after them all of the state, on this rank."""
    micro = how.pop("micro", 1)
    model, base = made(name, fisher, **how)
    opt = base if method is None else steppe.SharpnessAware(base, steppe.parse(method))
    network = DistributedDataParallel(model)
    found = run(model, network, opt, name, dist.get_world_size(), dist.get_rank(), micro=micro)
    return [*found, *(t for kept in base.state.values() for _, t in sorted(kept.items()))]


def drawn(fisher: str) -> list[Tensor]:
    """A look at the same examples on all ranks: before the mean over them, and after it."""
    model, (x, y) = nets.mlp()
    opt = NaturalGradient(model.parameters(), 0.0, fisher=fisher)
    batch = steppe.Batch(DistributedDataParallel(model), nets.losses, (x[:4], y[:4]))
    opt.backward(batch, None)
    mine = [t.clone() for estimate in opt._found._estimates for t in estimate.values()]
    opt.update()
    return [torch.cat([t.reshape(-1) for t in mine]), *(t for kept in opt.state.values() for t in kept.values())]


def shared_out() -> Any:
    """Who runs which of five jobs, what comes of them, and what everyone hears of one that fails."""
    ranks, run = Ranks(DistributedDataParallel(torch.nn.Linear(1, 1))), []

    def job(i: int, price: float) -> Any:
        def work() -> dict[str, Tensor]:
            run.append(i)
            return {"rank": torch.tensor([dist.get_rank()]), "square": torch.full((i, 2), float(i**2)).T}

        return price, torch.device("cpu"), work

    found = ranks.share_out([job(i, price) for i, price in enumerate([1.0, 1.0, 5.0, 1.0, 2.0])])
    mine = sorted(run)

    def fail() -> dict[str, Tensor]:
        raise ValueError("the factor of layer 7 is singular")

    try:
        ranks.share_out([(1.0, torch.device("cpu"), fail), job(1, 2.0)])
    except ValueError as error:
        return mine, found, str(error)
    return None


def not_finite(fisher: str) -> tuple[str, bool]:
    """One rank has a loss that is not a number; both say so, and go on."""
    model, opt = made("mlp", fisher)
    network = DistributedDataParallel(model)
    x, y = part(stream("mlp", 0), dist.get_rank(), 2)
    opt.step(steppe.Batch(network, nets.losses, (x, y)))
    before = [p.detach().clone() for p in model.parameters()]
    said = ""
    for _ in range(2):
        try:
            opt.step(steppe.Batch(network, nets.losses, (x * (float("nan") if dist.get_rank() else 1.0), y)))
        except ValueError as error:
            said = str(error)
    same = all(map(torch.equal, before, model.parameters()))
    opt.step(steppe.Batch(network, nets.losses, (x, y)))
    return said, same
