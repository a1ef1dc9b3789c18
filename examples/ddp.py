"""ESAM on several ranks with DistributedDataParallel: trains a small net, and goes on from its checkpoint.

    torchrun --standalone --nproc-per-node 2 examples/ddp.py --epochs 4 --checkpoint run.pt

Each rank takes its part of every batch; ε is that of the whole batch, so the run is the same on 1 rank or 8. With
``ascent="local"`` each rank has its own ε, and pass one is not reduced: m-sharpness.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, TensorDataset
from torch.utils.data.distributed import DistributedSampler

import steppe


def losses(model: nn.Module, batch: Any) -> Tensor:
    """Loss of each example, shape (B,)."""
    x, y = batch
    return F.cross_entropy(model(x), y, reduction="none")


def examples(count: int, seed: int) -> TensorDataset:
    """Points in 10 dimensions, labelled by what a fixed random net says of them."""
    teacher = torch.Generator().manual_seed(0)
    first, second = torch.randn(10, 20, generator=teacher), torch.randn(20, 4, generator=teacher)
    x = torch.randn(count, 10, generator=torch.Generator().manual_seed(seed))
    return TensorDataset(x, ((x @ first).tanh() @ second).argmax(dim=1))


def save(path: Path, state: dict[str, Any]) -> None:
    """Write aside, then rename: whenever the job dies, the file is whole."""
    aside = path.with_suffix(".tmp")
    torch.save(state, aside)
    os.replace(aside, path)


def run(args: argparse.Namespace, device: torch.device) -> None:
    """Train on this rank's part of the examples."""
    rank, world = dist.get_rank(), dist.get_world_size()

    train, test = examples(2048, seed=1), examples(512, seed=2)
    sampler = DistributedSampler(train, seed=0)
    loader = DataLoader(train, batch_size=128 // world, sampler=sampler, drop_last=True)

    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(10, 64), nn.ReLU(), nn.Linear(64, 4)).to(device)
    network = DistributedDataParallel(model)
    base = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-4)
    steps = args.epochs * len(loader)
    opt = steppe.SharpnessAware(base, steppe.parse(args.method), ascent=args.ascent, total_steps=steps)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(opt, T_max=steps)

    begin = 0
    if args.checkpoint.exists():
        state = torch.load(args.checkpoint, map_location=device, weights_only=True)
        model.load_state_dict(state["model"])
        opt.load_state_dict(state["optimizer"])
        scheduler.load_state_dict(state["scheduler"])
        begin = state["epochs"]

    for epoch in range(begin, args.epochs):
        sampler.set_epoch(epoch)
        for x, y in loader:
            opt.step(steppe.Batch(network, losses, (x.to(device), y.to(device))))
            scheduler.step()
        if rank == 0:
            x, y = (t.to(device) for t in test.tensors)
            with torch.no_grad():
                accuracy = (model(x).argmax(dim=1) == y).float().mean()
            print(f"epoch {epoch + 1}: {accuracy:.1%} of the test examples are right", flush=True)
            parts = {"model": model, "optimizer": opt, "scheduler": scheduler}
            save(args.checkpoint, {**{name: part.state_dict() for name, part in parts.items()}, "epochs": epoch + 1})
        dist.barrier()


def main() -> None:
    """Read the command line, and train."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--method", default="esam(rho=0.1)", help="an expression, as in steppe.parse")
    parser.add_argument("--ascent", choices=["global", "local"], default="global")
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--checkpoint", type=Path, default=Path("ddp.pt"))
    args = parser.parse_args()

    gpu = torch.cuda.is_available()
    dist.init_process_group("nccl" if gpu else "gloo")
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if gpu else torch.device("cpu")
    if gpu:
        torch.cuda.set_device(device)
    run(args, device)
    dist.destroy_process_group()  # after run() has freed the network: see the page on training loops


if __name__ == "__main__":
    main()
