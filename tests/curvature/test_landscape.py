"""Landscapes around a model."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import nets
from steppe.curvature.landscape import landscape
from steppe.curvature.objective import Objective

NETS = [nets.mlp, nets.convnet, nets.transformer]


def cut(data, size=5):
    x, y = data
    return [(x[i : i + size], y[i : i + size]) for i in range(0, len(x), size)]


def objective(make=nets.convnet, **how):
    model, data = make()
    return Objective(model, nets.losses, cut(data), **how)


def right(output, batch):
    return output.argmax(1) == batch[1]


def snapshot(model):
    return (
        {name: t.clone() for name, t in model.state_dict().items()},
        [module.training for module in model.modules()],
        [(p.requires_grad, None if p.grad is None else p.grad.clone()) for p in model.parameters()],
        [len(module._forward_hooks) for module in model.modules()],
        torch.get_rng_state(),
    )


def assert_same(one, other):
    for name, t in one[0].items():
        assert torch.equal(t, other[0][name]), name
    assert one[1] == other[1]
    for (required, grad), (required_then, grad_then) in zip(one[2], other[2], strict=True):
        assert required == required_then
        assert (grad is None and grad_then is None) or torch.equal(grad, grad_then)
    assert one[3] == other[3]
    assert torch.equal(one[4], other[4])


def used(make, mode):
    """A model in training, with gradients, with a frozen parameter, and with one layer in another mode."""
    model, data = make()
    nets.losses(model, data).mean().backward()
    model.train()
    list(model.modules())[-1].eval()
    next(model.parameters()).requires_grad_(False)
    return Objective(model, nets.losses, cut(data), mode=mode)


@pytest.mark.parametrize("mode", ["eval", "train"])
@pytest.mark.parametrize("directions", ["filter", "adversarial", "eigenvectors"])
@pytest.mark.parametrize("make", NETS)
def test_the_model_is_as_it_was(make, directions, mode):
    here = used(make, mode)
    before = snapshot(here.model)
    found = landscape(here, directions=directions, points=3, accuracy_fn=right)
    assert_same(before, snapshot(here.model))
    assert found.losses.isfinite().all()


@pytest.mark.parametrize("mode", ["eval", "train"])
def test_an_exception_in_the_middle_leaves_the_model_as_it_was(mode):
    here = used(nets.convnet, mode)
    before = snapshot(here.model)
    calls = []

    def broken(output, batch):
        calls.append(1)
        if len(calls) == 7:
            raise KeyboardInterrupt
        return right(output, batch)

    with pytest.raises(KeyboardInterrupt):
        landscape(here, points=5, accuracy_fn=broken)
    assert_same(before, snapshot(here.model))


@pytest.mark.parametrize("mode", ["eval", "train"])
@pytest.mark.parametrize("make", NETS)
def test_each_point_is_the_loss_there(make, mode):
    weights = lambda batch: 1 + batch[1].double()  # noqa: E731
    here = objective(make, mode=mode, weights=weights)
    axes = torch.randn(2, here.size, dtype=torch.float64)
    found = landscape(here, directions=axes, points=3, radius=0.1, accuracy_fn=right)
    assert found.coordinates.tolist() == [-0.1, 0, 0.1]
    for i, a in enumerate(found.coordinates):
        for j, b in enumerate(found.coordinates):
            there = copy.deepcopy(here.model)
            nn.utils.vector_to_parameters(here.join(here.params) + a * axes[0] + b * axes[1], there.parameters())
            each = Objective(there, nets.losses, here.loader, mode=mode, weights=weights)
            torch.testing.assert_close(found.losses[0, i, j], each.loss(), rtol=1e-12, atol=0)
            there.train(mode == "train")
            hits = torch.cat([weights(batch) * right(there(batch[0]), batch) for batch in here.loader])
            total = torch.cat([weights(batch) for batch in here.loader]).sum()
            torch.testing.assert_close(found.accuracies[0, i, j], hits.sum() / total, rtol=0, atol=1e-12)
    assert here.loss() == found.losses[0, 1, 1]


def test_dropout_is_the_same_at_all_points():
    model = nn.Sequential(nn.Linear(6, 64), nn.Dropout(), nn.Linear(64, 3)).double()
    here = Objective(model, nets.losses, cut(nets.data(6)), mode="train")
    nothing = torch.zeros(here.size, dtype=torch.float64)
    nothing[0] = 1e-300
    losses = landscape(here, dims=1, directions=nothing, points=5).losses
    assert (losses == here.loss()).all()


def test_a_quadratic_along_eigenvectors():
    model = nn.Linear(5, 1, bias=False).double()
    nn.init.zeros_(model.weight)
    basis = torch.linalg.qr(torch.randn(5, 5, dtype=torch.float64))[0]
    values = torch.tensor([7.0, 3.0, 1.0, 0.5, 0.1], dtype=torch.float64)
    x = (5 * values / 2).sqrt()[:, None] * basis.T  # the mean of (x w)² is ½ wᵀ H w
    here = Objective(model, lambda model, batch: model(batch)[:, 0].square(), [x[:2], x[2:]])
    found = landscape(here, directions=basis.T[:2], points=5, radius=2.0)
    a, b = torch.meshgrid(found.coordinates, found.coordinates, indexing="ij")
    torch.testing.assert_close(found.loss, (7 * a**2 + 3 * b**2) / 2, rtol=0, atol=1e-10)
    found = landscape(here, directions="eigenvectors", points=5, radius=2.0)
    assert found.converged
    assert found.names == ("eigenvector 1, λ = 7", "eigenvector 2, λ = 3")
    torch.testing.assert_close(found.loss, (7 * a**2 + 3 * b**2) / 2, rtol=1e-5, atol=0)


@pytest.mark.parametrize("directions", ["filter", "adversarial"])
def test_an_affine_loss_gives_a_plane(directions):
    model = nn.Linear(6, 4).double()
    x = torch.randn(11, 6, dtype=torch.float64)
    slopes = torch.randn(11, 4, dtype=torch.float64)
    here = Objective(model, lambda model, batch: (model(batch[0]) * batch[1]).sum(1) + 2, cut((x, slopes)))
    found = landscape(here, directions=directions, points=7, radius=3.0)
    a, b = torch.meshgrid(found.coordinates, found.coordinates, indexing="ij")
    table = torch.stack([torch.ones(49, dtype=torch.float64), a.flatten(), b.flatten()], 1)
    plane = torch.linalg.lstsq(table, found.loss.flatten()[:, None]).solution
    torch.testing.assert_close(table @ plane, found.loss.flatten()[:, None], rtol=0, atol=1e-10)
    assert plane[1].abs() > 1e-3
    torch.testing.assert_close(plane[0, 0], here.loss(), rtol=0, atol=1e-10)


@pytest.mark.parametrize("dims", [1, 2])
def test_scaling_a_layer_up_and_the_next_one_down_changes_nothing(dims):
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(2, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(16, 3)
    ).double()
    scaled = copy.deepcopy(model)
    with torch.no_grad():
        scaled[0].weight *= 100
        scaled[0].bias *= 100
        scaled[2].weight /= 100
    data = cut(nets.data(2, 6, 6))
    one, other = (landscape(Objective(net, nets.losses, data), dims=dims, points=5, draws=2) for net in (model, scaled))
    torch.testing.assert_close(one.losses, other.losses, rtol=0, atol=1e-10)
    assert one.losses.std() > 1e-2


def test_draws_are_a_function_of_the_seed_and_of_the_shapes():
    first, again, other = (landscape(objective(nets.mlp), points=3, draws=3, seed=seed) for seed in (1, 1, 2))
    assert torch.equal(first.losses, again.losses)
    assert not torch.isclose(first.losses, other.losses)[:, 0].any()
    assert first.losses.shape == (3, 3, 3)
    assert not torch.isclose(first.losses[0], first.losses[1])[0].any()
    torch.testing.assert_close(first.loss, first.losses.mean(0))
    torch.testing.assert_close(first.spread, first.losses.std(0))
    assert first.spread[1, 1] == 0
    assert landscape(objective(nets.mlp), points=3, seed=1).losses.equal(first.losses[:1])
    assert landscape(objective(nets.mlp), points=3).spread.isnan().all()


def test_models_of_one_architecture_get_the_same_draws():
    signs = []
    for seed in (0, 1):
        model, data = nets.mlp(seed)
        here = Objective(model, nets.losses, [data])
        moved = []

        def watching(model, batch, moved=moved, here=here):
            moved.append(here.join(here.params).clone())
            return nets.losses(model, batch)

        here.loss_fn = watching
        landscape(here, dims=1, points=3)
        signs.append((moved[2] - moved[1]).sign())
    assert torch.equal(*signs)
    assert signs[0].abs().sum() == 6 * 8 + 8 * 8 + 8 * 3


def test_what_is_not_finite_is_kept():
    model = nn.Linear(1, 1, bias=False).double()
    nn.init.zeros_(model.weight)
    here = Objective(model, lambda model, x: torch.log1p(model(x)[:, 0]), [torch.ones(3, 1, dtype=torch.float64)])
    direction = torch.ones(1, dtype=torch.float64)
    found = landscape(here, dims=1, directions=direction, points=5, radius=2.0).loss
    assert found[0].isnan()
    assert found[1] == -math.inf
    torch.testing.assert_close(found[2:], torch.log1p(torch.arange(3.0).double()))


def test_some_parameters_alone_move():
    here = objective(nets.mlp, params=r"^4\.")
    before = [p.detach().clone() for p in here.model.parameters()]
    seen = []

    def watching(model, batch):
        seen.append([torch.equal(p, then) for p, then in zip(model.parameters(), before, strict=True)])
        return nets.losses(model, batch)

    here.loss_fn = watching
    landscape(here, dims=1, points=2)
    assert seen == [[True, True, True, True, False, True]] * len(seen)


def test_cost_and_progress():
    here = objective()
    shares = []
    found = landscape(here, points=4, draws=2, accuracy_fn=right, progress=shares.append)
    assert found.passes == pytest.approx(2 * 16 / 3, abs=1e-9)
    assert shares == sorted(shares)
    assert 0 < shares[0] < 0.05
    assert shares[-1] == pytest.approx(1, abs=1e-12)
    assert landscape(here, directions="adversarial", points=2).passes == pytest.approx(1 + 4 / 3, abs=1e-9)


def test_one_forward_pass_a_point_and_one_run_through_the_data():
    model, data = nets.mlp()
    batches, runs, forwards = cut(data), [], []

    class Loader:
        def __iter__(self):
            runs.append(1)
            return iter(batches)

    here = Objective(model, nets.losses, Loader())
    assert here.examples == nets.B
    runs.clear()
    model.register_forward_hook(lambda *_: forwards.append(1))
    landscape(here, points=3, accuracy_fn=right)
    assert len(runs) == 1
    assert len(forwards) == 9 * len(batches)


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ({"dims": 3}, "dims=3"),
        ({"points": 1}, "points=1"),
        ({"radius": 0.0}, "radius=0.0"),
        ({"radius": math.nan}, "radius=nan"),
        ({"draws": 0}, "draws=0"),
        ({"draws": 2, "directions": "eigenvectors"}, "draws=2: only"),
        ({"draws": 2, "directions": torch.ones(2, 155)}, "draws=2: only"),
        ({"directions": "gradient"}, "directions='gradient'"),
        ({"directions": torch.ones(2, 3)}, r"shape \(2, 3\)"),
        ({"accuracy_fn": lambda output, batch: output}, r"accuracy_fn returned shape \(5, 3\) for 5 examples"),
    ],
)
def test_bad_input(how, message):
    with pytest.raises(ValueError, match=message):
        landscape(objective(nets.mlp), **{"points": 2, **how})


def test_a_loss_that_does_not_call_the_model_has_no_accuracy():
    model, data = nets.mlp()
    here = Objective(
        model, lambda model, batch: F.cross_entropy(model.forward(batch[0]), batch[1], reduction="none"), [data]
    )
    assert landscape(here, points=2).accuracies is None
    with pytest.raises(ValueError, match="did not call the model"):
        landscape(here, points=2, accuracy_fn=right)
