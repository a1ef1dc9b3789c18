"""Finished runs as something to measure: their networks with the trained weights, and the images."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from steppe.lab.augment import normalize
from steppe.lab.config import Config
from steppe.lab.options import Sample
from steppe.lab.run import Run
from steppe.lab.train import Training, laid_out

__all__ = ["baseline_of", "find", "grouped", "home", "load"]


def find(paths: Sequence[Path]) -> tuple[list[Run], list[str]]:
    """The finished runs in the folders of runs or of whole studies.

    Args:
        paths: folders of single runs, each of which must be finished, or of studies, of which the finished runs are
            taken: those of sgd first, the others by name. Of runs that are equal in all settings, the first counts.

    Returns:
        The runs, and a line for each that is left out, with its reason.

    Raises:
        ValueError: if a path is no such folder, a single run is not finished, or a study has no finished run.
    """
    runs: dict[Config, Run] = {}
    left_out = []
    for path in paths:
        for run in _at(path):
            if reason := _unfinished(run):
                left_out.append(f"{run.folder}: {reason}")
            elif runs.setdefault(run.config, run).folder.resolve() != run.folder.resolve():
                left_out.append(f"{run.folder}: has the settings of {runs[run.config].folder}")
    if not runs:
        raise ValueError("no run to measure: give the folder of a run or of a study")
    return list(runs.values()), left_out


def grouped(runs: Sequence[Run]) -> dict[str, list[int]]:
    """Places of the runs by their label: method and base, with the settings in which groups of one label differ."""
    groups: dict[Config, list[int]] = {}
    for place, run in enumerate(runs):
        groups.setdefault(replace(run.config, seed=0), []).append(place)
    labels = {}
    for config, places in groups.items():
        values = asdict(config)
        others = [asdict(other) for other in groups if other.title == config.title]
        differ = [f"{name}={value}" for name, value in values.items() if any(o[name] != value for o in others)]
        labels[", ".join([config.title, *differ])] = places
    return labels


def baseline_of(runs: Sequence[Run], groups: Mapping[str, Sequence[int]]) -> str:
    """The label of what the others are held against: the first of sgd, or else of all."""
    plain = (label for label, places in groups.items() if runs[places[0]].config.method == "sgd()")
    return next(plain, next(iter(groups)))


def home(paths: Sequence[Path]) -> Path:
    """The folder of the study that the first of the paths belongs to."""
    first = paths[0]
    if (first / "config.json").exists():
        first = first.parent
    return first.parent if first.resolve().name == "runs" else first


def load(run: Run, sample: Sample) -> tuple[nn.Module, list[tuple[Tensor, Tensor]]]:
    """The trained network of a finished run in eval mode, and its batches of normalized images and labels.

    Of the checkpoint, only the network's own weights are read.

    Raises:
        ValueError: if there is no checkpoint or it does not fit the network, the device cannot be used, or a count is
            not positive.
        FileNotFoundError: if the run's images are not where they were.
    """
    for name in ("examples", "batch_size"):
        if getattr(sample, name) < 1:
            raise ValueError(f"{name} must be at least 1, got {getattr(sample, name)}")
    checkpoint = run.folder / "checkpoint.pt"
    if not checkpoint.exists():
        raise ValueError(
            f"{run.folder} has no checkpoint.pt, which holds the weights and is not kept with results: "
            "give its `steppe compare` again, with another --out"
        )
    training = Training(run.config if sample.device is None else replace(run.config, device=sample.device))
    try:
        state: dict[str, Any] = torch.load(checkpoint, map_location=training.config.device, weights_only=True)
        training.model.load_state_dict(state["training"]["model"])
    except Exception as error:  # of a damaged file, torch raises nearly anything
        reason = (str(error).strip() or type(error).__name__).splitlines()[-1].strip()
        raise ValueError(f"{checkpoint} does not match {run.config.model} of {run.folder}: {reason}") from error
    dataset = training.dataset
    split = dataset.train if sample.split == "train" else dataset.test
    order = torch.randperm(len(split), generator=torch.Generator().manual_seed(sample.seed))
    chosen = split[order[: sample.examples].to(split.labels.device)]
    images = laid_out(normalize(chosen.images, dataset.mean, dataset.std))
    batches = zip(*(torch.split(each, sample.batch_size) for each in (images, chosen.labels)), strict=True)
    return training.model.eval(), list(batches)


def _at(path: Path) -> list[Run]:
    """The run at a path, which has to be finished, or the runs of a study, one of which has to be."""
    if (path / "config.json").exists():
        run = _open(path)
        if reason := _unfinished(run):
            raise ValueError(f"{path}: {reason}")
        return [run]
    folders = sorted(file.parent for pattern in ("runs/*", "*") for file in path.glob(f"{pattern}/config.json"))
    if not folders:
        what = "neither a run nor a study is in it" if path.is_dir() else "no such folder"
        raise ValueError(f"{path}: {what}; give folders that `steppe compare` made, OUT or OUT/runs/NAME")
    found = sorted(map(_open, folders), key=lambda run: run.config.title != "sgd()")
    if all(map(_unfinished, found)):
        raise ValueError(f"{path}: none of its {len(found)} runs is finished; give their command again")
    return found


def _open(folder: Path) -> Run:
    try:
        return Run.at(folder)
    except (TypeError, KeyError) as error:
        raise ValueError(f"{folder}: its files are not those of a run that this version can read: {error}") from error


def _unfinished(run: Run) -> str | None:
    if run.result is None:
        return "the run is not finished; give its command again"
    return f"the run failed, {run.result['failed']}" if "failed" in run.result else None
