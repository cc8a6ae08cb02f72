"""argv -> a frozen request, once. The only file that knows Fire.

A command is a function that is given its flags by name and returns a request: a frozen dataclass.
Fields of it that are made with `config.flag` are the command's flags, those of settings within it
too; docstrings are their help, and the function's own is the command's. Here argv gets one meaning
(`spell`): `-` is `_`, a value is never taken for a flag, a misspelt name gets a suggestion. Then
Fire binds what was given and reads each text by its field's type. Imports nothing heavy; Fire, 40
ms, only once names are right.
"""

import difflib
import re
import shutil
import textwrap
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass, replace
from functools import cache
from inspect import cleandoc
from pathlib import Path
from types import NoneType
from typing import Any, Literal, get_args, get_origin

from mistral_chat import __version__
from mistral_chat.config import Preset, SamplingParams, read_preset
from mistral_chat.errors import UsageError, shown

__all__ = ["Command", "Flag", "flags_of", "preset_values", "read", "spell"]

Command = Callable[..., Any]
BETWEEN = "\0"  # the values of a flag that is given several times: no word of argv can hold it
INDENT, WIDEST = 26, 100
_METAVARS = {int: "N", float: "F", Path: "FILE", str: "TEXT"}
_NUMBERS: dict[Any, str] = {int: "whole number", float: "number"}


@dataclass(frozen=True, kw_only=True)
class Flag:
    """One flag, as the field that it sets declares it.

    Args:
        name: with underscores.
        kind: of its value: bool is a switch.
        default: where the flag is not given.
        repeats: may be given several times.
        table: of a preset that may set it: "run", "generation" or none.
        metavar: how its value is shown; empty is by its kind.
        reads: from text to value, a ValueError for one that cannot be; None is by its kind.
        expected: says in an error what it takes, where its kind does not say it all.
        or_else: its value may be left out: the pattern of a next word that is meant as one, and
            the value where there is none.
        title: what its line of help stands under.
        help: that line.
    """

    name: str
    kind: Any
    default: Any
    repeats: bool = False
    table: str | None = None
    metavar: str = ""
    reads: Callable[[str], Any] | None = None
    expected: str = ""
    or_else: tuple[str, str] | None = None
    title: str = ""
    help: str = ""

    @property
    def choices(self) -> tuple[str, ...]:
        """What its value may be, where that is one of a few names."""
        return get_args(self.kind) if get_origin(self.kind) is Literal else ()

    @property
    def shown(self) -> str:
        """What stands behind its name in help: its value."""
        value = self.metavar or _METAVARS.get(self.kind, "NAME")
        return self.metavar if self.kind is bool else f" {value}"

    @property
    def help_line(self) -> str:
        """Its line of help, with what its declaration says already."""
        says_default = self.default is not None and (self.choices or self.kind in _NUMBERS)
        default = f" ({self.default})" if says_default and not self.repeats else ""
        if self.choices:
            return f"{' | '.join(self.choices)}{default}: {self.help}"
        return f"{self.help}{default}{' (repeatable)' * self.repeats}"

    def read(self, text: str) -> Any:
        """One value.

        Raises:
            ValueError: what is wrong with the text.
        """
        try:
            if self.choices:
                return self.choices[self.choices.index(text)]
            return (self.reads or self.kind)(text)
        except ValueError:
            names = f"none of {', '.join(self.choices)}" if self.choices else ""
            said = names or f"no {_NUMBERS.get(self.kind, self.expected)}"
            raise ValueError(f"{shown(text)} is {said}") from None

    def read_all(self, texts: str) -> Any:
        """What Fire reads with: the values of a flag that repeats, the last one of another.

        Raises:
            UsageError: a text that cannot be read, with the flag's name.
        """
        values = []
        for text in texts.split(BETWEEN):
            try:
                values.append(self.read(text))
            except ValueError as error:
                said = f"argument --{self.name}: {error}; see mistral-chat --help"
                if self.expected:
                    said = f"--{self.name} is {text!r}: expected {self.expected}"
                raise UsageError(said) from None
        return tuple(values) if self.repeats else values[-1]


_HELP = Flag(name="help", kind=bool, default=False, metavar=", -h", title="About", help="this text")
_VERSION = Flag(name="version", kind=bool, default=False, title="About", help="print the version")


