"""A progress bar in bytes, for loading and for downloading.

Uses rich, which is imported only when needed.
"""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from mistral_chat.cli.console.printing import drawn
from mistral_chat.cli.console.terminal import is_fancy

if TYPE_CHECKING:
    from rich.progress import ProgressColumn

__all__ = ["byte_bar", "byte_columns"]


def byte_columns(title: str) -> tuple["ProgressColumn", ...]:
    """Return the columns title, bar, bytes, bytes per second and time left."""
    from rich.progress import (
        BarColumn,
        DownloadColumn,
        TextColumn,
        TimeRemainingColumn,
        TransferSpeedColumn,
    )

    return (
        TextColumn(title),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
    )


@contextmanager
def byte_bar(title: str, total: int, done: int) -> Iterator[Callable[[int], None]]:
    """Show a bar on stderr and yield a function that advances it; no bar without a terminal.

    Args:
        title: text before the bar.
        total: bytes in total.
        done: bytes that are already there.
    """
    if not is_fancy(sys.stderr):
        yield lambda n: None
        return
    from rich.console import Console
    from rich.progress import Progress

    columns = byte_columns(title)
    bar = Progress(*columns, console=Console(stderr=True), transient=True)
    with bar as progress, drawn(bar.stop):
        task = progress.add_task("", total=total, completed=done)
        yield lambda n: progress.advance(task, n)
