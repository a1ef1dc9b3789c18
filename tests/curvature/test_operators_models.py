"""Operators on models as they come: compiled, in mixed precision, from transformers, on loaders of several sorts."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from exact import dense, differences, gap, losses, made, operator, probes, small, uneven, untouched
from steppe.curvature import Analyzer
from steppe.curvature.objective import Objective
from steppe.curvature.operator import Operator
from steppe.examples import take

KINDS = ["hessian", "ggn", "fisher", "empirical"]
BATCHES = uneven(4)


def compiled(how: str):
    """A model and a loss, compiled by way of AOTAutograd, which has no double backward."""
    model, loss_fn = small(), losses
    if how == "model":
        model = torch.compile(model, backend="aot_eager")
    elif how == "in place":
        model.compile(backend="aot_eager")
    elif how == "a layer":
        model[0] = torch.compile(model[0], backend="aot_eager")
    else:
        model = torch.compile(model, backend="aot_eager")
        loss_fn = torch.compile(losses, backend="aot_eager")
    return model, loss_fn


@pytest.mark.parametrize("how", ["model", "in place", "a layer", "model and loss"])
def test_compiled_models_run_eagerly_and_stay_compiled(how):
    torch.compiler.reset()
    model, loss_fn = compiled(how)
    v = probes(43, 1)[:, 0]
    if "model" in how:
        with pytest.raises(RuntimeError, match=r"double backward|donated buffer"):  # this is what comes of compiling
            plainly(model, loss_fn, v)
        torch.compiler.reset()
    for _ in range(2):
        for kind in KINDS:
            with untouched(model):
                found = operator(model, loss_fn, BATCHES, kind) @ v
            assert torch.equal(found, operator(small(), losses, BATCHES, kind) @ v)
        loss_fn(model, BATCHES[0]).sum().backward()  # compiled by now
        model.zero_grad()
    if "model" in how:
        with pytest.raises(RuntimeError, match=r"double backward|donated buffer"):
            plainly(model, loss_fn, v)
        assert Objective(model, loss_fn, BATCHES).names == ["0.weight", "0.bias", "2.weight", "2.bias"]


def plainly(model, loss_fn, v):
    """A product by double backward without more ado."""
    params = list(model.parameters())
    slopes = torch.autograd.grad(loss_fn(model, BATCHES[0]).sum(), params, create_graph=True)
    along = torch.split(v, [p.numel() for p in params])
    return torch.autograd.grad(slopes, params, [a.view(p.shape) for a, p in zip(along, params, strict=True)])


@pytest.mark.parametrize("kind", KINDS)
def test_autocast(kind):
    """bf16 in the forward passes: near the float32 numbers, not the same, and the same each time."""
    model = small().float()
    batches = [(x.float(), y) for x, y in uneven(4, sizes=(30, 7))]
    exact = operator(model, losses, batches, kind) @ probes(43).float()
    with untouched(model):
        A = operator(model, losses, batches, kind, autocast=torch.bfloat16)
        found = A @ probes(43).float()
        assert found.dtype == torch.float32
        assert 1e-5 < gap(found, exact) < 0.05
        assert torch.equal(A @ probes(43).float(), found)
        M = dense(A)
        assert gap(M, M.T) < 0.02


def test_half_precision_losses_are_counted_exactly():
    """bf16 has no 257: weights summed in it would count 256 examples."""
    model = small().float()
    x, y = uneven(4, sizes=(257,))[0]

    def loss_fn(model, batch):
        out = (model(batch[0]) - F.one_hot(batch[1], 3)).bfloat16()
        return out.square().sum(1)

    whole = operator(model, loss_fn, [(x.float(), y)])
    parts = operator(model, loss_fn, [(x[:200].float(), y[:200]), (x[200:].float(), y[200:])])
    v = probes(43, 1)[:, 0].float()
    assert gap(whole @ v, parts @ v) < 1e-5
    assert gap(whole.objective.gradient(), parts.objective.gradient()) < 1e-5


@pytest.mark.parametrize("mixed", [False, True])
def test_float32_and_weights_of_two_types(mixed):
    model, exact = small(), small()
    (model[0] if mixed else model).float()
    if mixed:
        model[0].register_forward_hook(lambda module, inputs, output: output.double())
    batches = [(x.float(), y) for x, y in BATCHES]
    A = operator(model, losses, batches)
    assert A.dtype == (torch.float64 if mixed else torch.float32)
    assert gap(dense(A).double(), dense(operator(exact, losses, BATCHES))) < 1e-5


def test_loaders_of_several_sorts():
    x, y = torch.cat([x for x, _ in BATCHES]), torch.cat([y for _, y in BATCHES])

    class Stream(IterableDataset):
        def __iter__(self):
            return iter(zip(x, y, strict=True))

    class Again:
        def __iter__(self):
            return iter(BATCHES)

    model = small()
    wanted = dense(operator(model, losses, BATCHES))
    loaders = DataLoader(TensorDataset(x, y), 3), DataLoader(Stream(), 5), Again(), tuple(BATCHES)
    for loader in loaders:
        with untouched(model):
            assert gap(dense(operator(model, losses, loader)), wanted) < 1e-12
            assert Objective(model, losses, loader).examples == 8


def test_scipy_operator():
    A = operator(small(), losses, BATCHES)
    M, L = dense(A).numpy(), A.linear_operator()
    v = probes(43).numpy()
    assert L.shape == (43, 43)
    assert L.dtype == v.dtype
    for x in (v[:, 0], v[:, :1], v):
        assert (L @ x).shape == x.shape
        assert abs(L @ x - M @ x).max() < 1e-13
    assert abs(L.rmatvec(v[:, 0]) - M @ v[:, 0]).max() < 1e-13


# transformers ---------------------------------------------------------------------------------------------------------


def bert(attention: str) -> nn.Module:
    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig(
        vocab_size=7,
        hidden_size=4,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=5,
        max_position_embeddings=4,
        num_labels=3,
        attn_implementation=attention,
    )
    return made(lambda: transformers.BertForSequenceClassification(config)).train()


def texts(**more):
    generator = torch.Generator().manual_seed(0)
    return [
        {
            "input_ids": torch.randint(1, 7, (n, 4), generator=generator),
            "attention_mask": (torch.arange(4) < 3).long().expand(n, 4),
            "labels": torch.randint(3, (n,), generator=generator),
            **more,
        }
        for n in (3, 2)
    ]


def of_logits(model, batch):
    inputs = {key: value for key, value in batch.items() if key != "labels"}
    return F.cross_entropy(model(**inputs).logits, batch["labels"], reduction="none")


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_transformers(attention):
    model = bert(attention)
    V = probes(sum(p.numel() for p in model.parameters()), 4)
    with untouched(model):
        A = operator(model, of_logits, texts())
        assert gap(A @ V, differences(model, of_logits, texts(), V)) < 1e-6
        ggn = operator(model, of_logits, texts(), "ggn") @ V
        assert gap(ggn, operator(model, of_logits, texts(), "fisher") @ V) < 1e-12
        assert gap(A @ V, ggn) > 1e-2
        empirical = operator(model, of_logits, texts(), "empirical") @ V
        single = [take(batch, slice(i, i + 1), n) for batch, n in zip(texts(), (3, 2), strict=True) for i in range(n)]
        G = torch.stack([Objective(model, of_logits, [one]).gradient() for one in single])
        assert gap(empirical, G.T @ (G @ V) / 5) < 1e-12
        block = Objective(model, of_logits, texts(), params=r"encoder\.layer\.0\.")
        assert 0 < block.size < A.size
        assert (Operator(block) @ torch.ones(block.size, dtype=torch.float64)).isfinite().all()


def test_a_model_that_computes_its_own_loss():
    """Its Hessian is right; what needs the logits or single examples says so."""
    model, v = bert("eager"), None
    own = operator(model, lambda model, batch: model(**batch).loss, texts())
    v = torch.ones(own.size, dtype=torch.float64)
    assert gap(own @ v, operator(model, of_logits, texts()) @ v) < 1e-12
    with pytest.raises(
        ValueError, match="if the model computes its loss itself, have loss_fn compute it of the logits"
    ):
        Operator(own.objective, "ggn") @ v
    with pytest.raises(ValueError, match=r"the Fisher matrix needs one output, logits \(B, C\)"):
        Operator(own.objective, "fisher") @ v
    with pytest.raises(TypeError, match="loss_fn returned a mean"):
        Operator(own.objective, "empirical") @ v
    assert gap(own @ v, operator(model, of_logits, texts()) @ v) < 1e-12


def test_weights_in_bf16_are_not_summed_in_it():
    """600 batches of one example: in bf16 their number would stick at 256."""
    torch.manual_seed(0)
    model = nn.Linear(3, 2).bfloat16()
    x, y = torch.randn(600, 3).bfloat16(), torch.randint(2, (600,))
    loaders = [(x, y)], [(x[i : i + 1], y[i : i + 1]) for i in range(600)]
    whole, single = (Analyzer(model, losses, loader, progress=False) for loader in loaders)
    v = torch.randn(8)
    torch.testing.assert_close(single.operator() @ v, whole.operator() @ v, rtol=0.05, atol=0.01)
    torch.testing.assert_close(single.objective.gradient(), whole.objective.gradient(), rtol=0.05, atol=0.01)
    assert single.trace().value == pytest.approx(whole.trace().value, rel=0.05)
