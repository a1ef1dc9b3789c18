"""EKFAC against the exact Fisher matrix: its diagonal in the eigenbasis, and never farther from it than K-FAC."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from fisher_blocks import dense, estimated, fisher, gap, inverse, made, normal

NETS = {
    "mlp": (lambda: nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)), (4,)),
    "tokens": (lambda: nn.Sequential(nn.Linear(3, 4), nn.GELU(), nn.Linear(4, 2), nn.Flatten(), nn.Tanh()), (3, 3)),
    "convolutions": (
        lambda: nn.Sequential(
            nn.Conv2d(2, 4, 3, padding=1), nn.ReLU(inplace=True), nn.Conv2d(4, 4, 2, stride=2, groups=2), nn.Flatten()
        ),
        (2, 4, 4),
    ),
    "one position": (lambda: nn.Sequential(nn.Conv1d(2, 3, 4), nn.Tanh(), nn.Flatten(), nn.Linear(3, 3)), (2, 4)),
}


class Words(nn.Module):
    """An embedding with padding, then a linear layer over the mean of what is left."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.head = nn.Embedding(5, 3, padding_idx=1), nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.table(x)).mean(1))


def pair(name: str, seed: int, sharing: str, empirical: bool) -> list[tuple]:
    """Of each layer K-FAC's matrix, EKFAC's, and the exact one; with the block and state of EKFAC."""
    if name == "words":
        model, x = made(Words, seed), torch.randint(5, (6, 4), generator=torch.Generator().manual_seed(seed))
    else:
        build, shape = NETS[name]
        model, x = made(build, seed), normal(6, *shape, seed=seed + 1)
    classes = model(x).shape[1]
    labels = torch.arange(6) % classes
    how = {"sharing": sharing, "labels": labels if empirical else None}
    kind = {"kind": "empirical" if empirical else "fisher", "labels": labels}
    kfac, ekfac = estimated(model, x, **how), estimated(model, x, **how, corrected=True)
    return [
        (dense(one, a), dense(other, b), fisher(model, x, one.params, **kind), other, b)
        for (one, a), (other, b) in zip(kfac, ekfac, strict=True)
    ]


@settings(max_examples=25, deadline=None, derandomize=True)
@given(st.sampled_from([*NETS, "words"]), st.integers(0, 99), st.sampled_from(["expand", "reduce"]), st.booleans())
def test_never_worse_than_kfac(name, seed, sharing, empirical):
    for kfac, ekfac, exact, *_ in pair(name, seed, sharing, empirical):
        assert gap(ekfac, exact) <= gap(kfac, exact) * (1 + 1e-9) + 1e-12


@pytest.mark.parametrize("empirical", [False, True])
@pytest.mark.parametrize("name", [*NETS, "words"])
def test_exact_diagonal_in_the_eigenbasis(name, empirical):
    worse = False
    for kfac, ekfac, exact, block, state in pair(name, 3, "expand", empirical):
        Q = basis(block, state)
        assert gap(Q.T @ ekfac @ Q, (Q.T @ exact @ Q).diag().diag()) < 1e-10
        worse = worse or gap(kfac, exact) > 1.01 * gap(ekfac, exact)
    assert worse


def basis(block, state) -> Tensor:
    """The eigenvectors of a block as columns."""
    if "A" in state and state["A"].ndim == 1:
        return torch.kron(torch.eye(len(state["A"]), dtype=torch.float64), state["QG"].contiguous())
    columns = []
    for k in range(block.groups):
        for u in state["QG"][k].T:
            for v in state["QA"][k].T:
                matrix = u.new_zeros(block.groups, *block.width[::-1])
                matrix[k] = torch.outer(u, v)
                columns.append(torch.cat([t.flatten() for t in block._tensors(matrix, block.params)]))
    return torch.stack(columns, 1)


@pytest.mark.parametrize("name", [*NETS, "words"])
def test_damping_is_that_of_the_matrix(name):
    for _, ekfac, _, block, state in pair(name, 3, "expand", False):
        for damping in (1e-3, 0.3):
            wanted = torch.linalg.inv(ekfac + damping * torch.eye(len(ekfac), dtype=torch.float64))
            assert gap(inverse(block, state, damping), wanted) < 1e-10


def test_refuses_factored_damping():
    model = made(NETS["mlp"][0])
    with pytest.raises(ValueError, match="EKFAC is no product"):
        estimated(model, normal(6, 4), corrected=True, form="factored")
