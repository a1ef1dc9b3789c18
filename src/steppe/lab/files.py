"""Files that are whole or absent, and folders that one command writes at a time."""

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

__all__ = ["claimed", "read_json", "write"]


@contextmanager
def claimed(folder: Path) -> Iterator[None]:
    """Keep a folder to this command; the claim ends with the process, however that ends.

    Args:
        folder: made if it is missing.

    Raises:
        ValueError: if another command has it.
        OSError: if the folder cannot be made.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(folder)) from error
    lock = FileLock(folder / ".lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise ValueError(f"{folder} is in use by another command: wait until it ends, or give another --out") from None
    try:
        yield
    finally:
        lock.release()


def read_json(path: Path, *, lines: bool = False) -> Any:
    """What a JSON file holds, or a list of what each of its lines does.

    Raises:
        ValueError: if it is not whole; the error names `path`.
        OSError: if it cannot be read.
    """
    try:
        text = path.read_text()
        return [json.loads(line) for line in text.splitlines()] if lines else json.loads(text)
    except ValueError as error:
        raise ValueError(f"{path} is damaged ({error}): delete it, and what it held is made anew") from error


def write(path: Path, content: str | bytes) -> None:
    """Write a file aside, then move it into place, so that a reader never meets half of it.

    Args:
        path: the file; missing parent folders are made.
        content: the whole of it, text as UTF-8.

    Raises:
        OSError: if it cannot be written; the error names `path`, and what was there before is untouched.
    """
    aside = path.with_name(path.name + ".part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            aside.write_bytes(content.encode() if isinstance(content, str) else content)
            os.replace(aside, path)
        except OSError:
            aside.unlink(missing_ok=True)
            raise
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from error
