"""What a sharpness-aware optimizer saves beside its base."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

from .point import Fill, State

KEY = "steppe"


def pack(base: Optimizer, memories: State, header: dict[str, Any], declared: Mapping[str, Fill]) -> dict[str, Any]:
    """Return the base's ``state_dict`` with the header in its first group, and the memories in its state.

    Every trainable parameter has every memory that is declared: ``torch.distributed.checkpoint`` loads only what
    is there already. The header says of which names this is more than what stands in for them.
    """
    saved = base.state_dict()
    first, *others = saved["param_groups"]
    written = {**dict.fromkeys(declared, False), **{name: True for named in memories.values() for name in named}}
    state = dict(saved["state"])
    for i, p in zip(_ids(saved), _params(base), strict=True):
        kept = memories.get(p, {})
        if written and (kept or p.requires_grad):
            stand_ins = {name: fill(p.detach()) for name, fill in declared.items() if name not in kept}
            named = {f"{KEY}.{name}": t for name, t in {**stand_ins, **kept}.items()}
            state[i] = {**state.get(i, {}), **named}
    first = {**first, KEY: {**header, "memories": written}}
    return {**saved, "state": state, "param_groups": [first, *others]}


def unpack(base: Optimizer, memories: State, saved: dict[str, Any], names: dict[str, str]) -> dict[str, Any] | None:
    """Load what ``pack`` returned into the base and the memories, and return the header; None where it has none.

    ``names`` tell the method: a state that was saved under one of them is its own.

    Raises:
        ValueError: if another method saved it, or if it was flattened on the way.
    """
    headers = [group[KEY] for group in saved["param_groups"] if KEY in group]
    if headers and not any(headers[0].get(kind) == name for kind, name in names.items()):
        saver, here = headers[0]["method"], names["method"]
        raise ValueError(f"the state was saved by {saver}, and this optimizer runs {here}: build that one")
    if not headers and any(isinstance(i, str) for i in _ids(saved)):
        raise ValueError(
            "the state goes by names and holds no method: use StateDictOptions(flatten_optimizer_state_dict=False), "
            "which keeps it; or give set_state_dict the base, if only the base was saved"
        )
    plain = {i: _plain(named) for i, named in saved["state"].items()}
    base.load_state_dict(
        {
            **saved,
            "state": {i: rest for i, rest in plain.items() if rest or not saved["state"][i]},
            "param_groups": [_plain(group) for group in saved["param_groups"]],
        }
    )
    memories.clear()
    if not headers:
        return None
    written = [name for name, real in headers[0].get("memories", {}).items() if real]
    for i, p in zip(_ids(saved), _params(base), strict=True):
        named = saved["state"].get(i, {})
        kept = {name: named[f"{KEY}.{name}"] for name in written if f"{KEY}.{name}" in named}
        if kept:
            memories[p] = {name: t.detach().clone().to(p.device) for name, t in kept.items()}
    return headers[0]  # type: ignore[no-any-return]


def _plain(named: Any) -> Any:
    """Return a parameter's state, or a group, without what the base does not know."""
    if not isinstance(named, dict):
        return named
    return {name: value for name, value in named.items() if str(name).split(".")[0] != KEY}


def _ids(saved: dict[str, Any]) -> list[Any]:
    """Return what the saved state calls the parameters, in order: numbers, or names."""
    return [i for group in saved["param_groups"] for i in group["params"]]


def _params(base: Optimizer) -> list[Tensor]:
    return [p for group in base.param_groups for p in group["params"]]
