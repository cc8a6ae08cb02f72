"""`mistral-chat download`: fetch one weight layout of a Hugging Face repository.

`fetch` downloads the big files, huggingface_hub the others. Only this command uses the network; a
run only looks up what is already there (`repository`).
"""

import logging
import os
import re
import warnings
from pathlib import Path
from typing import Any

from mistral_chat import __version__
from mistral_chat.cli.codes import INTERRUPTED
from mistral_chat.cli.console import printing
from mistral_chat.cli.hub.errors import WaitNotes, explain
from mistral_chat.cli.hub.fetch import Fetch, File
from mistral_chat.cli.repository import choose_files
from mistral_chat.cli.requests import DownloadRequest
from mistral_chat.engine.ranks.launch import launched_rank
from mistral_chat.errors import DownloadError, MistralChatError, named, shown

__all__ = ["run"]

API_TIMEOUT_S = 30
_ODD = "that is no hub which this command knows; check HF_ENDPOINT"


def run(request: DownloadRequest) -> int:
    """Run the command; the code to end with."""
    if launched_rank() not in (None, 0):
        return 0
    try:
        print(_download(request), flush=True)
    except KeyboardInterrupt:
        # A normal exit would wait for threads that wait for the network.
        os._exit(INTERRUPTED)
    return 0


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


def _download(request: DownloadRequest) -> Path:
    """Fetch what is missing; the folder."""
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
            request.repo, revision=request.revision, files_metadata=True, timeout=API_TIMEOUT_S
        )
        known = {file.rfilename: _listed(file) for file in info.siblings or ()}
        try:
            names = choose_files(known, request.layout)
        except DownloadError as error:
            raise DownloadError(f"{request.repo}: {error}") from None
        files = [known[name] for name in names]
        # The commit becomes the name of a folder in the cache.
        commit = str(info.sha)
        if not re.fullmatch(r"[0-9a-f]{40,64}", commit):
            raise DownloadError(f"{request.repo}: the hub names the commit {shown(commit)}: {_ODD}")
        Fetch(request.repo, commit, files, request.folder).run()
        folder = Path(
            snapshot_download(
                request.repo,
                revision=request.revision,
                local_dir=request.folder,
                allow_patterns=names,
                **about_us,
            )
        )
    except MistralChatError:
        raise
    except Exception as error:
        message = explain(error, request.repo, request.revision)
        if message is None and isinstance(error, (LookupError, TypeError, ValueError)):
            message = f"the hub's listing lacks or mistakes {shown(str(error))}: {_ODD}"
        if message is None:
            raise
        raise DownloadError(f"{request.repo}: {message}") from error
    # Without an answer to its own question huggingface_hub is content with what is there.
    for file in files:
        if not (folder / file.name).is_file() or (folder / file.name).stat().st_size != file.size:
            raise DownloadError(
                f"{request.repo}: {file.name} did not arrive whole: run the same command again"
            )
    return folder
