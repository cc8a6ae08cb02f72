"""Make names in folders survive a power cut; a file's own fsync does not cover them."""

import os
from pathlib import Path

__all__ = ["make_folder", "sync_folder"]


def sync_folder(folder: Path) -> None:
    """Sync a folder, so that the names of its files are on disk.

    Raises:
        OSError: the folder cannot be opened or synced.
    """
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def make_folder(folder: Path) -> None:
    """Create a folder that only its owner can read, and missing parents, and sync their names.

    Raises:
        OSError: it cannot be created.
    """
    missing = [each for each in (folder, *folder.parents) if not each.exists()]
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    for made in missing:
        sync_folder(made.parent)
