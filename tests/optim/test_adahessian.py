"""AdaHessian on functions whose answer is known, its products, its cost and its memory."""

from __future__ import annotations

import copy
import gc
import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import nets
import steppe
from steppe.lab.memory import peak_memory
from steppe.lab.models import build
from steppe.optim.adahessian import AdaHessian
from steppe.optim.differences import with_differences
from steppe.products import with_products

PLAIN = (torch.Tensor, nn.Parameter)  # not the fakes that compilation leaves
TINY = 1e-30  # for eps, where the step is to be Newton's own


def point(*x):
    return nn.Parameter(torch.tensor(x, dtype=torch.float64).squeeze())


@pytest.mark.parametrize("product", ["exact", "difference"])
@pytest.mark.parametrize("probes", [1, 3])
def test_the_first_step_on_a_diagonal_quadratic_is_newtons(product, probes):
    curvature = torch.tensor([[0.5, 3.0, 100.0], [1e-3, 7.0, 2.0]], dtype=torch.float64)
    model = nn.Linear(3, 2, bias=False).double()
    start = model.weight.detach().clone()
    target = torch.randn(2, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    opt = AdaHessian(model.parameters(), lr=1.0, eps=TINY, product=product, probes=probes)
    half = (curvature * (start - target)) / curvature

    def loss_fn(model, batch):
        return (0.5 * curvature * (model.weight - target) ** 2).sum()

    opt.step(steppe.Batch(model, loss_fn, torch.zeros(1)))
    torch.testing.assert_close(model.weight.detach(), start - half, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(model.weight.detach(), target, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("start", [(1.0, 1.0), (-3.0, 0.01), (1e4, -1e4)])
def test_the_lectures_quadratic_reaches_its_optimum_in_one_step(start):
    w = point(*start)
    opt = AdaHessian([w], lr=1.0, eps=TINY)
    opt.step(lambda: 10 * w[0] ** 2 + w[1] ** 2)
    assert w.abs().max() <= 1e-15 * max(map(abs, start))


def test_a_negative_curvature_counts_by_its_size():
    w = point(1.0)
    AdaHessian([w], lr=1.0, eps=TINY).step(lambda: -2 * w**2)
    assert w.item() == pytest.approx(2.0, abs=1e-12)


LOWEST = 0.07336549466562737  # of x² + 0.1 x sin(20πx), on both sides of 0


def wavy(x):
    return x**2 + 0.1 * x * torch.sin(20 * math.pi * x)


def distances(start, lr, betas, steps):
    """How far the iterates are from a global minimum."""
    x = point(start)
    opt, found = AdaHessian([x], lr=lr, betas=betas), []
    for _ in range(steps):
        opt.step(lambda: wavy(x))
        found.append(abs(abs(x.item()) - LOWEST))
    return found


@pytest.mark.parametrize(("start", "lr", "beta1"), [(2.0, 1.5, 0.2), (0.7, 1.0, 0.0)])
def test_the_lectures_wavy_parabola_needs_the_moving_average(start, lr, beta1):
    """From 2 the first step lands at 0.29; local curvature is up to 300 times that of the parabola there."""
    averaged = distances(start, lr, (beta1, 0.999), 60)
    assert max(averaged[9:]) < 3e-3
    assert max(averaged[40:]) < 1e-6
    local = distances(start, lr, (beta1, 0.0), 1000)
    assert min(local[1:]) > 0.05
    x = torch.linspace(-0.2, 0.2, 400_001, dtype=torch.float64)
    assert abs(float(x[wavy(x).argmin()])) == pytest.approx(LOWEST, abs=1e-6)


def signs(params, seed):
    draw = torch.Generator().manual_seed(seed)
    return [(2 * torch.randint(2, p.shape, generator=draw) - 1).to(p) for p in params]


def flat(tensors):
    return torch.cat([t.detach().reshape(-1).double() for t in tensors])


def off(model, data, dtype):
    """The error of the difference's product, relative to the exact one in float64."""
    exact, (x, y) = copy.deepcopy(model).double(), data
    model = model.to(dtype)
    z = signs(model.parameters(), 1)
    wide = [t.double() for t in z]
    batch = steppe.Batch(exact, nets.losses, (x.double(), y))
    _, g, [wanted] = with_products(batch, list(exact.parameters()), [wide])
    batch = steppe.Batch(model, nets.losses, (x.to(dtype), y))
    losses, slopes, [found] = with_differences(batch, list(model.parameters()), [z])
    assert losses.shape == (len(y),)
    torch.testing.assert_close(flat(slopes), flat(g), rtol=1e-3, atol=1e-5)
    return float((flat(found) - flat(wanted)).norm() / flat(wanted).norm())


def test_the_difference_is_as_near_as_it_says():
    torch.manual_seed(0)
    vit = build("vit", channels=1, size=8, width=64)
    data = torch.randn(4, 1, 8, 8), torch.randint(10, (4,))
    assert 0.02 < off(vit, data, torch.float32) < 0.3
    assert off(vit, data, torch.float64) < 2e-3
    assert off(*nets.transformer(), torch.float64) < 2e-3
    assert off(*nets.mlp(), torch.float32) < 0.02


def test_the_difference_sees_the_kinks_of_relu():
    torch.manual_seed(0)
    model = build("cnn", channels=1, size=8, width=8)
    batch = steppe.Batch(model, nets.losses, (torch.randn(16, 1, 8, 8), torch.randint(10, (16,))))
    params = list(model.parameters())
    z = [signs(params, seed) for seed in range(8)]
    _, _, exact = with_products(batch, params, z)
    _, _, found = with_differences(batch, params, z)
    size = [sum(float(flat(each).abs().mean()) for each in products) for products in (exact, found)]
    assert 1.5 < size[1] / size[0] < 6


@pytest.mark.parametrize("micro", [1, 3])
def test_the_difference_draws_the_same_twice_moves_statistics_once_and_leaves_the_weights(micro):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Dropout(0.5), nn.Linear(8, 3)).double()
    twin, data = copy.deepcopy(model), nets.data(6)
    params, start = list(model.parameters()), copy.deepcopy(model.state_dict())
    z = [signs(params, 1), signs(params, 2)]
    found, slopes, products = [], [], []
    for each, which in ((model, with_differences), (twin, with_products)):
        torch.manual_seed(1)
        batch = steppe.Batch(each, nets.losses, data, micro=micro)
        losses, g, along = which(batch, list(each.parameters()), z)
        found.append(losses), slopes.append(g), products.append(along)
    torch.testing.assert_close(*found)
    torch.testing.assert_close(*slopes)
    torch.testing.assert_close(*products, rtol=1e-2, atol=1e-3)
    assert all(torch.equal(p, start[name]) for name, p in model.named_parameters())
    assert all(map(torch.equal, model.buffers(), twin.buffers()))
    assert int(model[1].num_batches_tracked) == 1
    assert all(p.grad is None for p in params)


class Counted:
    """A network that counts how often its first layer runs forward, and backward for the first time."""

    def __init__(self, net):
        self.model, self.data = net()
        self.forward = self.backward = 0
        self.model[0].register_forward_hook(lambda module, inputs, output: self.see(output))

    def see(self, output):
        self.forward += 1
        if output.requires_grad:
            output.register_hook(lambda g: setattr(self, "backward", self.backward + 1))


@pytest.mark.parametrize("n", [1, 3])
@pytest.mark.parametrize("probes", [1, 2])
@pytest.mark.parametrize("product", ["exact", "difference"])
def test_the_cost_is_what_it_runs(product, n, probes):
    seen = Counted(nets.mlp)
    opt = AdaHessian(seen.model.parameters(), product=product, n=n, probes=probes)
    for _ in range(6):
        opt.step(steppe.Batch(seen.model, nets.losses, seen.data))
    due = 6 // n
    if product == "difference":
        assert seen.forward == seen.backward == 6 + due * probes
        assert opt.extra == (probes, probes)
        assert opt.cost() == pytest.approx(seen.forward / 6)
    else:
        assert seen.forward == 6
        assert opt.extra == (0, 3 * probes)
        assert opt.cost() == pytest.approx(1 + (opt.extra[0] + 2 * opt.extra[1]) / 3 * due / 6)


def test_a_product_is_two_gradients_of_matrix_products():
    """Counted in multiplications: exactly what ``cost`` says of a network of linear layers."""
    from torch.utils.flop_counter import FlopCounterMode

    torch.manual_seed(0)
    model = nn.Sequential(*[nn.Sequential(nn.Linear(32, 32), nn.Tanh()) for _ in range(12)])
    data = torch.randn(8, 32), torch.randint(32, (8,))

    def flops(**options):
        opt = AdaHessian(model.parameters(), **options)
        with FlopCounterMode(display=False) as counter:
            for _ in range(4):
                opt.step(steppe.Batch(model, nets.losses, data))
        return counter.get_total_flops(), opt.cost()

    model_of_sgd = steppe.Batch(model, nets.losses, data)
    with FlopCounterMode(display=False) as counter:
        for _ in range(4):
            model_of_sgd.backward(None)
    gradient = counter.get_total_flops()
    for options in ({}, {"n": 2}, {"probes": 2}, {"product": "difference"}, {"product": "difference", "n": 4}):
        counted, cost = flops(**options)
        assert counted / gradient == pytest.approx(cost, rel=0.05)


def graphs():
    return sum(issubclass(type(t), torch.Tensor) and t.grad_fn is not None for t in gc.get_objects())


def alive():
    parts = {t.data_ptr(): t.nbytes for t in gc.get_objects() if type(t) in PLAIN}
    return sum(parts.values())


@pytest.mark.parametrize("options", [{}, {"n": 3, "probes": 2}, {"product": "difference"}], ids=str)
def test_200_steps_leave_no_graph_behind_and_hold_no_more_memory(options):
    model, data = nets.convnet()
    opt = AdaHessian(model.parameters(), lr=1e-3, **options)
    batch = steppe.Batch(model, nets.losses, data)
    for _ in range(3):
        opt.step(batch)
    gc.collect()
    gc.disable()
    try:
        before = graphs(), alive()
        for _ in range(200):
            opt.step(batch)
        assert (graphs(), alive()) == before
    finally:
        gc.enable()
    assert all(p.grad.grad_fn is None for p in model.parameters())
    assert not any(t.requires_grad for kept in opt.state.values() for t in kept.values())


@pytest.mark.parametrize(("n", "copies"), [(1, 2), (5, 3)])
def test_between_steps_it_holds_two_copies_of_the_weights_or_three(n, copies):
    model = nn.Sequential(nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 64))
    size = sum(p.nbytes for p in model.parameters())
    opt = AdaHessian(model.parameters(), n=n)
    opt.step(steppe.Batch(model, nets.losses, (torch.randn(2, 64), torch.randint(64, (2,)))))
    held = sum(t.untyped_storage().nbytes() for kept in opt.state.values() for t in kept.values() if t.ndim)
    assert held == copies * size
    assert not opt._seen


def test_the_peak_of_many_steps_is_that_of_two():
    def run(steps):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 64))
        opt = AdaHessian(model.parameters())
        data = torch.randn(2, 64), torch.randint(64, (2,))
        for _ in range(steps):
            opt.step(steppe.Batch(model, nets.losses, data))

    assert peak_memory(lambda: run(12)) <= peak_memory(lambda: run(2)) * 1.01


