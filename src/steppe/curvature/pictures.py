"""Pictures of landscapes: curves and contours."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, cast

import numpy as np
from numpy.typing import NDArray

from .landscape import Landscape, Value

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLOURS = ("#000000", "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
"""Okabe and Ito's palette, told apart by all eyes; without its yellow, too pale on white."""
DASHES = ("-", "--", ":", "-.")
WIDE = 20.0
"""A ratio of the largest value to the smallest, from which the scale is logarithmic."""
BANDS = 24
Array = NDArray[np.float64]


def plot_landscapes(landscapes: Mapping[str, Landscape], axes: Axes | None = None, *, value: Value = "loss") -> Figure:
    """Draw the landscapes of several models: curves on one pair of axes, or maps side by side with one scale.

    The scale is logarithmic where the values span more than a factor of 20. What is not finite is a gap.

    Args:
        landscapes: the models' names and landscapes, all of one or all of two dimensions.
        axes: one pair of axes for all of them, on which maps become contour lines, a colour for each model.
        value: ``"loss"`` or ``"accuracy"``.

    Returns:
        The figure; save it as ``.png`` or ``.svg`` with its ``savefig``.

    Raises:
        ValueError: if there are none, their dimensions differ, the accuracy was not measured, or nothing is finite.
        ImportError: without matplotlib.
    """
    dims = {landscape.dims for landscape in landscapes.values()}
    if len(dims) != 1:
        raise ValueError("no landscapes to draw" if not dims else "landscapes of one and of two dimensions together")
    if dims == {1} or axes is not None:
        for name, landscape in landscapes.items():
            axes = draw(landscape, axes, label=name, value=value)
        return cast("Axes", axes).figure  # type: ignore[return-value]
    grids = [values_of(landscape, value)[0] for landscape in landscapes.values()]
    columns = min(len(grids), 3)
    rows = -(-len(grids) // columns)
    size = (0.8 + 3.6 * columns, 0.1 + 3.4 * rows)
    figure, panes = _pyplot().subplots(rows, columns, figsize=size, layout="constrained", squeeze=False)
    levels = _levels(grids)
    for pane in panes.flat[len(grids) :]:
        pane.remove()
    used = list(panes.flat[: len(grids)])
    for pane, grid, (name, landscape) in zip(used, grids, landscapes.items(), strict=True):
        bands = _map(pane, landscape, grid, levels)
        pane.set_title(named(name, landscape))
    _bar(figure, bands, used, value)
    return figure  # type: ignore[no-any-return]


def draw(landscape: Landscape, axes: Axes | None, *, label: str | None, value: Value) -> Axes:
    """Draw one landscape, as `Landscape.plot` says."""
    mean, draws = values_of(landscape, value)
    if axes is None:
        axes = _pyplot().subplots(figsize=(6.0, 4.2 if landscape.dims == 1 else 5.0), layout="constrained")[1]
    number = len(axes.lines)
    style: Any = {"color": COLOURS[number % len(COLOURS)], "linestyle": DASHES[number // len(COLOURS) % len(DASHES)]}
    label = None if label is None else named(label, landscape)
    if landscape.dims == 1:
        _curve(axes, landscape, mean, draws, label, style)
        axes.set_ylabel(title(value) + (f", mean ± deviation of {len(draws)} draws" if len(draws) > 1 else ""))
    elif label is None:
        _bar(axes.figure, _map(axes, landscape, mean, _levels([mean])), [axes], value)
    else:
        _lines(axes, landscape, mean, label, style)
        axes.set_title(title(value), fontsize="medium")
    if label is not None:
        axes.legend(loc=("best", "upper right")[landscape.dims - 1], framealpha=0.9, fontsize="small")
    return axes


def _curve(axes: Any, landscape: Landscape, mean: Array, draws: Array, label: str | None, style: Any) -> None:
    """Draw the mean, and a band around it that is as wide as the deviation, and nowhere wider than the draws."""
    x = landscape.coordinates.numpy()
    axes.plot(x, mean, label=label, linewidth=1.5, **style)
    if len(draws) > 1:
        spread = draws.std(0, ddof=1)
        low, high = np.maximum(mean - spread, draws.min(0)), np.minimum(mean + spread, draws.max(0))
        axes.fill_between(x, low, high, color=style["color"], alpha=0.15, linewidth=0)
    if is_wide(mean):
        axes.set_yscale("log")
    axes.set_xlabel(merged(axes.get_xlabel(), landscape.names[0]))
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.2)


def _map(axes: Any, landscape: Landscape, grid: Array, levels: Array) -> Any:
    """Draw filled contours, and lines at round numbers."""
    from matplotlib.colors import LogNorm, Normalize
    from matplotlib.patheffects import withStroke

    x = landscape.coordinates.numpy()
    norm = (LogNorm if is_wide(levels) else Normalize)(levels[0], levels[-1])
    values = np.ma.masked_invalid(grid.T)
    bands = axes.contourf(x, x, values, levels=levels, norm=norm, cmap="viridis")
    bands.set_edgecolor("face")  # or the background shines through between bands in SVG and PDF
    lines = axes.contour(x, x, values, levels=_round_numbers(levels), colors="white", linewidths=0.6)
    around = [withStroke(linewidth=1.5, foreground="0.2")]
    for text in axes.clabel(lines, fmt=number, fontsize=7):
        text.set_path_effects(around)
    _square(axes, landscape, color="white", path_effects=around)
    axes.set_facecolor("0.85")
    return bands


def _lines(axes: Any, landscape: Landscape, grid: Array, label: str, style: Any) -> None:
    """Draw contour lines at round numbers, the same for all models."""
    x = landscape.coordinates.numpy()
    values = np.ma.masked_invalid(grid.T)
    levels = _round_numbers(grid)
    lines = axes.contour(x, x, values, levels, colors=style["color"], linestyles=style["linestyle"], linewidths=1.1)
    axes.clabel(lines, fmt=number, fontsize=7)
    axes.plot([], [], label=label, linewidth=1.5, **style)
    _square(axes, landscape, color="black")


def _square(axes: Any, landscape: Landscape, **style: Any) -> None:
    """Give both axes one scale, and mark the model."""
    axes.scatter(0, 0, marker="+", s=60, zorder=4, **style)
    axes.set_aspect("equal")
    axes.locator_params(nbins=5)
    axes.set_xlabel(merged(axes.get_xlabel(), landscape.names[0]))
    axes.set_ylabel(merged(axes.get_ylabel(), landscape.names[1]))


def _round_numbers(values: Array) -> list[float]:
    """Return a few levels inside the range of the values."""
    from matplotlib.ticker import LogLocator, MaxNLocator

    low, high = extremes([values])
    subs = (1, 3) if low > 0 and high < 1e4 * low else (1,)
    found = (LogLocator(subs=subs, numticks=12) if is_wide(values) else MaxNLocator(6)).tick_values(low, high)
    return [level for level in found if low < level < high] or [(low + high) / 2]


def _bar(figure: Any, bands: Any, panes: Sequence[Any], value: Value) -> None:
    from matplotlib.ticker import LogLocator, MaxNLocator

    ticks = LogLocator() if is_wide(bands.levels) else MaxNLocator(8)
    figure.colorbar(bands, ax=panes, label=title(value), ticks=ticks, shrink=0.85)


def named(name: str, landscape: Landscape) -> str:
    """Return the name of a model, with what is wrong about its landscape."""
    return name if landscape.converged else f"{name} (not converged)"


def merged(*names: str) -> str:
    """Return what to write at an axis that several models share: without the eigenvalues, if those differ."""
    there = [name for name in names if name]
    return there[0] if len(set(there)) == 1 else there[0].split(",")[0]


def values_of(landscape: Landscape, value: Value) -> tuple[Array, Array]:
    """Return the mean over the draws and the draws, of the loss or of the accuracy in per cent."""
    if value not in ("loss", "accuracy"):
        raise ValueError(f'value={value!r} is neither "loss" nor "accuracy"')
    found = landscape.losses if value == "loss" else landscape.accuracies
    if found is None:
        raise ValueError("the accuracy was not measured: give accuracy_fn to the measurement")
    if not found.mean(0).isfinite().any():
        raise ValueError("no value of the landscape is finite: nothing can be drawn")
    draws: Array = (found if value == "loss" else 100 * found).numpy()
    draws = np.where(np.isfinite(draws), draws, np.nan)
    return draws.mean(0), draws


def extremes(grids: Sequence[Array]) -> tuple[float, float]:
    """Return the smallest and the largest value that is no gap."""
    return min(float(np.nanmin(grid)) for grid in grids), max(float(np.nanmax(grid)) for grid in grids)


def is_wide(values: Array) -> bool:
    """Whether the scale is to be logarithmic."""
    low, high = extremes([values])
    return low > 0 and high > WIDE * low


def _levels(grids: Sequence[Array]) -> Array:
    """Return the bounds of the colours, the same for all maps."""
    low, high = extremes(grids)
    if high - low <= 1e-12 * max(abs(low), abs(high)):
        low, high = low - 0.5, high + 0.5
    margin = 1e-6 * (high - low)
    if low > 0 and high > WIDE * low:
        return np.geomspace(low * (1 - 1e-6), high * (1 + 1e-6), BANDS + 1)
    return np.linspace(low - margin, high + margin, BANDS + 1)


def number(x: float) -> str:
    """Return a number as short as can be."""
    return f"{x:.2g}" if 1e-3 <= abs(x) < 1e4 or x == 0 else f"{x:.0e}".replace("e-0", "e-").replace("e+0", "e")


def title(value: Value) -> str:
    """Return what to write at an axis."""
    return "loss" if value == "loss" else "accuracy (%)"


def _pyplot() -> Any:
    try:
        import matplotlib.pyplot as plt
    except ImportError as error:
        raise ImportError("pictures need matplotlib: pip install 'steppe[lab]'") from error
    return plt
