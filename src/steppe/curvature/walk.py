"""The mean loss at many places, from one run through the data."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias

import torch
from torch import Tensor

from .. import rng
from .objective import FORWARD, Objective

Accuracy: TypeAlias = Callable[[Any, Any], Tensor]
Progress: TypeAlias = Callable[[float], None]


def walk(
    objective: Objective,
    go: Callable[[int], None],
    places: int,
    accuracy_fn: Accuracy | None = None,
    progress: Progress = lambda share: None,
) -> tuple[Tensor, Tensor | None]:
    """Return the mean loss and accuracy at each of several places; what is not finite is returned as it is.

    Each batch is read once and taken to all places, so all of them see the same examples, whatever the loader costs.

    Args:
        objective: the loss.
        go: ``go(i)`` sets the weights to those of place i; the caller puts them back.
        places: number of places.
        accuracy_fn: ``accuracy_fn(output, batch)`` returns 1 for each example that the model has right and 0 for the
            others, shape (B,). ``output`` is what the model returned to ``loss_fn``: there is no second forward pass.
        progress: told the share done.

    Returns:
        Two float64 tensors on the CPU, shape (places,); None for an accuracy that nobody asked for.

    Raises:
        ValueError: if ``loss_fn`` did not call the model, so there is no output; or if an accuracy is not (B,).

    Cost:
        1/3 for each place.
    """
    exact = torch.float32 if objective.device.type == "mps" else torch.float64
    totals = torch.zeros(2, places, dtype=exact, device=objective.device)
    weight = torch.zeros((), dtype=exact, device=objective.device)
    devices = {p.device for p in objective.model.parameters()}
    outputs: list[Any] = []
    keep = objective.model.register_forward_hook(lambda module, inputs, output: outputs.append(output))
    examples, done = objective.examples, 0
    try:
        with objective.still(), torch.no_grad():
            for batch in objective.batches():
                states = rng.states(devices) if objective.mode == "train" else {}  # then dropout repeats
                for i in range(places):
                    go(i)
                    rng.put_back(states)
                    outputs.clear()
                    losses = objective.losses(batch, finite=False)
                    weights = objective.weights_of(batch, losses)
                    totals[0, i] += (weights * losses).sum(dtype=exact)
                    if accuracy_fn is not None:
                        right = _right(accuracy_fn, outputs, batch, losses)
                        totals[1, i] += (weights * right).sum(dtype=exact)
                    objective.count(FORWARD, len(losses))
                    progress((done + (i + 1) / places * len(losses)) / examples)
                weight += weights.sum(dtype=exact)
                done += len(losses)
    finally:
        keep.remove()
    means = objective.mean(totals, weight).double().cpu()
    return means[0], None if accuracy_fn is None else means[1]


def _right(accuracy_fn: Accuracy, outputs: list[Any], batch: Any, losses: Tensor) -> Tensor:
    if not outputs:
        raise ValueError("accuracy_fn has nothing to look at: loss_fn did not call the model")
    right = accuracy_fn(outputs[-1], batch)
    if right.shape != losses.shape:
        raise ValueError(
            f"accuracy_fn returned shape {tuple(right.shape)} for {len(losses)} examples: return 0 or 1 for each, (B,)"
        )
    return right.to(losses)
