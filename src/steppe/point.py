"""Where a step stands, and the four protocols: all that a part may know of the step, and the step of a part.

The protocols carry defaults, so a part states only what is special about it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, MutableMapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Protocol

import torch
from torch import Generator, Tensor

from . import rng
from .vec import Vec

State = MutableMapping[Tensor, dict[str, Any]]
Fill = Callable[[Tensor], Tensor]
"""What stands in for the memory of a parameter that has none: a function of the parameter."""


@dataclass
class Memory:
    """Named vectors that outlive the step: one tensor beside each parameter, checkpointed with the optimizer.

    Args:
        state: the optimizer's state, from a parameter to its named tensors.
        params: the parameters in the order of the vectors read and written.
        pending: what the step has written; it counts at once, and is kept when the step has succeeded.
    """

    state: State
    params: Vec
    pending: dict[Tensor, dict[str, Any]] = field(default_factory=dict)

    def __contains__(self, name: str) -> bool:
        return any(self._find(p, name) is not None for p in self.params)

    def read(self, name: str, default: Fill = torch.zeros_like) -> Vec:
        """Return the vector of that name, ``default(parameter)`` where a parameter has none yet."""
        found = (self._find(p, name) for p in self.params)
        return [default(p.detach()) if t is None else t for p, t in zip(self.params, found, strict=True)]

    def write(self, name: str, vector: Vec, *, others: Fill | None = None) -> None:
        """Keep ``vector`` under that name, if the step succeeds.

        ``others`` takes the place of what parameters beside those of the vector have kept; by default they keep it.
        """
        if others is not None:
            for p in [p for p, named in self.state.items() if name in named]:
                self.pending.setdefault(p, {})[name] = others(p.detach())
        for p, t in zip(self.params, vector, strict=True):
            self.pending.setdefault(p, {})[name] = t

    def is_new(self, name: str) -> bool:
        """Whether this step has written a vector of that name."""
        return any(name in named for named in self.pending.values())

    def commit(self) -> None:
        """Keep what was written."""
        for p, named in self.pending.items():
            self.state.setdefault(p, {}).update(named)

    def _find(self, p: Tensor, name: str) -> Tensor | None:
        for place in (self.pending, self.state):
            if p in place and name in place[p]:
                found: Tensor = place[p][name]
                return found
        return None


@dataclass
class Point:
    """Where the step stands.

    Args:
        step: number of steps taken before this one.
        total: length of the training in steps, or None where it was not given.
        lr: learning rate of the first parameter group, at this step.
        peak_lr: the largest learning rate that the schedule reaches.
        seed: the optimizer's seed.
        group: number of the group of examples, where the batch is cut into groups with their own ε; else 0.
        memory: vectors that outlive the step.
        rho: radius of this step's perturbation.
        w: weights to be perturbed, unperturbed; one tensor a parameter.
        g0: gradient of pass one, aligned with ``w``; empty where pass one is not run.
        names: the parameters' names, aligned with ``w``; only for a ``perturb`` that declares ``needs_names``.
        squares: ``Σᵢ (∇ℓᵢ)²``, aligned with ``w``; only on steps where ``perturb.fisher_examples`` asks for it.
        product: Hessian-vector product, aligned with ``w``; only for a ``combine`` that declares ``needs_product``.
        spare: whether ``g0`` may be overwritten, because nobody reads it after ``perturb``.
    """

    step: int
    total: int | None
    lr: float
    peak_lr: float
    seed: int
    group: int
    memory: Memory
    rho: float = 0.0
    w: Vec = field(default_factory=list)
    g0: Vec = field(default_factory=list)
    names: list[str] = field(default_factory=list)
    squares: Vec = field(default_factory=list)
    product: Vec = field(default_factory=list)
    spare: bool = False

    def generator(self, purpose: str, device: torch.device | str = "cpu") -> Generator:
        """Return a fresh generator, a function of (seed, step, group, purpose): the same on all ranks."""
        return rng.seeded(f"{self.seed}/{self.step}/{self.group}/{purpose}", device)


class When(Protocol):
    """Is this step sharp, and how large is ρ?"""

    @property
    def needs_total(self) -> bool:
        """Whether the length of the training must be known."""
        return False

    def chance(self, step: int, total: int) -> float:
        """Return the probability that a step of a training of ``total`` steps is sharp."""
        ...

    def limit(self, among: int) -> float:
        """Return ``share`` in the limit of many steps."""
        ...

    def share(self, total: int | None, among: int = 1) -> float:
        """Return the expected share of sharp steps over ``total`` steps, None for the limit of many.

        Only steps 0, ``among``, 2 ``among``, ... are looked at.
        """
        if total is None:
            return self.limit(among)
        steps = range(0, total, among)
        return sum(self.chance(step, total) for step in steps) / len(steps)

    def __call__(self, at: Point) -> float | None:
        """Return ρ; 0 for a step of the base alone; None for a step that reuses what the last sharp one left."""
        ...


class Perturb(Protocol):
    """Which ε?"""

    needs_g0: ClassVar[bool] = True
    needs_names: bool = False
    needs_total: ClassVar[bool] = False
    needs_examples: ClassVar[bool] = False
    memories: ClassVar[Mapping[str, Fill]] = {}

    @property
    def passes(self) -> int:
        """Number of gradients that make ε; each call adds its share of ρ."""
        return 1

    @property
    def is_steepest(self) -> bool:
        """Whether ε is ρ g0/‖g0‖, for which the second-order term is stated."""
        return False

    @property
    def share(self) -> float:
        """Expected share of the parameters that pass one differentiates."""
        return 1.0

    def picks(self, at: Point, count: int) -> list[bool] | None:
        """Return which of the ``count`` parameters pass one differentiates; None for all of them."""
        return None

    def fisher_examples(self, step: int) -> int:
        """Return how many examples' squared gradients the step needs, mostly 0."""
        return 0

    def extra(self, batch_size: int, total: int | None, when: When) -> float:
        """Return the expected propagations a step that ``fisher_examples`` adds, on the steps that ``when`` says."""
        return 0.0

    def __call__(self, at: Point, rho: float) -> tuple[Vec, Tensor | float]:
        """Return a vector aligned with ``at.w`` and the factor that makes it ε; may overwrite a spare ``at.g0``."""
        ...


class Select(Protocol):
    """Which examples does pass two see?"""

    needs_rise: ClassVar[bool] = False
    needs_second: ClassVar[bool] = False

    def count(self, batch_size: int) -> int:
        """Return how many of a batch's examples pass two sees."""
        return batch_size

    def __call__(self, rise: Tensor) -> Tensor:
        """Return the rows of pass two, shape (n,), from each example's rise in loss, shape (B,)."""
        return torch.arange(len(rise), device=rise.device)


class Combine(Protocol):
    """Which direction from g0 and g1?"""

    memories: ClassVar[Mapping[str, Fill]] = {}

    @property
    def needs_g0(self) -> bool:
        """Whether the whole gradient of pass one is read."""
        return True

    @property
    def weights(self) -> tuple[float, float] | None:
        """The fixed a and b of ``d = a g0 + b g1``; None for a combination that is no fixed mix."""
        return None

    @property
    def needs_product(self) -> bool:
        """Whether a Hessian-vector product is taken along ``probe``."""
        return False

    def probe(self, at: Point, g1: Vec) -> Vec:
        """Return the vector that the Hessian at the weights is multiplied with."""
        return g1

    def __call__(self, at: Point, g1: Vec | None) -> Vec:
        """Return the direction, aligned with ``at.w``; ``g1`` is None where no pass two ran. May overwrite both."""
        ...
