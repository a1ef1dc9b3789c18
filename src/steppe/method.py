"""A method: the four parts of a step as one frozen value, its expression and its cost."""

from __future__ import annotations

import functools
import inspect
import numbers
from collections.abc import Callable
from dataclasses import dataclass, field, fields, replace
from typing import Any, ParamSpec, TypeVar

from . import checks
from .point import Combine, Fill, Perturb, Select, When

P = ParamSpec("P")
T = TypeVar("T")

FORWARD = 1 / 3
"""Share of a propagation that its forward pass is; its two halves of a backward pass are as much each."""
PRODUCT = 3.0
"""Propagations of a Hessian-vector product: a gradient with its graph (1), and a backward pass through both (2)."""


@dataclass(frozen=True, repr=False)
class Method:
    """What a sharpness-aware step does: when, with which ε, on which examples of pass two, in which direction.

    Recipes such as ``sam()`` build the methods of the literature; composing the parts by hand builds a new one.

    Args:
        when: is the step sharp, and how large is ρ.
        perturb: which ε.
        combine: which direction from the gradients g0 at w and g1 at w + ε.
        select: which examples pass two sees; None for all.
        m: number of examples that share one ε (m-sharpness); None for the whole batch.
        text: the expression that builds the method; recipes fill it in, and ``dataclasses.replace`` drops it.

    Raises:
        ValueError: if two parts exclude each other; the message names both.
    """

    when: When
    perturb: Perturb
    combine: Combine
    select: Select | None = None
    m: int | None = None
    text: str = field(default="", init=False, compare=False)

    def __post_init__(self) -> None:
        if self.m is not None:
            checks.count(m=self.m)
        masked = self.perturb.share < 1
        if masked and self.combine.needs_g0:
            raise ValueError(
                f"{self.perturb!r} leaves weight gradients of pass one out, but {self.combine!r} needs all of them: "
                "use beta=1 or another combination"
            )
        if masked and not self.perturb.needs_g0:
            raise ValueError(f"{self.perturb!r} saves weight gradients of pass one, but its ε needs none of them")
        if self.combine.needs_product and not self.perturb.is_steepest:
            raise ValueError(f"{self.combine!r} differentiates ε = ρ g0/‖g0‖, but {self.perturb!r} makes another one")
        if self.m is not None:
            self.check_groups(f"m={self.m} cuts the step into groups")
        if self.m is not None and self.needs_second:
            raise ValueError(f"m={self.m} pairs each group with itself, but {self.select!r} takes pass two elsewhere")

    def __repr__(self) -> str:
        if self.text:
            return self.text
        values = (f"{f.name}={getattr(self, f.name)!r}" for f in fields(self) if f.name != "text")
        return f"Method({', '.join(values)})"

    def check_groups(self, why: str) -> None:
        """Refuse what has one ε for the whole step.

        Args:
            why: what gives parts of the batch an ε of their own.

        Raises:
            ValueError: if a part keeps a memory.
        """
        if self.memories:
            part = self.combine if self.combine.memories else self.perturb
            raise ValueError(f"{why}, but {part!r} keeps one memory for the whole step")

    @property
    def memories(self) -> dict[str, Fill]:
        """Names of the vectors that outlive the step, and what stands in for one not yet written."""
        return {**self.perturb.memories, **self.combine.memories}

    @property
    def needs_total(self) -> bool:
        """Whether ``SharpnessAware`` must be told the length of the training."""
        return self.when.needs_total or self.perturb.needs_total

    @property
    def needs_second(self) -> bool:
        """Whether ``opt.step`` takes a second batch for pass two."""
        return self.select is not None and self.select.needs_second

    @property
    def needs_examples(self) -> bool:
        """Whether a bare closure is too little: single examples, or the model itself, are looked at."""
        perturb, combine = self.perturb, self.combine
        return self.select is not None or self.m is not None or perturb.needs_examples or combine.needs_product

    @property
    def needs_first(self) -> bool:
        """Whether sharp steps run pass one at all."""
        return self.perturb.needs_g0 or self.combine.needs_g0 or (self.select is not None and self.select.needs_rise)

    def cost(self, batch_size: int = 128, total_steps: int | None = None) -> float:
        """Return the expected propagations of a step: 1 is a forward and a backward pass over the batch.

        A forward pass counts ⅓, the two halves of a backward pass (by inputs and by weights) ⅓ each, as in the cost
        model of ESAM (Du et al. 2022); ``opt.stats.propagations`` counts the same of what really ran.

        Args:
            batch_size: examples a step; matters where a selection is rounded to whole examples.
            total_steps: length of the training; None for the limit of many steps.

        Raises:
            ValueError: if one of the two is no whole number of at least 1.
        """
        checks.count(batch_size=batch_size, **({} if total_steps is None else {"total_steps": total_steps}))
        sharp = 0.0
        if self.needs_first:
            sharp += 1 - (1 - self.perturb.share) / 3
        sharp += (self.perturb.passes - 1) * (1 - (1 - self.perturb.share) / 3)
        if self.select is not None and self.select.needs_rise:
            sharp += FORWARD
        sharp += self.second_share(batch_size)
        sharp += PRODUCT if self.combine.needs_product else 0
        share = self.when.share(total_steps)
        extra = self.perturb.extra(batch_size, total_steps, self.when)
        return share * sharp + extra + (1 - share)

    def second_share(self, batch_size: int) -> float:
        """Return the share of a batch that pass two sees."""
        if self.select is None:
            return 1.0
        whole, rest = divmod(batch_size, self.m or batch_size)
        groups = [self.m or batch_size] * whole + ([rest] if rest else [])
        return sum(self.select.count(size) for size in groups) / batch_size


def recipe(function: Callable[P, T]) -> Callable[P, T]:
    """Make ``repr`` of what ``function`` returns the call that builds it, with the arguments that are no defaults."""
    signature = inspect.signature(function)

    @functools.wraps(function)
    def build(*args: P.args, **kwargs: P.kwargs) -> T:
        given = signature.bind(*args, **kwargs)
        given.arguments = {name: _plain(value) for name, value in given.arguments.items()}
        value: Any = function(*given.args, **given.kwargs)
        words = []
        for name, argument in given.arguments.items():
            default = signature.parameters[name].default
            if default is inspect.Parameter.empty:
                words.append(_word(argument))
            elif argument != default:
                words.append(f"{name}={_word(argument)}")
        built: T = replace(value)
        object.__setattr__(built, "text", f"{function.__name__}({', '.join(words)})")
        return built

    return build


def _plain(value: Any) -> Any:
    """Return the Python number of a number of another library, and everything else as it is."""
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        return value
    return int(value) if isinstance(value, numbers.Integral) else float(value)


def _word(value: Any) -> str:
    """Return the one way to write an argument: 1 and 1.0 are the same."""
    whole = isinstance(value, float) and value.is_integer() and abs(value) < 1e15
    return repr(int(value)) if whole else repr(value)
