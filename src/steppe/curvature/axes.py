"""Where the pictures of results are drawn."""

from __future__ import annotations

from typing import TYPE_CHECKING

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
