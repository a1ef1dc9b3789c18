"""Many runs in one go."""

import os
from collections.abc import Iterable, Sequence
from dataclasses import asdict, replace
from pathlib import Path

import steppe
from steppe.lab import bases
from steppe.lab.config import Config, Setting
from steppe.lab.files import claimed
from steppe.lab.jobs import lockstep, spread
from steppe.lab.presets import base_preset
from steppe.lab.progress import Display
from steppe.lab.run import Run
from steppe.lab.train import Training

__all__ = ["compare", "configure", "perform"]


def configure(setting: Setting, method: str, seed: int, validation: float = 0.0, base: str = "sgd") -> Config:
    """The run of a method, a base and a seed in a setting.

    Learning rate, momentum and weight decay are those in the base's expression, else the setting's, else the preset's.

    Args:
        setting: what all runs share.
        method: expression of the method; the run keeps `repr` of it, so that one method has one name.
        seed: of the run.
        validation: share of the training images that is held out and evaluated on.
        base: expression of the base, see `steppe.lab.bases.read`.

    Raises:
        ValueError: if the method or the base does not parse, or a value is out of its range.
    """
    name, own = bases.read(base)
    given = {key: value for key in bases.SHARED if (value := getattr(setting, key)) is not None}
    values = {**base_preset(setting.data, name), **given, **own}
    shared = {key: float(values.pop(key)) for key in bases.SHARED}
    data = setting.data if setting.data == "digits" else os.path.normpath(setting.data)
    config = Config(
        **{**asdict(setting), **shared, "data": data},
        method=repr(steppe.parse(method)),
        seed=seed,
        validation=validation,
        base=bases.write(name, values),
    )
    bases.check(config)
    return config


def compare(
    setting: Setting,
    methods: Sequence[str],
    seeds: int,
    out: Path,
    jobs: int = 1,
    base: Sequence[str] = ("sgd",),
) -> list[Run]:
    """Train every method on every base with every seed, all runs of a seed an epoch at a time in turn.

    So the seconds of a run's epoch stand beside those of the others at the same moment, and what slows the machine
    down for a while slows all of them.

    Args:
        setting: what all runs share.
        methods: expressions of the methods; one that occurs twice runs once.
        seeds: number of seeds, 0 to seeds - 1.
        out: folder of the study.
        jobs: number of processes, each of which takes a seed at a time; the last ones share what seeds are left.
        base: expressions of the bases; one that occurs twice counts once.

    Returns:
        The finished runs, seed by seed in the order of the bases, and of the methods on each.

    Raises:
        ValueError: if a method or a base does not parse, there is none, or a value is out of its range.
        OSError: if a file cannot be written.
    """
    if seeds < 1:
        raise ValueError(f"seeds must be at least 1, got {seeds}")
    if not methods:
        raise ValueError("no method to compare: name at least one, such as sam")
    if not base:
        raise ValueError("no base to compare on: name at least one, such as sgd")
    configs = dict.fromkeys(configure(setting, method, 0, base=each) for each in base for method in methods)
    return perform(([replace(config, seed=seed) for config in configs] for seed in range(seeds)), out, jobs)


def perform(groups: Iterable[Iterable[Config]], out: Path, jobs: int = 1) -> list[Run]:
    """Finish the runs; those of one group advance in lockstep, an epoch at a time.

    Args:
        groups: the runs, as groups.
        out: folder of the study.
        jobs: number of processes, see `steppe.lab.jobs.spread`; with 1 there is only this one.

    Returns:
        All runs, finished, in the order given.

    Raises:
        ValueError: if jobs is not positive, a config names what does not exist, or another command uses the folder.
        OSError: if a file cannot be written.
    """
    if jobs < 1:
        raise ValueError(f"jobs must be at least 1, got {jobs}")
    planned = [[Run(config, out) for config in group] for group in groups]
    runs = [run for group in planned for run in group]
    waiting = [left for group in planned if (left := [run for run in group if run.result is None])]
    with claimed(out), Display(runs) as display:
        if min(jobs, len(waiting)) <= 1:
            for group in waiting:
                for moved in lockstep(group):
                    display.show(runs, moved)
            return runs
        Training(waiting[0][0].config)  # refuses at once what every process would refuse
        watched = {run.config: run for run in runs}
        for moved in spread([[run.config for run in group] for group in waiting], out, jobs):
            watched[moved.config] = moved
            display.show(list(watched.values()), moved)
        return [watched[run.config] for run in runs]
