"""An optimizer that looks at the curvature of the batch beside its gradient."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Literal, TypeAlias

import torch
from torch import Generator, Tensor, nn
from torch.optim import Optimizer
from torch.optim.optimizer import ParamsT

from . import checks, rng, vec
from .batch import Batch
from .method import Method
from .vec import Vec
from .wrapper import refuse_complex

At: TypeAlias = Literal["perturbed", "weights"]


class SecondOrder(Optimizer):
    """What optimizers that need curvature share: a step of their own, and a step inside ``SharpnessAware``.

    A step has two halves. ``backward`` runs the pass that leaves the gradient in ``.grad``, and sees the curvature on
    the way; ``update`` moves the weights. Alone, ``step`` does both. A wrapper calls ``begin``, runs ``backward`` in
    place of one of its own passes if the curvature is due, and then calls ``step`` with nothing.

    Args:
        params: parameters, or parameter groups.
        defaults: hyper-parameters of the groups.
        at: where a sharpness-aware method has the curvature taken. ``"perturbed"`` (default): at ``w + ε``, in the pass
            whose gradient is the direction; every method has that pass and differentiates all weights in it.
            ``"weights"``: at ``w``, in pass one; a method without it, or one that leaves weight gradients of it out,
            pays for them on the steps where curvature is due.
        seed: seed of all that is drawn; draws are a function of (seed, step, purpose).

    Raises:
        ValueError: if ``at`` is unknown, or a parameter is complex.
    """

    n: int = 1
    """Steps from one look at the curvature to the next."""
    takes_closure = False
    """Whether a closure that returns the loss is enough; else the model is needed."""

    def __init__(self, params: ParamsT, defaults: dict[str, Any], *, at: At = "perturbed", seed: int = 0) -> None:
        checks.one_of(at=(at, ("perturbed", "weights")))
        super().__init__(params, defaults)
        self.at, self.seed = at, seed
        self.extra = (0.0, 0.0)
        """Passes forward and backward, per example, that the last ``backward`` ran beyond those of a gradient."""
        self.late = 0.0
        """Gradients of single examples, in cost, that the last ``update`` ran."""
        self._handed = False
        refuse_complex(self.trainable())

    def is_due(self) -> bool:
        """Whether the step to come looks at the curvature."""
        return self.steps % self.n == 0

    def backward(
        self,
        batch: Batch,
        params: Vec | None,
        *,
        share: float = 1.0,
        rows: Tensor | None = None,
        again: bool = False,
        reduce: bool = True,
        weight: float = 1.0,
        scaler: torch.amp.GradScaler | None = None,
    ) -> Tensor:
        """Run a pass as ``Batch.backward`` does, and see the curvature of the batch, for the step to come.

        Args:
            batch: the examples.
            params: tensors that the gradient is left on; None for all that are trainable.
            share: the batch's share of the step, where a step runs on several; they add up to 1.
            rows: as in ``Batch.backward``, and so are ``again``, ``reduce``, ``weight`` and ``scaler``.
            again: see ``rows``.
            reduce: of the gradient, where ``params`` is None; curvature is always averaged over the ranks.
            weight: see ``rows``.
            scaler: see ``rows``; the curvature is that of the loss as it was before.

        Returns:
            Losses of the examples, detached.
        """
        raise NotImplementedError

    def forget(self) -> None:
        """Drop what was seen for a step that did not come to its end."""
        raise NotImplementedError

    def update(self) -> None:
        """Move the weights by ``.grad`` and what was seen.

        Raises:
            ValueError: before any weight is moved.
        """
        raise NotImplementedError

    def cost(self) -> float:
        """Return the expected propagations of a step alone; a method adds ``method.cost() − 1`` to it."""
        raise NotImplementedError

    def cost_under(self, method: Method, batch_size: int = 128, total_steps: int | None = None) -> float:
        """Return the expected propagations of a step of ``SharpnessAware(self, method)``.

        ``method.cost()``, and what the curvature costs beyond a gradient, on the examples of the pass that sees it.

        Args:
            method: the method around this optimizer.
            batch_size: as in ``method.cost``.
            total_steps: as in ``method.cost``.
        """
        sharp, extra = method.when.share(total_steps, self.n), self.cost() - 1
        plain = method.cost(batch_size, total_steps)
        if self.at == "perturbed":
            return plain + extra * (1 - sharp + sharp * method.second_share(batch_size))
        unpaid = (1 - method.perturb.share) / 3 if method.needs_first else 1.0
        return plain + extra + sharp * unpaid / self.n

    def begin(self) -> None:
        """Begin a step that another runs: the next ``step`` takes ``.grad`` as it is, and what ``backward`` saw."""
        self.forget()
        self._handed = True

    @torch.no_grad()
    def step(  # type: ignore[override]
        self, closure: Batch | Callable[[], Any] | None = None
    ) -> Tensor | None:
        """Take one step and return the mean loss, detached.

        Args:
            closure: a ``steppe.Batch``; or, where that is enough for the optimizer, a closure that returns the loss
                without calling ``backward``.

        Raises:
            TypeError: if it is neither, or too little.
            ValueError: if the loss or its curvature is not finite; the weights are then as before.

        Cost:
            ``cost()`` propagations on average.
        """
        handed, self._handed = self._handed, False
        # torch.distributed.checkpoint has the state made by a step with lr = 0
        if closure is None and (handed or all(group["lr"] == 0 for group in self.param_groups)):
            self.update()
            return None
        batch = self._source(closure)
        self.zero_grad()
        self.forget()
        loss = (self.backward(batch, None) if self.is_due() else batch.backward(None)).mean()
        judged = loss if batch.ranks.is_alone else vec.norm([p.grad for p in self.trainable() if p.grad is not None])
        if not math.isfinite(float(judged)):
            raise ValueError(
                f"the loss is {float(loss):g} at step {self.steps} of {type(self).__name__}, or a gradient is not "
                "finite: the weights are as before this step; a smaller learning rate may help"
            )
        self.update()
        return loss

    def _source(self, closure: Batch | Callable[[], Any] | None) -> Batch:
        """Return the batch of a step, or refuse what is too little."""
        name = type(self).__name__
        if isinstance(closure, Batch):
            return closure
        write = f"write {name}.step(steppe.Batch(model, loss_fn, batch))"
        if not callable(closure):
            raise TypeError(
                f"{name} needs the loss with its graph, and .grad has none: {write}"
                + (", or give a closure that returns the loss without calling backward" if self.takes_closure else "")
            )
        if not self.takes_closure:
            raise TypeError(f"{name} looks at the model, which a closure hides: {write}")
        return Batch(nn.Module(), _Loss(closure), torch.zeros(1, device=self.trainable()[0].device))

    def trainable(self) -> Vec:
        """Return the parameters that require a gradient, in the order of the groups."""
        return [p for group in self.param_groups for p in group["params"] if p.requires_grad]

    def group_of(self, p: Tensor) -> dict[str, Any]:
        """Return the parameter group that holds ``p``."""
        return next(group for group in self.param_groups if any(p is q for q in group["params"]))

    @property
    def steps(self) -> int:
        """Number of steps taken; a parameter that was frozen on the way has fewer."""
        return max((int(kept["step"]) for kept in self.state.values() if "step" in kept), default=0)

    def generator(self, purpose: str, device: torch.device | str = "cpu") -> Generator:
        """Return a fresh generator, a function of (seed, step, purpose): the same on all ranks."""
        return rng.seeded(f"{self.seed}/{self.steps}/{purpose}", device)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what ``state_dict`` returned; the state keeps its types, which may be wider than the weights'."""
        super().load_state_dict(state_dict)
        numbers = [i for group in state_dict["param_groups"] for i in group["params"]]
        params = [p for group in self.param_groups for p in group["params"]]
        for i, p in zip(numbers, params, strict=True):
            for name, value in state_dict["state"].get(i, {}).items():
                if isinstance(value, Tensor) and value.dtype != self.state[p][name].dtype:
                    self.state[p][name] = value.detach().clone().to(p.device)

    def __getstate__(self) -> dict[str, Any]:
        """Return all there is to copy or pickle, but a scheduler's patch of ``step``: it is bound to the original."""
        return {name: value for name, value in self.__dict__.items() if name != "step"}


class _Loss:
    """A closure as a loss of one example."""

    def __init__(self, closure: Callable[[], Any]) -> None:
        self._closure = closure

    def __call__(self, model: Any, data: Any) -> Tensor:
        loss = self._closure()
        if not isinstance(loss, Tensor) or not loss.requires_grad:
            raise TypeError(
                f"the closure returned {'a detached loss' if isinstance(loss, Tensor) else repr(loss)}: return the "
                "loss itself, with its graph, without calling backward"
            )
        return loss.reshape(())