@cache
def flags_of(settings: type) -> dict[str, Flag]:
    """The flags that a dataclass declares, by name; those of dataclasses within it too."""
    said = {
        name: (title, text)
        for kind in reversed(settings.__mro__)
        for title, name, text in _documented(kind)
    }
    found: dict[str, Flag] = {}
    for field in fields(settings):
        title, text = said.get(field.name, ("", ""))
        kinds = get_args(field.type) if NoneType in get_args(field.type) else (field.type,)
        kind: Any = next(kind for kind in kinds if kind is not NoneType)
        if is_dataclass(kind):
            within = flags_of(kind)  # type: ignore[arg-type]
            found |= {name: replace(flag, title=title) for name, flag in within.items()}
        elif "flag" in field.metadata:
            about = {"title": title, "help": text, **field.metadata["flag"]}
            repeats = get_origin(kind) is tuple and "reads" not in about
            kind = get_args(kind)[0] if repeats else kind
            found[field.name] = Flag(
                name=field.name, kind=kind, default=field.default, repeats=repeats, **about
            )
    return found


def _documented(kind: type) -> list[tuple[str, str, str]]:
    """Title, name and text of each field that a class's own docstring tells of."""
    found: list[tuple[str, str, str]] = []
    title = ""
    for line in cleandoc(kind.__doc__ or "").splitlines():
        if entry := re.fullmatch(r"    (\w+): (.*)", line):
            found.append((title, entry[1], entry[2]))
        elif line.startswith("     ") and found:
            found[-1] = (*found[-1][:2], f"{found[-1][2]} {line.strip()}")
        elif line.endswith(":") and not line.startswith(" "):
            title = line[:-1]
    return [(title, name, text.removesuffix(".")) for title, name, text in found]


def read(commands: Mapping[str, Command], argv: Sequence[str], default: str) -> Any:
    """What a command line asks for; nothing was run.

    Args:
        commands: by name. A command takes `words`, those that are no flags, and its flags by name.
        argv: words of the command line.
        default: the command that has no name on it.

    Returns:
        the request, or a text: help or the version, which come before values that cannot be.

    Raises:
        UsageError: an unknown or misspelt flag, or a value that cannot be.
    """
    is_named = bool(argv) and argv[0] in commands and argv[0] != default
    name, typed = (argv[0], argv[1:]) if is_named else (default, argv)
    command = commands[name]
    request, main_job = _request(command), _request(commands[default])
    flags = flags_of(request)
    about = [_HELP, _VERSION] if issubclass(request, main_job) else [_HELP]
    given, words = spell(typed, flags | {flag.name: flag for flag in about})
    if "help" in given:
        return _help(command, main_job)
    if "version" in given:
        return f"mistral-chat {__version__}\n"
    import fire

    spelt = [f"--{flag}={text}" for flag, text in given.items()]
    if words:
        spelt.append(f"--words={BETWEEN.join(words)}")
    readers = {flag.name: flag.read_all for flag in flags.values()}
    fire.decorators.SetParseFns(words=lambda text: text.split(BETWEEN), **readers)(command)
    own = ["--", f"--separator={BETWEEN}"]  # Fire's own separator is `-`, which is stdin here
    return fire.Fire(dict(commands), [name, *spelt, *own], serialize=lambda request: None)


def _request(command: Command) -> type:
    request: type = command.__annotations__["return"]
    return request


