"""What the steps of an optimizer really ran."""

from __future__ import annotations

import math
from dataclasses import dataclass

from .method import FORWARD


@dataclass
class Stats:
    """Passes that ran, counted in examples; a bare closure counts as one example.

    Args:
        steps: steps taken.
        examples: examples handed to the steps.
        forward: examples that went forward through the network.
        backward: examples that went backward; one whose weight gradients are taken for a share f of the weights only
            counts ``(1 + f)/2``.
        sharp: steps on which the weights were perturbed.
        skipped: steps that a gradient scaler skipped, because the scaled gradients overflowed.
        moved: effective ρ of the last perturbed step, where weights are bf16 or fp16: ``‖Δ‖``, Δ the change of the
            weights that really happened; summed over inner steps. None where rounding plays no part.
        projected: effective ρ along what was asked, ``Δᵀε/‖ε‖``; as ``moved``.
    """

    steps: int = 0
    examples: int = 0
    forward: float = 0.0
    backward: float = 0.0
    sharp: int = 0
    skipped: int = 0
    moved: float | None = None
    projected: float | None = None

    @property
    def propagations(self) -> float:
        """Propagations a step: 1 is a forward and a backward pass over the batch, the forward pass ⅓ of it."""
        return FORWARD * (self.forward + 2 * self.backward) / max(1, self.examples)

    def count(self, examples: float, *, share: float = 1.0, forward: float = 1, backward: float = 1) -> None:
        """Add ``forward`` forward and ``backward`` backward passes over so many examples."""
        self.forward += forward * examples
        self.backward += backward * examples * (1 + share) / 2

    def measure(self, squares: list[float], inner: int) -> None:
        """Note the effective ρ of an inner step from ``‖Δ‖², Δᵀε, ‖ε‖²``."""
        moved, along, asked = math.sqrt(squares[0]), squares[1], math.sqrt(squares[2])
        projected = along / asked if asked else 0.0
        self.moved = moved + (self.moved or 0.0 if inner else 0.0)
        self.projected = projected + (self.projected or 0.0 if inner else 0.0)
