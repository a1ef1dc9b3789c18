"""The command line, `steppe`."""

import errno
import shlex
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Annotated, Any, Union

import steppe
from steppe.lab.config import Setting
from steppe.lab.presets import GRIDS, METHODS, preset, preset_jobs, preset_seeds

__all__ = ["main"]

FAILED = 2
INTERRUPTED = 130
PIPED_WIDTH = 160


@dataclass(frozen=True)
class Compare(Setting):
    """Compare methods over seeds: test accuracy, cost, time and memory, in a table and in pictures.

    All methods of a seed see the same initial weights, batches, augmentation and label noise. A command that
    was interrupted goes on where it stopped when it is given again.

    For instance:

        steppe compare
        steppe compare --methods sgd sam "rst(esam(rho=0.4), p=0.5)" --seeds 3
        steppe compare --data data/cifar10 --model wrn-16-8 --epochs 200 --out runs/wrn
        steppe compare --data data/cifar10 --help
    """

    methods: tuple[str, ...] = METHODS
    """Expressions of the methods, see `steppe methods`. They are held against sgd, or else the first."""
    seeds: int = 5
    """Number of seeds."""
    out: Path = Path("runs")
    """Folder of the reports and the runs."""
    jobs: int = 1
    """Processes to train in, each of which takes a seed at a time."""
    threads: int = 1
    """Threads that torch computes with in each process."""


@dataclass(frozen=True)
class Train(Setting):
    """Train one network with one method and one seed.

    For instance:

        steppe train --method "sam(rho=0.6)"
        steppe train --method esam --data data/cifar10 --seed 3
    """

    method: str = "sgd"
    """Expression of the method, as `steppe methods` lists them."""
    seed: int = 0
    """Fixes weights, batches, augmentation and label noise."""
    out: Path = Path("runs")
    """Folder in which the run's own folder is made."""
    threads: int = 1
    """Threads that torch computes with."""


@dataclass(frozen=True)
class Tune(Setting):
    """Choose the methods' values by accuracy on a held-out fifth of the training images.

    Test images take no part.

    For instance:

        steppe tune
        steppe tune --grids "sam(rho={0.1,0.2,0.4})" "gsam(rho={0.2,0.4}, alpha={0.1,0.4})" --seeds 5
    """

    grids: tuple[str, ...] = GRIDS
    """Expressions of methods in which braces list the values to try."""
    seeds: int = 3
    """Number of seeds a candidate."""
    out: Path = Path("runs")
    """Folder of tuned.json, tuned.md and the runs."""
    jobs: int = 1
    """Processes to train in, each of which takes a run at a time."""
    threads: int = 1
    """Threads that torch computes with in each process."""


@dataclass(frozen=True)
class Methods:
    """List the methods: signature, equation, cost and source of each."""


Command = Compare | Train | Tune | Methods


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit status: 0, 2 after a failure, 130 after an interruption.

    Args:
        arguments: what follows `steppe`; by default those of the process.
    """
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    if arguments == ["--version"]:
        print(f"steppe {steppe.__version__}")
        return 0
    command: Command | None = None
    try:
        command = _parse(arguments)
        return _run(command, shlex.join(["steppe", *arguments]))
    except KeyboardInterrupt:
        return _say("interrupted; run the same command again to go on", INTERRUPTED)
    except ModuleNotFoundError as error:
        return _say(f"the laboratory needs {error.name}: pip install 'steppe[lab]'", FAILED)
    except OSError as error:
        if error.errno == errno.ENOSPC:
            where = error.filename or getattr(command, "out", ".")
            mend = "free some or give another --out; finished runs are kept"
            return _say(f"no space left on the disk for {where}: {mend}", FAILED)
        return _say(str(error), FAILED)
    except (ValueError, TypeError) as error:
        return _say(str(error), FAILED)


def _say(message: str, status: int) -> int:
    print(f"steppe: {message}", file=sys.stderr)
    return status


def _parse(arguments: Sequence[str]) -> Command:
    """Parse the command line; the defaults are those of its --data."""
    import tyro

    data = next(iter(_values_of("--data", arguments)), "digits")
    setting = asdict(preset(data))
    out = Path("runs") / (Path(data).name or "images")
    seeds, jobs, threads = preset_seeds(data), *preset_jobs(data)
    commands = {
        "compare": Compare(**setting, seeds=seeds, out=out, jobs=jobs, threads=threads),
        "train": Train(**setting, out=out, threads=threads),
        "tune": Tune(**setting, out=out.with_name(f"{out.name}-tune"), jobs=jobs, threads=threads),
        "methods": Methods(),
    }
    subcommands: Any = tuple(
        Annotated[type(default), tyro.conf.subcommand(name, default=default)] for name, default in commands.items()
    )
    description = "Compare the methods that train neural networks into flat minima. (--version: its number)"
    parsed: Command = tyro.cli(
        Union[subcommands],  # noqa: UP007
        args=arguments,
        prog="steppe",
        description=description,
    )
    return parsed


def _values_of(option: str, arguments: Sequence[str]) -> Iterator[str]:
    for here, following in zip(arguments, [*arguments[1:], ""], strict=True):
        if here == option:
            yield following
        elif here.startswith(f"{option}="):
            yield here.removeprefix(f"{option}=")


def _run(command: Command, line: str) -> int:
    from rich.console import Console

    console = Console()
    if not console.is_terminal:
        console.width = PIPED_WIDTH
    if isinstance(command, Methods):
        from steppe.lab.catalogue import catalogue

        console.print(catalogue())
        return 0

    import torch

    from steppe.lab.report import write_report
    from steppe.lab.study import compare, configure, perform
    from steppe.lab.tune import tune, write_choice

    if command.threads < 1:
        raise ValueError(f"threads must be at least 1, got {command.threads}")
    torch.set_num_threads(command.threads)
    setting = Setting(**{field.name: getattr(command, field.name) for field in fields(Setting)})
    if isinstance(command, Tune):
        candidates = tune(setting, command.grids, command.seeds, command.out, command.jobs)
        console.print(write_choice(candidates, command.out, line))
        console.print(f"written to {command.out / 'tuned.md'}")
        return 0 if all(candidate.accuracy for candidate in candidates) else FAILED
    if isinstance(command, Train):
        runs = perform([[configure(setting, command.method, command.seed)]], command.out)
        console.print_json(data=runs[0].result)
        console.print(f"written to {runs[0].folder}")
    else:
        runs = compare(setting, command.methods, command.seeds, command.out, command.jobs)
        console.print(write_report(runs, command.out, line))
        console.print(f"written to {command.out / 'report.md'}")
    failures = [run.failure for run in runs if run.failure]
    for failure in failures:
        _say(failure, FAILED)
    return FAILED if failures else 0
