"""The command line, `steppe`."""

import errno
import io
import os
import shlex
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, fields
from itertools import zip_longest
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar, Union

import steppe
from steppe.lab.config import Setting
from steppe.lab.options import Landscapes, Sharpness
from steppe.lab.presets import preset, preset_jobs, preset_seeds

if TYPE_CHECKING:
    from _typeshed import DataclassInstance
    from rich.console import Console

    from steppe.lab.commands import Command, Compare, Landscape, Measure, Tune
    from steppe.lab.run import Run

__all__ = ["main"]

FAILED = 2
INTERRUPTED = 130
PIPED_WIDTH = 160


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit status: 0, 2 after a failure, 130 after an interruption.

    Args:
        arguments: what follows `steppe`; by default those of the process.
    """
    arguments = (sys.argv[1:] if arguments is None else list(arguments)) or ["--help"]
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # a terminal that lacks a sign of the table still shows the table
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
    except ImportError as error:
        return _say(str(error), FAILED)
    except OSError as error:
        if error.errno == errno.ENOSPC:
            where = error.filename or getattr(command, "out", ".")
            mend = "free some or give another --out; what is finished is kept"
            return _say(f"no space left on the disk for {where}: {mend}", FAILED)
        if error.filename is None or error.strerror is None:
            return _say(str(error), FAILED)
        return _say(f"{error.filename}: {error.strerror}; give another path, or see to this one", FAILED)
    except (RuntimeError, MemoryError, OverflowError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        return _say(f"{reason}; if memory ran out, a smaller --width or --batch-size helps", FAILED)
    except (ValueError, TypeError) as error:
        return _say(str(error), FAILED)


def _say(message: str, status: int) -> int:
    print(f"steppe: {message}", file=sys.stderr)
    return status


def _parse(arguments: Sequence[str]) -> "Command":
    """Parse the command line; the defaults are those of its --data."""
    import tyro

    from steppe.lab.commands import Compare, Landscape, Measure, Methods, Train, Tune

    data = next(reversed(list(_values_of("--data", arguments))), "digits")
    setting = asdict(preset(data))
    out = Path("runs") / (Path(os.path.abspath(data)).name or "images")
    seeds, jobs, threads = preset_seeds(data), *preset_jobs(data)
    commands = {
        "compare": Compare(**setting, seeds=seeds, out=out, jobs=jobs, threads=threads),
        "train": Train(**setting, out=out, threads=threads),
        "tune": Tune(**setting, out=out.with_name(f"{out.name}-tune"), jobs=jobs, threads=threads),
        "sharpness": Measure(),
        "landscape": Landscape(),
        "methods": Methods(),
    }
    subcommands: Any = tuple(
        Annotated[type(default), tyro.conf.subcommand(name, default=default)] for name, default in commands.items()
    )
    description = "Compare the methods that train neural networks into flat minima. `--version` prints the version."
    parsed: Command = tyro.cli(
        Union[subcommands],  # noqa: UP007
        args=arguments,
        prog="steppe",
        description=description,
    )
    return parsed


def _values_of(option: str, arguments: Sequence[str]) -> Iterator[str]:
    for here, following in zip_longest(arguments, arguments[1:], fillvalue=""):
        if here == option:
            yield following
        elif here.startswith(f"{option}="):
            yield here.removeprefix(f"{option}=")


def _run(command: "Command", line: str) -> int:
    import torch
    from rich.console import Console

    from steppe.lab.catalogue import catalogue
    from steppe.lab.commands import Compare, Landscape, Measure, Methods, Tune

    console = Console()
    if not console.is_terminal:
        console.width = PIPED_WIDTH
    if isinstance(command, Methods):
        console.print(catalogue())
        return 0
    if command.threads is not None:
        most = max(os.cpu_count() or 1, torch.get_num_threads())
        if not 1 <= command.threads <= most:
            raise ValueError(f"threads must lie between 1 and the {most} of this machine, got {command.threads}")
        torch.set_num_threads(command.threads)
    if isinstance(command, Measure):
        return _measure(command, line, console)
    if isinstance(command, Landscape):
        return _draw(command, line, console)
    if isinstance(command, Tune):
        return _tune(command, line, console)
    if isinstance(command, Compare):
        return _compare(command, line, console)

    from steppe.lab.study import configure, perform

    (run,) = perform(
        [[configure(_only(command, Setting), command.method, command.seed, base=command.base)]], command.out
    )
    console.print_json(data=run.result)
    print(f"written to {run.folder}")
    return _status([run])


def _compare(command: "Compare", line: str, console: "Console") -> int:
    from steppe.lab.flatness import columns
    from steppe.lab.report import write_report
    from steppe.lab.study import compare

    runs = compare(_only(command, Setting), command.methods, command.seeds, command.out, command.jobs, command.base)
    found = write_report(runs, command.out, line)
    if command.sharpness:
        found = write_report(runs, command.out, line, columns(runs))
    console.print(found)
    print(f"written to {command.out / 'report.md'}")
    return _status(runs)


def _tune(command: "Tune", line: str, console: "Console") -> int:
    from steppe.lab.tune import tune, write_choice

    candidates = tune(_only(command, Setting), command.grids, command.seeds, command.out, command.jobs, command.base)
    console.print(write_choice(candidates, command.out, line))
    print(f"written to {command.out / 'tuned.md'}")
    return 0 if all(candidate.accuracy for candidate in candidates) else FAILED


def _measure(command: "Measure", line: str, console: "Console") -> int:
    from steppe.lab.files import claimed
    from steppe.lab.flatness import write_sharpness
    from steppe.lab.sharpness import measure_sharpness
    from steppe.lab.trained import home

    runs, left_out = _finished(command)
    out = command.out or home(command.runs) / "sharpness"
    what = _only(command, Sharpness)
    with claimed(out):
        found = measure_sharpness(runs, what)
        console.print(write_sharpness(runs, found, left_out, what, out, line))
    print(f"written to {out / 'sharpness.md'}")
    return 0


def _draw(command: "Landscape", line: str, console: "Console") -> int:
    from steppe.lab.atlas import write_landscapes
    from steppe.lab.files import claimed
    from steppe.lab.landscapes import measure_landscapes
    from steppe.lab.trained import home

    runs, left_out = _finished(command)
    out = command.out or home(command.runs) / "landscape"
    what = _only(command, Landscapes)
    with claimed(out):
        curves, maps = measure_landscapes(runs, what)
        for path in write_landscapes(curves, maps, left_out, what, out, line):
            print(f"written to {path}")
    return 0


def _finished(command: "Measure | Landscape") -> "tuple[list[Run], list[str]]":
    """The runs that a command names, and those that are left out; torch gets their number of threads."""
    import torch

    from steppe.lab.trained import find

    runs, left_out = find(command.runs)
    for line in left_out:
        _say(f"left out: {line}", 0)
    if command.threads is None:
        torch.set_num_threads(min((runs[0].result or {}).get("threads", 1), torch.get_num_threads()))
    return runs, left_out


Options = TypeVar("Options", bound="DataclassInstance")


def _only(command: Options, kind: type[Options]) -> Options:
    """The options of a command that are of one kind."""
    return kind(**{field.name: getattr(command, field.name) for field in fields(kind)})


def _status(runs: "Sequence[Run]") -> int:
    failures = [run.failure for run in runs if run.failure]
    for failure in failures:
        _say(failure, FAILED)
    return FAILED if failures else 0