def test_the_rows_of_an_embedding_share_a_value_and_other_matrices_do_not():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(7, 4), nn.Flatten(), nn.Linear(12, 3))
    data = torch.randint(7, (5, 3)), torch.randint(3, (5,))
    opt = AdaHessian(model.parameters())
    opt.step(steppe.Batch(model, nets.losses, data))
    table, matrix = (opt.state[model[i].weight]["exp_diagonal_sq"] for i in (0, 2))
    assert torch.equal(table, table[:, :1].expand_as(table))
    assert not torch.equal(matrix, matrix[:, :1].expand_as(matrix))
    opt = AdaHessian(model.parameters(), block="row")
    opt.step(lambda: F.cross_entropy(model(data[0]), data[1]))
    for p in (model[0].weight, model[2].weight):
        square = opt.state[p]["exp_diagonal_sq"]
        torch.testing.assert_close(square, square[:, :1].expand_as(square))


@pytest.mark.parametrize("product", ["exact", "difference"])
def test_a_parameter_that_takes_no_part_stays_and_one_that_comes_later_waits_for_its_probe(product):
    model, data = nets.mlp()
    spare = nn.Parameter(torch.ones(3, dtype=torch.float64))
    opt = AdaHessian([*model[0].parameters(), spare], n=4, product=product)
    opt.add_param_group({"params": model[2].parameters(), "weight_decay": 0.1})
    batch = steppe.Batch(model, nets.losses, data)
    opt.step(batch)
    assert torch.equal(spare, torch.ones(3))
    assert spare not in opt.state
    opt.add_param_group({"params": model[4].parameters(), "lr": 0.01})
    start, moved = model[4].weight.detach().clone(), model[0].weight.detach().clone()
    for i in range(1, 6):
        opt.step(batch)
        assert torch.equal(start, model[4].weight) == (i < 4)
        assert not torch.equal(moved, model[0].weight)
    assert int(opt.state[model[4].weight]["step"]) == 2
    assert int(opt.state[model[0].weight]["step"]) == opt.steps == 6


