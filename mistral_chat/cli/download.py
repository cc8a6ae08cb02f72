"""`mistral-chat download`: one weight layout of a Hugging Face repository, and where it then lies.

Big files come in by ranges, into a partial file that an interrupted download leaves behind, and
are held against their SHA-256; huggingface_hub does the rest. A run only looks here for what is
there already: nothing but the command itself touches the network.
"""

import errno
import fcntl
import hashlib
import io
import logging
import os
import re
import shutil
import sys
import threading
import warnings
from collections.abc import Callable, Collection, Iterator, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, cast

from mistral_chat import __version__
from mistral_chat.cli import flags
from mistral_chat.errors import CheckpointError, DownloadError, MistralChatError, UsageError

__all__ = ["cached_folder", "choose_files", "is_repository", "run"]

INTERRUPTED = 130
LAYOUTS = ("auto", "consolidated", "hf")
AT_ONCE = 8  # one connection of the hub's gives a part of a fast line only
API_TIMEOUT_S = 30
# The hub serves larger files by its own protocol alone; huggingface_hub speaks it.
MOST_BY_RANGES_BYTES = 50_000_000_000
HELP = """usage: mistral-chat download OWNER/NAME [DIR] [flags]

Fetch one weight layout of a Hugging Face repository, with its shape and its tokenizer. The last
line on stdout is the folder, so that mistral-chat "$(mistral-chat download OWNER/NAME)" works.
Without DIR it lies in huggingface_hub's cache, and mistral-chat OWNER/NAME finds it there. What an
interrupted download fetched is kept: the same command goes on from there.

  --revision REVISION  a branch, tag or commit (main)
  --layout NAME        auto | consolidated | hf (auto: consolidated where there is one)

HF_TOKEN, HF_ENDPOINT, HF_HOME and HF_HUB_CACHE mean what they mean to huggingface_hub.
"""
_FLAGS = {"revision": True, "layout": True, "help": False}
_REPOSITORY = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*", re.ASCII)
_TOKENIZER = re.compile(r"tekken\.json|tokenizer\.model(\.v\w+)?")
# huggingface_hub's HTTP library changed with its releases; its errors are known by their module.
_HTTP_LIBRARIES = ("httpcore", "httpcore2", "httpx", "httpx2", "requests", "urllib3")

OnBytes = Callable[[int], None]


class _StoppedError(Exception):
    """Another file failed, or the person gave up."""


@dataclass(frozen=True, kw_only=True)
class Asked:
    """What to fetch, and where to.

    Args:
        repo: owner/name.
        folder: where the files go; None is huggingface_hub's cache.
        revision: branch, tag or commit; None is main.
        layout: which weights; auto prefers Mistral's own.
    """

    repo: str
    folder: Path | None = None
    revision: str | None = None
    layout: str = "auto"


@dataclass(frozen=True)
class _File:
    """A file of the repository; only those in the hub's large-file storage have a digest."""

    name: str
    size: int
    sha256: str | None


def run(words: Sequence[str]) -> int:
    """Run the command; the code to end with."""
    from mistral_chat.engine.launch import launched_rank

    normalized = flags.normalize(words, _FLAGS)
    if launched_rank() not in (None, 0):
        return 0
    if flags.wants_help(normalized):
        print(HELP, end="")
        return 0
    asked = _read(normalized)
    try:
        print(_download(asked), flush=True)
    except KeyboardInterrupt:
        # Threads that wait for the network would be waited for.
        os._exit(INTERRUPTED)
    return 0


def _read(words: Sequence[str]) -> Asked:
    values: dict[str, str] = {}
    plain = []
    for word in words:
        if word.startswith("--"):
            name, _, value = word.removeprefix("--").partition("=")
            values[name] = value
        else:
            plain.append(word)
    if not plain:
        raise UsageError("OWNER/NAME is missing: expected a repository, such as mistralai/NAME")
    if len(plain) > 2:
        raise UsageError(f"found {len(plain)} words: expected OWNER/NAME and at most one DIR")
    if not _REPOSITORY.fullmatch(plain[0]):
        raise UsageError(f"{plain[0]!r} is no repository's name: expected OWNER/NAME")
    if values.get("layout", "auto") not in LAYOUTS:
        raise UsageError(f"--layout is {values['layout']!r}: expected {' | '.join(LAYOUTS)}")
    if values.get("revision") == "":
        raise UsageError("--revision is empty: expected a branch, tag or commit")
    folder = Path(plain[1]) if len(plain) > 1 else None
    if folder is not None and folder.exists() and not folder.is_dir():
        raise UsageError(f"{folder} is a file: expected a folder, or a name that is free")
    return Asked(repo=plain[0], folder=folder, **values)


