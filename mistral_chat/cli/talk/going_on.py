"""The command that resumes a kept chat: the words that started this one, and `--resume ID`."""

import os
import re
import shlex
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

from mistral_chat.cli.requests import LATEST_SESSION, SESSION_ID

__all__ = ["command_to_go_on", "typed_command"]

# The chat already contains these; its system prompt and effort may have changed since.
_BEGINNING = ("file", "system", "system_file", "reasoning")
_SWITCHES = re.compile(r"-[bBdEiIOPqsSuv]+")  # Python's switches that take no value


def typed_command(*, launched: bool) -> list[str]:
    """Return the command that started this process, or the launcher that did.

    Args:
        launched: whether a launcher started this process.
    """
    if launched:
        import psutil

        try:
            words = psutil.Process(os.getppid()).cmdline()
        except psutil.Error:
            words = []
        # Another launcher's daemon is not a command that a person could type again.
        if words and Path(words[0]).name.startswith("python"):
            return _as_typed(words)
    return _as_typed(sys.orig_argv)


def _as_typed(words: Sequence[str]) -> list[str]:
    """Drop the interpreter from a Python process's words if the script is executable."""
    at = 1
    while at < len(words) and _SWITCHES.fullmatch(words[at]):
        at += 1
    if at < len(words) and "/" in words[at] and os.access(words[at], os.X_OK):
        return [_short(words[at]), *words[at + 1 :]]
    return [_short(words[0]), *words[1:]]


def _short(program: str) -> str:
    """Return a program's bare name if the shell finds the program by it."""
    found = shutil.which(Path(program).name)
    is_same = found is not None and Path(found).absolute() == Path(program).absolute()
    return Path(program).name if is_same else program


def command_to_go_on(typed: Sequence[str], session: str) -> str:
    """Return the command to resume a chat, quoted for a shell.

    Args:
        typed: the words that started the chat.
        session: the value of `--resume`.
    """
    kept: list[str] = []
    words = list(typed)
    while words:
        word = words.pop(0)
        name, equals, _ = word.partition("=")
        name = name.removeprefix("--").replace("-", "_") if name.startswith("--") else ""
        if word == "--":
            words = [word, *words]
            break
        if name == "resume":
            is_value = words and (re.fullmatch(SESSION_ID, words[0]) or words[0] == LATEST_SESSION)
            if is_value and not equals:
                del words[0]
        elif name in _BEGINNING:
            if not equals:
                del words[:1]
        else:
            kept.append(word)
    is_id = re.fullmatch(SESSION_ID, session)
    resume = ["--resume", session] if is_id else [f"--resume={session}"]
    return shlex.join([*kept, *resume, *words])
