"""What a natural gradient asks of a block of the Fisher matrix, and what a pass shows of it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Protocol

from torch import Tensor
from torch.autograd.graph import GradientEdge

from ..vec import Vec


@dataclass
class Seen:
    """What one forward pass over some examples, and backward passes of scores through it, showed of one layer.

    With s_k the scores of all examples, shaped as the model's outputs and such that the Fisher matrix of the model is
    ``(1/B) Σ_n Σ_k Jₙᵀ s_kn s_knᵀ Jₙ`` (so drawn labels carry 1/√draws, and expected ones √p), the gradients are
    those of ``Σ_n s_knᵀ zₙ`` by the layer's outputs: of examples, not of their mean.
    """

    size: int = 0
    """Examples B; what holds the layer's inputs may have more rows than that."""
    inputs: list[Tensor] = field(default_factory=list)
    """What each call of the layer was given, detached."""
    edges: list[GradientEdge] = field(default_factory=list)
    """Where the gradient of each call's output is to be had."""
    gradients: list[list[Tensor | None]] = field(default_factory=list)
    """One list for each score: of each call the gradient, shaped as its output; None where it reaches no output."""


class Block(Protocol):
    """A diagonal block of the Fisher matrix: a layer's, or that of all parameters.

    A block holds no tensor of the run. Its state, a dict of named tensors, is `optimizer.state[block.params[0]]`: the
    running averages of the estimates, and beside them, under other names, what `invert` makes of them. The names
    `step`, `momentum` and `covers` are taken.

    Attributes:
        params: Its parameters, in order. The first carries the block's state.
        name: The layer's name, for messages.
        is_exact: Whether `solve` inverts `F + λI` for every λ it is given, with the F of `quadratic`.
    """

    params: Vec
    name: str

    @property
    def is_exact(self) -> bool:
        """See above."""

    def price(self) -> float:
        """Floating-point operations of an inversion, up to a factor that all blocks share."""

    def invert(self, state: dict[str, Tensor], damping: float) -> dict[str, Tensor]:
        """What is kept between inversions: eigenvectors, Cholesky factors; the same names and shapes each time.

        Raises:
            ValueError: with the layer's name and the damping, if a factor is singular or not finite.
        """

    def solve(self, state: dict[str, Tensor], gradients: Vec, damping: float) -> Vec:
        """`(F + λI)⁻¹ g`, aligned with `params`."""

    def quadratic(self, state: dict[str, Tensor], d: Vec) -> Tensor:
        """`dᵀ F d`, without the damping, a tensor of no dimensions."""


class LayerBlock(Block, Protocol):
    """A block that is estimated from what passes show of its layer."""

    def estimate(self, seen: Seen) -> dict[str, Tensor]:
        """The factors, means over the examples seen, at least float32; zeros where the layer was not called."""

    def rescale(self, seen: Seen, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """Second moments in the eigenbasis in `state`, means over the examples seen; {} for a block without."""
