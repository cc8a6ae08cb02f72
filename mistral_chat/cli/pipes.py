"""stdin and the pipes of a shell's `<(command)`: read once, and left where ranks can read them.

A pipe gives what it holds to one reader, and only to processes that inherit it. So whoever reads it
first puts it into a file in memory, from which rank 0 reads it as from any other. Bounded, so that
an endless one fills no memory. Knows nothing of prompts.
"""

import fcntl
import os
import re
import select
import stat
import sys
import time
from collections.abc import Callable, Sequence

from mistral_chat.errors import PromptError
from mistral_chat.files import SMALL_FILE_BYTES

__all__ = ["keep_pipes", "leave_for_ranks", "read_stdin"]

PATIENCE_S = 1.0
MOST_KEPT_BYTES = 1 << 30  # a batch's lines may come from a pipe; flags' files are bounded further
_HANDLE = re.compile(r"(?:--[\w-]+=)?(/(?:dev|proc/self)/fd/(\d+))")


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


def keep_pipes(words: Sequence[str]) -> list[str]:
    """The words of a command line, with files in memory for the pipes that a shell put there.

    Raises:
        PromptError: one that cannot be read, or has no end.
    """
    return [_keep_pipe(word) for word in words]


def _keep_pipe(word: str) -> str:
    match = _HANDLE.fullmatch(word)
    if match is None:
        return word
    handle = int(match[2])
    try:
        is_read = fcntl.fcntl(handle, fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDONLY
        is_pipe = handle > 2 and is_read and stat.S_ISFIFO(os.fstat(handle).st_mode)
    except (OSError, OverflowError):  # whoever opens it says so
        return word
    if not is_pipe:
        return word
    data = _read_to_end(handle, match[1], most_bytes=MOST_KEPT_BYTES)
    return word.replace(match[1], f"/proc/{os.getpid()}/fd/{_keep(data)}")


def _keep(data: bytes) -> int:
    """A file in memory that holds this, open and without a name; it goes with its last reader."""
    handle = os.memfd_create("mistral-chat")
    left = memoryview(data)
    while left:
        left = left[os.write(handle, left) :]
    os.lseek(handle, 0, os.SEEK_SET)
    return handle
