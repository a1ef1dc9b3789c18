"""Newton's method without a matrix, against dense solves."""

from __future__ import annotations

import copy
import gc
import io
import itertools
import math
import pickle

import pytest
import torch
from torch import nn

import nets
import steppe
from steppe.curvature import Objective, Operator
from steppe.optim.newton import HALVINGS, NewtonCG


class Point(nn.Module):
    """Returns its weights, once for each example."""

    def __init__(self, *start):
        super().__init__()
        self.w = nn.Parameter(torch.tensor(start, dtype=torch.float64))

    def forward(self, x):
        return self.w.expand(len(x), -1)


def bowl(matrix, b):
    """``½ wᵀA w − bᵀw`` for each example; its Hessian and its Gauss-Newton matrix are A."""
    return lambda model, x: (z := model(x)).mul(z @ matrix).sum(1) / 2 - z @ b


def spectrum(values, seed=0):
    n = len(values)
    q, _ = torch.linalg.qr(torch.randn(n, n, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)))
    return (q * values) @ q.T


def flat(tensors):
    return torch.cat([t.detach().reshape(-1) for t in tensors])


def gradient(model, loss_fn, data):
    return flat(torch.autograd.grad(loss_fn(model, data).mean(), list(model.parameters())))


def dense(model, loss_fn, data, kind):
    size = sum(p.numel() for p in model.parameters())
    A = Operator(Objective(model, loss_fn, [data], mode="train"), kind) @ torch.eye(size, dtype=torch.float64)
    return (A + A.T) / 2


X = torch.zeros(3, 1)


@pytest.mark.parametrize("curvature", ["ggn", "hessian"])
def test_one_step_reaches_the_minimum_of_a_quadratic(curvature):
    A, b = spectrum(torch.logspace(-1, 2, 50, dtype=torch.float64)), torch.linspace(-1, 1, 50, dtype=torch.float64)
    model = Point(*torch.linspace(3, -2, 50).tolist())
    opt = NewtonCG(model.parameters(), curvature=curvature, damping=1e-14, iterations=200, tolerance=0)
    opt.step(steppe.Batch(model, bowl(A, b), X))
    torch.testing.assert_close(model.w.detach(), torch.linalg.solve(A, b), rtol=0, atol=1e-10)
    assert 50 <= opt.products < 202


@pytest.mark.parametrize("parts", [1, 3])
@pytest.mark.parametrize("curvature", ["ggn", "hessian"])
def test_the_step_is_the_dense_solve(curvature, parts):
    model, data = nets.mlp()
    before, g = flat(model.parameters()), gradient(model, nets.losses, data)
    B, damping = dense(model, nets.losses, data, curvature), 1.0
    opt = NewtonCG(model.parameters(), curvature=curvature, damping=damping, iterations=2000, tolerance=0, adapt=False)
    assert torch.linalg.eigvalsh(B)[0] > -damping
    loss = opt.step(steppe.Batch(model, nets.losses, data, micro=parts))
    expected = before - torch.linalg.solve(B + damping * torch.eye(len(g), dtype=torch.float64), g)
    torch.testing.assert_close(flat(model.parameters()), expected, rtol=0, atol=1e-8)
    torch.testing.assert_close(loss, nets.losses(nets.mlp()[0], data).mean().detach())
    assert opt.damping == damping
    assert opt.steps == 1


def test_batch_norm_is_looked_at_as_it_trains_and_its_statistics_move_once():
    model, data = nets.convnet()
    g, B = gradient(model, nets.losses, data), dense(copy.deepcopy(model), nets.losses, data, "ggn")
    model, data = nets.convnet()
    before = flat(model.parameters())
    other = nets.convnet()[0]
    nets.losses(other, data)
    opt = NewtonCG(model.parameters(), damping=0.5, iterations=2000, tolerance=0, adapt=False)
    opt.step(steppe.Batch(model, nets.losses, data))
    expected = before - torch.linalg.solve(B + 0.5 * torch.eye(len(g), dtype=torch.float64), g)
    torch.testing.assert_close(flat(model.parameters()), expected, rtol=0, atol=1e-8)
    for found, wanted in zip(model.buffers(), other.buffers(), strict=True):
        torch.testing.assert_close(found, wanted, rtol=0, atol=0)


