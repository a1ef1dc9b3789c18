"""A model's parameters, cut into blocks of the Fisher matrix."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, TypeAlias

from torch import Tensor, nn

from ..vec import Vec
from . import layers
from .blocks import Block
from .dense import Dense
from .diagonal import Diagonal
from .kronecker import Form, Sharing

Fisher: TypeAlias = Literal["exact", "mc", "empirical", "diagonal", "kfac", "ekfac"]
DENSE = ("exact", "mc", "empirical")


def partition(
    model: nn.Module,
    trainable: Vec,
    fisher: Fisher,
    group_of: Callable[[Tensor], dict[str, Any]],
    *,
    sharing: Sharing,
    norms: Literal["diagonal", "full"],
    form: Form,
) -> tuple[list[Block], dict[str, str]]:
    """Return the blocks, those of layers first, and of parameters that K-FAC does not know the names and the reasons.

    Args:
        model: the network, maybe wrapped.
        trainable: the parameters, in any order.
        fisher: which Fisher matrix.
        group_of: the parameter group of a parameter.
        sharing: see `layers.blocks`, and so ``norms`` and ``form``.
        norms: see ``sharing``.
        form: see ``sharing``.

    Raises:
        ValueError: if a parameter is not the model's, or there are too many for the whole matrix.
    """
    wanted = set(trainable)
    names = {p: name for name, p in model.named_parameters() if p in wanted}
    if len(names) < len(wanted):
        raise ValueError(f"{len(wanted) - len(names)} of the {len(wanted)} trainable parameters are not those of "
                         f"{type(model).__name__}: give the model that they are part of")  # fmt: skip
    if fisher in DENSE:
        return [Dense(list(names), group_of)], {}
    known: list[Block] = []
    reasons: dict[str, str] = {}
    if fisher != "diagonal":
        known[:], reasons = layers.blocks(
            model, list(names), corrected=fisher == "ekfac", sharing=sharing, norms=norms, form=form
        )
    covered = {p for block in known for p in block.params}
    return [*known, *(Diagonal(p, name) for p, name in names.items() if p not in covered)], reasons
