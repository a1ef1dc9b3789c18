"""Which parameters a measurement is about."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import TypeAlias

from torch import Tensor, nn

from ..vec import Vec

Selection: TypeAlias = str | nn.Module | Iterable[Tensor] | None
"""Parameters: a regular expression that is searched in their names, a module, the tensors themselves, None for all."""


def chosen(model: nn.Module, params: Selection) -> tuple[list[str], Vec]:
    """Return the names and tensors of the parameters chosen, in the model's order."""
    named = list(model.named_parameters())
    if params is None:
        found = [(name, p) for name, p in named if p.requires_grad]
        if not found:
            raise ValueError(f"{type(model).__name__} has no parameter that requires a gradient")
    elif isinstance(params, str):
        try:
            pattern = re.compile(params)
        except re.error as error:
            raise ValueError(f"{params!r} is not a regular expression: {error}") from error
        hits = {p for name, p in model.named_parameters(remove_duplicate=False) if pattern.search(name)}
        found = [(name, p) for name, p in named if p in hits]
        if not found:
            examples = ", ".join(name for name, _ in named[:3])
            raise ValueError(f"no parameter's name has {params!r} in it; there are {examples}, ...")
    else:
        given = params.parameters() if isinstance(params, nn.Module) else params
        wanted = {given} if isinstance(given, Tensor) else set(given)
        found = [(name, p) for name, p in named if p in wanted]
        if not found or len(found) < len(wanted):
            raise ValueError(f"{len(wanted) - len(found)} of the {len(wanted)} parameters asked for are not the "
                             "model's: give some of model.parameters(), one of its modules, or a regular expression"
                             if wanted else "no parameter was chosen")  # fmt: skip
    for name, p in found:
        if not p.is_floating_point():
            raise ValueError(f"{name} is {p.dtype}: only real weights have a curvature here")
    return [name for name, _ in found], [p for _, p in found]