def is_repository(word: str) -> bool:
    """Whether MODEL can only be meant as a repository: owner/name, and no path that exists."""
    return _REPOSITORY.fullmatch(word) is not None and not Path(word).exists()


def cached_folder(repo: str) -> Path:
    """The snapshot of a repository in huggingface_hub's cache that holds a whole model.

    That of the branch main where there is one, else the only one.

    Raises:
        CheckpointError: none, or several of which none is main's.
    """
    home = _home_of(repo)
    main = home / "refs" / "main"
    head = home / "snapshots" / main.read_text().strip() if main.is_file() else None
    if head is not None and _is_whole(head):
        return head
    snapshots = home / "snapshots"
    whole = [path for path in snapshots.glob("*") if _is_whole(path)]
    if len(whole) > 1:
        raise CheckpointError(
            f"{repo}: {len(whole)} revisions are downloaded and none of them is main: expected "
            f"one; give the folder of the one that is meant ({', '.join(map(str, sorted(whole)))})"
        )
    if not whole:
        found = "downloaded in part only" if snapshots.is_dir() else "not downloaded"
        raise CheckpointError(
            f"{repo}: no such folder, and as a Hugging Face repository {found}: "
            f"mistral-chat download {repo} fetches it"
        )
    return whole[0]


def _home_of(repo: str) -> Path:
    """Where huggingface_hub's cache keeps a repository: blobs, snapshots and refs."""
    from huggingface_hub import constants

    return Path(constants.HF_HUB_CACHE).expanduser() / f"models--{repo.replace('/', '--')}"


def _is_whole(folder: Path) -> bool:
    try:
        # A link whose blob has gone does not exist.
        choose_files([path.name for path in folder.glob("*") if path.exists()], "auto")
    except DownloadError:
        return False
    return True


def choose_files(names: Collection[str], layout: str) -> list[str]:
    """The files of one model: one set of weights, its shape, its tokenizer, and nothing else.

    Args:
        names: of a repository's files.
        layout: "consolidated", "hf", or "auto" for the first of them that is whole.

    Raises:
        DownloadError: no whole set of weights, or no tokenizer; says what was found.
    """
    top = sorted(name for name in names if "/" not in name)
    tokenizers = [name for name in top if _TOKENIZER.fullmatch(name)]
    for known, shapes in (("consolidated", ("params.json", "config.json")),
                          ("hf", ("config.json",))):  # fmt: skip
        if layout not in ("auto", known) or shapes[0] not in top:
            continue
        weights = _weights(top, "consolidated" if known == "consolidated" else "model")
        if weights and not tokenizers:
            raise DownloadError(
                "it holds weights but no tokenizer: expected tekken.json or tokenizer.model.vN"
            )
        if weights:
            return [*(name for name in shapes if name in top), *tokenizers, *weights]
    files = [name for name in top if name.endswith((".safetensors", ".pth", ".bin", ".gguf"))]
    found = files or top
    more = f" and {len(found) - 3} more" if len(found) > 3 else ""
    expected = {
        "consolidated": "params.json with consolidated*.safetensors",
        "hf": "config.json with model*.safetensors",
    }
    raise DownloadError(
        f"no known layout of weights: found {', '.join(found[:3]) or 'nothing'}{more}; expected "
        + (" or ".join(expected.values()) if layout == "auto" else expected[layout])
        + ", all shards of it"
    )


def _weights(names: Sequence[str], stem: str) -> list[str]:
    """The one set of weights whose files begin with `stem`; shards come before a single file."""
    shards: dict[int, list[str]] = {}
    for name in names:
        if match := re.fullmatch(rf"{stem}-\d+-of-(\d+)\.safetensors", name):
            shards.setdefault(int(match[1]), []).append(name)
    single, index = f"{stem}.safetensors", f"{stem}.safetensors.index.json"
    if len(shards) == 1:
        ((total, files),) = shards.items()
        if len(files) == total:
            return [*(name for name in names if name == index), *files]
    if single in names:
        return [single]
    pickles = [name for name in names if re.fullmatch(rf"{stem}\.\d+\.pth", name)]
    return pickles if len(pickles) == 1 else []


