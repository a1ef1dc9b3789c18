"""K-FAC against the exact Fisher matrix, plain formulas and dense inverses."""

from __future__ import annotations

import math
from itertools import product

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fisher_blocks import dense, estimated, fisher, gap, look, made, normal
from steppe.optim.layers import blocks


def two_layers() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))


class Tokens(nn.Module):
    """Linear layers on several tokens, in part called twice, with a ReLU in place, then a mean."""

    def __init__(self, bias: bool = True) -> None:
        super().__init__()
        self.inner, self.again, self.head = nn.Linear(4, 5, bias=bias), nn.Linear(5, 5, bias=bias), nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.inner(x), inplace=True)
        x = torch.tanh(self.again(x))
        return self.head(self.again(x).mean(1))


def test_one_layer_is_exact_where_the_likelihood_is_gaussian():
    model = made(lambda: nn.Linear(4, 3))
    for n in (2, 7):
        ((block, state),) = estimated(model, normal(n, 4), likelihood="gaussian")
        exact = fisher(model, normal(n, 4), block.params, likelihood="gaussian")
        assert gap(dense(block, state), exact) < 1e-12


def test_one_layer_of_normal_inputs_in_the_limit_of_many():
    """With a label drawn for each input the error falls as 1/√N."""
    model, errors = made(lambda: nn.Linear(4, 3)), []
    known, _ = blocks(model, list(model.parameters()))
    limit = torch.eye(15, dtype=torch.float64)  # inputs and a 1 for the bias, of second moment 1, times slopes of such
    for n in (200, 20_000):
        squares = []
        for seed in range(12):
            (seen,) = look(model, normal(n, 4, seed=seed), known, likelihood="gaussian")
            seen.gradients = [[normal(n, 3, seed=seed + 100)]]
            state = known[0].estimate(seen)
            state |= known[0].invert(state, 1e-2)
            squares.append((dense(known[0], state) - limit).square().sum())
        errors.append(float(sum(squares) / 12) ** 0.5)
    assert 7 < errors[0] / errors[1] < 14


@pytest.mark.parametrize("bias", [True, False])
def test_deep_linear_networks_with_gaussian_likelihood(bias):
    """Gradients of the outputs are the same for all inputs, so the product of the expectations is that of products."""
    layers = [nn.Linear(4, 5, bias=bias), nn.Linear(5, 2, bias=bias), nn.Linear(2, 3, bias=bias)]
    model = made(lambda: nn.Sequential(*layers))
    for block, state in estimated(model, normal(6, 4), likelihood="gaussian"):
        exact = fisher(model, normal(6, 4), block.params, likelihood="gaussian")
        assert gap(dense(block, state), exact) < 1e-12


def test_one_example():
    """Of one example and one class of labels the block is a product."""
    model = made(two_layers)
    for block, state in estimated(model, normal(1, 4)):
        assert gap(dense(block, state), fisher(model, normal(1, 4), block.params)) < 1e-12


def test_not_exact_for_categorical_outputs():
    """That the tests above could fail."""
    model = made(two_layers)
    (block, state), _ = estimated(model, normal(6, 4))
    assert 1e-3 < gap(dense(block, state), fisher(model, normal(6, 4), block.params)) < 1


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("sharing", ["expand", "reduce"])
def test_shared_positions_by_plain_loops(sharing, bias):
    """Tokens, a layer called twice, and a ReLU in place on what may be a view of the layer's output."""
    model, x = made(lambda: Tokens(bias)), normal(6, 3, 4)
    given, slopes = plain(model, x)
    for block, state in estimated(model, x, sharing=sharing):
        A = G = 0
        for n in range(6):
            a, gs = given[block.name][n], slopes[block.name]
            a = torch.cat([a, a.new_ones(len(a), 1)], 1) if len(block.params) > 1 else a
            if sharing == "reduce":
                a = a.mean(0, keepdim=True)
            A = A + a.T @ a / len(a) / 6
            for each in gs:
                g = each[n].sum(0, keepdim=True) if sharing == "reduce" else each[n]
                G = G + g.T @ g / 6
        assert gap(state["A"][0], A) < 1e-12, block.name
        assert gap(state["G"][0], G) < 1e-12, block.name


def plain(model: Tokens, x: Tensor) -> tuple[dict, dict]:
    """Of each layer the inputs (examples, positions, in), and for each class the gradients of the outputs."""
    a = x
    h = model.inner(a)
    h.retain_grad()
    b = h.clamp_min(0)
    c = model.again(b)
    c.retain_grad()
    d = torch.tanh(c)
    e = model.again(d)
    e.retain_grad()
    f = e.mean(1)
    z = model.head(f)
    z.retain_grad()
    given = {"inner": a, "again": torch.cat([b, d], 1).detach(), "head": f.detach()[:, None]}
    slopes = {name: [] for name in given}
    p = z.detach().softmax(1)
    for k in range(3):
        for t in (h, c, e, z):
            t.grad = None
        (p[:, k].sqrt() * z.log_softmax(1)[:, k]).sum().backward(retain_graph=True)
        slopes["inner"].append(h.grad)
        slopes["again"].append(torch.cat([c.grad, e.grad], 1))
        slopes["head"].append(z.grad[:, None])
    return given, slopes


