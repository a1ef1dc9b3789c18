"""Landscapes of two dimensions as surfaces to turn, on one page that needs no network."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import cycle
from pathlib import Path
from typing import Any

import numpy as np

from .landscape import Landscape, Value
from .pictures import COLOURS, Array, extremes, is_wide, merged, named, number, title, values_of


def write_surfaces(landscapes: Mapping[str, Landscape], path: str | Path, *, value: Value = "loss") -> None:
    """Write an HTML page with the surfaces of one or more models: turned by the mouse, shown and hidden by buttons.

    The script that draws is in the page, about 5 MB; nothing is fetched when it is opened. Heights are logarithmic
    where the values span more than a factor of 20. What is not finite is a hole.

    Args:
        landscapes: the models' names and landscapes, all of two dimensions.
        path: of the file to write.
        value: ``"loss"`` or ``"accuracy"``.

    Raises:
        ValueError: if there are none, one has another number of dimensions, the accuracy was not measured, or nothing
            is finite.
        ImportError: without plotly.
    """
    try:
        import plotly.graph_objects as go  # type: ignore[import-untyped]
    except ImportError as error:
        raise ImportError("the page with surfaces needs plotly: pip install 'steppe[lab]'") from error
    if not landscapes:
        raise ValueError("no landscapes to draw")
    for name, landscape in landscapes.items():
        if landscape.dims != 2:
            raise ValueError(f"the landscape of {name} has one dimension: a surface takes two")
    grids = [values_of(landscape, value)[0] for landscape in landscapes.values()]
    everything = np.concatenate([grid.ravel() for grid in grids])
    wide = is_wide(everything)
    figure = go.Figure()
    for (name, landscape), grid, tint in zip(landscapes.items(), grids, cycle(COLOURS)):
        x = landscape.coordinates.numpy()
        figure.add_surface(
            x=x,
            y=x,
            z=_heights(grid, wide).T,
            customdata=grid.T,
            name=named(name, landscape),
            showlegend=len(grids) > 1,
            showscale=False,
            colorscale="Viridis" if len(grids) == 1 else [[0, tint], [1, _pale(tint)]],
            contours={"z": {"show": True, "color": "rgba(255, 255, 255, 0.5)", "width": 1}},
            hovertemplate=f"{name}<br>(%{{x:.3g}}, %{{y:.3g}})<br>{title(value)} %{{customdata:.4g}}<extra></extra>",
        )
    axes = [merged(*names) for names in zip(*(landscape.names for landscape in landscapes.values()), strict=True)]
    figure.update_layout(
        template="plotly_white",
        scene={
            "xaxis": {"title": {"text": axes[0]}},
            "yaxis": {"title": {"text": axes[1]}},
            "zaxis": {"title": {"text": title(value)}, **_heights_axis(_heights(everything, wide), wide)},
            "aspectmode": "cube",
            "camera": {"eye": {"x": 1.5, "y": 1.5, "z": 1.1}},
        },
        legend={"title": {"text": "click to hide or show"}, "itemsizing": "constant"},
        margin={"l": 0, "r": 0, "t": 50, "b": 0},
        updatemenus=[_buttons(list(landscapes))] if len(grids) > 1 else [],
    )
    figure.write_html(
        path, include_plotlyjs=True, include_mathjax=False, div_id="surfaces", config={"displaylogo": False}
    )


def _heights(grid: Array, wide: bool) -> Array:
    return np.log10(grid) if wide else grid


def _heights_axis(heights: Array, wide: bool) -> dict[str, Any]:
    """Return an axis that stays as it is when models are hidden."""
    low, high = extremes([heights])
    margin = 0.05 * (high - low) or 0.5
    axis: dict[str, Any] = {"range": [low - margin, high + margin]}
    if wide:  # heights are logarithms, because plotly's own logarithmic axis takes no contours
        places = np.arange(np.ceil(low), high + 1e-9, max(1, round((high - low) / 8)))
        axis |= {"tickvals": places, "ticktext": [number(10.0**place) for place in places]}
    return axis


def _buttons(names: list[str]) -> dict[str, Any]:
    """Return a row of buttons: all models, or one of them."""
    shown = {"all": [True] * len(names), **{name: [name == other for other in names] for name in names}}
    buttons = [{"label": name, "method": "restyle", "args": [{"visible": each}]} for name, each in shown.items()]
    return {"type": "buttons", "direction": "right", "x": 0, "xanchor": "left", "y": 1.06, "buttons": buttons}


def _pale(colour: str) -> str:
    """Return the colour half way to white."""
    red, green, blue = (int(colour[i : i + 2], 16) for i in (1, 3, 5))
    return f"rgb({(red + 255) // 2}, {(green + 255) // 2}, {(blue + 255) // 2})"