def test_a_frozen_model_part_is_left_alone():
    model, data = nets.mlp()
    model[0].requires_grad_(False)
    start = model[0].weight.clone()
    opt = AdaHessian(model.parameters(), weight_decay=0.1)
    opt.step(steppe.Batch(model, nets.losses, data))
    assert torch.equal(start, model[0].weight)


def test_the_gradient_goes_to_those_asked_for_and_the_diagonal_is_that_of_all():
    model, data = nets.mlp()
    opt, params = AdaHessian(model.parameters()), list(model.parameters())
    batch = steppe.Batch(model, nets.losses, data)
    with torch.no_grad():
        opt.backward(batch, [])
        assert all(p.grad is None for p in params)
        opt.backward(batch, params[:2], share=0.5)
    assert [p.grad is not None for p in params] == [True] * 2 + [False] * 4
    assert set(opt._seen) == set(params)
    opt.forget()
    assert not opt._seen


@pytest.mark.parametrize("product", ["exact", "difference"])
def test_shares_of_a_step_add_up_and_a_scaled_loss_is_unscaled(product):
    model, (x, y) = nets.mlp()
    whole, parts = AdaHessian(model.parameters(), product=product), AdaHessian(model.parameters(), product=product)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**12)
    scaler.scale(torch.ones(1))
    with torch.no_grad():
        whole.backward(steppe.Batch(model, nets.losses, (x, y)), [])
        for rows, share in ((slice(0, 4), 1 / 3), (slice(4, 12), 2 / 3)):
            parts.backward(steppe.Batch(model, nets.losses, (x[rows], y[rows])), [], share=share, scaler=scaler)
    for p in model.parameters():
        torch.testing.assert_close(whole._seen[p], parts._seen[p], rtol=1e-6, atol=1e-8)


def test_the_estimate_is_the_diagonal_in_the_mean_of_many_probes():
    model, data = nets.mlp()
    objective = steppe.curvature.Objective(model, nets.losses, [data])
    A = steppe.curvature.Operator(objective)
    wanted = torch.diagonal(A @ torch.eye(A.size, dtype=torch.float64))
    opt = AdaHessian(model.parameters(), probes=400)
    with torch.no_grad():
        opt.backward(steppe.Batch(model, nets.losses, data), [])
    found = flat([opt._seen[p] for p in model.parameters()])
    spread = ((A @ torch.eye(A.size, dtype=torch.float64)) ** 2).sum(1) - wanted**2
    assert float(((found - wanted) / (spread / 400).sqrt()).abs().max()) < 4.5
