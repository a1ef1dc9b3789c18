"""What the scripts of this folder share: figures, and a command line."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure

PICTURES = Path(__file__).parents[1] / "pictures"


def figure(panels: int, width: float = 4.6, height: float = 4.2) -> tuple[Figure, Sequence[Axes]]:
    """Return a figure with panels side by side."""
    made = Figure(figsize=(width * panels, height), dpi=120, layout="constrained")
    return made, [made.add_subplot(1, panels, i + 1) for i in range(panels)]


def run(main: Callable[[Path], None], text: str | None) -> None:
    """Call ``main`` with the folder for its picture."""
    parser = argparse.ArgumentParser(description=(text or "").splitlines()[0])
    parser.add_argument("--out", type=Path, default=PICTURES, help="folder of the picture")
    out = parser.parse_args().out
    out.mkdir(parents=True, exist_ok=True)
    main(out)
