"""Temporary folders; those of killed processes are removed later.

Knows nothing of what is made in them.
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
    """Create an empty folder, locked by this process, and remove it at the end.

    Raises:
        OSError: it cannot be created.
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
    """Remove the folders of killed processes, which nobody holds a lock on."""
    if not any(parent.glob(f"{prefix}*")):
        return
    with contextlib.suppress(OSError), _alone_in(parent):
        for work in parent.glob(f"{prefix}*"):
            with contextlib.suppress(OSError), _opened(work) as handle:
                if lock(handle) and _locks_hold(work):
                    shutil.rmtree(work, ignore_errors=True)


@contextlib.contextmanager
def _alone_in(parent: Path) -> Iterator[None]:
    """Lock the parent, so that no other process sees a folder that is not locked yet."""
    with _opened(parent) as handle:
        with contextlib.suppress(OSError):  # a file system without locks
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield


def _locks_hold(work: Path) -> bool:
    """Return whether locks work here: one on this folder, which we hold, must be refused."""
    with _opened(work) as handle:
        return not lock(handle)


@contextlib.contextmanager
def _opened(folder: Path) -> Iterator[int]:
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    try:
        yield handle
    finally:
        os.close(handle)
