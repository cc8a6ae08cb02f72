"""What a failed download means and what to do, in one line.

Knows huggingface_hub's errors and those beneath it; fetches nothing.
"""

import errno

__all__ = ["explain"]

# huggingface_hub's HTTP library changed with its releases; its errors are known by their module.
_HTTP_LIBRARIES = ("httpcore", "httpcore2", "httpx", "httpx2", "requests", "urllib3")


def explain(error: BaseException, repo: str, revision: str | None) -> str | None:
    """What went wrong and what to do; None for what nobody expected.

    Args:
        error: as raised.
        repo: owner/name.
        revision: that was asked for.
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
