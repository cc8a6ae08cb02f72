"""Explain a failed or waiting download, and what to do about it, in one line.

Knows the errors of huggingface_hub and of the libraries below it; fetches nothing.
"""

import errno
import logging
import re
import time
from collections.abc import Callable
from typing import Any

__all__ = ["WaitNotes", "explain"]

# Releases of huggingface_hub use different HTTP libraries, so match errors by module name.
_HTTP_LIBRARIES = ("httpcore", "httpcore2", "httpx", "httpx2", "requests", "urllib3")


def explain(error: BaseException, repo: str, revision: str | None) -> str | None:
    """Explain an error and say what to do; None for an unexpected one.

    Args:
        error: the error raised.
        repo: owner/name.
        revision: the requested revision.
    """
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
            f"the repository is gated: ask for access at {hub}/{repo}, then set HF_TOKEN to "
            f"a token from {hub}/settings/tokens ({token})"
        )
    if isinstance(error, errors.RevisionNotFoundError):
        return f"no revision {revision!r}: expected a branch, tag or commit of it"
    if isinstance(error, errors.EntryNotFoundError):
        return f"a file that it lists is not there (404): it may just have changed; {kept}"
    if isinstance(error, errors.RepositoryNotFoundError):
        return (
            f"no such repository at {hub} (a private one looks the same): check the name, or set "
            f"HF_TOKEN to a token that may read it"
        )
    if status == 429:
        seconds = _seconds_to_wait(getattr(error, "response", None))
        wait = "some minutes" if seconds is None else f"{seconds:,} s"
        return f"{hub} says that these are too many requests (429): wait {wait}; {kept}"
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


def _seconds_to_wait(response: Any) -> int | None:
    """Read the seconds to wait from a 429 response: the hub's own header, or HTTP's."""
    headers = getattr(response, "headers", {})
    match = re.search(r";\s*r=0\s*;\s*t=(\d+)", headers.get("ratelimit", ""))
    match = match or re.fullmatch(r"(\d+)", headers.get("retry-after", "").strip())
    return int(match[1]) if match else None


class WaitNotes(logging.Handler):
    """Reports when huggingface_hub waits, which it does for minutes and only logs.

    Args:
        note: called with the line to print.
    """

    def __init__(self, note: Callable[[str], None]) -> None:
        super().__init__(logging.WARNING)
        self._note = note
        self._until = 0.0

    def emit(self, record: logging.LogRecord) -> None:
        """Handle a log record; many files wait for the same limit, which is reported once."""
        match = re.match(r"Rate limited\. Waiting (\d+)", record.getMessage())
        if match is None or time.monotonic() < self._until:
            return
        self._until = time.monotonic() + int(match[1])
        self._note(f"too many requests (429): going on in {int(match[1]):,} s, as the hub asks")


def _first_line(error: BaseException) -> str:
    return (str(error) or type(error).__name__).splitlines()[0]