def test_dropout_masks_are_those_of_the_gradient():
    """Under one mask the loss is linear in the kept weights' outputs, so a step without damping ends it."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Dropout(0.5), nn.Linear(20, 1, bias=False)).double()
    x, y = torch.randn(8, 20, dtype=torch.float64), torch.randn(8, 1, dtype=torch.float64)

    def loss_fn(model, data):
        return (model(data[0]) - data[1]).square().sum(1)

    batch = steppe.Batch(model, loss_fn, (x, y))
    NewtonCG(model.parameters(), damping=1e-12, iterations=200, tolerance=0).step(batch)
    assert batch.losses(again=True).mean() < 1e-12
    assert batch.losses(again=False).mean() > 1e-2


def test_damping_shrinks_where_the_model_is_right():
    model = Point(3.0, 2.0)
    opt = NewtonCG(model.parameters(), damping=0.3)
    A, b = torch.diag(torch.tensor([2.0, 5.0])).double(), torch.zeros(2).double()
    opt.step(steppe.Batch(model, bowl(A, b), X))
    assert opt.damping == pytest.approx(0.2, rel=1e-12)


def quartic(model, x):
    """Its Gauss-Newton matrix at 0.1 is far too small for a step of length 1."""
    z = model(x)
    return (z**4).sum(1) - 0.5 * z.sum(1)


def test_damping_grows_where_the_model_is_wrong_and_the_loss_never_rises():
    model = Point(0.1)
    opt = NewtonCG(model.parameters(), damping=1e-3)
    batch = steppe.Batch(model, quartic, X)
    B, g = 12 * 0.1**2, 4 * 0.1**3 - 0.5
    d = -g / (B + 1e-3)
    before = float(opt.step(batch))
    assert opt.damping == pytest.approx(1.5e-3, rel=1e-12)
    halvings = -math.log2((float(model.w.detach()) - 0.1) / d)
    assert halvings == pytest.approx(round(halvings), abs=1e-9)
    assert 1 <= round(halvings) <= HALVINGS
    assert quartic(model, X).mean() < before


@pytest.mark.parametrize("sources", [1, 2])
@pytest.mark.parametrize(("ratio", "factor"), [(0.2, 3 / 2), (0.3, 1), (0.7, 1), (0.8, 2 / 3)])
def test_damping_follows_the_ratio(ratio, factor, sources):
    """By construction the loss falls by this share of what its model says, on each of the sources."""
    model = Point(1.0)
    opt = NewtonCG(model.parameters(), damping=1e-9)

    def loss_fn(model, x):
        z = model(x)
        return (z**2 / 2 + 2 * (1 - ratio) * z.clamp(max=0.5).sub(0.5).square()).sum(1)  # 1/2 at 1; model: −1/2

    opt.begin()
    for _ in range(sources):
        opt.backward(steppe.Batch(model, loss_fn, X), None, share=1 / sources)
    model.w.grad /= sources
    opt.step()
    assert opt.damping == pytest.approx(1e-9 * factor)
    assert abs(float(model.w.detach())) < 1e-6


def test_curvature_is_that_of_the_rows_taken():
    model, (x, y) = nets.mlp()
    rows = torch.tensor([1, 4, 5, 11])
    part = (x[rows], y[rows])
    before, g, B = flat(model.parameters()), gradient(model, nets.losses, part), dense(model, nets.losses, part, "ggn")
    opt = NewtonCG(model.parameters(), iterations=2000, tolerance=0, adapt=False)
    opt.begin()
    assert len(opt.backward(steppe.Batch(model, nets.losses, (x, y)), None, rows=rows)) == 4
    opt.step()
    expected = before - torch.linalg.solve(B + torch.eye(len(g), dtype=torch.float64), g)
    torch.testing.assert_close(flat(model.parameters()), expected, rtol=0, atol=1e-8)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_loss_that_is_not_finite_after_the_step_halves_it(value):
    model = Point(2.0)
    opt = NewtonCG(model.parameters(), damping=1e-9)

    def loss_fn(model, x):
        z = model(x)
        return (z**2 / 2 + torch.where(z < 0.7, value, 0.0)).sum(1)

    opt.step(steppe.Batch(model, loss_fn, X))
    assert float(model.w.detach()) == pytest.approx(1.0)
    assert opt.damping == pytest.approx(1.5e-9)


def test_a_step_that_helps_at_no_length_is_left_out():
    model = Point(2.0)
    opt = NewtonCG(model.parameters(), damping=1e-9)

    def loss_fn(model, x):
        z = model(x)
        return (z**2 / 2 + torch.where(z != 2, 10.0, 0.0)).sum(1)

    for _ in range(2):
        opt.step(steppe.Batch(model, loss_fn, X))
    assert float(model.w.detach()) == 2.0
    assert opt.damping == pytest.approx(2.25e-9)


def test_at_the_minimum_rounding_is_not_judged():
    model, data = Point(1.0, -1.0), torch.zeros(5, 1)
    A, b = spectrum(torch.tensor([1.0, 9.0]).double()), torch.ones(2).double()
    opt, lambdas = NewtonCG(model.parameters()), []
    for _ in range(60):
        opt.step(steppe.Batch(model, bowl(A, b), data))
        lambdas.append(opt.damping)
    assert min(lambdas) == lambdas[-1] == lambdas[-2] > 1e-8
    torch.testing.assert_close(model.w.detach(), torch.linalg.solve(A, b))


def spiral(n=90):
    """Three arms, three classes."""
    generator = torch.Generator().manual_seed(0)
    arm = torch.arange(n) % 3
    r = torch.linspace(0.1, 1, n, dtype=torch.float64)
    angle = 4 * r + arm * 2 * torch.pi / 3 + 0.1 * torch.randn(n, dtype=torch.float64, generator=generator)
    return torch.stack([r * angle.cos(), r * angle.sin()], 1), arm


def test_it_trains_far_below_sgd():
    ends = {}
    for name in ("sgd", "newton"):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(2, 16), nn.Tanh(), nn.Linear(16, 3)).double()
        data = spiral()
        batch = steppe.Batch(model, nets.losses, data)
        if name == "newton":
            opt = NewtonCG(model.parameters())
            losses = [float(opt.step(batch)) for _ in range(30)]
            assert all(after <= before + 1e-12 for before, after in itertools.pairwise(losses))
        else:
            opt = torch.optim.SGD(model.parameters(), lr=0.5, momentum=0.9)
            for _ in range(300):
                opt.zero_grad()
                nets.losses(model, data).mean().backward()
                opt.step()
        ends[name] = float(batch.losses().mean())
    assert ends["newton"] < 0.1 * ends["sgd"]


def saddle(model, x):
    """Negative curvature along the second axis."""
    z = model(x)
    return 2 * z[:, 0] ** 2 - z[:, 1] ** 2 + z[:, 1] ** 4


def test_negative_curvature_is_left_by_the_gradient():
    model = Point(0.0, 0.1)
    opt = NewtonCG(model.parameters(), curvature="hessian", damping=1e-3, adapt=False)
    g = gradient(model, saddle, X)
    before = flat(model.parameters())
    opt.step(steppe.Batch(model, saddle, X))
    torch.testing.assert_close(flat(model.parameters()), before - g, rtol=0, atol=1e-15)
    assert opt.products == 1


def test_it_leaves_a_saddle_that_newton_converges_to():
    model = Point(0.5, 0.01)
    batch = steppe.Batch(model, saddle, X)
    w = flat(model.parameters())
    for _ in range(20):
        H = torch.diag(torch.tensor([4.0, -2 + 12 * w[1] ** 2], dtype=torch.float64))
        w = w - torch.linalg.solve(H, torch.stack([4 * w[0], -2 * w[1] + 4 * w[1] ** 3]))
    assert abs(w[1]) < 1e-12
    opt = NewtonCG(model.parameters(), curvature="hessian")
    for _ in range(30):
        opt.step(batch)
    assert float(model.w[0].detach()) == pytest.approx(0, abs=1e-6)
    assert abs(float(model.w[1].detach())) == pytest.approx(0.5**0.5, abs=1e-6)


def run(opt, model, data, steps, scheduler=None):
    for _ in range(steps):
        opt.step(steppe.Batch(model, nets.losses, data))
        if scheduler is not None:
            scheduler.step()


def through_disk(state):
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("curvature", ["ggn", "hessian"])
def test_it_goes_on_to_the_bit(curvature, dtype):
    model, (x, y) = nets.mlp()
    model, data = model.to(dtype), (x.to(dtype), y)
    opt = NewtonCG(model.parameters(), curvature=curvature)
    run(opt, model, data, 4)
    saved = through_disk([model.state_dict(), opt.state_dict()])
    run(opt, model, data, 4)
    fresh = nets.mlp(seed=1)[0].to(dtype)
    other = NewtonCG(fresh.parameters(), curvature=curvature, damping=7)
    run(other, fresh, data, 1)
    fresh.load_state_dict(saved[0])
    other.load_state_dict(saved[1])
    run(other, fresh, data, 4)
    assert torch.equal(flat(fresh.parameters()), flat(model.parameters()))
    assert other.damping == opt.damping != 1
    assert other.steps == opt.steps == 8


def test_a_scheduler_reaches_it():
    model, data = nets.mlp()
    opt = NewtonCG(model.parameters(), lr=1.0, damping=100, adapt=False, warm=0)
    scheduler = torch.optim.lr_scheduler.StepLR(opt, 1, gamma=0.5)
    lengths = []
    for _ in range(3):
        before = flat(model.parameters())
        run(opt, model, data, 1, scheduler)
        lengths.append(float((flat(model.parameters()) - before).norm()))
    assert lengths[1] / lengths[0] == pytest.approx(0.5, rel=0.02)
    assert lengths[2] / lengths[1] == pytest.approx(0.5, rel=0.02)


def test_groups_have_their_own_rate_and_decay():
    model, data = nets.mlp()
    first, rest = list(model[0].parameters()), list(model[2:].parameters())
    g, B = gradient(model, nets.losses, data), dense(model, nets.losses, data, "ggn")
    d = -torch.linalg.solve(B + torch.eye(len(g), dtype=torch.float64), g)
    cut = sum(p.numel() for p in first)
    before = flat(model.parameters())
    opt = NewtonCG([{"params": rest, "lr": 0.5}, {"params": first, "weight_decay": 0.1, "lr": 0.2}],
                   iterations=2000, tolerance=0, adapt=False)  # fmt: skip
    run(opt, model, data, 1)
    expected = torch.cat([(1 - 0.02) * before[:cut] + 0.2 * d[:cut], before[cut:] + 0.5 * d[cut:]])
    torch.testing.assert_close(flat(model.parameters()), expected, rtol=0, atol=1e-8)


def test_what_takes_no_part_is_left_alone():
    model, data = nets.mlp()
    model.spare = nn.Parameter(torch.ones(2, dtype=torch.float64))
    model[0].bias.requires_grad_(False)
    before = model[0].bias.clone()
    opt = NewtonCG(model.parameters(), weight_decay=0.1)
    run(opt, model, data, 2)
    assert torch.equal(model.spare.detach(), torch.ones(2).double())
    assert torch.equal(model[0].bias, before)
    assert model.spare.grad is None


def test_a_mean_loss_does_too():
    ends = []
    for loss_fn in (nets.losses, lambda model, data: nets.losses(model, data).mean()):
        model, data = nets.mlp()
        opt = NewtonCG(model.parameters())
        for _ in range(2):
            opt.step(steppe.Batch(model, loss_fn, data))
        ends.append(flat(model.parameters()))
    torch.testing.assert_close(*ends, rtol=0, atol=1e-12)


def test_the_last_direction_saves_products():
    """On one batch whose curvature hardly changes, a warm start ends sooner, at the same place."""
    counts = {}
    for warm in (0.0, 1.0):
        model, data = nets.mlp()
        opt = NewtonCG(model.parameters(), lr=1e-6, damping=1e-2, adapt=False, iterations=500, warm=warm)
        run(opt, model, data, 3)
        counts[warm] = opt.products
    assert counts[1.0] < counts[0.0]


def test_products_and_losses_stay_below_the_cost():
    model, data = nets.mlp()
    calls, examples = [], len(data[1])

    def loss_fn(model, data):
        calls.append(len(data[1]))
        return nets.losses(model, data)

    for curvature, bound in (("ggn", 2 + 52 * 4 / 3 + 8 / 3), ("hessian", 2 + 51 * 2 + 8 / 3)):
        opt = NewtonCG(model.parameters(), curvature=curvature)
        assert opt.cost() == pytest.approx(bound)
        opt.step(steppe.Batch(model, loss_fn, data))
        assert opt.products <= 52
    assert NewtonCG(model.parameters(), adapt=False, warm=0, iterations=10).cost() == pytest.approx(2 + 40 / 3)
    calls.clear()
    NewtonCG(model.parameters(), curvature="hessian").step(steppe.Batch(model, loss_fn, data))
    assert 4 <= len(calls) <= 4 + HALVINGS  # the gradient, the kept graph, the loss before and after
    assert set(calls) == {examples}


def test_no_graph_outlives_the_step():
    model, data = nets.mlp()
    opt = NewtonCG(model.parameters())

    def alive():
        return sum(issubclass(type(each), torch.Tensor) for each in gc.get_objects())

    gc.collect()
    gc.disable()
    try:
        counts = []
        for _ in range(6):
            run(opt, model, data, 1)
            counts.append(alive())
    finally:
        gc.enable()
    assert len(set(counts[1:])) == 1


def test_a_step_without_rate_and_gradient_makes_the_state():
    """As ``torch.distributed.checkpoint`` does before it loads."""
    model, _ = nets.mlp()
    opt, before = NewtonCG(model.parameters(), lr=0.0), flat(model.parameters())
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    opt.step()
    assert all(set(opt.state[p]) == {"step", "direction", "damping"} for p in model.parameters())
    assert torch.equal(flat(model.parameters()), before)


def test_a_copy_and_a_pickle_go_on_alone():
    model, data = nets.mlp()
    opt = NewtonCG(model.parameters())
    run(opt, model, data, 2)
    copies = [copy.deepcopy((model, opt)), pickle.loads(pickle.dumps((model, opt)))]
    run(opt, model, data, 2)
    for other, runner in copies:
        run(runner, other, data, 2)
        assert torch.equal(flat(other.parameters()), flat(model.parameters()))
