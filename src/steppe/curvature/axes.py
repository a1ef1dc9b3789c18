"""Where the pictures of results are drawn."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np
from torch import Tensor

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def given_or_new(axes: Axes | None) -> Axes:
    """Return the axes, or those of a new figure.

    Raises:
        ImportError: without matplotlib.
    """
    if axes is not None:
        return axes
    try:
        from matplotlib import pyplot
    except ImportError as error:
        raise ImportError("pictures need matplotlib: pip install 'steppe[lab]'") from error
    return pyplot.subplots(layout="constrained")[1]


def histogram(values: Tensor, mean: float, error: float, axes: Axes | None) -> Axes:
    """Draw how often values occur, with a line at their mean and a band of its standard error around it."""
    axes = given_or_new(axes)
    margin = 1e-3 * float(values.abs().max())
    ends = float(values.min()) - margin, float(values.max()) + margin
    bins = min(50, 5 + math.isqrt(len(values)))
    color = axes.stairs(*np.histogram(values.numpy(), bins, ends)).get_edgecolor()
    spread = f" ± {error:.2g}" if math.isfinite(error) else ""
    axes.axvline(mean, color=color, linestyle="--", label=f"mean {mean:.3g}{spread}")
    if spread:
        axes.axvspan(mean - error, mean + error, color=color, alpha=0.2)
    axes.legend()
    return axes
