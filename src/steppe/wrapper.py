"""An optimizer around another one: the same parameter groups, the same state."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.optim import Optimizer

from .vec import Vec


class Wrapper(Optimizer):
    """An optimizer whose parameter groups and state are those of its base: the same objects.

    Args:
        base: the optimizer inside.
    """

    def __init__(self, base: Optimizer) -> None:
        super().__init__([{"params": []}], base.defaults)
        self.base = base

    @property
    def param_groups(self) -> list[dict[str, Any]]:  # type: ignore[override]
        """The base's parameter groups, so that a scheduler reaches both."""
        base = getattr(self, "base", None)  # not in __dict__ where a trainer wraps this optimizer by a subclass
        groups: list[dict[str, Any]] = self._early if base is None else base.param_groups
        return groups

    @param_groups.setter
    def param_groups(self, groups: list[dict[str, Any]]) -> None:
        if "base" in self.__dict__:
            self.base.param_groups = groups
        else:
            self._early = groups

    @property
    def state(self) -> Any:  # type: ignore[override]
        """The base's state."""
        base = getattr(self, "base", None)
        return {} if base is None else base.state

    @state.setter
    def state(self, state: Any) -> None:
        if "base" in self.__dict__:
            self.base.state = state

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group to the base, and so to this optimizer.

        Raises:
            ValueError: if a parameter is complex, or the group maximizes.
        """
        if "base" in self.__dict__:
            self.base.add_param_group(param_group)
            try:
                self._refuse()
            except ValueError:
                self.base.param_groups.pop()
                raise

    def state_dict(self) -> dict[str, Any]:  # type: ignore[override]
        """Return all that a checkpoint needs, after the hooks registered for that."""
        for before in self._optimizer_state_dict_pre_hooks.values():
            before(self)
        saved = self._save()
        for after in self._optimizer_state_dict_post_hooks.values():
            saved = after(self, saved) or saved
        return saved

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what ``state_dict`` returned; one of the base alone is accepted and starts the method afresh.

        Raises:
            ValueError: if it was saved by another method; the message names both.
        """
        saved = dict(state_dict)
        for before in self._optimizer_load_state_dict_pre_hooks.values():
            saved = before(self, saved) or saved
        self._load(saved)
        for after in self._optimizer_load_state_dict_post_hooks.values():
            after(self)

    def _save(self) -> dict[str, Any]:
        return self.base.state_dict()

    def _load(self, saved: dict[str, Any]) -> None:
        self.base.load_state_dict(saved)

    def params(self) -> Vec:
        """Return all parameters, in the order of the groups."""
        return [p for group in self.base.param_groups for p in group["params"]]

    def _refuse(self) -> None:
        refuse_complex(self.trainable())
        if any(group.get("maximize") for group in self.param_groups):
            raise ValueError("the base has maximize=True, but ε climbs the loss: leave it out, and return −loss")

    def trainable(self) -> Vec:
        """Return the parameters that require a gradient."""
        return [p for p in self.params() if p.requires_grad]

    def names(self, params: Vec, named: dict[Tensor, str]) -> list[str]:
        """Return the parameters' names: those that the base was built with, or else those in ``named``.

        Raises:
            ValueError: if one has no name.
        """
        for group in self.base.param_groups:
            named.update(zip(group["params"], group.get("param_names", []), strict=False))
        if any(p not in named for p in params):
            raise ValueError("the method goes by names: build the base with model.named_parameters()")
        return [named[p] for p in params]

    def __getstate__(self) -> dict[str, Any]:
        """Return all there is to copy or pickle, but a scheduler's patch of ``step``: it is bound to the original."""
        return {name: value for name, value in self.__dict__.items() if name not in ("step", "_left", "_others")}


def refuse_complex(params: Vec) -> None:
    """Refuse complex parameters.

    Raises:
        ValueError: if there is one.
    """
    if any(p.is_complex() for p in params):
        raise ValueError("a parameter is complex: keep it as torch.view_as_real, and make it complex in forward")
