"""Directions in the space of the weights, along which a landscape is drawn."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Generator, Tensor

from .. import vec
from ..examples import extent, take
from .eigenvalues import eigenvalues
from .objective import Objective, exact
from .operator import Operator


@dataclass(frozen=True)
class Directions:
    """The axes of a landscape."""

    vectors: Tensor
    """Flat vectors over the objective's parameters, shape (dims, n)."""
    names: tuple[str, ...]
    """What to write at each axis."""
    converged: bool = True
    """Whether they are what they are called: Hessian eigenvectors might not have been found."""


def filter_normalized(objective: Objective, generator: Generator, *, vectors: bool = False) -> Tensor:
    """Return a Gaussian direction that has, in each filter, the norm of the weights' filter.

    ``d_f ← d_f ‖w_f‖/‖d_f‖`` for each filter f, a slice along dimension 0. Scaling one layer of a ReLU network up and
    the next one down, which leaves the network's outputs as they are, scales the direction alike.

    Args:
        objective: the parameters.
        generator: on the objective's device.
        vectors: whether tensors of at most one dimension (biases, the scales of norm layers) move too, each as one
            filter; default False: the direction is 0 there.

    Returns:
        Shape (n,), in the type of the objective's vectors.

    Raises:
        ValueError: if the direction would be 0.

    Cost:
        None.

    Source:
        Li et al. 2018, "Visualizing the loss landscape of neural nets", section 4.
    """
    weights = [p.detach().to(objective.device, objective.dtype) for p in objective.params]
    noise = [vec.randn(w, generator) for w in weights]  # the same draws, whatever is left out below
    for w, d, size, length in zip(weights, noise, vec.filter_norms(weights), vec.filter_norms(noise), strict=True):
        if w.ndim > 1 or vectors:
            d.mul_(torch.where(length > 0, size / length, 0.0))
        else:
            d.zero_()
    direction = objective.join(noise)
    if not direction.any():
        raise ValueError("the filter-normalised direction is 0: none of the parameters chosen is a non-zero tensor of "
                         "two dimensions or more")  # fmt: skip
    return direction


def adversarial(objective: Objective, generator: Generator) -> Tensor:
    """Return the gradients of two random halves of the data, made orthonormal.

    ``u = g_x/‖g_x‖``, ``v = (g_y − (uᵀg_y)u)/‖…‖`` with ``g_x = ∇L_{B_x}(w)``, ``g_y = ∇L_{B_y}(w)``, and B_x, B_y two
    halves of the data that share no example. The paper draws along ηg_x and ηg_y, η the learning rate, and calls
    them orthogonal, which gradients of disjoint examples need not be. The plane is the same; here a distance in the
    picture is one between weights, in the unit of SAM's ρ. At u lies SAM's ascent, up to the choice of examples.

    Args:
        objective: the loss and the parameters.
        generator: which examples are in which half, on the objective's device.

    Returns:
        Shape (2, n).

    Raises:
        ValueError: if a gradient is 0, or both are parallel.

    Cost:
        1.

    Source:
        Du et al. 2022, "Efficient sharpness-aware minimization for improved training of neural networks", appendix A.5.
    """
    totals = torch.zeros(2, objective.size, dtype=objective.dtype, device=objective.device)
    weight = torch.zeros(2, dtype=exact(objective.device), device=objective.device)
    seen = 0
    with objective.still(), torch.enable_grad():
        for batch in objective.batches():
            size, device = extent(batch)
            turn = (torch.randperm(size, generator=generator, device=objective.device) + seen).to(device) % 2
            for half in (0, 1):
                rows = (turn == half).nonzero()[:, 0]
                if len(rows):
                    data = take(batch, rows, size)
                    losses = objective.losses(data)
                    weights = objective.weights_of(data, losses)
                    totals[half] += objective.join(objective.slopes((weights * losses).sum(), create_graph=False))
                    weight[half] += weights.sum().to(weight)
            seen += size
            objective.count(1, size)
    u, v = (objective.mean(total, each) for total, each in zip(totals, weight, strict=True))
    if not (u.any() and v.any()):
        raise ValueError("the gradient of half of the data is 0: there is no adversarial direction")
    u, v = u / u.norm(), v / v.norm()
    rest = v - (u @ v) * u
    rest -= (u @ rest) * u
    if rest.norm() <= 100 * torch.finfo(rest.dtype).eps:
        raise ValueError("the gradients of both halves of the data are parallel and span no plane: give other data")
    return torch.stack([u, rest / rest.norm()])


def eigenvectors(objective: Objective, dims: int, *, seed: int = 0) -> Directions:
    """Return the unit eigenvectors of the Hessian's largest eigenvalues: along them, ``L(w + aq) ≈ L + a qᵀg + ½λa²``.

    Args:
        objective: the loss and the parameters.
        dims: how many.
        seed: of the first Lanczos vector.

    Returns:
        Named by their eigenvalues; ``converged`` is that of `eigenvalues`.

    Raises:
        ValueError: as `eigenvalues` does.

    Cost:
        That of `eigenvalues` with ``k=dims``.
    """
    found = eigenvalues(Operator(objective), dims, seed=seed)
    pairs = zip(found.values.tolist(), found.converged.tolist(), strict=True)
    names = tuple(
        f"eigenvector {i}{'' if converged else ' (not converged)'}, λ = {value:.3g}"
        for i, (value, converged) in enumerate(pairs, 1)
    )
    return Directions(found.vectors, names, bool(found.converged.all()))


def given(objective: Objective, vectors: Tensor | Sequence[Tensor], dims: int) -> Directions:
    """Return directions that the caller made.

    Raises:
        ValueError: if they are not ``dims`` finite vectors of the objective's size, none of them 0.
    """
    stacked = (vectors if isinstance(vectors, Tensor) else torch.stack(list(vectors))).detach()
    stacked = stacked[None] if stacked.ndim == 1 else stacked
    if stacked.shape != (dims, objective.size):
        raise ValueError(
            f"directions of shape {tuple(stacked.shape)}: dims={dims} takes {dims} flat vectors of the "
            f"{objective.size} entries of the parameters"
        )
    stacked = stacked.to(objective.device, objective.dtype)
    if not (stacked.isfinite().all() and stacked.any(dim=1).all()):
        raise ValueError("a direction is 0, or not finite")
    return Directions(stacked, tuple(f"direction {i + 1}" for i in range(dims)))
