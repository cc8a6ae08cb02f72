"""What a power cut would leave: which bytes and names were written through, seen at os.fsync."""

import os
import stat
from pathlib import Path

import pytest


class Disk:
    """Notes what is synced from now on.

    Args:
        monkeypatch: undoes it.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self._sizes: dict[tuple[int, int], int] = {}  # of files, when they were last synced
        self._names: dict[tuple[int, int], set[str]] = {}  # in folders, likewise
        fsync = os.fsync

        def note(handle: int) -> None:
            fsync(handle)
            found = os.fstat(handle)
            key = found.st_dev, found.st_ino
            if stat.S_ISDIR(found.st_mode):
                self._names[key] = set(os.listdir(handle))
            else:
                self._sizes[key] = found.st_size

        monkeypatch.setattr(os, "fsync", note)

    def has_all_of(self, path: Path) -> bool:
        """Whether every byte of a file was synced."""
        found = path.stat()
        return self._sizes.get((found.st_dev, found.st_ino)) == found.st_size

    def knows_name_of(self, path: Path) -> bool:
        """Whether the folder of a file or folder was synced when it was there."""
        found = path.parent.stat()
        return path.name in self._names.get((found.st_dev, found.st_ino), ())
