"""What a sharpness-aware optimizer saves beside its base."""

from __future__ import annotations

from collections.abc import MutableMapping
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

KEY = "steppe"
Memories = MutableMapping[Tensor, dict[str, Any]]


def pack(base: Optimizer, memories: Memories, header: dict[str, Any]) -> dict[str, Any]:
    """Return the base's ``state_dict``, with ``header`` and the memories by position under ``KEY``."""
    position = {p: i for i, p in enumerate(_params(base))}
    kept = {position[p]: dict(named) for p, named in memories.items() if named}
    return {**base.state_dict(), KEY: {**header, "memory": kept}}


def unpack(base: Optimizer, memories: Memories, saved: dict[str, Any], method: str) -> dict[str, Any] | None:
    """Load what ``pack`` returned into the base and the memories, and return the header; None where it has none.

    Raises:
        ValueError: if another method saved it.
    """
    header = saved.get(KEY)
    if header is not None and header["method"] != method:
        raise ValueError(f"the state was saved by {header['method']}, and this optimizer runs {method}: build that one")
    base.load_state_dict({name: value for name, value in saved.items() if name != KEY})
    memories.clear()
    if header is None:
        return None
    params = _params(base)
    for i, named in header["memory"].items():
        memories[params[i]] = {name: t.detach().clone().to(params[i].device) for name, t in named.items()}
    return header  # type: ignore[no-any-return]


def _params(base: Optimizer) -> list[Tensor]:
    return [p for group in base.param_groups for p in group["params"]]
