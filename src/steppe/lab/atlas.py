"""The pictures of landscapes, and the page that shows them."""

import datetime
import json
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Literal

from steppe.curvature import Landscape, plot_landscapes, write_surfaces
from steppe.lab.files import write
from steppe.lab.landscapes import plain
from steppe.lab.options import Landscapes
from steppe.lab.plots import new_figure, saved
from steppe.lab.report import machine

__all__ = ["write_landscapes"]

VALUES: tuple[Literal["loss", "accuracy"], ...] = ("loss", "accuracy")
TITLES = {
    "curves": "Loss and accuracy along a line",
    "map-loss": "Loss in a plane",
    "map-accuracy": "Accuracy in a plane",
}


def write_landscapes(
    curves: Mapping[str, Landscape],
    maps: Mapping[str, Landscape],
    left_out: Sequence[str],
    what: Landscapes,
    out: Path,
    command: str,
) -> list[Path]:
    """Write curves and maps as PNG and SVG, surfaces as an HTML page, and landscape.md and landscape.json into `out`.

    Args:
        curves: landscapes of one dimension by their labels.
        maps: landscapes of two.
        left_out: runs that were not measured, with the reason.
        what: the options of the landscapes.
        out: folder of the report.
        command: the command line that made it.

    Returns:
        The files.

    Raises:
        OSError: if a file cannot be written.
        ImportError: without plotly, which makes the page.
    """
    files: dict[str, str | bytes] = {}
    if curves:
        figure, panes = new_figure(2)
        for axes, value in zip(panes, VALUES, strict=True):
            plot_landscapes(curves, axes, value=value)
            if what.directions == "eigenvectors":
                axes.set_xlabel("first eigenvector of the Hessian")
        files |= {f"curves.{kind}": saved(figure, kind) for kind in ("png", "svg")}
    if maps:
        from matplotlib import pyplot

        for value in VALUES:
            figure = plot_landscapes(maps, value=value)
            files |= {f"map-{value}.{kind}": saved(figure, kind) for kind in ("png", "svg")}
            pyplot.close(figure)
        with tempfile.TemporaryDirectory() as folder:
            write_surfaces(maps, Path(folder) / "surfaces.html")
            files["surfaces.html"] = (Path(folder) / "surfaces.html").read_bytes()
    files["landscape.json"] = json.dumps(
        {
            "options": asdict(what),
            "curves": {name: plain(each) for name, each in curves.items()},
            "maps": {name: plain(each) for name, each in maps.items()},
        }
    )
    pictures = "".join(f"![{title}]({name}.png)\n\n" for name, title in TITLES.items() if f"{name}.png" in files)
    page = "[The same as surfaces to turn](surfaces.html)\n\n" if maps else ""
    doubtful = [name for name, each in {**curves, **maps}.items() if not each.converged]
    files["landscape.md"] = (
        f"# Landscapes\n\n{pictures}{page}{_legend(curves, what)}"
        + "".join(f"- {name}: the eigenvectors did not converge\n" for name in doubtful)
        + "".join(f"- left out: {line}\n" for line in left_out)
        + f"\n    {command}\n\n{datetime.date.today().isoformat()}, {machine()}.\n"
    )
    for name, content in files.items():
        write(out / name, content)
    return [out / name for name in files]


def _legend(curves: Mapping[str, Landscape], what: Landscapes) -> str:
    split = {"train": "training images with the labels that were trained on", "test": "test images"}[what.split]
    lines = [f"Measured on at most {what.examples} {split}, without augmentation, in eval mode."]
    if any(len(curve.losses) > 1 for curve in curves.values()):
        lines.append(
            "A curve is the mean over draws of the direction, and over seeds; its band one standard deviation."
        )
    if what.directions == "filter":
        lines.append("Directions are Gaussian, and in each filter as long as the weights: 1 is the weights' own norm.")
    return "\n".join(lines) + "\n\n"
