"""Download big files by ranges, several at once, each continuing where it stopped.

Writes each to a partial file, which survives an interruption, and checks its SHA-256. Knows
nothing of layouts.
"""

import errno
import hashlib
import io
import os
import shutil
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, cast

from mistral_chat import __version__
from mistral_chat.cli.console.locks import lock
from mistral_chat.cli.console.progress import byte_bar
from mistral_chat.cli.repository import home_of
from mistral_chat.errors import DownloadError

__all__ = ["Fetch", "File"]

AT_ONCE = 8  # one connection to the hub uses only part of a fast line
# The hub serves larger files only by its own protocol; huggingface_hub implements it.
MOST_BY_RANGES_BYTES = 50_000_000_000

OnBytes = Callable[[int], None]


class _StoppedError(Exception):
    """Another file failed, or the user interrupted."""


@dataclass(frozen=True)
class File:
    """A file of the repository; only files in the hub's large-file storage have a digest."""

    name: str
    size: int
    sha256: str | None


class Fetch:
    """The big files of a download, several at once, each continuing where it stopped.

    Finished files are put where huggingface_hub looks before it fetches anything: in its cache as
    `blobs/SHA256`, in a folder under their own names.

    Args:
        repo: owner/name.
        commit: the files' commit.
        files: all files of the download; small ones only count for disk space.
        folder: destination; None is huggingface_hub's cache.

    Raises:
        DownloadError: raised by `run`: the disk is full, or a file arrived damaged.
    """

    def __init__(self, repo: str, commit: str, files: Sequence[File], folder: Path | None) -> None:
        self._repo = repo
        self._commit = commit
        self._folder = folder
        self._root = home_of(repo) / "blobs" if folder is None else folder
        missing = [file for file in files if not self._is_there(file)]
        self._big = [file for file in missing if file.sha256 and file.size <= MOST_BY_RANGES_BYTES]
        self._needed = sum(file.size for file in missing)
        self._stopped = threading.Event()

    def run(self) -> None:
        """Fetch all files, or raise the first failure."""
        done = sum(self._partial_bytes(file) for file in self._big)
        self._check_room(self._needed - done)
        if not self._big:
            return
        self._root.mkdir(parents=True, exist_ok=True)
        pool = ThreadPoolExecutor(AT_ONCE)
        with byte_bar("downloading", sum(file.size for file in self._big), done) as on_bytes:
            futures = [pool.submit(self._fetch, file, on_bytes) for file in self._big]
            try:
                wait(futures, return_when=FIRST_EXCEPTION)
                self._stopped.set()
                wait(futures)
            finally:
                self._stopped.set()
                pool.shutdown(wait=False, cancel_futures=True)
        failed = [error for future in futures if (error := future.exception())]
        for error in sorted(failed, key=lambda error: isinstance(error, _StoppedError)):
            raise error

    def _place(self, file: File) -> Path:
        return self._root / ((file.sha256 or "") if self._folder is None else file.name)

    def _partial(self, file: File) -> Path:
        place = self._place(file)
        return place.with_name(f"{place.name}.incomplete")

    def _partial_bytes(self, file: File) -> int:
        partial = self._partial(file)
        return min(partial.stat().st_size, file.size) if partial.exists() else 0

    def _is_there(self, file: File) -> bool:
        """Return whether huggingface_hub will find this big file; it checks the file itself."""
        return file.sha256 is not None and self._place(file).exists()

    def _check_room(self, needed: int) -> None:
        at = self._root.absolute()
        while not at.exists():
            at = at.parent
        free = shutil.disk_usage(at).free
        if free < needed:
            raise DownloadError(
                f"{self._repo} needs {_gb(needed)} more on the disk, and there are "
                f"{_gb(free)} free at {at}: make room, or give a DIR on another disk "
                f"(HF_HUB_CACHE moves the cache)"
            )

    def _fetch(self, file: File, on_bytes: OnBytes) -> None:
        from huggingface_hub import hf_hub_url
        from huggingface_hub.file_download import http_get
        from huggingface_hub.utils import build_hf_headers  # type: ignore[attr-defined]

        place, partial = self._place(file), self._partial(file)
        if self._stopped.is_set():
            raise _StoppedError
        with _Partial(partial, on_bytes, self._stopped) as out:
            if place.exists():  # another download finished it first
                partial.unlink(missing_ok=True)
                return
            if out.tell() > file.size:
                out.seek(0)
                out.truncate()
            if out.tell() < file.size:
                headers = build_hf_headers(library_name="mistral-chat", library_version=__version__)
                http_get(
                    hf_hub_url(self._repo, file.name, revision=self._commit),
                    cast(BinaryIO, out),
                    resume_size=out.tell(),
                    headers=headers | {"Accept-Encoding": "identity"},
                    expected_size=file.size,
                )
            found = out.sha256.hexdigest()
            if found != file.sha256:
                partial.unlink()
                raise DownloadError(
                    f"{self._repo}: {file.name} has sha256 {found}, expected {file.sha256}: "
                    f"it was thrown away; run the same command again"
                )
            partial.replace(place)


class _Partial(io.FileIO):
    """A partial file with its running digest, open for appending.

    Raises:
        DownloadError: another process is writing it, or it is a symbolic link.
    """

    def __init__(self, path: Path, on_bytes: OnBytes, stopped: threading.Event) -> None:
        try:
            super().__init__(path, "a+", opener=_open_no_link)
        except OSError as error:
            if error.errno != errno.ELOOP:
                raise
            raise DownloadError(f"{path} is a link, which no download made: remove it") from error
        if not lock(self.fileno()):  # without lock support, the digest detects two writers
            self.close()
            raise DownloadError(
                f"{path}: another download is writing it: wait until that has ended"
            )
        self._on_bytes = on_bytes
        self._stopped = stopped
        self._digest()

    def _digest(self) -> None:
        """Hash the existing bytes; leave the position at the end."""
        self.sha256 = hashlib.sha256()
        left = os.fstat(self.fileno()).st_size
        self.seek(0)
        while part := self.read(min(left, 1 << 22)):
            self.sha256.update(part)
            left -= len(part)

    def write(self, data: Any) -> int:
        """Write all of the data."""
        if self._stopped.is_set():
            raise _StoppedError
        view = memoryview(data)
        while view:
            view = view[super().write(view) :]
        self.sha256.update(data)
        self._on_bytes(len(data))
        return len(data)

    def truncate(self, size: int | None = None) -> int:
        """Truncate the file; happens if a server ignores ranges and sends it from the start."""
        before = os.fstat(self.fileno()).st_size
        size = super().truncate(size)
        self._on_bytes(size - before)
        self._digest()
        return size


def _open_no_link(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, 0o666)


def _gb(n_bytes: int) -> str:
    return f"{n_bytes / 1e9:,.2f} GB"
