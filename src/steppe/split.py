"""The two passes of a step on two groups of ranks, where neither needs the other."""

from __future__ import annotations

from .method import Method


def check(method: Method) -> None:
    """Refuse a method whose passes depend on each other.

    Raises:
        ValueError: if ε needs pass one's gradient, the combination is not a fixed mix of both gradients, or pass two
            looks at pass one's losses.
    """
    reason = None
    if method.perturb.needs_g0:
        reason = f"{method.perturb!r} makes ε of pass one's gradient"
    elif method.combine.weights is None:
        reason = f"{method.combine!r} is no fixed mix of the two gradients"
    elif method.select is not None and method.select.needs_rise:
        reason = f"{method.select!r} looks at the losses of both passes"
    elif method.m is not None:
        reason = f"m={method.m} cuts each rank's batch into groups"
    if reason is not None:
        raise ValueError(f"split=True runs the two passes of {method!r} on different ranks, but {reason}")


def share(method: Method, rank: int, world: int) -> tuple[bool, float]:
    """Return whether the rank runs the perturbed pass, and the factor of its loss.

    ``d = a g0 + b g1``. Of W ranks the first Q run pass one with their loss times ``aW/Q``, the P others pass two
    with ``bW/P``: the data-parallel mean of the gradients is then d. Q is W/2, rounded down but at least 1; 0 where
    a = 0, and W where b = 0.

    Args:
        method: one that ``check`` lets pass.
        rank: this rank, from 0.
        world: number of ranks W, at least 2.

    Source:
        Li et al. 2022, "Efficient generalization improvement guided by random weight perturbation", algorithm 1.
    """
    assert method.combine.weights is not None
    a, b = method.combine.weights
    plain = 0 if a == 0 else world if b == 0 else max(1, world // 2)
    return (False, a * world / plain) if rank < plain else (True, b * world / (world - plain))
