"""What the ranks run: a sharpness-aware method on a second-order base."""

from __future__ import annotations

import torch.distributed as dist
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

import nets
import steppe
from ddp_work import part, stream
from recipes_list import weights
from steppe import optim

STEPS = 4
BASES = {
    "adahessian": lambda params: optim.AdaHessian(params, lr=0.01, n=2),
    "kfac": lambda params: optim.NaturalGradient(params, 0.05, damping=0.1, draws=None, n=2, n_inverse=2),
    "newton": lambda params: optim.NewtonCG(params, lr=0.1, iterations=5),
}


def train(name: str, text: str, at: str, ascent: str, world: int = 1, rank: int = 0) -> list[Tensor]:
    """Weights and counts after a training on this rank's part of the data."""
    model, _ = nets.mlp()
    base = BASES[name](model.parameters())
    base.at = at
    opt = steppe.SharpnessAware(base, steppe.parse(text), ascent=ascent)
    network = DistributedDataParallel(model) if world > 1 else model
    for step in range(STEPS):
        opt.step(steppe.Batch(network, nets.losses, part(stream("mlp", step), rank, world)))
    return weights(model)


def together(name: str, text: str, at: str, ascent: str) -> list[Tensor]:
    """The same on a rank."""
    return train(name, text, at, ascent, dist.get_world_size(), dist.get_rank())
