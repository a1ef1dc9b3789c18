"""Blocks of normalisation layers and embeddings against the exact Fisher matrix."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from fisher_blocks import dense, estimated, fisher, gap, inverse, look, made, normal

NORMS = {
    "layer": (lambda: nn.LayerNorm(4), (3, 4)),
    "layer of one token": (lambda: nn.LayerNorm(4), (4,)),
    "layer over two dimensions": (lambda: nn.LayerNorm((3, 4), eps=0.1), (2, 3, 4)),
    "layer without bias": (lambda: nn.LayerNorm(4, bias=False), (3, 4)),
    "rms": (lambda: nn.RMSNorm(4), (3, 4)),
    "group": (lambda: nn.GroupNorm(2, 4), (4, 3, 2)),
    "group of vectors": (lambda: nn.GroupNorm(2, 4), (4,)),
    "batch 1d": (lambda: nn.BatchNorm1d(4), (4,)),
    "batch 1d with positions": (lambda: nn.BatchNorm1d(4), (4, 3)),
    "batch 2d": (lambda: nn.BatchNorm2d(3), (3, 2, 3)),
    "batch 3d": (lambda: nn.BatchNorm3d(2), (2, 2, 1, 3)),
}


def network(name: str) -> tuple[nn.Module, Tensor]:
    """A norm layer between two linear ones, in eval mode, its weight, bias and statistics not those it began with."""
    build, shape = NORMS[name]
    width = int(torch.Size(shape).numel())
    model = made(
        lambda: nn.Sequential(
            nn.Flatten(), nn.Linear(width, width), nn.Unflatten(1, shape), build(), nn.ReLU(inplace=True), nn.Flatten()
        ).append(nn.Linear(width, 3))
    )
    norm = model[3]
    with torch.no_grad():
        for i, t in enumerate([*norm.parameters(), *(b for b in norm.buffers() if b.is_floating_point())]):
            t.copy_(1 + 0.5 * normal(*t.shape, seed=i).tanh())
    return model.eval(), normal(6, *shape)


@pytest.mark.parametrize("name", NORMS)
def test_full_and_diagonal_block(name):
    model, x = network(name)
    (block, state), (diagonal, other) = (estimated(model, x, norms=norms)[1] for norms in ("full", "diagonal"))
    exact = fisher(model, x, block.params)
    assert gap(dense(block, state), exact) < 1e-10
    assert gap(dense(diagonal, other), exact.diag().diag()) < 1e-10
    for damping in (1e-3, 0.3):
        identity = torch.eye(len(exact), dtype=torch.float64)
        assert gap(inverse(block, state, damping), torch.linalg.inv(exact + damping * identity)) < 1e-10
        assert (
            gap(inverse(diagonal, other, damping), torch.linalg.inv(exact.diag().diag() + damping * identity)) < 1e-10
        )


def test_batch_norm_in_train_mode_where_examples_do_not_meet_again():
    """The last layers see each example by itself, so the block is exact: no further statistics link them."""
    model, x = network("batch 2d")
    (block, state) = estimated(model.train(), x, norms="full")[1]
    assert gap(dense(block, state), fisher(model, x, block.params)) < 1e-10
    before = copy.deepcopy(model.state_dict())
    block.estimate(look(model, x, [block])[0])
    after = model.state_dict()
    moved = [key for key in before if not torch.equal(before[key], after[key])]
    assert moved == ["3.running_mean", "3.running_var", "3.num_batches_tracked"]  # by the model's own pass
    assert int(after["3.num_batches_tracked"]) == int(before["3.num_batches_tracked"]) + 1


def test_a_layer_called_twice():
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.inner, self.head = nn.LayerNorm(4), nn.Linear(4, 4), nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.norm(torch.tanh(self.inner(self.norm(x))).mean(1)))

    model, x = made(Twice), normal(5, 3, 4)
    block, state = estimated(model, x, norms="full")[0]
    assert gap(dense(block, state), fisher(model, x, block.params)) < 1e-10


def test_frozen_weight():
    model, x = network("group")
    model[3].weight.requires_grad_(False)
    block, state = estimated(model, x, norms="full")[1]
    assert [p is model[3].bias for p in block.params] == [True]
    assert gap(dense(block, state), fisher(model, x, block.params)) < 1e-10


class Words(nn.Module):
    """An embedding of single words, that are means themselves or go on into a linear layer."""

    def __init__(self, head: bool, padding: int | None = None) -> None:
        super().__init__()
        self.table = nn.Embedding(5, 3, padding_idx=padding)
        self.head = nn.Linear(3, 3) if head else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.table(x))


@pytest.mark.parametrize("corrected", [False, True])
@pytest.mark.parametrize("padding", [None, 2])
@pytest.mark.parametrize("head", [False, True])
def test_embedding_where_exact(head, padding, corrected):
    """Slopes of a linear network with Gaussian likelihood do not depend on the word."""
    model = made(lambda: Words(head, padding))
    for words in ([0, 1, 1, 4, 2, 0], [3], [2, 2, 1]):
        x = torch.tensor(words)
        block, state = estimated(model, x, likelihood="gaussian", corrected=corrected)[0]
        exact = fisher(model, x, block.params, likelihood="gaussian")
        if padding is not None:  # G is over the words that train something, and so is A
            assert not exact[6:9].any()
        assert gap(dense(block, state), exact) < 1e-12


@pytest.mark.parametrize("form", ["tikhonov", "factored"])
def test_damped_embedding(form):
    model, x = made(lambda: Words(True, 2)), torch.tensor([0, 1, 1, 4, 2, 0])
    block, state = estimated(model, x, damping=0.1, form=form)[0]
    A, G, one = state["A"], state["G"], torch.eye(5, dtype=torch.float64)
    if form == "tikhonov":
        wanted = torch.linalg.inv(torch.kron(A.diag(), G) + 0.1 * torch.eye(15, dtype=torch.float64))
    else:
        pi = (A.mean() / G.diag().mean()).sqrt()
        right = G + 0.1**0.5 / pi * one[:3, :3]
        wanted = torch.kron(torch.linalg.inv(A.diag() + pi * 0.1**0.5 * one), torch.linalg.inv(right))
    assert gap(inverse(block, state, 0.1), wanted) < 1e-10


def test_embedding_of_positions_that_all_examples_share():
    """Look-ups are counted once for all examples, and the mean over them still has the right size."""

    class Places(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.places = nn.Embedding(4, 3)

        def forward(self, x: Tensor) -> Tensor:
            return (x + self.places(torch.tensor([[2, 0]]))).flatten(1)

    model, x = made(Places), normal(6, 2, 3)
    ((_, state),) = estimated(model, x, likelihood="gaussian")
    assert torch.equal(state["A"], torch.tensor([0.5, 0, 0.5, 0], dtype=torch.float64))
    assert state["G"].shape == (3, 3)
