"""Four diagonals of a small network: Fisher, empirical Fisher, Hessian, and the second moments that Adam keeps.

    python docs/second_order/adam.py [--out docs/pictures]

They are those of the mean loss over all examples, at two places: where training begins, and after 40 steps of Newton's
method. Adam does not move the weights here (lr = 0) and hardly forgets; it sees the examples epoch by epoch, in batches
of b = 1 and of b = 20. With g the gradient of all N examples and F̃ the empirical Fisher's diagonal, its v should be
``g² + (F̃ − g²)/b · (N − b)/(N − 1)``, which is F̃ for b = 1.
"""

from __future__ import annotations

from pathlib import Path

import torch
from drawing import figure, run
from kfac import Data, losses, trained
from torch import Tensor, nn

import steppe
from steppe.curvature import Objective, Operator
from steppe.optim import AdaHessian, NewtonCG

SIZES, DRAWS, FORGETTING = (1, 20), 200, 1e-6
STEPS = 40


def diagonals(model: nn.Module, data: Data) -> dict[str, Tensor]:
    """Return the diagonals of three matrices."""
    objective = Objective(model, losses, [data])
    eye = torch.eye(objective.size, dtype=torch.float64)
    kinds = {"Fisher": "fisher", "empirical Fisher": "empirical", "Hessian": "hessian"}
    return {name: (Operator(objective, kind) @ eye).diagonal() for name, kind in kinds.items()}


def adam(model: nn.Module, data: Data, size: int) -> Tensor:
    """Return Adam's second moments, corrected as it corrects them: the mean of squared gradients of mini-batches."""
    opt = torch.optim.Adam(model.parameters(), lr=0.0, betas=(0.9, 1 - FORGETTING))
    generator, count = torch.Generator().manual_seed(0), len(data[1])
    epochs = [torch.randperm(count, generator=generator) for _ in range(DRAWS * size // count)]
    for rows in torch.cat(epochs).split(size):
        opt.zero_grad()
        losses(model, (data[0][rows], data[1][rows])).mean().backward()
        opt.step()
    v = torch.cat([opt.state[p]["exp_avg_sq"].flatten() for p in model.parameters()])
    return v / (1 - (1 - FORGETTING) ** DRAWS)


def adahessian(model: nn.Module, data: Data) -> Tensor:
    """Return AdaHessian's root mean square of the diagonal, from 100 probes."""
    opt = AdaHessian(model.parameters(), lr=0.0, betas=(0.0, 0.0), probes=100)
    opt.step(steppe.Batch(model, losses, data))
    return torch.cat([opt.state[p]["exp_diagonal_sq"].flatten() for p in model.parameters()]).sqrt()


def alike(u: Tensor, v: Tensor) -> float:
    """Return the rank correlation of two diagonals."""
    ranks = torch.stack([t.argsort().argsort().double() for t in (u, v)])
    return float(torch.corrcoef(ranks)[0, 1])


def main(out: Path) -> None:
    """Draw the diagonals against the Fisher's, and print how they compare."""
    drawn, panes = figure(2)
    marks = {"empirical Fisher": {"marker": "o", "fillstyle": "none", "color": "k"}}
    model, data = trained(0)
    for axes, place in zip(panes, ("at the start", "trained"), strict=True):
        if place == "trained":
            opt = NewtonCG(model.parameters())
            for _ in range(STEPS):
                opt.step(steppe.Batch(model, losses, data))
        found = diagonals(model, data)
        g2 = Objective(model, losses, [data]).gradient().square()
        for size in SIZES:
            v = adam(model, data, size)
            count = len(data[1])
            wanted = g2 + (found["empirical Fisher"] - g2) / size * (count - size) / (count - 1)
            off = float((v - wanted).norm() / wanted.norm())
            print(f"{place}: Adam's v, batches of {size}: relative error of the formula {off:.4f}")
            found[f"Adam's v, batches of {size}"] = v
        found["AdaHessian's"] = adahessian(model, data)
        for name, values in found.items():
            if name != "Fisher":
                print(f"{place}: {name}: {float(values.sum() / found['Fisher'].sum()):.4f} of the Fisher's sum, "
                      f"rank correlation with it {alike(values.abs(), found['Fisher']):.2f}, "
                      f"with the Hessian's {alike(values.abs(), found['Hessian'].abs()):.2f}")  # fmt: skip
                mark = marks.get(name, {"marker": "."})
                axes.loglog(found["Fisher"], values.abs(), linestyle="none", label=name, alpha=0.6, **mark)
        ends = [float(found["Fisher"].min()), float(found["Fisher"].max())]
        axes.loglog(ends, ends, color="0.6")
        axes.set(title=place, xlabel="Fisher", ylabel="entry of the diagonal, absolute")
    panes[0].legend(fontsize="x-small")
    drawn.savefig(out / "adam.png")


if __name__ == "__main__":
    run(main, __doc__)
