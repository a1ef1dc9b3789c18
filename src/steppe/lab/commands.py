"""The commands and their options, as the command line reads them; their docstrings are its help."""

from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

from tyro.conf import Positional

from steppe.lab.config import Setting
from steppe.lab.options import Landscapes, Sharpness
from steppe.lab.presets import GRIDS, METHODS

__all__ = ["Command", "Compare", "Landscape", "Measure", "Methods", "Train", "Tune"]


@dataclass(frozen=True)
class Compare(Setting):
    """Compare methods, on one base or several, over seeds: accuracy, cost, time and memory, in a table and in pictures.

    All runs of a seed see the same initial weights, batches, augmentation and label noise. A command that
    was interrupted goes on where it stopped when it is given again.

    For instance:

        steppe compare
        steppe compare --methods sgd sam "rst(esam(rho=0.4), p=0.5)" --seeds 3
        steppe compare --methods sgd sam --base sgd adamw "kfac(lr=0.03, damping=0.01)"
        steppe compare --data data/cifar10 --model wrn-16-8 --epochs 200 --out runs/wrn

    Defaults depend on the data. These are shown with those for a folder of images:

        steppe compare --data data/cifar10 --help
    """

    methods: tuple[str, ...] = METHODS
    """Expressions of the methods, see `steppe methods`. They are held against sgd, or else the first."""
    base: tuple[str, ...] = ("sgd",)
    """Expressions of the optimizers that take the step; every method runs on each, held against sgd on the first."""
    seeds: int = 5
    """Number of seeds."""
    out: Path = Path("runs")
    """Folder of the reports and the runs."""
    jobs: int = 1
    """Processes to train in: each trains one seed at a time; the last seeds are shared out."""
    threads: int = 1
    """Threads that torch computes with in each process."""
    sharpness: bool = False
    """Measure λmax, λmax/λ5, surrogate gap and m-sharpness of the trained networks too, see `steppe sharpness`."""


@dataclass(frozen=True)
class Train(Setting):
    """Train one network with one method, one base and one seed.

    For instance:

        steppe train --method "sam(rho=0.6)"
        steppe train --method sam --base "adamw(lr=0.003)"
        steppe train --method esam --data data/cifar10 --seed 3
    """

    method: str = "sgd"
    """Expression of the method, as `steppe methods` lists them."""
    base: str = "sgd"
    """Expression of the optimizer that takes the step, from the same list."""
    seed: int = 0
    """Fixes weights, batches, augmentation and label noise."""
    out: Path = Path("runs")
    """Folder in which the run's own folder is made."""
    threads: int = 1
    """Threads that torch computes with."""


@dataclass(frozen=True)
class Tune(Setting):
    """Choose the values of methods and bases by accuracy on a held-out fifth of the training images.

    Test images take no part.

    For instance:

        steppe tune
        steppe tune --grids "sam(rho={0.1,0.2,0.4})" "gsam(rho={0.2,0.4}, alpha={0.1,0.4})" --seeds 5
        steppe tune --grids sgd --base "adamw(lr={0.001,0.003,0.01})" "kfac(lr={0.01,0.03}, damping={0.001,0.01})"
    """

    grids: tuple[str, ...] = GRIDS
    """Expressions of methods in which braces list the values to try."""
    base: tuple[str, ...] = ("sgd",)
    """Expressions of the optimizers that take the step, in the same way; every grid is tried on each."""
    seeds: int = 3
    """Number of seeds a candidate."""
    out: Path = Path("runs")
    """Folder of tuned.json, tuned.md and the runs."""
    jobs: int = 1
    """Processes to train in, each of which takes a run at a time."""
    threads: int = 1
    """Threads that torch computes with in each process."""


@dataclass(frozen=True)
class Measure(Sharpness):
    """Measure how flat the minima of finished runs are: eigenvalues, trace, sharpness, spectra, filter norms, and more.

    What was measured is kept in the folders of the runs: a command that was interrupted goes on where it stopped when
    it is given again.

    For instance:

        steppe sharpness runs/digits
        steppe sharpness runs/digits/runs/*-s0-* --examples 200
    """

    runs: Positional[tuple[Path, ...]] = ()
    """Folders of finished runs of `steppe compare`, OUT/runs/NAME, or of whole studies, OUT."""
    out: Path | None = None
    """Folder of the report; by default `sharpness` in the folder of the first study."""
    threads: int | None = None
    """Threads that torch computes with; by default as many as the first run was trained with."""


@dataclass(frozen=True)
class Landscape(Landscapes):
    """Draw the loss around the minima of finished runs: curves, maps, and surfaces to turn in a browser.

    What was measured is kept in the folders of the runs: a command that was interrupted goes on where it stopped when
    it is given again.

    For instance:

        steppe landscape runs/digits/runs/*-s0-*
        steppe landscape runs/digits --dims 1 --draws 10
    """

    runs: Positional[tuple[Path, ...]] = ()
    """Folders of finished runs of `steppe compare`, OUT/runs/NAME, or of whole studies, OUT."""
    out: Path | None = None
    """Folder of the pictures; by default `landscape` in the folder of the first study."""
    threads: int | None = None
    """Threads that torch computes with; by default as many as the first run was trained with."""


@dataclass(frozen=True)
class Methods:
    """List the methods and the bases: signature or values, equation, cost and source of each."""


Command: TypeAlias = Compare | Train | Tune | Measure | Landscape | Methods
