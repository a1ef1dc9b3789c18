"""The axes of landscapes."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import nets
from steppe.curvature.directions import adversarial, eigenvectors, filter_normalized, given
from steppe.curvature.objective import Objective


def objective(make=nets.convnet, size=5, **how):
    model, (x, y) = make()
    batches = [(x[i : i + size], y[i : i + size]) for i in range(0, len(x), size)]
    return Objective(model, nets.losses, batches, **how)


def filters(t):
    return t.flatten(1).norm(dim=1)


@pytest.mark.parametrize("make", [nets.mlp, nets.convnet, nets.transformer])
def test_filters_have_the_norms_of_the_weights_and_vectors_stand_still(make):
    here = objective(make)
    direction = here.split(filter_normalized(here, here.generator(0, "")))
    for name, p, d in zip(here.names, here.params, direction, strict=True):
        if p.ndim > 1:
            torch.testing.assert_close(filters(d), filters(p.detach()), rtol=0, atol=1e-10, msg=name)
            assert (d - p).norm() > 0.1 * p.norm()
        else:
            assert not d.any(), name


def test_vectors_move_as_one_filter_if_asked_to():
    here = objective(nets.mlp)
    still, moving = (
        here.split(filter_normalized(here, here.generator(0, ""), vectors=vectors)) for vectors in (False, True)
    )
    for p, one, other in zip(here.params, still, moving, strict=True):
        assert torch.equal(one, other) == (p.ndim > 1)
        torch.testing.assert_close(other.norm(), p.detach().norm(), rtol=0, atol=1e-10)


def test_filters_of_zeros_stand_still():
    here = objective(nets.mlp)
    with torch.no_grad():
        here.params[0][2] = 0
    direction = here.split(filter_normalized(here, here.generator(0, "")))[0]
    assert direction.isfinite().all()
    assert not direction[2].any()
    assert direction[[0, 1, 3]].any(dim=1).all()


def test_biases_alone_have_no_filters():
    here = objective(nets.mlp, params="bias")
    with pytest.raises(ValueError, match="filter-normalised direction is 0"):
        filter_normalized(here, here.generator(0, ""))


def test_adversarial_directions_are_the_gradients_of_two_halves():
    here = objective(weights=lambda batch: 1.0 + batch[1])
    generator = here.generator(3, "")
    axes = adversarial(here, generator)
    torch.testing.assert_close(axes @ axes.T, torch.eye(2, dtype=torch.float64), rtol=0, atol=1e-12)

    x, y = (torch.cat(each) for each in zip(*here.loader, strict=True))
    generator, seen, turns = here.generator(3, ""), 0, []
    for batch, _ in here.loader:
        turns.append((torch.randperm(len(batch), generator=generator) + seen) % 2)
        seen += len(batch)
    turn = torch.cat(turns)
    assert turn.sum() == len(x) / 2
    gradients = [
        Objective(here.model, nets.losses, [(x[turn == half], y[turn == half])], weights=here.weights).gradient()
        for half in (0, 1)
    ]
    torch.testing.assert_close(axes[0], gradients[0] / gradients[0].norm(), rtol=0, atol=1e-12)
    inside = axes.T @ (axes @ gradients[1])
    torch.testing.assert_close(inside, gradients[1], rtol=0, atol=1e-12)
    assert axes[1] @ gradients[1] > 0


def test_adversarial_directions_cost_one_gradient():
    here = objective()
    adversarial(here, here.generator(0, ""))
    assert here.passes == pytest.approx(1, abs=1e-12)


def test_batches_of_one_example_are_halved_too():
    here = objective(size=1)
    assert adversarial(here, here.generator(0, "")).isfinite().all()


def test_parallel_halves_span_no_plane():
    model, (x, y) = nets.mlp()
    here = Objective(model, nets.losses, [(x[:1].expand(4, -1), y[:1].expand(4))])
    with pytest.raises(ValueError, match="parallel"):
        adversarial(here, here.generator(0, ""))


def test_flat_losses_have_no_adversary():
    model, data = nets.mlp()
    here = Objective(model, lambda model, batch: 0 * nets.losses(model, batch), [data])
    with pytest.raises(ValueError, match="gradient of half of the data is 0"):
        adversarial(here, here.generator(0, ""))


def test_eigenvectors_are_the_hessians():
    model = nn.Linear(4, 1, bias=False).double()
    scales = torch.tensor([3.0, 1.0, 9.0, 2.0], dtype=torch.float64)
    data = torch.diag(scales.sqrt()), torch.zeros(4, 1)  # the mean of (√s w)² has the Hessian s/2
    here = Objective(model, lambda model, batch: (model(batch[0])[:, 0]).square(), [data])
    found = eigenvectors(here, 2)
    assert found.converged
    torch.testing.assert_close(found.vectors.abs(), torch.eye(4, dtype=torch.float64)[[2, 0]], rtol=0, atol=1e-3)
    assert found.names == ("eigenvector 1, λ = 4.5", "eigenvector 2, λ = 1.5")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda v: v[:1], r"shape \(1, 155\): dims=2 takes 2 flat vectors of the 155 entries"),
        (lambda v: v[:, 1:], r"shape \(2, 154\)"),
        (lambda v: v * torch.tensor([[1.0], [0.0]]), "a direction is 0"),
        (lambda v: v / 0, "not finite"),
    ],
)
def test_directions_that_do_not_fit_are_refused(change, message):
    here = objective(nets.mlp)
    vectors = torch.randn(2, here.size, dtype=torch.float64)
    assert torch.equal(given(here, list(vectors), 2).vectors, vectors)
    with pytest.raises(ValueError, match=message):
        given(here, change(vectors), 2)
