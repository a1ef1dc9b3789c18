"""The distribution of the filters' norms."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .. import vec
from .axes import given_or_new
from .objective import Objective

if TYPE_CHECKING:
    from matplotlib.axes import Axes


@dataclass(frozen=True)
class FilterNorms:
    """What `filter_norms` found."""

    norms: dict[str, Tensor]
    """‖w_k‖ of each parameter's filters by its name, float64 on the CPU, shape (filters,)."""
    passes: float = 0.0
    """Cost in gradients of the data: none."""

    @property
    def every(self) -> Tensor:
        """The norms of all filters one after the other."""
        return torch.cat(list(self.norms.values()))

    def quantiles(self, q: Sequence[float] = (0.05, 0.25, 0.5, 0.75, 0.95), name: str | None = None) -> list[float]:
        """Return quantiles of one parameter's norms, or of all."""
        norms = self.every if name is None else self.norms[name]
        shares = torch.tensor(q, dtype=torch.float64)
        at = shares * (len(norms) - 1)
        low = norms.sort().values[at.floor().long()]
        high = norms.sort().values[at.ceil().long()]
        return torch.lerp(low, high, at - at.floor()).tolist()

    def plot(self, axes: Axes | None = None, *, label: str | None = None, bins: int = 50) -> Axes:
        """Draw a histogram of all norms, as a density; call it again on the same axes to add another model."""
        axes = given_or_new(axes)
        axes.hist(self.every.numpy(), bins=bins, density=True, histtype="step", label=label)
        axes.set_xlabel("filter norm")
        axes.set_ylabel("density")
        if label is not None:
            axes.legend()
        return axes


def filter_norms(objective: Objective) -> FilterNorms:
    """Return ``‖w_k‖`` of every filter: a slice along dimension 0 of a parameter of two or more dimensions.

    Args:
        objective: gives the parameters.

    Raises:
        ValueError: if none of them has filters.

    Cost:
        None.

    Source:
        Li et al. 2022, "Efficient generalization improvement guided by random weight perturbation", section 3.4.
    """
    filtered = [(name, p.detach()) for name, p in zip(objective.names, objective.params, strict=True) if p.ndim > 1]
    if not filtered:
        raise ValueError("none of the chosen parameters has two or more dimensions, so there are no filters")
    names, weights = zip(*filtered, strict=True)
    norms = vec.filter_norms([w.cpu().double() for w in weights])
    return FilterNorms({name: each.flatten() for name, each in zip(names, norms, strict=True)})
