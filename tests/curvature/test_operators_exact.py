"""Operators against dense matrices: by plain autograd to 1e-12, and by central differences where there are norms."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.sparse.linalg
import torch
from torch import nn
from torch.nn import functional as F

from exact import (
    dense,
    examples,
    flat,
    gap,
    gauss_newton,
    hessian,
    losses,
    made,
    mlp,
    operator,
    outer,
    probes,
    rows,
    small,
    squares,
    uneven,
    untouched,
)
from steppe.curvature.objective import Objective
from steppe.curvature.operator import Operator

KINDS = ["hessian", "ggn", "fisher", "empirical"]
BATCHES = uneven(11, classes=4)
SMALL = uneven(4)


@pytest.fixture(scope="module")
def exact():
    """The four matrices of the MLP of 464 weights, from single examples."""
    model = mlp()
    assert sum(p.numel() for p in model.parameters()) == 464
    mean = losses(model, [torch.cat(both) for both in zip(*BATCHES, strict=True)]).mean()
    ggn = gauss_newton(model, BATCHES, F.cross_entropy)
    return {
        "hessian": hessian(mean, list(model.parameters())),
        "ggn": ggn,
        "fisher": ggn,
        "empirical": outer(model, losses, BATCHES),
    }


@pytest.mark.parametrize("kind", KINDS)
def test_every_matrix_of_464_weights(exact, kind):
    model, V = mlp(), probes(464, 20)
    with untouched(model):
        A = operator(model, losses, BATCHES, kind)
        assert gap(A @ V, exact[kind] @ V) < 1e-12
        if kind == "hessian":
            assert gap(dense(A), exact[kind]) < 1e-12
        B = operator(model, losses, BATCHES, kind, reuse=True)
        for v in V.T[:3]:
            assert gap(B @ v, exact[kind] @ v) < 1e-12


@pytest.mark.parametrize("kind", KINDS)
def test_top_5_eigenvalues(exact, kind):
    A = operator(mlp(), losses, BATCHES, kind).linear_operator()
    found = scipy.sparse.linalg.eigsh(A, k=5, which="LA", v0=np.ones(464), return_eigenvectors=False)
    wanted = torch.linalg.eigvalsh(exact[kind])[-5:]
    assert gap(torch.tensor(np.sort(found)), wanted) < 1e-12


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("choose", ["module", "pattern", "two", "tensors"])
def test_blocks(exact, kind, choose):
    model = mlp()
    names = [name for name, _ in model.named_parameters()]
    params, wanted = {
        "module": (model[2], ["2.weight", "2.bias"]),
        "pattern": (r"bias$", ["0.bias", "2.bias", "4.bias"]),
        "two": (r"^(0|4)\.", ["0.weight", "0.bias", "4.weight", "4.bias"]),
        "tensors": ([model[4].bias, model[0].weight], ["0.weight", "4.bias"]),
    }[choose]
    cuts = torch.split(torch.arange(464), [p.numel() for p in model.parameters()])
    index = torch.cat([cut for name, cut in zip(names, cuts, strict=True) if name in wanted])
    objective = Objective(model, losses, BATCHES)
    with untouched(model):
        for each in (Objective(model, losses, BATCHES, params=params), objective.only(params)):
            assert each.names == wanted
            A, V = Operator(each, kind), probes(each.size)
            assert gap(A @ V, exact[kind][index][:, index] @ V) < 1e-12
    assert objective.names == names


def test_loss_and_gradient():
    model = mlp()
    each = torch.stack([losses(model, one)[0] for one in examples(BATCHES)])
    objective = Objective(model, losses, BATCHES)
    torch.testing.assert_close(objective.loss(), each.mean().detach(), rtol=1e-14, atol=0)
    wanted = flat(torch.autograd.grad(each.mean(), list(model.parameters())))
    assert gap(objective.gradient(), wanted) < 1e-13


def test_an_unweighted_mean_over_batches_would_be_seen(exact):
    """The published bug: the mean of the batches' matrices, whatever their sizes."""
    model, V = mlp(), probes(464)
    each = torch.stack([operator(model, losses, [batch]) @ V for batch in BATCHES])
    shares = torch.tensor([len(y) / 8 for _, y in BATCHES], dtype=torch.float64)
    assert gap(each.mean(0), exact["hessian"] @ V) > 1e-2
    assert gap(torch.einsum("b,bij->ij", shares, each), exact["hessian"] @ V) < 1e-12


@pytest.mark.parametrize("kind", ["hessian", "ggn", "fisher"])
def test_a_mean_loss_will_do_where_no_single_example_is_needed(exact, kind):
    A = operator(mlp(), lambda model, batch: losses(model, batch).mean(), BATCHES, kind)
    assert gap(A @ probes(464), exact[kind] @ probes(464)) < 1e-12


