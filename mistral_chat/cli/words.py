"""The words of a command line, made plain: which are flags, which are their values.

For every command: `-` is `_`, a value is never taken for a flag, a misspelt name gets a suggestion.
Knows nothing of what the flags are for. Imports nothing heavy.
"""

import difflib
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mistral_chat.errors import UsageError

__all__ = ["OwnFlag", "normalize", "read_own", "split", "wants_help", "whole_from"]


def normalize(
    argv: Sequence[str],
    flags: Mapping[str, bool],
    optional: Mapping[str, tuple[str, str]] | None = None,
) -> list[str]:
    """Write flags as `--name` or `--name=value`, so that a value is never taken for a flag.

    Args:
        argv: words of the command line.
        flags: name -> whether it takes a value.
        optional: of these, the ones whose value may be left out: the pattern of a next word that
            is meant as one, and the value where there is none.

    Raises:
        UsageError: an unknown or misspelt flag, or one without its value.
    """
    words = list(argv)
    done: list[str] = []
    while words:
        word = words.pop(0)
        if word == "--":
            return [*done, "--", *words]
        if word == "-h":
            word = "--help"
        if not word.startswith("-") or word == "-":
            done.append(word)
            continue
        name, equals, value = word.removeprefix("--").partition("=")
        name = name.replace("-", "_")
        if not word.startswith("--") or name not in flags or word.startswith("---"):
            raise UsageError(_unknown(word.partition("=")[0], name, flags))
        if not flags[name]:
            if equals:
                raise UsageError(f"--{name} is a switch and takes no value; found {value!r}")
            done.append(f"--{name}")
            continue
        if optional and name in optional and not equals:
            pattern, default = optional[name]
            is_value = bool(words) and re.fullmatch(pattern, words[0]) is not None
            done.append(f"--{name}={words.pop(0) if is_value else default}")
            continue
        if not equals:
            if not words or (
                words[0].partition("=")[0].lstrip("-").replace("-", "_") in flags
                and (words[0].startswith("--"))
            ):
                found = f"the flag {words[0]}" if words else "nothing"
                raise UsageError(
                    f"--{name} needs a value; found {found} after it (a text that looks like a "
                    f"flag is written --{name}=TEXT)"
                )
            value = words.pop(0)
        done.append(f"--{name}={value}")
    return done


def _unknown(word: str, name: str, flags: Mapping[str, bool]) -> str:
    close = difflib.get_close_matches(name, flags, n=1, cutoff=0.6)
    hint = f"did you mean --{close[0]}?" if close else "see mistral-chat --help"
    return f"unknown flag {word}: {hint}"


def wants_help(words: Sequence[str]) -> bool:
    """Whether normalized words ask for help."""
    return "--help" in _before_dashes(words)


def _before_dashes(words: Sequence[str]) -> Sequence[str]:
    return words[: words.index("--")] if "--" in words else words


def split(words: Sequence[str]) -> tuple[list[str], list[str]]:
    """Normalized words as flags, and what is none, each in its order."""
    before = _before_dashes(words)
    flags = [word for word in before if word.startswith("--")]
    others = [word for word in before if not word.startswith("--")]
    return flags, [*others, *words[len(before) + 1 :]]


@dataclass(frozen=True)
class OwnFlag:
    """A flag that only one command has.

    Args:
        read: from text to value, a ValueError for one that cannot be; None for a switch.
        expected: says in an error what `read` takes.
        name: of the value, where it differs from the flag's.
    """

    read: Callable[[str], Any] | None = None
    expected: str = ""
    name: str | None = None


def whole_from(least: int) -> OwnFlag:
    """A flag whose value is a whole number of at least this."""

    def read(text: str) -> int:
        if not (text.isascii() and text.isdigit() and int(text) >= least):
            raise ValueError
        return int(text)

    return OwnFlag(read, f"a whole number of at least {least}")


def read_own(
    argv: Sequence[str], own: Mapping[str, OwnFlag], shared: Mapping[str, bool] | None = None
) -> tuple[dict[str, Any] | None, list[str]]:
    """Read a command's own flags.

    Args:
        argv: the command's words.
        own: its flags by name; `--help` is one besides.
        shared: its flags that others read: name -> whether it takes a value.

    Returns:
        the values of those that are given, and the other words, normalized; None where the words
        ask for help.

    Raises:
        UsageError: an unknown or misspelt flag, or a value that cannot be.
    """
    takes_value = {name: flag.read is not None for name, flag in own.items()}
    words = normalize(argv, {**takes_value, **(shared or {}), "help": False})
    if wants_help(words):
        return None, words
    values: dict[str, Any] = {}
    rest: list[str] = []
    n_read = len(_before_dashes(words))
    for word in words[:n_read]:
        name, _, text = word.removeprefix("--").partition("=")
        if not word.startswith("--") or name not in own:
            rest.append(word)
            continue
        flag = own[name]
        try:
            values[flag.name or name] = True if flag.read is None else flag.read(text)
        except ValueError:
            raise UsageError(f"--{name} is {text!r}: expected {flag.expected}") from None
    return values, [*rest, *words[n_read:]]
