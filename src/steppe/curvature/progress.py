"""The bar that a measurement shows while it works."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager


@contextmanager
def bar(title: str, show: bool) -> Iterator[Callable[[float], None]]:
    """Give a function that takes the share done, in [0, 1], and draws it with the time left.

    Args:
        title: what is being measured.
        show: whether to draw; nothing is drawn where the error stream is no terminal, or ``rich`` is not installed.
    """
    if not show or not sys.stderr.isatty():
        yield lambda share: None
        return
    try:
        from rich.console import Console
        from rich.progress import Progress
    except ModuleNotFoundError:
        yield lambda share: None
        return
    with Progress(console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task(title, total=1.0)
        yield lambda share: progress.update(task, completed=share)
