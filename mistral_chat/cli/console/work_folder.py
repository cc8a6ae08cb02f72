"""A folder to make something in, of which nothing stays; a killed process's is taken away later.

Knows nothing of what is made.
"""

import contextlib
import fcntl
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from mistral_chat.cli.console.locks import lock

__all__ = ["remove_left_behind", "work_folder"]


@contextlib.contextmanager
def work_folder(parent: Path, prefix: str) -> Iterator[Path]:
    """An empty folder that this process holds a lock on; gone afterwards.

    Raises:
        OSError: it cannot be made.
    """
    with contextlib.ExitStack() as held:
        with _alone_in(parent):
            work = Path(tempfile.mkdtemp(prefix=prefix, dir=parent))
            lock(held.enter_context(_opened(work)))
        try:
            yield work
        finally:
            shutil.rmtree(work, ignore_errors=True)
            remove_left_behind(parent, prefix)


def remove_left_behind(parent: Path, prefix: str) -> None:
    """Take away the folders of processes that were killed: nobody holds a lock on them."""
    if not any(parent.glob(f"{prefix}*")):
        return
    with contextlib.suppress(OSError), _alone_in(parent):
        for work in parent.glob(f"{prefix}*"):
            with contextlib.suppress(OSError), _opened(work) as handle:
                if lock(handle) and _locks_hold(work):
                    shutil.rmtree(work, ignore_errors=True)


@contextlib.contextmanager
def _alone_in(parent: Path) -> Iterator[None]:
    """Wait until no other process is in such a block, so that no folder is there unlocked."""
    with _opened(parent) as handle:
        with contextlib.suppress(OSError):  # a file system without locks
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield


def _locks_hold(work: Path) -> bool:
    """Whether this file system knows locks: nobody gets a folder that this process has locked."""
    with _opened(work) as handle:
        return not lock(handle)


@contextlib.contextmanager
def _opened(folder: Path) -> Iterator[int]:
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    try:
        yield handle
    finally:
        os.close(handle)
