"""The sharpness-aware step: two passes, four parts, one function."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor
from torch.optim import LBFGS, Optimizer

from . import vec
from .batch import Batch, Closure
from .checkpoint import pack, unpack
from .method import Method
from .point import Memory, Point
from .stats import Stats
from .vec import Vec


class SharpnessAware(Optimizer):
    """A sharpness-aware step around any torch optimizer.

    ``g0 = ∇L_B(w)``, ``g1 = ∇L_B'(w + ε)``; the direction that the method makes of the two is handed to the base as
    ``.grad``. Parameter groups are the base's own, so a learning-rate scheduler may be built on either.

    Args:
        base: the optimizer that takes the step, over the parameters to be trained.
        method: what the step does: ``steppe.sam()`` and its like, or ``steppe.parse(text)``.
        seed: seed of all that the method draws; draws are a function of (seed, step, purpose). Default 0.
        total_steps: length of the training in steps; needed by methods with a schedule over the whole training.

    Raises:
        TypeError: if ``base`` is no optimizer that takes one gradient a step, or ``method`` is no ``Method``.
        ValueError: if nothing is trainable, or the method needs ``total_steps`` and does not get it.
    """

    def __init__(self, base: Optimizer, method: Method, *, seed: int = 0, total_steps: int | None = None) -> None:
        if not isinstance(base, Optimizer) or isinstance(base, (SharpnessAware, LBFGS)):
            raise TypeError(f"base is {type(base).__name__}: give an optimizer that takes one gradient a step, as SGD")
        if not isinstance(method, Method):
            raise TypeError(f"method is {method!r}: give a recipe such as steppe.sam(), or steppe.parse(text)")
        if not any(p.requires_grad for group in base.param_groups for p in group["params"]):
            raise ValueError("the base optimizer holds no trainable parameter: none has requires_grad=True")
        if total_steps is not None and total_steps < 1:
            raise ValueError(f"total_steps={total_steps!r} must be at least 1")
        if method.needs_total and total_steps is None:
            raise ValueError(
                f"{method!r} follows a schedule: give SharpnessAware(..., total_steps=<steps of the training>)"
            )
        super().__init__([{"params": []}], base.defaults)
        self.base, self.method, self.seed, self.total_steps = base, method, seed, total_steps
        self.stats = Stats()

    @property
    def param_groups(self) -> list[dict[str, Any]]:  # type: ignore[override]
        """The base's parameter groups: the same objects, so that a scheduler reaches both."""
        groups: list[dict[str, Any]] = self.__dict__["base"].param_groups if "base" in self.__dict__ else self._early
        return groups

    @param_groups.setter
    def param_groups(self, groups: list[dict[str, Any]]) -> None:
        if "base" in self.__dict__:
            self.base.param_groups = groups
        else:
            self._early = groups

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group to the base, and so to this optimizer."""
        if "base" in self.__dict__:
            self.base.add_param_group(param_group)

    @torch.no_grad()
    def step(self, closure: Batch | Callable[[], Any], second: Batch | None = None) -> Tensor:  # type: ignore[override]
        """Take one step and return the mean loss of its first pass, detached.

        Gradients that were there before are discarded; the direction taken is left in ``.grad``.

        Args:
            closure: a ``steppe.Batch``; or a closure that clears the gradients, calls ``backward`` and returns the
                loss, for methods that look at no single examples and models without running statistics.
            second: the batch of pass two, for methods that take another one (``rwp(other=True)``) and no others.

        Raises:
            TypeError: if ``closure`` is neither, or too little for the method.
            ValueError: if a loss is not finite: weights and the base's state are then as they were before the step.

        Cost:
            ``method.cost()`` propagations, counted in ``stats``, and one wait for the loss.
        """
        source = self._source(closure, second)
        rho = self.method.when(self._point([], 0))
        groups = source.groups(self.method.m) if self.method.m and isinstance(source, Batch) else [source]
        loss, sums = self._direction(groups[0], second, rho, 0), dict[Tensor, Tensor]()
        if len(groups) > 1:
            loss = self._accumulate(groups[0].size / source.size, loss, sums)
        for number, group in enumerate(groups[1:], 1):
            part = self._direction(group, second, rho, number)
            loss = loss + self._accumulate(group.size / source.size, part, sums)
        for p, direction in sums.items():
            p.grad = direction
        self.base.step()
        self.stats.steps += 1
        self.stats.examples += source.size
        return loss

    def _accumulate(self, weight: float, loss: Tensor, sums: dict[Tensor, Tensor]) -> Tensor:
        """Add ``weight`` times the direction in ``.grad`` to ``sums``, and return the loss times ``weight``."""
        for p in self._trainable():
            if p.grad is not None:
                sums[p] = sums[p].add_(p.grad, alpha=weight) if p in sums else p.grad.mul_(weight)
        return loss * weight

    def _direction(self, source: Batch | Closure, second: Batch | None, rho: float | None, group: int) -> Tensor:
        """Leave the method's direction on one source in ``.grad``, and return the mean loss of the first pass."""
        method, params = self.method, self._trainable()
        perturb, combine, select = method.perturb, method.combine, method.select
        at = self._point(params, group)
        for p in self._params():
            p.grad = None
        if not rho:
            loss = self._finite(self._run(source, None))
            if rho is None:
                self._combine(at, params, [p.grad for p in params], None)
            return loss

        at.rho = rho
        picks = perturb.picks(at, len(params))
        if picks is not None and not any(picks):
            return self._finite(self._run(source, None))
        picked = None if picks is None else [p for p, pick in zip(params, picks, strict=True) if pick]
        squares = self._squares(source, params, perturb.fisher_examples(at.step))
        before = self._run(source, picked) if method.needs_first else None
        slopes: list[Tensor | None] = self._take(params)
        climbs = [g is not None or not perturb.needs_g0 for g in slopes]
        at.memory.params = at.w = moved = [p for p, climb in zip(params, climbs, strict=True) if climb]
        at.g0 = [g for g in slopes if g is not None]
        at.squares = [t for t, climb in zip(squares, climbs, strict=True) if climb] if squares else []
        at.names = self._names(moved, source) if perturb.needs_names else []
        at.spare = not combine.needs_g0
        if at.spare:
            slopes = [None] * len(params)
        home = vec.clone(moved)
        try:
            vec.add_(moved, *perturb(at, rho / perturb.passes))
            at.w, at.spare = home, True
            for _ in range(1, perturb.passes):
                self._run(source, picked, again=True)
                at.g0 = [torch.zeros_like(p) if g is None else g for p, g in zip(moved, self._take(moved), strict=True)]
                vec.add_(moved, *perturb(at, rho / perturb.passes))
            at.g0 = []
            rows = None
            if select is not None and select.needs_rise:
                assert isinstance(source, Batch)
                assert before is not None
                rows = select(source.losses() - before)
                self.stats.forward += source.size
            after = self._run(second or source, None, rows=rows, again=method.needs_first)
        finally:
            vec.copy_(moved, home)
        loss = self._finite(after if before is None else before, after)
        self._combine(at, params, slopes, self._take(params), source)
        at.memory.commit()
        self.stats.sharp += group == 0
        return loss

    def _combine(
        self,
        at: Point,
        params: Vec,
        g0: list[Tensor | None],
        g1: list[Tensor | None] | None,
        source: Any = None,
    ) -> None:
        """Leave ``combine``'s direction in ``.grad``; a gradient that only one pass has counts as 0 in the other."""
        combine = self.method.combine
        with_g0 = combine.needs_g0 or g1 is None
        both = list(zip(params, g0 if with_g0 else [None] * len(params), g1 or [None] * len(params), strict=True))
        used = [(p, a, b) for p, a, b in both if a is not None or b is not None]
        at.memory.params = at.w = [p for p, _, _ in used]
        if with_g0:
            at.g0 = [torch.zeros_like(p) if a is None else a for p, a, _ in used]
        second = None if g1 is None else [torch.zeros_like(p) if b is None else b for p, _, b in used]
        if combine.needs_product and second is not None:
            at.product = source.product(at.w, combine.probe(at, second))
            self.stats.count(source.size, backward=3)
        for p, direction in zip(at.w, combine(at, second), strict=True):
            p.grad = direction

    def _squares(self, source: Batch | Closure, params: Vec, wanted: int) -> Vec:
        if not wanted or not isinstance(source, Batch):
            return []
        self.stats.count(min(wanted, source.size))
        return source.squares(params, wanted)

    def _run(
        self, source: Batch | Closure, picked: Vec | None, *, rows: Tensor | None = None, again: bool = False
    ) -> Tensor:
        """Run one pass, count it, and return the losses."""
        losses = source.backward(picked, rows=rows, again=again)
        size = source.size if rows is None else len(rows)
        share = 1.0
        if picked is not None:
            share = sum(p.numel() for p in picked) / sum(p.numel() for p in self._trainable())
        self.stats.count(size, share=share, backward=int(share > 0))
        return losses

    def _finite(self, *losses: Tensor) -> Tensor:
        """Return the mean of the first losses, or raise if any is not finite."""
        means = [each.mean() for each in losses]
        if not math.isfinite(sum(float(mean) for mean in means)):
            raise ValueError(
                f"the loss is {', then '.join(f'{float(m):g}' for m in means)} at step {self.stats.steps} with "
                f"{self.method!r}: the weights are as before this step; a smaller learning rate or rho may help"
            )
        return means[0]

    def _source(self, closure: Batch | Callable[[], Any], second: Batch | None) -> Batch | Closure:
        if self.method.needs_second != (second is not None):
            takes = "takes a second batch: opt.step(batch, second)" if second is None else "takes no second batch"
            raise ValueError(f"{self.method!r} {takes}")
        if second is not None and not isinstance(second, Batch):
            raise TypeError(f"the second batch is {type(second).__name__}: give a steppe.Batch(model, loss_fn, batch)")
        if isinstance(closure, Batch):
            return closure
        if not callable(closure):
            raise TypeError("opt.step takes a steppe.Batch(model, loss_fn, batch), or a closure that returns the loss")
        if self.method.needs_examples:
            raise TypeError(
                f"{self.method!r} looks at single examples or at the model, which a bare closure hides: "
                "write opt.step(steppe.Batch(model, loss_fn, batch))"
            )
        return Closure(closure, self._trainable(), repeats=self.method.needs_first and self.method.when.share(None) > 0)

    def _names(self, params: Vec, source: Batch | Closure) -> list[str]:
        named: dict[Tensor, str] = source.names() if isinstance(source, Batch) else {}
        for group in self.base.param_groups:
            named.update(zip(group["params"], group.get("param_names", []), strict=False))
        if any(p not in named for p in params):
            raise ValueError(f"{self.method!r} goes by names: build the base with model.named_parameters()")
        return [named[p] for p in params]

    def _point(self, params: Vec, group: int) -> Point:
        first = self.base.param_groups[0]
        lr = float(first["lr"]) if "lr" in first else 0.0
        peak = float(first.get("max_lr", first.get("initial_lr", lr)))
        return Point(self.stats.steps, self.total_steps, lr, peak, self.seed, group, Memory(self.state, params))

    def _trainable(self) -> Vec:
        return [p for p in self._params() if p.requires_grad]

    def _params(self) -> Vec:
        return [p for group in self.base.param_groups for p in group["params"]]

    @staticmethod
    def _take(params: Vec) -> list[Tensor | None]:
        """Return the gradients by reference, and leave none."""
        slopes = [p.grad for p in params]
        for p in params:
            p.grad = None
        return slopes

    def state_dict(self) -> dict[str, Any]:  # type: ignore[override]
        """Return the base's ``state_dict`` and, under ``"steppe"``, method, seed, counts and memories."""
        return pack(
            self.base,
            self.state,
            {"method": repr(self.method), "seed": self.seed, "stats": asdict(self.stats)},
        )

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what ``state_dict`` returned; one of the base alone is accepted and starts the method afresh.

        Raises:
            ValueError: if it was saved by another method; the message names both.
        """
        header = unpack(self.base, self.state, state_dict, repr(self.method))
        self.stats = Stats(**header["stats"]) if header else Stats()
        self.seed = header["seed"] if header else self.seed

    def __getstate__(self) -> dict[str, Any]:
        """Return all there is to copy or pickle, but a scheduler's patch of ``step``: it is bound to the original."""
        return {name: value for name, value in self.__dict__.items() if name != "step"}
