"""What AdaHessian refuses: with a clear line, and the weights as they were."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

import nets
import steppe
from steppe.optim.adahessian import AdaHessian


def refused(opt, run, kind, *words):
    params = [p for group in opt.param_groups for p in group["params"]]
    before, state = [p.detach().clone() for p in params], copy.deepcopy(opt.state_dict())
    with pytest.raises(kind) as error:
        run()
    assert [word for word in words if word not in str(error.value)] == []
    assert "\n" not in str(error.value)
    assert all(map(torch.equal, before, params))
    assert repr(opt.state_dict()) == repr(state)
    assert not opt._seen or opt.forget() is None


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"lr": -1.0}, "lr=-1.0"),
        ({"betas": (1.0, 0.9)}, "beta1=1.0"),
        ({"betas": (0.9, -0.1)}, "beta2=-0.1"),
        ({"eps": 0.0}, "eps=0.0"),
        ({"eps": float("nan")}, "eps=nan"),
        ({"weight_decay": -0.1}, "weight_decay=-0.1"),
        ({"power": 1.5}, "power=1.5"),
        ({"block": 0}, "block=0"),
        ({"block": 2.0}, "block=2.0"),
        ({"block": "rows"}, "block='rows' must be 'row'"),
        ({"n": 0}, "n=0"),
        ({"probes": 0}, "probes=0"),
        ({"average": "mean"}, "average='mean'"),
        ({"product": "finite"}, "product='finite'"),
        ({"at": "here"}, "at='here'"),
    ],
)
def test_arguments(options, words):
    with pytest.raises(ValueError, match=words.replace("(", "\\(")):
        AdaHessian(nets.mlp()[0].parameters(), **options)


def test_a_group_that_is_refused_is_not_added():
    model, _ = nets.mlp()
    opt = AdaHessian(model[0].parameters())
    with pytest.raises(ValueError, match="power=2"):
        opt.add_param_group({"params": model[2].parameters(), "power": 2.0})
    assert len(opt.param_groups) == 1


def batch(model, data, loss_fn=nets.losses, **how):
    return steppe.Batch(model, loss_fn, data, **how)


def test_no_loss_to_look_at():
    model, data = nets.mlp()
    opt = AdaHessian(model.parameters())
    nets.losses(model, data).mean().backward()
    refused(opt, opt.step, TypeError, "steppe.Batch(model, loss_fn, batch)", "without calling backward")


@pytest.mark.parametrize("product", ["exact", "difference"])
def test_closures(product):
    model, (x, y) = nets.mlp()
    opt = AdaHessian(model.parameters(), product=product)

    def called():
        opt.zero_grad()
        loss = F.cross_entropy(model(x), y)
        loss.backward()
        return loss

    def good():
        return F.cross_entropy(model(x), y)

    if product == "difference":
        refused(opt, lambda: opt.step(good), TypeError, "steppe.Batch(model, loss_fn, batch)")
        return
    refused(opt, lambda: opt.step(called), TypeError, "without calling backward")
    refused(opt, lambda: opt.step(lambda: good().detach()), TypeError, "detached")
    refused(opt, lambda: opt.step(lambda: good().item()), TypeError, "without calling backward")
    refused(opt, lambda: opt.step(lambda: None), TypeError, "None")
    assert opt.step(good).isfinite()


class Root(torch.autograd.Function):
    """The identity, with a second derivative that is not a number."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, g):
        return g + (g * 0).abs().sqrt() * 0


@pytest.mark.parametrize("where", [1, 3, 5])
def test_a_product_that_is_not_finite_names_the_parameter(where):
    model, data = nets.mlp()
    model.insert(where, nn.Identity())
    model[where].forward = Root.apply
    opt = AdaHessian(model.parameters())
    refused(opt, lambda: opt.step(batch(model, data)), ValueError, "not finite at parameter 0.weight", "AdaHessian")
    named = AdaHessian([nn.Parameter(torch.ones(2).double()), *model.parameters()])
    assert named.param_groups[0]["params"][0].shape == (2,)
    refused(named, lambda: named.step(batch(model, data)), ValueError, "parameter 0.weight")
    x, y = data
    refused(opt, lambda: opt.step(lambda: F.cross_entropy(model(x), y)), ValueError, "number 0 of shape (8, 6)")


