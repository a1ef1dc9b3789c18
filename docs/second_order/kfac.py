"""One block of the Fisher matrix of a small trained network, exactly and as K-FAC and EKFAC have it, with the inverses.

    python docs/second_order/kfac.py [--out docs/pictures]

The network is 4 - 6 - 5 - 3 with tanh, the block that of its middle layer, weight and bias together. All matrices are
exact expectations over the labels of the model. Errors are in the Frobenius norm, relative to the exact matrix.
"""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F
from drawing import figure, run
from torch import Tensor, nn

import steppe
from steppe.curvature import Objective, Operator
from steppe.optim import NaturalGradient, NewtonCG

DAMPING = 1e-2
EXAMPLES, STEPS = 200, 15
LAYER = 2
Data = tuple[Tensor, Tensor]


def losses(model: nn.Module, data: Data) -> Tensor:
    """Return the cross entropy of each example."""
    return F.cross_entropy(model(data[0]), data[1], reduction="none")


def trained(steps: int = STEPS) -> tuple[nn.Sequential, Data]:
    """Return the network after some steps of Newton's method, and its data: three clouds that overlap."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        labels = torch.arange(EXAMPLES) % 3
        x = torch.randn(EXAMPLES, 4).double() + 1.5 * torch.randn(3, 4).double()[labels]
        model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3)).double()
    opt = NewtonCG(model.parameters())
    for _ in range(steps):
        opt.step(steppe.Batch(model, losses, (x, labels)))
    return model, (x, labels)


def exact(model: nn.Sequential, data: Data) -> Tensor:
    """Return the block of the layer over ``[W, bias]``, row by row as K-FAC's."""
    layer = model[LAYER]
    operator = Operator(Objective(model, losses, [data], params=layer), "fisher")
    matrix = operator @ torch.eye(operator.size, dtype=torch.float64)
    rows, columns = layer.weight.shape
    places = torch.arange(rows * columns).reshape(rows, columns)
    bias = rows * columns + torch.arange(rows)
    order = torch.cat([places, bias[:, None]], dim=1).flatten()
    return matrix[order][:, order]


def approximations(model: nn.Sequential, data: Data) -> dict[str, Tensor]:
    """Return K-FAC's and EKFAC's block, from the states of two optimizers."""
    found = {}
    for fisher in ("kfac", "ekfac"):
        opt = NaturalGradient(model.parameters(), lr=0.0, fisher=fisher, damping=DAMPING, draws=None)
        opt.step(steppe.Batch(model, losses, data))
        state = opt.state[model[LAYER].weight]
        if fisher == "kfac":
            found["K-FAC"] = torch.kron(state["G"][0], state["A"][0])
        else:
            basis = torch.kron(state["QG"][0], state["QA"][0])
            found["EKFAC"] = (basis * state["moments"].flatten()) @ basis.T
    return found


def main(out: Path) -> None:
    """Draw the matrices and their damped inverses, and print the errors."""
    model, data = trained()
    right = float((model(data[0]).argmax(1) == data[1]).double().mean())
    print(f"the network has learnt {100 * right:.0f} % of its {EXAMPLES} examples")
    matrices = {"exact": exact(model, data), **approximations(model, data)}
    matrices["diagonal"] = matrices["exact"].diagonal().diag()
    eye = torch.eye(len(matrices["exact"]), dtype=torch.float64)
    drawn, panes = figure(len(matrices), 3.2, 6.6)
    for axes in panes:
        axes.remove()
    panes = drawn.subplots(2, len(matrices))
    for column, (name, matrix) in enumerate(matrices.items()):
        for row, (what, wanted, found) in enumerate(
            [
                ("F", matrices["exact"], matrix),
                (
                    "(F + λI)⁻¹",
                    torch.linalg.inv(matrices["exact"] + DAMPING * eye),
                    torch.linalg.inv(matrix + DAMPING * eye),
                ),
            ]
        ):
            error = float((found - wanted).norm() / wanted.norm())
            if name != "exact":
                print(f"{what}, {name}: relative error {error:.4f}")
            top = float(wanted.abs().max()) ** 0.5
            axes = panes[row][column]
            axes.imshow((found.sign() * found.abs().sqrt()).numpy(), cmap="RdBu_r", vmin=-top, vmax=top)
            axes.set(title=f"{what}, {name}" + (f": {error:.2f}" if name != "exact" else ""), xticks=[], yticks=[])
    drawn.savefig(out / "kfac.png")


if __name__ == "__main__":
    run(main, __doc__)
