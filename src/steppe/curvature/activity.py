"""How many neurons are active."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from .axes import given_or_new
from .objective import FORWARD, Objective
from .part import gathered

if TYPE_CHECKING:
    from matplotlib.axes import Axes

ACTIVATIONS = {"relu", "relu6", "leaky_relu", "elu", "selu", "celu", "gelu", "silu", "mish", "hardswish"}


@dataclass(frozen=True)
class Activity:
    """What `active_neurons` found."""

    shares: dict[str, float]
    """Share of active neurons in each activation, in the order in which they run."""
    neurons: dict[str, int]
    """Number of neurons there, for one example."""
    share: float
    """Share in all."""
    passes: float

    def plot(self, axes: Axes | None = None) -> Axes:
        """Draw the share of each activation, in per cent."""
        axes = given_or_new(axes)
        axes.plot(range(1, len(self.shares) + 1), [100 * share for share in self.shares.values()], marker="o")
        axes.set_xlabel("activation, in the order in which they run")
        axes.set_ylabel("active neurons (%)")
        return axes


def active_neurons(objective: Objective, *, progress: Callable[[float], None] = lambda share: None) -> Activity:
    """Measure the share of active neurons in each ReLU, GELU and the like: those whose input is positive.

    For a ReLU, that is where its value is. Functions (``F.relu``) are seen as modules are (``nn.ReLU``). A module's
    activation has its name; that of a function is the name of the module it runs in, a colon, and its own. What runs
    more than once in a forward pass is numbered. Channels and positions are neurons of their own; means over the
    examples are weighted as the loss is.

    Args:
        objective: gives the model and the data.
        progress: is told the share done.

    Raises:
        ValueError: if the model runs no such activation, not the same ones for each batch, or a loss is not finite.

    Cost:
        1/3.

    Source:
        Chen et al. 2022, "When vision transformers outperform ResNets without pretraining or strong data
        augmentations", section 4.4 and figure 2.
    """
    totals: dict[str, Tensor] = {}
    neurons: dict[str, int] = {}
    weight = torch.zeros((), dtype=torch.float64)
    with objective.still(), torch.no_grad(), _where(objective.model) as stack:
        before, done, examples = objective.passes, 0, objective.examples
        for batch in objective.batches():
            with _Activations(stack) as watch:
                losses = objective.losses(batch)
            weights = objective.weights_of(batch, losses).cpu().double()
            objective.count(FORWARD, len(losses))
            if done and watch.found.keys() != totals.keys():
                raise ValueError("the model does not run the same activations for each batch")
            for name, (shares, entries) in watch.found.items():
                each = shares if len(shares) == len(losses) else shares.mean()
                totals[name] = totals.get(name, torch.zeros((), dtype=torch.float64)) + (weights * each).sum()
                neurons[name] = entries // len(losses)
            weight += weights.sum()
            done += len(losses)
            progress(done / examples)
    if not totals:
        known = ", ".join(sorted(ACTIVATIONS))
        raise ValueError(f"{type(objective.model).__name__} runs none of the activations {known}")
    ranks = gathered(objective, [(torch.stack(list(totals.values())), weight)])
    whole = sum(weight for _, weight in ranks)
    if not whole:
        raise ValueError("the weights of all examples are 0")
    shares = dict(zip(totals, (sum(total for total, _ in ranks) / whole).tolist(), strict=True))
    share = sum(neurons[name] * shares[name] for name in shares) / sum(neurons.values())
    return Activity(shares, neurons, share, objective.passes - before)


class _Activations(TorchFunctionMode):
    """Looks at the inputs of activations while it is entered."""

    def __init__(self, stack: list[tuple[str, nn.Module]]) -> None:
        super().__init__()
        self._stack = stack
        self.found: dict[str, tuple[Tensor, int]] = {}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        function = getattr(func, "__name__", "").rstrip("_")
        if function in ACTIVATIONS:
            x = args[0] if args else kwargs["input"]
            active = x.detach() > 0
            self.found[self._name(function)] = active.reshape(len(x), -1).double().mean(1).cpu(), x.numel()
        return func(*args, **(kwargs or {}))

    def _name(self, function: str) -> str:
        path, module = self._stack[-1] if self._stack else ("", None)
        here = path if type(module).__module__ == "torch.nn.modules.activation" else f"{path}:{function}"
        name, count = here, 1
        while name in self.found:
            count += 1
            name = f"{here}#{count}"
        return name


@contextmanager
def _where(model: nn.Module) -> Iterator[list[tuple[str, nn.Module]]]:
    """Give the modules that run at the moment with their names, the innermost last."""
    stack: list[tuple[str, nn.Module]] = []
    with ExitStack() as hooks:
        for name, module in model.named_modules():
            enter: Any = lambda module, inputs, name=name: stack.append((name, module))  # noqa: E731
            leave: Any = lambda module, inputs, output: stack.pop() and None  # noqa: E731
            for handle in (
                module.register_forward_pre_hook(enter, prepend=True),
                module.register_forward_hook(leave, always_call=True),
            ):
                hooks.callback(handle.remove)
        yield stack
