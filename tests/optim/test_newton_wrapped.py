"""Newton's method as the base of a sharpness-aware step, and what it refuses."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

import nets
import steppe
from steppe.optim.newton import NewtonCG


def flat(model):
    return torch.cat([p.detach().reshape(-1) for p in model.parameters()])


def train(method, steps=3, net=nets.mlp, **how):
    model, data = net()
    opt = NewtonCG(model.parameters(), **how)
    if method is not None:
        opt = steppe.SharpnessAware(opt, steppe.parse(method))
    losses = [float(opt.step(steppe.Batch(model, nets.losses, data))) for _ in range(steps)]
    return model, losses


@pytest.mark.parametrize("at", ["perturbed", "weights"])
@pytest.mark.parametrize(
    "method", ["sam(rho=0.05)", "rwp()", "looksam(k=2)", "rst(sam())", "esam()", "m_sharpness(sam(), 5)"]
)
def test_it_trains_under_a_method(method, at):
    model, losses = train(method, 8, at=at)
    assert losses[-1] < 0.7 * losses[0]
    assert flat(model).isfinite().all()


@pytest.mark.parametrize("at", ["perturbed", "weights"])
@pytest.mark.parametrize("net", [nets.mlp, nets.convnet])
def test_with_a_tiny_radius_it_is_the_plain_step(net, at):
    """Three steps, each amplified by up to 1/λ: 1e-9 of ε is 1e-6 of the weights."""
    plain, _ = train(None, net=net)
    sharp, _ = train("sam(rho=1e-9)", net=net, at=at)
    torch.testing.assert_close(flat(sharp), flat(plain), rtol=0, atol=1e-6)


def moved(model, size=0.3, seed=0):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(size * torch.randn(p.shape, dtype=p.dtype, generator=generator))


def test_curvature_is_that_of_the_weights_at_which_it_was_seen():
    """By hand: the pass runs at ``w + ε``, the update at ``w``; the step is the dense solve at ``w + ε``."""
    from steppe.curvature import Objective, Operator

    model, data = nets.mlp()
    opt = NewtonCG(model.parameters(), adapt=False, iterations=2000, tolerance=0)
    home = [p.detach().clone() for p in model.parameters()]
    before = flat(model)
    expected, g = torch.zeros(len(before), len(before), dtype=torch.float64), 0
    opt.begin()
    for share, rows in ((0.75, slice(0, 9)), (0.25, slice(9, 12))):
        part = (data[0][rows], data[1][rows])
        moved(model, seed=rows.start)
        opt.backward(steppe.Batch(model, nets.losses, part), None, share=share, weight=share)
        A = Operator(Objective(model, nets.losses, [part]), "ggn") @ torch.eye(len(before), dtype=torch.float64)
        expected += share * share * A
        for p, w in zip(model.parameters(), home, strict=True):
            p.data.copy_(w)
    g = torch.cat([p.grad.reshape(-1) for p in model.parameters()])
    opt.step()
    wanted = before - torch.linalg.solve(expected + torch.eye(len(g), dtype=torch.float64), g)
    torch.testing.assert_close(flat(model), wanted, rtol=0, atol=1e-8)


@pytest.mark.parametrize("change", [{"damping": 0}, {"damping": -1.0}, {"damping": float("nan")}, {"adapt": 1},
                                    {"curvature": "fisher"}, {"iterations": 0}, {"tolerance": -1}, {"warm": 1.5},
                                    {"lr": -1.0}, {"weight_decay": float("inf")}, {"at": "home"}])  # fmt: skip
def test_bad_arguments(change):
    with pytest.raises(ValueError, match=next(iter(change))):
        NewtonCG(nn.Linear(2, 2).parameters(), **change)
    if "lr" in change or "weight_decay" in change:
        with pytest.raises(ValueError, match=next(iter(change))):
            NewtonCG([{"params": list(nn.Linear(2, 2).parameters()), **change}])


class Once(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x.sin()

    @staticmethod
    @once_differentiable
    def backward(ctx, slope: Tensor) -> Tensor:
        return slope * ctx.saved_tensors[0].cos()


def once(model, data):
    return nets.losses(lambda x: Once.apply(model(x)), data)


def infinite_curvature(model, data):
    """The slope is finite, the second derivative is not."""
    z = model(data[0])
    return ((z - z.detach()).abs() + 0).pow(1.5).sum(1) + nets.losses(model, data)


def nan_loss(model, data):
    return nets.losses(model, data) * float("nan")


def linear(model, data):
    return model(data[0]).sum(1)


@pytest.mark.parametrize("wrapped", [False, True])
@pytest.mark.parametrize(("loss_fn", "curvature", "message"), [
    (once, "hessian", "not twice differentiable"),
    (once, "ggn", "not twice differentiable"),
    (infinite_curvature, "hessian", "not finite"),
    (nan_loss, "ggn", "nan"),
    (linear, "ggn", "linear in the model's outputs"),
])  # fmt: skip
def test_a_loss_without_curvature_leaves_the_weights(loss_fn, curvature, message, wrapped):
    model, data = nets.mlp()
    opt = NewtonCG(model.parameters(), curvature=curvature)
    runner = steppe.SharpnessAware(opt, steppe.sam()) if wrapped else opt
    runner.step(steppe.Batch(model, nets.losses, data))
    before, damping = flat(model), opt.damping
    directions = [opt.state[p]["direction"].clone() for p in model.parameters()]
    with pytest.raises(ValueError, match=message):
        runner.step(steppe.Batch(model, loss_fn, data))
    assert torch.equal(flat(model), before)
    assert (opt.damping, opt.steps) == (damping, 1)
    assert all(map(torch.equal, directions, [opt.state[p]["direction"] for p in model.parameters()]))
    runner.step(steppe.Batch(model, nets.losses, data))
    assert opt.steps == 2


def test_an_exception_between_the_products_leaves_the_weights():
    model, data = nets.mlp()
    calls = []

    def loss_fn(model, data):
        calls.append(None)
        if len(calls) == 4:  # the gradient, the graph of the products, the loss before, then the loss after
            raise KeyboardInterrupt
        return nets.losses(model, data)

    opt, before = NewtonCG(model.parameters()), flat(model)
    with pytest.raises(KeyboardInterrupt):
        opt.step(steppe.Batch(model, loss_fn, data))
    assert torch.equal(flat(model), before)


def test_a_gradient_that_is_not_finite_is_refused():
    model, data = nets.mlp()
    opt, before = NewtonCG(model.parameters()), flat(model)
    opt.begin()
    opt.backward(steppe.Batch(model, nets.losses, data), None)
    model[0].weight.grad[0, 0] = float("inf")
    with pytest.raises(ValueError, match="gradient handed to NewtonCG is not finite"):
        opt.step()
    assert torch.equal(flat(model), before)


def test_what_is_too_little():
    model, data = nets.mlp()
    opt, before = NewtonCG(model.parameters()), flat(model)
    with pytest.raises(TypeError, match="looks at the model"):
        opt.step(lambda: nets.losses(model, data).mean())
    with pytest.raises(TypeError, match="NewtonCG"):
        opt.step()
    opt.begin()
    with pytest.raises(ValueError, match="has seen no batch"):
        opt.step()
    stray = NewtonCG([*model.parameters(), nn.Parameter(torch.ones(2))])
    with pytest.raises(ValueError, match="not the model's"):
        stray.step(steppe.Batch(model, nets.losses, data))
    assert torch.equal(flat(model), before)


def test_weights_of_16_bits_are_refused():
    model, (x, y) = nets.mlp()
    model = model.bfloat16()
    before = flat(model)
    with pytest.raises(ValueError, match="fewer than 32 bits"):
        NewtonCG(model.parameters()).step(steppe.Batch(model, nets.losses, (x.bfloat16(), y)))
    assert torch.equal(flat(model), before)


def test_bf16_autocast_trains():
    model, (x, y) = nets.mlp()
    model, data = model.float(), (x.float(), y)
    opt = NewtonCG(model.parameters())
    losses = [float(opt.step(steppe.Batch(model, nets.losses, data, autocast=torch.bfloat16))) for _ in range(6)]
    assert losses[-1] < 0.5 * losses[0]
    assert {t.dtype for p in model.parameters() for t in (p, opt.state[p]["direction"])} == {torch.float32}