def test_a_loss_that_is_not_finite():
    model, (x, y) = nets.mlp()
    for product in ("exact", "difference"):
        opt = AdaHessian(model.parameters(), product=product, n=2)
        opt.step(batch(model, (x, y)))
        opt.step(batch(model, (x, y)))
        refused(opt, lambda opt=opt: opt.step(batch(model, (x * float("inf"), y))), ValueError, "nan")


def test_a_scaler_is_told_of_it():
    model, data = nets.mlp()
    model.insert(3, nn.Identity())
    model[3].forward = Root.apply
    opt, scaler = AdaHessian(model.parameters()), torch.amp.GradScaler("cpu")
    scaler.scale(torch.ones(1))
    for params in (None, [], list(model[-1].parameters())):
        opt.zero_grad()
        with torch.no_grad():
            opt.backward(batch(model, data), params, scaler=scaler)
        assert not all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())
        opt.forget()


class Once(torch.autograd.Function):
    """A sine that cannot be differentiated twice."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x.sin()

    @staticmethod
    @once_differentiable
    def backward(ctx, g):
        return g * ctx.saved_tensors[0].cos()


def test_a_loss_that_is_not_twice_differentiable():
    model, data = nets.mlp()
    model[1].forward = Once.apply
    opt = AdaHessian(model.parameters())
    refused(opt, lambda: opt.step(batch(model, data)), ValueError, "not twice differentiable", "Once")
    other = AdaHessian(model.parameters(), product="difference")
    assert other.step(batch(model, data)).isfinite()
    words = nn.Sequential(nn.Embedding(7, 4), nn.Flatten(), nn.Linear(12, 3))
    target = torch.randint(7, (5, 3)), torch.randint(3, (5,))
    opt = AdaHessian(words.parameters())

    def loss_fn(model, batch):
        return F.ctc_loss(model(batch[0])[None].log_softmax(-1).expand(4, -1, -1), batch[1][:, None].clamp(min=1),
                          torch.full((5,), 4), torch.ones(5, dtype=torch.long), reduction="none")  # fmt: skip

    refused(opt, lambda: opt.step(batch(words, target, loss_fn)), ValueError, "not twice differentiable")


@pytest.mark.parametrize("product", ["exact", "difference"])
@pytest.mark.parametrize("n", [1, 2])
def test_a_sparse_gradient(product, n):
    model = nn.Sequential(nn.Embedding(7, 4, sparse=True), nn.Flatten(), nn.Linear(12, 3))
    data = torch.randint(7, (5, 3)), torch.randint(3, (5,))
    opt = AdaHessian(model.parameters(), product=product, n=n)
    refused(opt, lambda: opt.step(batch(model, data)), ValueError, "layer 0", "sparse=False")


def test_low_precision_has_no_difference():
    model, (x, y) = nets.mlp()
    opt = AdaHessian(model.parameters(), product="difference")
    mixed = batch(model.float(), (x.float(), y), autocast=torch.bfloat16)
    refused(opt, lambda: opt.step(mixed), ValueError, 'product="exact"')
    low = batch(model.bfloat16(), (x.bfloat16(), y))
    refused(opt, lambda: opt.step(low), ValueError, 'product="exact"')


def test_a_difference_needs_the_same_random_numbers():
    model, data = nets.mlp()
    opt = AdaHessian(model.parameters(), product="difference")
    refused(opt, lambda: opt.step(batch(model, data, replay=False)), ValueError, "replay=True")


@pytest.mark.parametrize("call", [1, 2, 3])
def test_an_exception_leaves_the_weights_and_the_gradients(call):
    model, data = nets.mlp()
    opt, calls = AdaHessian(model.parameters(), product="difference", probes=2), []

    def loss_fn(model, batch):
        calls.append(None)
        if len(calls) == call:
            raise RuntimeError("out of memory")
        return nets.losses(model, batch)

    refused(opt, lambda: opt.step(batch(model, data, loss_fn)), RuntimeError, "out of memory")
    assert all(p.grad is None for p in model.parameters())
