"""Defaults of the command line: what is trained, by which methods, and which values are tried."""

import os
from dataclasses import replace

import torch

from steppe.lab.config import Setting

__all__ = ["GRIDS", "METHODS", "preset", "preset_jobs", "preset_seeds"]

METHODS = (
    "sgd",
    "sam(rho=0.8)",
    "esam(rho=0.4)",
    "rwp(gamma=0.1)",
    "rst(sam(rho=1.5), p=0.5)",
    "gsam(rho=0.4, alpha=0.4)",
    "looksam(rho=0.4)",
)
"""Methods compared by default, with the best of the values in `GRIDS` on the digits' validation split."""

GRIDS = (
    "sam(rho={0.2,0.4,0.6,0.8,1.0})",
    "esam(rho={0.2,0.4,0.6})",
    "rwp(gamma={0.02,0.05,0.1,0.2})",
    "rst(sam(rho={0.6,0.8,1.0,1.2,1.5,2.0}), p=0.5)",
    "gsam(rho={0.2,0.4,0.6,0.8}, alpha={0.1,0.4})",
    "looksam(rho={0.2,0.4,0.6,0.8}, alpha={0.3,0.7})",
)
"""Values that `steppe tune` tries by default."""


def preset(data: str) -> Setting:
    """The setting that a data set starts from.

    Args:
        data: "digits", or the path of a folder of Parquet files.
    """
    if data == "digits":
        return Setting()
    return replace(
        Setting(),
        data=data,
        model="resnet18",
        epochs=80,
        batch_size=128,
        lr=0.2,
        label_noise=0.0,
        flip=True,
        crop=4,
        cutout=16,
        eval_every=8,
        device="cuda" if torch.cuda.is_available() else "cpu",
    )


def preset_seeds(data: str) -> int:
    """The number of seeds that a comparison on a data set starts from."""
    return 5 if data == "digits" else 3


def preset_jobs(data: str) -> tuple[int, int]:
    """Processes, and threads of each: small networks gain from a process a core, large ones from threads."""
    return (os.cpu_count() or 1, 1) if data == "digits" else (1, torch.get_num_threads())
