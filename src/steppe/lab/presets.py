"""Defaults of the command line: what is trained, by which methods, and which values are tried."""

import os
from collections.abc import Mapping
from dataclasses import replace

import torch

from steppe.lab.config import Setting

__all__ = ["BASES", "BASE_GRIDS", "GRIDS", "METHODS", "base_preset", "preset", "preset_jobs", "preset_seeds"]

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

BASES: Mapping[str, Mapping[str, float]] = {
    "sgd": {"lr": 0.1, "momentum": 0.9, "weight_decay": 5e-4},
    "adamw": {"lr": 0.0003, "momentum": 0.9, "weight_decay": 0.01},
    "adahessian": {"lr": 0.01, "momentum": 0.9, "weight_decay": 0.05},
    "kfac": {"lr": 0.001, "momentum": 0.9, "weight_decay": 0.01, "damping": 0.1},
    "ekfac": {"lr": 0.001, "momentum": 0.9, "weight_decay": 0.01, "damping": 0.1},
    "newton-cg": {"lr": 0.3, "momentum": 0.0, "weight_decay": 0.0},
}
"""Values of the bases, with the best of those in `BASE_GRIDS` on the digits' validation split; but SGD's are those that
the methods were tuned with."""

BASE_GRIDS = (
    "sgd(lr={0.03,0.1,0.3})",
    "adamw(lr={0.0001,0.0003,0.001,0.003,0.01}, weight_decay={0.01,0.1})",
    "adahessian(lr={0.001,0.003,0.01,0.03,0.1}, weight_decay={0.005,0.05})",
    "kfac(damping={0.03,0.1}, lr={0.001,0.01})",
    "ekfac(damping={0.03,0.1}, lr={0.001,0.01})",
    "newton-cg(lr={0.3,1})",
)
"""Values that were tried for them: `steppe tune --grids sgd --base "adamw(lr={0.001,0.003,0.01})"`."""


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
        label_noise=0.0,
        flip=True,
        crop=4,
        cutout=16,
        eval_every=8,
        device="cuda" if torch.cuda.is_available() else "cpu",
    )


def base_preset(data: str, name: str) -> Mapping[str, float]:
    """The values that a base starts from on a data set.

    Args:
        data: "digits", or the path of a folder of Parquet files.
        name: of the base.
    """
    return BASES[name] if data == "digits" or name != "sgd" else {**BASES[name], "lr": 0.2}


def preset_seeds(data: str) -> int:
    """The number of seeds that a comparison on a data set starts from."""
    return 5 if data == "digits" else 3


def preset_jobs(data: str) -> tuple[int, int]:
    """Processes, and threads of each: small networks gain from a process a core, large ones from threads."""
    return (os.cpu_count() or 1, 1) if data == "digits" else (1, torch.get_num_threads())
