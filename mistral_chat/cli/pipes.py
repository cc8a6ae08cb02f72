"""stdin and pipes in the place of files: read once, and left where ranks can read them.

A pipe gives what it holds to one reader, and only to processes that inherit it. So whoever reads it
first puts it into a file in memory, from which rank 0 reads it as from any other. Bounded, so that
an endless one fills no memory. Knows nothing of prompts.
"""

import os
import select
import stat
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from mistral_chat.cli.command_line import flags_of
from mistral_chat.cli.requests import ChatRequest
from mistral_chat.errors import PromptError
from mistral_chat.files import SMALL_FILE_BYTES

__all__ = ["keep_pipe", "keep_pipes", "leave_for_ranks", "read_stdin"]

PATIENCE_S = 1.0
MOST_KEPT_BYTES = 1 << 30  # a batch's lines may come from a pipe; flags' files are bounded further
_NAME_A_FILE = [
    flag.name
    for flag in flags_of(ChatRequest).values()
    if flag.kind is Path and flag.name != "tools"
]  # whose suffix says what it is


def read_stdin(on_waiting: Callable[[], None]) -> bytes:
    """Everything up to stdin's end.

    Args:
        on_waiting: called once, where that end does not come within a second.

    Raises:
        PromptError: more than any context holds, or it cannot be read.
    """
    assert sys.stdin is not None
    return _read_to_end(sys.stdin.fileno(), "stdin", on_waiting)


def _read_to_end(
    handle: int,
    where: str,
    on_waiting: Callable[[], None] = lambda: None,
    most_bytes: int = SMALL_FILE_BYTES,
) -> bytes:
    told_at: float | None = time.monotonic() + PATIENCE_S
    data = bytearray()
    try:
        while True:
            left = None if told_at is None else max(0.0, told_at - time.monotonic())
            ready = select.select([handle], [], [], left)[0]
            if told_at is not None and time.monotonic() >= told_at:
                told_at = None
                on_waiting()
            if not ready:
                continue
            try:
                part = os.read(handle, 1 << 20)
            except BlockingIOError:  # another program set it to that, and took what was there
                continue
            if not part:
                return bytes(data)
            data += part
            if len(data) > most_bytes:
                raise PromptError(
                    f"{where} has more than {most_bytes >> 20} MiB: expected less, and an end"
                )
    except OSError as error:
        raise PromptError(f"{where} cannot be read ({error.strerror})") from error


def leave_for_ranks(data: bytes) -> None:
    """Have stdin hold this from its beginning, for the processes that this one starts."""
    handle = _keep(data)
    try:
        os.dup2(handle, sys.stdin.fileno(), inheritable=True)
    finally:
        os.close(handle)


def keep_pipes(words: Sequence[str], on_waiting: Callable[[str], None]) -> list[str]:
    """The words of a command line, with a file in memory for each pipe that a flag names.

    Args:
        words: as typed.
        on_waiting: told the name of a pipe whose end does not come within a second.

    Raises:
        PromptError: one that cannot be read, or has no end.
    """
    kept: list[str] = []
    before = ""
    for word in words:
        flag, equals, value = word.partition("=") if word.startswith("--") else (before, "", word)
        if flag.removeprefix("--").replace("-", "_") in _NAME_A_FILE and value:
            value = keep_pipe(value, on_waiting)
        kept.append(f"{flag}={value}" if equals else value if value else word)
        before = word
    return kept


def keep_pipe(path: str, on_waiting: Callable[[str], None]) -> str:
    """A file in memory with what a pipe holds, by its path; any other path as it is.

    Raises:
        PromptError: it cannot be read, or has no end.
    """
    try:
        if not stat.S_ISFIFO(Path(path).stat().st_mode):
            return path
        handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK)  # its writer may come later
    except (OSError, ValueError):  # whoever opens it says so
        return path
    try:
        data = _read_to_end(handle, path, lambda: on_waiting(path), MOST_KEPT_BYTES)
    finally:
        os.close(handle)
    return f"/proc/{os.getpid()}/fd/{_keep(data)}"


def _keep(data: bytes) -> int:
    """A file in memory that holds this, open and without a name; it goes with its last reader."""
    handle = os.memfd_create("mistral-chat")
    left = memoryview(data)
    while left:
        left = left[os.write(handle, left) :]
    os.lseek(handle, 0, os.SEEK_SET)
    return handle
