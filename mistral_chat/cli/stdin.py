"""All of stdin, read once by whoever comes first, and left for the rank that is to read it.

Bounded, so that an endless stdin fills no memory. Knows nothing of prompts.
"""

import os
import select
import sys
import time
from collections.abc import Callable

from mistral_chat.errors import PromptError
from mistral_chat.files import SMALL_FILE_BYTES

__all__ = ["leave_for_ranks", "read_stdin"]

PATIENCE_S = 1.0


def read_stdin(on_waiting: Callable[[], None], most_bytes: int = SMALL_FILE_BYTES) -> bytes:
    """Everything up to stdin's end.

    Args:
        on_waiting: called once, where that end does not come within a second.
        most_bytes: a longer one is refused as soon as it is.

    Raises:
        PromptError: more than that, or it cannot be read.
    """
    assert sys.stdin is not None
    handle = sys.stdin.fileno()
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
                    f"stdin has more than {most_bytes >> 20} MiB, which no context holds: "
                    f"expected a text for the model to read"
                )
    except OSError as error:
        raise PromptError(f"stdin cannot be read ({error.strerror})") from error


def leave_for_ranks(data: bytes) -> None:
    """Have stdin hold this from its beginning, for the processes that this one starts.

    It lies in memory and has no name. Whichever of them reads it finds it whole, however long.
    """
    handle = os.memfd_create("stdin")
    try:
        left = memoryview(data)
        while left:
            left = left[os.write(handle, left) :]
        os.lseek(handle, 0, os.SEEK_SET)
        os.dup2(handle, sys.stdin.fileno(), inheritable=True)
    finally:
        os.close(handle)