def spell(argv: Sequence[str], flags: Mapping[str, Flag]) -> tuple[dict[str, str], list[str]]:
    """Give words of a command line their one meaning.

    Args:
        argv: the words.
        flags: by name.

    Returns:
        the flags that are given, with their texts, and the words that are none.

    Raises:
        UsageError: an unknown or misspelt flag, or one without its value.
    """
    words, given, others = list(argv), dict[str, str](), list[str]()
    while words:
        word = words.pop(0)
        if word == "--":
            return given, [*others, *words]
        if not word.startswith("-") or word == "-":
            others.append(word)
            continue
        name, equals, text = ("--help" if word == "-h" else word).removeprefix("--").partition("=")
        name = name.replace("-", "_")
        if name not in flags:
            close = difflib.get_close_matches(name, flags, n=1, cutoff=0.6)
            hint = f"did you mean --{close[0]}?" if close else "see mistral-chat --help"
            raise UsageError(f"unknown flag {word.partition('=')[0]}: {hint}")
        flag = flags[name]
        if flag.kind is bool:
            if equals:
                raise UsageError(f"--{name} is a switch and takes no value; found {text!r}")
            text = "True"
        elif not equals and flag.or_else:
            pattern, text = flag.or_else
            text = words.pop(0) if words and re.fullmatch(pattern, words[0]) else text
        elif not equals:
            if not words or _names_flag(words[0], flags):
                found = f"the flag {words[0]}" if words else "nothing"
                raise UsageError(
                    f"--{name} needs a value; found {found} after it (a text that looks like a "
                    f"flag is written --{name}=TEXT)"
                )
            text = words.pop(0)
        given[name] = f"{given[name]}{BETWEEN}{text}" if name in given else text
    return given, others


def _names_flag(word: str, flags: Mapping[str, Flag]) -> bool:
    name = word.partition("=")[0].lstrip("-").replace("-", "_")
    return word.startswith("--") and name in flags


def preset_values(path: Path, flags: Mapping[str, Flag]) -> tuple[Preset, dict[str, Any]]:
    """A preset, and what it gives to flags by name.

    Args:
        path: of its file.
        flags: of the main job; each says which of a preset's tables it belongs to.

    Raises:
        UsageError: no preset, a key that no flag of its table has, or a value that the flag does
            not take.
    """
    preset = read_preset(path)
    values: dict[str, Any] = {}
    for table, entries in (("run", preset.run), ("generation", preset.generation)):
        known = {name: flag for name, flag in flags.items() if flag.table == table}
        for name, value in entries.items():
            if name not in known:
                close = difflib.get_close_matches(name, known, n=1)
                hint = f"did you mean {close[0]}?" if close else f"expected {', '.join(known)}"
                raise UsageError(f"--config {path}: unknown key {name} in [{table}]: {hint}")
            try:
                values[name] = _read_value(known[name], value)
            except ValueError as error:
                raise UsageError(f"--config {path}: [{table}] {name}: {error}") from error
    return preset, values


def _read_value(flag: Flag, value: Any) -> Any:
    if flag.kind is bool:
        if not isinstance(value, bool):
            raise ValueError(f"{value!r} is neither true nor false")
        return value
    if flag.repeats:
        listed = value if isinstance(value, list) else [value]
        return tuple(flag.read(str(entry)) for entry in listed)
    return flag.read(str(value))


def _help(command: Command, main_job: type) -> str:
    """A command's docstring, with its flags in the place of `{flags}`, names for `{sampling}`.

    Of the main job's flags another command only names those that its request says nothing about.
    """
    request = _request(command)
    flags = flags_of(request)
    titles = [title for kind in request.__mro__ for title, *_ in _documented(kind)]
    shows = [*(flag for flag in flags.values() if flag.help), _HELP, _VERSION]
    if not issubclass(request, main_job):
        titles = ["Args"]
        shows = [replace(flags[name], title="Args") for _, name, _ in _documented(request)]
    lines: list[str] = []
    for title in dict.fromkeys([*titles, *(flag.title for flag in shows)]):
        lines += [] if title == "Args" else ["", f"{title[0].lower()}{title[1:]}:"]
        for flag in shows:
            if flag.title == title:
                lines += _wrap(
                    flag.help_line, f"  --{flag.name}{flag.shown}  ".ljust(INDENT), INDENT
                )
    if left_out := [name for name in flags if name not in [flag.name for flag in shows]]:
        named = " ".join(f"--{name}" for name in left_out)
        lines += _wrap(f"and of the main job: {named}", "  ", 2)
    text = cleandoc(command.__doc__ or "").replace("Usage:", "usage:", 1)
    text = text.replace("{flags}", "\n".join(lines).strip("\n"))
    return text.replace("{sampling}", " ".join(flags_of(SamplingParams))).rstrip() + "\n"


def _wrap(text: str, first: str, indent: int) -> list[str]:
    width = min(WIDEST, shutil.get_terminal_size().columns - 2)
    return textwrap.wrap(text, width, initial_indent=first, subsequent_indent=" " * indent)
