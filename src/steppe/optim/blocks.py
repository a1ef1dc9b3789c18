"""What a natural gradient asks of a block of the Fisher matrix."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

from ..vec import Vec


class Block(Protocol):
    """A diagonal block of the Fisher matrix: a layer's, or that of all parameters.

    A block holds no tensor of the run. Its state, a dict of named tensors, is `optimizer.state[block.params[0]]`: the
    running averages of the estimates, and beside them, under other names, what `invert` makes of them.

    Attributes:
        params: Its parameters, in order. The first carries the block's state.
        name: The layer's name, for messages.
    """

    params: Vec
    name: str

    def invert(self, state: dict[str, Tensor], damping: float) -> dict[str, Tensor]:
        """What is kept between inversions: eigenvectors, Cholesky factors. Raises ValueError with the layer's name."""

    def solve(self, state: dict[str, Tensor], gradients: Vec, damping: float) -> Vec:
        """`(F + λI)⁻¹ g`, aligned with `params`."""

    def quadratic(self, state: dict[str, Tensor], d: Vec) -> Tensor:
        """`dᵀ F d`, without the damping, a tensor of no dimensions."""

    def price(self) -> float:
        """Floating-point operations of an inversion, up to a factor that all blocks share."""
