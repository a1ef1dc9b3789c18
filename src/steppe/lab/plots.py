"""The pictures of a comparison, and those of the sharpness of its runs."""

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import cycle
from typing import TYPE_CHECKING, Any

from steppe.curvature import FilterNorms, Spectrum
from steppe.curvature.pictures import COLOURS, DASHES
from steppe.lab.stats import Estimate, estimate

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["Curve", "Point", "accuracy_against_cost", "curves", "filters", "new_figure", "saved", "spectra"]

PLACES = [(8 * x * far, 8 * y * far) for far in range(1, 12) for x in (1, -1) for y in (1, -1, 0)]
"""Where a name may stand, in points from its mark, the nearest first."""


@dataclass(frozen=True)
class Point:
    """A method in the first picture."""

    method: str
    cost: float
    """Propagations a step."""
    accuracy: Estimate


@dataclass(frozen=True)
class Curve:
    """A method in the second picture: (epoch, value) of all seeds together."""

    method: str
    train_loss: list[tuple[int, float]]
    test_accuracy: list[tuple[int, float]]


def accuracy_against_cost(points: Sequence[Point]) -> bytes:
    """Test accuracy in per cent, with 95 % intervals, against propagations a step, as a PNG."""
    figure, (axes,) = new_figure(1)
    marks = [(point.cost, 100 * point.accuracy.mean, 100 * (point.accuracy.half or 0.0)) for point in points]
    for (x, y, half), colour in zip(marks, cycle(COLOURS)):
        axes.errorbar(x, y, yerr=half or None, fmt="o", color=colour, capsize=3, alpha=0.9)
    axes.set_xlabel("propagations per step")
    axes.set_ylabel("test accuracy (%)")
    axes.margins(0.2)
    low, high = axes.get_ylim()
    axes.set_ylim(max(low, 0.0), min(high, 102.0))
    _label(figure, axes, [point.method for point in points], marks)
    return saved(figure)


def _label(figure: "Figure", axes: "Axes", names: Sequence[str], marks: Sequence[tuple[float, float, float]]) -> None:
    """Name each mark at the nearest place where the name lies in the picture and on nothing else."""
    from matplotlib.transforms import Bbox

    figure.canvas.draw()
    inside = axes.get_window_extent()
    centres = axes.transData.transform([(x, y) for x, y, _ in marks])
    ends = axes.transData.transform([(x, y + half) for x, y, half in marks])
    taken = [
        Bbox.from_extents(x - 5, y - 5 - (end - y), x + 5, end + 5)
        for (x, y), (_, end) in zip(centres, ends, strict=True)
    ]
    for name, (x, y, _), centre, colour in zip(names, marks, centres, cycle(COLOURS), strict=False):
        sample = figure.text(0, 0, name, fontsize=8)
        size = sample.get_window_extent()
        sample.remove()

        def box(place: tuple[int, int], centre: Any = centre, size: Any = size) -> Bbox:
            right, up = (number * figure.dpi / 72 for number in place)
            left = centre[0] + right - (size.width if right < 0 else 0)
            return Bbox.from_bounds(left, centre[1] + up - size.height / 2, size.width, size.height)

        def hidden(place: tuple[int, int], box: Any = box) -> float:
            here = box(place)
            outside = here.width * here.height - _area(here, inside)
            return float(round(outside + sum(_area(here, other) for other in taken)))

        place = min(PLACES, key=hidden)
        taken.append(box(place))
        axes.annotate(
            name,
            (x, y),
            place,
            textcoords="offset points",
            ha="left" if place[0] > 0 else "right",
            va="center",
            fontsize=8,
            color=colour,
            arrowprops={"arrowstyle": "-", "color": colour, "alpha": 0.4, "linewidth": 0.6},
        ).set_in_layout(False)


def _area(one: Any, other: Any) -> float:
    width = min(one.x1, other.x1) - max(one.x0, other.x0)
    height = min(one.y1, other.y1) - max(one.y0, other.y0)
    return float(max(width, 0.0) * max(height, 0.0))


def curves(methods: Sequence[Curve]) -> bytes:
    """Training loss and test accuracy against the epoch, mean over seeds with its 95 % interval, as a PNG."""
    figure, (left, right) = new_figure(2)
    for number, curve in enumerate(methods):
        style: Any = {
            "color": COLOURS[number % len(COLOURS)],
            "linestyle": DASHES[number // len(COLOURS) % len(DASHES)],
        }
        for axes, values, scale in ((left, curve.train_loss, 1), (right, curve.test_accuracy, 100)):
            by_epoch: dict[int, list[float]] = {}
            for epoch, value in values:
                by_epoch.setdefault(epoch, []).append(scale * value)
            epochs = sorted(by_epoch)
            means = [estimate(by_epoch[epoch]) for epoch in epochs]
            axes.plot(epochs, [m.mean for m in means], label=curve.method, linewidth=1.2, **style)
            low, high = ([m.mean + sign * (m.half or 0.0) for m in means] for sign in (-1, 1))
            axes.fill_between(epochs, low, high, color=style["color"], alpha=0.12, linewidth=0)
    left.set_ylabel("training loss")
    right.set_ylabel("test accuracy (%)")
    for axes in (left, right):
        axes.set_xlabel("epoch")
    figure.legend(*left.get_legend_handles_labels(), loc="outside lower center", ncols=3, fontsize=8, frameon=False)
    return saved(figure)


def spectra(found: Mapping[str, Spectrum]) -> bytes:
    """Spectral densities of the methods' Hessians on one pair of axes, as a PNG."""
    figure, (axes,) = new_figure(1)
    axes.set_prop_cycle(color=COLOURS * len(DASHES), linestyle=[dash for dash in DASHES for _ in COLOURS])
    widest = max(float(spectrum.nodes.max() - spectrum.nodes.min()) for spectrum in found.values())
    for method, spectrum in found.items():
        spectrum.plot(axes, label=method, width=widest / 100 or 1.0)
    return saved(figure)


def filters(found: Mapping[str, FilterNorms]) -> bytes:
    """Distributions of the norms of the methods' filters on one pair of axes, as a PNG."""
    figure, (axes,) = new_figure(1)
    axes.set_prop_cycle(color=COLOURS)
    for method, norms in found.items():
        norms.plot(axes, label=method)
    return saved(figure)


def new_figure(panels: int) -> tuple["Figure", Sequence["Axes"]]:
    """A figure with panels side by side."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5 + 3 * panels, 5), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    panes = [figure.add_subplot(1, panels, number + 1) for number in range(panels)]
    for axes in panes:
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.2)
    return figure, panes


def saved(figure: "Figure", kind: str = "png") -> bytes:
    """The content of a file with the figure: "png" or "svg"."""
    content = io.BytesIO()
    figure.savefig(content, format=kind)
    return content.getvalue()