def _download(asked: Asked) -> Path:
    """Fetch what is missing; the folder."""
    from huggingface_hub import HfApi, snapshot_download
    from huggingface_hub.utils import disable_progress_bars  # type: ignore[attr-defined]

    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # HF_HUB_DISABLE_PROGRESS_BARS=0 is an answer too
        disable_progress_bars()
    about_us: dict[str, Any] = {"library_name": "mistral-chat", "library_version": __version__}
    try:
        info = HfApi(**about_us).model_info(
            asked.repo, revision=asked.revision, files_metadata=True, timeout=API_TIMEOUT_S
        )
        known = {
            file.rfilename: _File(
                file.rfilename, file.size or 0, file.lfs.sha256 if file.lfs else None
            )
            for file in info.siblings or ()
        }
        try:
            names = choose_files(known, asked.layout)
        except DownloadError as error:
            raise DownloadError(f"{asked.repo}: {error}") from None
        files = [known[name] for name in names]
        assert info.sha is not None
        _Fetch(asked, info.sha, files).run()
        folder = Path(
            snapshot_download(
                asked.repo,
                revision=asked.revision,
                local_dir=asked.folder,
                allow_patterns=names,
                **about_us,
            )
        )
    except MistralChatError:
        raise
    except Exception as error:
        message = _explained(error, asked)
        if message is None:
            raise
        raise DownloadError(f"{asked.repo}: {message}") from error
    # Without an answer to its own question huggingface_hub is content with what is there.
    for file in files:
        if not (folder / file.name).is_file() or (folder / file.name).stat().st_size != file.size:
            raise DownloadError(
                f"{asked.repo}: {file.name} did not arrive whole: run the same command again"
            )
    return folder


class _Fetch:
    """The big files of a download, several at a time, each going on where it was.

    A finished file lies where huggingface_hub looks before it fetches anything itself: in its
    cache as `blobs/SHA256`, in a folder under its own name.
    """

    def __init__(self, asked: Asked, commit: str, files: Sequence[_File]) -> None:
        self._asked = asked
        self._commit = commit
        self._root = _home_of(asked.repo) / "blobs" if asked.folder is None else asked.folder
        missing = [file for file in files if not self._is_there(file)]
        self._big = [file for file in missing if file.sha256 and file.size <= MOST_BY_RANGES_BYTES]
        self._needed = sum(file.size for file in missing)
        self._stopped = threading.Event()

    def run(self) -> None:
        """Fetch them all, or raise what the first failed with."""
        done = sum(self._partial_bytes(file) for file in self._big)
        self._check_room(self._needed - done)
        if not self._big:
            return
        self._root.mkdir(parents=True, exist_ok=True)
        pool = ThreadPoolExecutor(AT_ONCE)
        with _bar(sum(file.size for file in self._big), done) as on_bytes:
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

    def _place(self, file: _File) -> Path:
        return self._root / ((file.sha256 or "") if self._asked.folder is None else file.name)

    def _partial(self, file: _File) -> Path:
        place = self._place(file)
        return place.with_name(f"{place.name}.incomplete")

    def _partial_bytes(self, file: _File) -> int:
        partial = self._partial(file)
        return min(partial.stat().st_size, file.size) if partial.exists() else 0

    def _is_there(self, file: _File) -> bool:
        """Whether huggingface_hub will find a big file where it looks; it checks it itself."""
        return file.sha256 is not None and self._place(file).exists()

    def _check_room(self, needed: int) -> None:
        at = self._root.absolute()
        while not at.exists():
            at = at.parent
        free = shutil.disk_usage(at).free
        if free < needed:
            raise DownloadError(
                f"{self._asked.repo} needs {_gb(needed)} more on the disk, and there are "
                f"{_gb(free)} free at {at}: make room, or give a DIR on another disk "
                f"(HF_HUB_CACHE moves the cache)"
            )

    def _fetch(self, file: _File, on_bytes: OnBytes) -> None:
        from huggingface_hub import hf_hub_url
        from huggingface_hub.file_download import http_get
        from huggingface_hub.utils import build_hf_headers  # type: ignore[attr-defined]

        place, partial = self._place(file), self._partial(file)
        if self._stopped.is_set():
            raise _StoppedError
        with _Partial(partial, on_bytes, self._stopped) as out:
            if place.exists():  # another download was first
                partial.unlink(missing_ok=True)
                return
            if out.tell() > file.size:
                out.seek(0)
                out.truncate()
            if out.tell() < file.size:
                headers = build_hf_headers(library_name="mistral-chat", library_version=__version__)
                http_get(
                    hf_hub_url(self._asked.repo, file.name, revision=self._commit),
                    cast(BinaryIO, out),
                    resume_size=out.tell(),
                    headers=headers | {"Accept-Encoding": "identity"},
                    expected_size=file.size,
                )
            found = out.sha256.hexdigest()
            if found != file.sha256:
                partial.unlink()
                raise DownloadError(
                    f"{self._asked.repo}: {file.name} has sha256 {found}, expected {file.sha256}: "
                    f"it was thrown away; run the same command again"
                )
            partial.replace(place)


