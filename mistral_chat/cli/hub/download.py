"""`mistral-chat download`: fetch one weight layout of a Hugging Face repository.

`fetch` downloads the big files, huggingface_hub the others. Only this command uses the network; a
run only looks up what is already there (`repository`).
"""

import logging
import os
import re
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mistral_chat import __version__
from mistral_chat.cli.codes import INTERRUPTED
from mistral_chat.cli.console import printing
from mistral_chat.cli.hub.errors import WaitNotes, explain
from mistral_chat.cli.hub.fetch import Fetch, File
from mistral_chat.cli.repository import choose_files, is_name
from mistral_chat.cli.words import OwnFlag, read_own
from mistral_chat.engine.launch import launched_rank
from mistral_chat.errors import DownloadError, MistralChatError, UsageError, named, shown

__all__ = ["run"]

LAYOUTS = ("auto", "consolidated", "hf")
API_TIMEOUT_S = 30
_ODD = "that is no hub which this command knows; check HF_ENDPOINT"
HELP = """usage: mistral-chat download OWNER/NAME [DIR] [flags]

Fetch one weight layout of a Hugging Face repository, with its shape and its tokenizer. The last
line on stdout is the folder, so that mistral-chat "$(mistral-chat download OWNER/NAME)" works.
Without DIR it lies in huggingface_hub's cache, and mistral-chat OWNER/NAME finds it there. What an
interrupted download fetched is kept: the same command goes on from there.

  --revision REVISION  a branch, tag or commit (main)
  --layout NAME        auto | consolidated | hf (auto: consolidated where there is one)

HF_TOKEN, HF_ENDPOINT, HF_HOME and HF_HUB_CACHE mean what they mean to huggingface_hub.
"""


def _layout(text: str) -> str:
    if text not in LAYOUTS:
        raise ValueError
    return text


def _revision(text: str) -> str:
    if not text:
        raise ValueError
    return text


_OWN = {
    "revision": OwnFlag(_revision, "a branch, tag or commit"),
    "layout": OwnFlag(_layout, " | ".join(LAYOUTS)),
}


@dataclass(frozen=True, kw_only=True)
class Asked:
    """What to fetch, and where to put it.

    Args:
        repo: owner/name.
        folder: destination; None is huggingface_hub's cache.
        revision: branch, tag or commit; None is main.
        layout: which weights; auto prefers Mistral's own layout.
    """

    repo: str
    folder: Path | None = None
    revision: str | None = None
    layout: str = "auto"


def run(words: Sequence[str]) -> int:
    """Run the command; return the exit code."""
    values, places = read_own(words, _OWN)
    if launched_rank() not in (None, 0):
        return 0
    if values is None:
        print(HELP, end="")
        return 0
    asked = _read(values, [word for word in places if word != "--"])
    try:
        print(_download(asked), flush=True)
    except KeyboardInterrupt:
        # A normal exit would wait for threads that wait for the network.
        os._exit(INTERRUPTED)
    return 0


def _read(values: dict[str, Any], places: Sequence[str]) -> Asked:
    if not places:
        raise UsageError("OWNER/NAME is missing: expected a repository, such as mistralai/NAME")
    if len(places) > 2:
        raise UsageError(f"found {len(places)} words: expected OWNER/NAME and at most one DIR")
    if not is_name(places[0]):
        raise UsageError(f"{places[0]!r} is no repository's name: expected OWNER/NAME")
    folder = Path(places[1]) if len(places) > 1 else None
    if folder is not None and folder.exists() and not folder.is_dir():
        raise UsageError(f"{folder} is a file: expected a folder, or a name that is free")
    return Asked(repo=places[0], folder=folder, **values)


def _note(line: str) -> None:
    printing.note(f"mistral-chat: {line}")


def _listed(file: Any) -> File:
    """Check an entry of the hub's listing, as its digest becomes a file name on this disk.

    Raises:
        DownloadError: an invalid digest or size.
    """
    sha256 = file.lfs.sha256 if file.lfs else None
    size = file.size or 0
    if sha256 is not None and not re.fullmatch(r"[0-9a-f]{64}", str(sha256)):
        raise DownloadError(
            f"the hub gives {named(file.rfilename)} the sha256 {shown(sha256)}: {_ODD}"
        )
    if type(size) is not int or not 0 <= size < 1 << 60:
        raise DownloadError(f"the hub gives {named(file.rfilename)} the size {shown(size)}: {_ODD}")
    return File(file.rfilename, size, sha256)


def _download(asked: Asked) -> Path:
    """Fetch the missing files; return the folder."""
    from huggingface_hub import HfApi, snapshot_download
    from huggingface_hub.utils import disable_progress_bars  # type: ignore[attr-defined]

    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)
    http_log = logging.getLogger("huggingface_hub.utils._http")
    http_log.setLevel(logging.WARNING)
    http_log.propagate = False
    http_log.addHandler(WaitNotes(_note))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it warns if HF_HUB_DISABLE_PROGRESS_BARS=0 is set
        disable_progress_bars()
    about_us: dict[str, Any] = {"library_name": "mistral-chat", "library_version": __version__}
    try:
        info = HfApi(**about_us).model_info(
            asked.repo, revision=asked.revision, files_metadata=True, timeout=API_TIMEOUT_S
        )
        known = {file.rfilename: _listed(file) for file in info.siblings or ()}
        try:
            names = choose_files(known, asked.layout)
        except DownloadError as error:
            raise DownloadError(f"{asked.repo}: {error}") from None
        files = [known[name] for name in names]
        # The commit becomes the name of a folder in the cache.
        commit = str(info.sha)
        if not re.fullmatch(r"[0-9a-f]{40,64}", commit):
            raise DownloadError(f"{asked.repo}: the hub names the commit {shown(commit)}: {_ODD}")
        Fetch(asked.repo, commit, files, asked.folder).run()
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
        message = explain(error, asked.repo, asked.revision)
        if message is None and isinstance(error, (LookupError, TypeError, ValueError)):
            message = f"the hub's listing lacks or mistakes {shown(str(error))}: {_ODD}"
        if message is None:
            raise
        raise DownloadError(f"{asked.repo}: {message}") from error
    # If its own request fails, huggingface_hub accepts the files that it finds, so check them.
    for file in files:
        if not (folder / file.name).is_file() or (folder / file.name).stat().st_size != file.size:
            raise DownloadError(
                f"{asked.repo}: {file.name} did not arrive whole: run the same command again"
            )
    return folder