@pytest.mark.parametrize("kind", KINDS)
def test_weights_are_counts(kind):
    """An example of weight 2 counts as two, one of weight 0 is not there."""
    model = small()
    counts = [torch.tensor([2, 0, 1, 3]), torch.tensor([1, 1, 0]), torch.tensor([2])]
    repeated = [(x.repeat_interleave(n, 0), y.repeat_interleave(n)) for (x, y), n in zip(SMALL, counts, strict=True)]
    weighted = [(x, y, n) for (x, y), n in zip(SMALL, counts, strict=True)]
    found = Objective(model, lambda m, b: losses(m, b[:2]), weighted, weights=lambda b: b[2])
    wanted = Objective(model, losses, repeated)
    assert gap(dense(Operator(found, kind)), dense(Operator(wanted, kind))) < 1e-12
    assert gap(found.gradient(), wanted.gradient()) < 1e-13
    torch.testing.assert_close(found.loss(), wanted.loss(), rtol=1e-14, atol=0)


@pytest.mark.parametrize("kind", KINDS)
def test_dictionaries_and_other_nests(kind):
    model = small()
    wanted = dense(operator(model, losses, SMALL, kind))
    dicts = [{"x": x, "more": [{"y": y}], "id": "name"} for x, y in SMALL]
    found = operator(model, lambda m, b: losses(m, (b["x"], b["more"][0]["y"])), dicts, kind)
    assert torch.equal(dense(found), wanted)


@pytest.mark.parametrize("kind", KINDS)
def test_frozen_weights_are_left_out_unless_named(kind):
    model, whole = small(), small()
    model[0].weight.requires_grad_(False)
    everything = dense(operator(whole, losses, SMALL, kind))
    with untouched(model):
        A = operator(model, losses, SMALL, kind)
        assert A.size == 23
        assert gap(dense(A), everything[20:, 20:]) < 1e-12
        assert gap(dense(operator(model, losses, SMALL, kind, params=r"0\.")), everything[:25, :25]) < 1e-12


@pytest.mark.parametrize("kind", KINDS)
def test_a_weight_that_takes_no_part_has_rows_of_zeros(kind):
    class Spare(nn.Module):
        def __init__(self):
            super().__init__()
            self.spare, self.net = nn.Linear(2, 1), small()

        def forward(self, x):
            return self.net(x)

    A = dense(operator(made(Spare), losses, SMALL, kind))
    assert not A[:3].any()
    assert not A[:, :3].any()
    assert gap(A[3:, 3:], dense(operator(small(), losses, SMALL, kind))) < 1e-12


def test_max_batches():
    model = small()
    found = Objective(model, losses, SMALL, max_batches=2)
    assert gap(dense(Operator(found)), dense(operator(model, losses, SMALL[:2]))) < 1e-13
    assert found.examples == 7


def test_several_columns_are_the_products_one_by_one():
    A = operator(small(), losses, SMALL, "ggn")
    V = probes(43)
    assert (A @ V).shape == (43, 3)
    torch.testing.assert_close(A @ V, torch.stack([A @ v for v in V.T], 1), rtol=1e-13, atol=1e-15)
    assert (A @ V[:, :1]).shape == (43, 1)
    assert (A @ V[:, 0]).shape == (43,)


def test_squared_error_of_several_outputs():
    """GGN = JᵀJ, the Gaussian Fisher; Hessian by plain double backward."""
    model = small()
    batches = [(x, torch.sin(x[:, :3])) for x, _ in SMALL]
    J = rows(torch.cat([model(x) for x, _ in batches]).reshape(-1), list(model.parameters()))
    for A in (
        operator(model, squares, batches, "ggn"),
        operator(model, squares, batches, "fisher", likelihood="gaussian"),
    ):
        assert gap(dense(A), J.T @ J / 8) < 1e-12
    mean = torch.cat([squares(model, batch) for batch in batches]).mean()
    assert gap(dense(operator(model, squares, batches)), hessian(mean, list(model.parameters()))) < 1e-12


def test_gauss_newton_of_a_model_with_two_outputs():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.body, self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 3), nn.Linear(4, 1)

        def forward(self, x):
            h = self.body(x).tanh()
            return {"logits": self.a(h), "scale": self.b(h), "constant": x}

    def loss_fn(model, batch):
        out = model(batch[0])
        return F.cross_entropy(out["logits"] * out["scale"].exp(), batch[1], reduction="none")

    model = made(Two)
    params, found = list(model.parameters()), []
    for x, y in examples(SMALL):
        out = model(x)
        z = torch.cat([out["logits"][0], out["scale"][0]])
        J, leaf = rows(z, params), z.detach().requires_grad_()
        found.append(J.T @ hessian(F.cross_entropy(leaf[:3] * leaf[3].exp(), y[0]), [leaf]) @ J)
    assert gap(dense(operator(model, loss_fn, SMALL, "ggn")), torch.stack(found).mean(0)) < 1e-12
