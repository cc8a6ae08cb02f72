"""A folder to make something in, of which nothing stays; a killed process's is taken away later.

Knows nothing of what is made.
"""

import contextlib
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from mistral_chat.cli.locks import lock

__all__ = ["remove_left_behind", "work_folder"]

YOUNG_S = 5.0  # another process may have made it, and be about to lock it


@contextlib.contextmanager
def work_folder(parent: Path, prefix: str) -> Iterator[Path]:
    """An empty folder that this process holds a lock on; gone afterwards.

    Raises:
        OSError: it cannot be made.
    """
    work = Path(tempfile.mkdtemp(prefix=prefix, dir=parent))
    try:
        with _opened(work) as handle:
            lock(handle)
            yield work
    finally:
        shutil.rmtree(work, ignore_errors=True)
        remove_left_behind(parent, prefix)


def remove_left_behind(parent: Path, prefix: str) -> None:
    """Take away the folders of processes that were killed: nobody holds a lock on them."""
    for work in parent.glob(f"{prefix}*"):
        with contextlib.suppress(OSError), _opened(work) as handle:
            is_young = time.time() - os.fstat(handle).st_mtime < YOUNG_S
            if not is_young and lock(handle) and _locks_hold(work):
                shutil.rmtree(work, ignore_errors=True)


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