def test_layers_without_a_gradient_and_dead_ones():
    """A layer that is not called, one whose output is not used, one whose output is constant."""

    class Partly(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.idle, self.unused, self.dead, self.head = (nn.Linear(4, 4) for _ in range(4))

        def forward(self, x: Tensor) -> Tensor:
            self.unused(x)
            return self.head(x + 0 * self.dead(x))

    found = {b.name: (b, s) for b, s in estimated(made(Partly), normal(5, 4), form="factored", damping=0.25)}
    for name in ("idle", "unused", "dead"):
        block, state = found[name]
        assert not state["G"].any()
        g = [normal(*p.shape) for p in block.params]
        assert all(t.isfinite().all() for t in block.solve(state, g, 0.25))
    assert found["head"][1]["G"].any()


def test_frozen_weight_leaves_the_block_of_the_bias():
    model = made(two_layers)
    model[0].weight.requires_grad_(False)
    block, state = estimated(model, normal(6, 4))[0]
    assert [p.shape for p in block.params] == [(5,)]
    assert gap(dense(block, state), fisher(model, normal(6, 4), block.params)) < 1e-12


def test_positions_that_all_examples_share():
    """A layer that sees no example: its gradient is the sum over them, and unbiased where labels are drawn."""

    class Places(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.places, self.head = nn.Linear(2, 3, bias=False), nn.Linear(3, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(x * self.places(normal(1, 2, seed=3)))

    model, x = made(Places), normal(3, 3)
    known, _ = blocks(model, [model.places.weight], corrected=True)
    log_p, basis = model(x).detach().log_softmax(1), [torch.eye(n, dtype=torch.float64)[None] for n in (2, 3)]
    G = moments = 0.0
    for labels in product(range(3), repeat=3):  # all that can be drawn
        (seen,) = look(model, x, known, labels=torch.tensor(labels))
        chance = sum(log_p[n, label] for n, label in enumerate(labels)).exp()
        G = G + chance * known[0].estimate(seen)["G"][0]
        moments = moments + chance * known[0].rescale(seen, {"QA": basis[0], "QG": basis[1]})["moments"]
    exact, a = fisher(model, x, [model.places.weight]), normal(1, 2, seed=3)
    assert gap(torch.kron(G, a.T @ a), exact) < 1e-12
    assert gap(moments.flatten(), exact.diag()) < 1e-12


@pytest.mark.parametrize("corrected", [False, True])
def test_bf16(corrected):
    """Factors are float32 under autocast and of bf16 weights, and near those of float32."""
    model, x = made(lambda: Tokens()).float(), normal(6, 3, 4).float()
    wanted = estimated(model, x, corrected=corrected)
    with torch.autocast("cpu", torch.bfloat16):
        known, _ = blocks(model, list(model.parameters()), corrected=corrected)
        seen = look(model, x, known)
    model.bfloat16()
    low = estimated(model, x.bfloat16(), corrected=corrected)
    for (block, state), each, (other, rounded) in zip(wanted, seen, low, strict=True):
        for found in (block.estimate(each), other.estimate(look(model, x.bfloat16(), [other])[0])):
            for key in ("A", "G"):
                assert found[key].dtype == torch.float32
                assert gap(found[key], state[key]) < 0.05
        assert {t.dtype for t in rounded.values()} == {torch.float32}
        solved = other.solve(rounded, [torch.ones_like(p) for p in other.params], 0.01)
        assert {t.dtype for t in solved} == {torch.float32}


@pytest.mark.parametrize("form", ["tikhonov", "factored"])
def test_factors_that_are_not_finite_name_the_layer(form):
    (block, state), _ = estimated(made(two_layers), normal(6, 4))
    block.form = form
    for key, what in (("A", "input factor"), ("G", "output factor")):
        with pytest.raises(ValueError, match=f"the {what} of 0 is not finite"):
            block.invert({**state, key: state[key] * math.nan}, 0.1)


def test_many_examples_are_taken_in_pieces(monkeypatch):
    model = made(lambda: nn.Sequential(nn.Conv1d(2, 3, 2), nn.Flatten(), nn.Linear(12, 3)))
    whole = estimated(model, normal(7, 2, 5), corrected=True)
    monkeypatch.setattr("steppe.optim.positions.ENTRIES", 40)
    for (_, state), (_, wanted) in zip(estimated(model, normal(7, 2, 5), corrected=True), whole, strict=True):
        assert all(gap(state[key], wanted[key]) < 1e-12 for key in ("A", "G", "moments"))


def test_wide_factors_by_halves():
    model, x = made(lambda: nn.Linear(335, 3)), normal(9, 335)
    ((_, state),) = estimated(model, x)
    a = torch.cat([x, x.new_ones(9, 1)], 1)
    assert gap(state["A"][0], a.T @ a / 9) < 1e-12
    assert torch.equal(state["A"], state["A"].mT)
