"""What the steps of an optimizer really ran."""

from __future__ import annotations

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
    """

    steps: int = 0
    examples: int = 0
    forward: float = 0.0
    backward: float = 0.0
    sharp: int = 0

    @property
    def propagations(self) -> float:
        """Propagations a step: 1 is a forward and a backward pass over the batch, the forward pass ⅓ of it."""
        return FORWARD * (self.forward + 2 * self.backward) / max(1, self.examples)

    def count(self, examples: int, *, share: float = 1.0, backward: int = 1) -> None:
        """Add a forward pass and ``backward`` backward passes over so many examples."""
        self.forward += examples
        self.backward += backward * examples * (1 + share) / 2
