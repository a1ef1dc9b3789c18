"""Trains a small network with ESAM in Accelerate's loop, in micro-batches; alone or by ``accelerate launch``.

python examples/accelerate_loop.py
"""

from __future__ import annotations

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import steppe
from steppe.integrations.accelerate import AcceleratedSharpnessAware

TOKENS, LENGTH, CLASSES = 32, 10, 4


def texts(count: int, seed: int) -> TensorDataset:
    """Return random tokens; the class of a text is the remainder that most of its tokens have."""
    tokens = torch.randint(TOKENS, (count, LENGTH), generator=torch.Generator().manual_seed(seed))
    return TensorDataset(tokens, F.one_hot(tokens % CLASSES, CLASSES).sum(dim=1).argmax(dim=1))


def loss_fn(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    """Return the cross entropy of each example, shape (B,)."""
    tokens, labels = batch
    return F.cross_entropy(model(tokens), labels, reduction="none")


def main() -> None:
    """Train for 4 epochs and print the accuracy."""
    torch.manual_seed(0)
    accelerator = Accelerator(gradient_accumulation_steps=4, mixed_precision="bf16")
    model = nn.Sequential(nn.EmbeddingBag(TOKENS, 32), nn.GELU(), nn.Linear(32, CLASSES))
    base = torch.optim.AdamW(model.parameters(), lr=0.02)
    sharp = steppe.SharpnessAware(base, steppe.esam(rho=0.05), clip=1.0)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(base, T_max=128)
    model, opt, loader, scheduler = accelerator.prepare(
        model,
        AcceleratedSharpnessAware(sharp, accelerator),
        DataLoader(texts(2048, seed=0), batch_size=16, shuffle=True),
        scheduler,
    )
    for _ in range(4):
        for batch in loader:
            with accelerator.accumulate(model):
                opt.step(steppe.Batch(model, loss_fn, batch))
                scheduler.step()
    model.eval()
    tokens, labels = (t.to(accelerator.device) for t in texts(512, seed=1).tensors)
    with torch.no_grad():
        accuracy = (model(tokens).argmax(dim=1) == labels).float().mean()
    accelerator.print(
        f"{sharp.stats.steps} steps of {sharp.stats.propagations:.2f} propagations, accuracy {accuracy:.3f}"
    )


if __name__ == "__main__":
    main()
