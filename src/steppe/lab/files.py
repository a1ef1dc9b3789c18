"""Files that are whole or absent."""

import os
from pathlib import Path

__all__ = ["write"]


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
