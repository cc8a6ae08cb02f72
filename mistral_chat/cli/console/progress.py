"""What a bar of bytes shows, for loading and for downloading.

Knows rich; imports it when asked.
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
    """Title, bar, bytes, bytes a second and time left."""
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
    """A bar on stderr that is told of further bytes; nothing where that is no terminal.

    Args:
        title: what is done.
        total: bytes.
        done: of them, those that are there already.
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