class _Partial(io.FileIO):
    """The part of a file that is there, its digest, and a place to write on.

    Raises:
        DownloadError: another process writes it.
    """

    def __init__(self, path: Path, on_bytes: OnBytes, stopped: threading.Event) -> None:
        super().__init__(path, "a+")
        try:
            fcntl.flock(self.fileno(), fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self.close()
            raise DownloadError(
                f"{path}: another download is writing it: wait until that has ended"
            ) from None
        except OSError:
            pass  # a file system without locks; the digest tells what two writers made of it
        self._on_bytes = on_bytes
        self._stopped = stopped
        self._digest()

    def _digest(self) -> None:
        """Read what is there; leaves the position at its end."""
        self.sha256 = hashlib.sha256()
        left = os.fstat(self.fileno()).st_size
        self.seek(0)
        while part := self.read(min(left, 1 << 22)):
            self.sha256.update(part)
            left -= len(part)

    def write(self, data: Any) -> int:
        """Write all of it."""
        if self._stopped.is_set():
            raise _StoppedError
        view = memoryview(data)
        while view:
            view = view[super().write(view) :]
        self.sha256.update(data)
        self._on_bytes(len(data))
        return len(data)

    def truncate(self, size: int | None = None) -> int:
        """As a file's; a server that knows no ranges has the file begin anew."""
        before = os.fstat(self.fileno()).st_size
        size = super().truncate(size)
        self._on_bytes(size - before)
        self._digest()
        return size


@contextmanager
def _bar(total: int, done: int) -> Iterator[OnBytes]:
    """A bar on stderr, in bytes and bytes a second; nothing where that is no terminal."""
    from mistral_chat.cli.terminal import is_fancy

    if not is_fancy(sys.stderr):
        yield lambda n: None
        return
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        DownloadColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
        TransferSpeedColumn,
    )

    columns = (
        TextColumn("downloading"),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("", total=total, completed=done)
        yield lambda n: progress.advance(task, n)


def _explained(error: BaseException, asked: Asked) -> str | None:
    """What went wrong and what to do, in one line; None for what nobody expected."""
    from huggingface_hub import constants, errors, get_token

    if isinstance(error, errors.LocalEntryNotFoundError) and error.__cause__ is not None:
        error = error.__cause__
    hub = constants.ENDPOINT
    kept = "what was fetched is kept; run the same command again to go on"
    status = getattr(getattr(error, "response", None), "status_code", None)
    if isinstance(error, errors.OfflineModeIsEnabled):
        return "HF_HUB_OFFLINE forbids the network: unset it to download"
    if isinstance(error, errors.GatedRepoError):
        token = "the one in use has no access" if get_token() else "none is set"
        return (
            f"the repository is gated: ask for access at {hub}/{asked.repo}, then set HF_TOKEN to "
            f"a token from {hub}/settings/tokens ({token})"
        )
    if isinstance(error, errors.RevisionNotFoundError):
        return f"no revision {asked.revision!r}: expected a branch, tag or commit of it"
    if isinstance(error, errors.RepositoryNotFoundError):
        return (
            f"no such repository at {hub} (a private one looks the same): check the name, or set "
            f"HF_TOKEN to a token that may read it"
        )
    if status == 429:
        return f"{hub} says that these are too many requests (429): wait some minutes; {kept}"
    if status in (401, 403):
        return (
            f"{hub} refuses access ({status}): set HF_TOKEN to a token from {hub}/settings/tokens "
            f"that may read it"
        )
    if status is not None:
        return f"{hub} failed ({status}): {kept}"
    if isinstance(error, errors.HFValidationError):
        return f"no name that a repository can have ({_first_line(error)})"
    if type(error).__module__.partition(".")[0] in _HTTP_LIBRARIES:
        return (
            f"{hub} cannot be reached, or broke off ({_first_line(error)}): check the network; "
            f"{kept}"
        )
    if isinstance(error, OSError):
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            return f"no space is left on the disk: make room; {kept}"
        if error.errno is not None:
            return f"{error.filename or 'the disk'}: {error.strerror}; {kept}"
        return f"{_first_line(error)}; {kept}"
    return None


def _first_line(error: BaseException) -> str:
    return (str(error) or type(error).__name__).splitlines()[0]


def _gb(n_bytes: int) -> str:
    return f"{n_bytes / 1e9:,.2f} GB"
