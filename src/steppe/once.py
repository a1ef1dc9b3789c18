"""Losses without a second derivative, refused in words."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor
from torch.autograd.function import once_differentiable

ONCE = once_differentiable(lambda ctx: None).__code__
"""What ``@once_differentiable`` makes of every function."""


@contextmanager
def in_words() -> Iterator[None]:
    """Say in words that a second derivative is missing.

    Raises:
        ValueError: in the place of torch's own error.
    """
    try:
        yield
    except RuntimeError as error:
        reason = str(error).splitlines()[0]
        if not any(sign in reason for sign in ("derivative for", "differentiate twice", "double backward")):
            raise
        raise ValueError(
            f"the loss is not twice differentiable and has no curvature: {reason}; replace that operation"
        ) from error


def refuse(results: Sequence[Tensor]) -> None:
    """Raise where ``torch.autograd.grad`` does not: it takes the second derivative of these functions for 0.

    Raises:
        ValueError: naming the function.
    """
    seen: set[Any] = set()
    found = [t.grad_fn for t in results]
    while found:
        node = found.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        backward = getattr(getattr(node, "_forward_cls", None), "backward", None)
        if getattr(backward, "__code__", None) is ONCE:
            raise ValueError(f"the loss is not twice differentiable and has no curvature: {node.name()} is marked "
                             "@once_differentiable; replace that operation")  # fmt: skip
        found += [each for each, _ in node.next_functions]
