"""The flags of the main job: one table, read into frozen settings before anything is loaded.

argparse does help and types; what it cannot do is done before it: `-` for `_`, values that look
like flags, suggestions for misspelt names. Imports nothing heavy.
"""

import argparse
import difflib
import re
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NoReturn

from mistral_chat.config import (
    COMPLETION_MAX_TOKENS,
    DEVICES,
    DTYPES,
    LOAD_FORMATS,
    EngineConfig,
    Preset,
    SamplingParams,
    read_preset,
)
from mistral_chat.errors import UsageError

__all__ = ["COMMANDS", "Options", "help_text", "parse"]

COMMANDS = ("demo", "download", "inspect", "bench", "batch")


@dataclass(frozen=True)
class Flag:
    """One flag.

    Args:
        name: with underscores.
        convert: from text to value; None for a switch.
        help: what it does; one line.
        metavar: how its value is shown.
        repeats: may be given several times.
        table: where a preset may set it: "run", "generation" or nowhere.
    """

    name: str
    convert: Callable[[str], Any] | None
    help: str
    metavar: str | None = None
    repeats: bool = False
    table: str | None = None


def _whole(text: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number") from None


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is no number") from None


def _one_of(*choices: str) -> Callable[[str], str]:
    def convert(text: str) -> str:
        if text not in choices:
            raise argparse.ArgumentTypeError(f"{text!r} is none of {', '.join(choices)}")
        return text

    return convert


_GROUPS: dict[str, tuple[Flag, ...]] = {
    "what to answer": (
        Flag("instruct", None, "use the model's chat template; off is plain completion",
             table="run"),
        Flag("prompt", str, "answer this and exit", "TEXT"),
        Flag("file", Path, "put this text before the prompt (repeatable)", "PATH", repeats=True),
        Flag("system", str, "system prompt", "TEXT"),
        Flag("system_file", Path, "system prompt from a file", "PATH"),
        Flag("tools", Path, "function schemas to offer (.json)", "FILE"),
    ),
    "how to choose words": (
        Flag("max_tokens", _whole,
             f"most tokens of one answer (chat: until the context is full; "
             f"plain: {COMPLETION_MAX_TOKENS})", "N", table="generation"),
        Flag("temperature", _number, "0 takes the most likely token (0.7)", "F",
             table="generation"),
        Flag("top_p", _number, "keep the most likely tokens up to this probability (1.0)", "F",
             table="generation"),
        Flag("top_k", _whole, "keep this many most likely tokens (0: all)", "N",
             table="generation"),
        Flag("min_p", _number, "drop tokens this much less likely than the best (0: none)", "F",
             table="generation"),
        Flag("seed", _whole, "same seed, same ranks, same answer (random)", "N",
             table="generation"),
        Flag("stop", str, "end the answer before this text (repeatable)", "TEXT", repeats=True,
             table="generation"),
        Flag("json_schema", Path, "the answer is JSON, valid against this schema", "FILE"),
        Flag("json_object", None, "the answer is a JSON object"),
    ),
    "what to print": (
        Flag("json", None, "one JSON object on stdout instead of text"),
        Flag("logprobs", _whole, "with --json: the N most likely tokens at each place (0)", "N"),
        Flag("stats", None, "figures on stderr after each answer", table="run"),
        Flag("quiet", None, "nothing on stderr but errors", table="run"),
    ),
    "the chat": (
        Flag("plain", None, "answers of a chat as raw text, not as Markdown", table="run"),
        Flag("resume", str, "go on with an earlier chat (the last one)", "ID"),
        Flag("no_save", None, "keep nothing of this chat on disk", table="run"),
    ),
    "where and how to run": (
        Flag("nproc_per_node", _whole,
             "ranks on this machine (every GPU the model can use; one without GPUs)", "N",
             table="run"),
        Flag("device", _one_of(*DEVICES), f"{' | '.join(DEVICES)} (auto)", "NAME", table="run"),
        Flag("dtype", _one_of(*DTYPES), f"{' | '.join(DTYPES)} (auto)", "NAME", table="run"),
        Flag("max_seq_len", _whole, "context to plan memory for (what fits, at most the model's)",
             "N", table="run"),
        Flag("config", Path, "a TOML preset; flags win over it", "FILE"),
        Flag("load_format", _one_of(*LOAD_FORMATS), f"{' | '.join(LOAD_FORMATS)} (auto)", "NAME",
             table="run"),
    ),
}  # fmt: skip
_FLAGS = {flag.name: flag for group in _GROUPS.values() for flag in group}
SESSION_ID = r"\d{8}-\d{6}-[0-9a-f]{4}"
LATEST_SESSION = "latest"
_SAMPLING = ("max_tokens", "temperature", "top_p", "top_k", "min_p", "seed", "stop")
_ENGINE = ("device", "dtype", "max_seq_len", "load_format")


@dataclass(frozen=True, kw_only=True)
class Options:
    """The main job as asked for.

    Args:
        engine: what to load, and where.
        sampling: how to choose tokens.
        nproc_per_node: ranks asked for; None leaves it to the machine.
        instruct: chat template, or plain completion.
        prompt: what to answer; None leaves it to stdin.
        files: texts put before the prompt.
        system: system prompt.
        system_file: or the file that holds it.
        tools: file of function schemas.
        json_schema: file of the schema that answers are valid against.
        json_object: answers are JSON objects.
        json: one object on stdout.
        stats: figures after each answer.
        quiet: nothing on stderr but errors.
        plain: answers of a chat as raw text, not as Markdown.
        resume: the kept chat to go on with: its id, or `latest`; None begins a new one.
        save: keep the chat on disk as it goes.
    """

    engine: EngineConfig
    sampling: SamplingParams
    nproc_per_node: int | None = None
    instruct: bool = False
    prompt: str | None = None
    files: tuple[Path, ...] = ()
    system: str | None = None
    system_file: Path | None = None
    tools: Path | None = None
    json_schema: Path | None = None
    json_object: bool = False
    json: bool = False
    stats: bool = False
    quiet: bool = False
    plain: bool = False
    resume: str | None = None
    save: bool = True


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{message}; see mistral-chat --help")


def _parser(prog: str, *, positional: bool) -> _Parser:
    parser = _Parser(
        prog=prog,
        usage=f"{prog} {'MODEL ' if positional else ''}[flags]",
        description=(
            "Talk to a Mistral model. Without a prompt, at a terminal: a chat. With --prompt, or "
            "with text on stdin: one answer on stdout."
            if positional
            else "The same on the embedded model, a chat on 2 ranks; --path prints its folder."
        ),
        epilog=(
            "commands: mistral-chat demo talks to a small embedded model, download fetches a "
            "model, inspect says what one is and whether it fits, bench measures, batch answers a "
            "file of prompts; each has its --help. Under torchrun: torchrun --nproc-per-node 8 "
            "--no-python mistral-chat MODEL --instruct. - and _ in flags are the same. Codes: 0 "
            "answered, 1 failed, 2 wrong usage, 130 interrupted."
        ),
        add_help=False,
        allow_abbrev=False,
        argument_default=argparse.SUPPRESS,
        formatter_class=lambda prog: argparse.HelpFormatter(
            prog, max_help_position=30, width=min(100, shutil.get_terminal_size().columns - 2)
        ),
    )
    if positional:
        where = "a model's folder, or a downloaded repository (owner/name)"
        parser.add_argument("model", nargs="*", metavar="MODEL", help=where)
    for title, flags in _GROUPS.items():
        group = parser.add_argument_group(title)
        for flag in flags:
            text = flag.help.replace("%", "%%")
            if flag.convert is None:
                group.add_argument(f"--{flag.name}", action="store_true", help=text)
            else:
                group.add_argument(
                    f"--{flag.name}",
                    type=flag.convert,
                    metavar=flag.metavar,
                    action="append" if flag.repeats else "store",
                    help=text,
                )
    about = parser.add_argument_group("about")
    about.add_argument("--help", "-h", action="store_true", help="this text")
    about.add_argument("--version", action="store_true", help="print the version")
    return parser


def help_text(command: str | None = None) -> str:
    """What `--help` prints."""
    prog = "mistral-chat" if command is None else f"mistral-chat {command}"
    return _parser(prog, positional=command is None).format_help()


def normalize(argv: Sequence[str], flags: dict[str, bool] | None = None) -> list[str]:
    """Write flags as `--name` or `--name=value`, so that a value is never taken for a flag.

    Args:
        argv: words of the command line.
        flags: name -> whether it takes a value; None is the main job's.

    Raises:
        UsageError: an unknown or misspelt flag, or one without its value.
    """
    if flags is None:
        flags = {name: flag.convert is not None for name, flag in _FLAGS.items()}
        flags |= {"help": False, "version": False}
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
        if name == "resume" and not equals:  # its value may be left out
            is_id = bool(words) and re.fullmatch(SESSION_ID, words[0]) is not None
            done.append(f"--resume={words.pop(0) if is_id else LATEST_SESSION}")
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


def _unknown(word: str, name: str, flags: dict[str, bool]) -> str:
    close = difflib.get_close_matches(name, flags, n=1, cutoff=0.6)
    hint = f"did you mean --{close[0]}?" if close else "see mistral-chat --help"
    return f"unknown flag {word}: {hint}"


def wants_help(words: Sequence[str]) -> bool:
    """Whether normalized words ask for help."""
    return "--help" in words[: words.index("--") if "--" in words else len(words)]


def parse(words: Sequence[str]) -> Options:
    """Read normalized words of the main job.

    Raises:
        UsageError: a value of the wrong kind or out of its range, or flags that exclude each other.
    """
    given = vars(_parser("mistral-chat", positional=True).parse_args(list(words)))
    models = given.pop("model", [])
    given = {name: _put_back_dashes(value) for name, value in given.items()}
    if len(models) > 1:
        raise UsageError(
            f"found {len(models)} words ({' '.join(map(repr, models))}); expected one MODEL: "
            f"a text belongs in --prompt"
        )
    preset = read_preset(given["config"]) if "config" in given else Preset()
    values = _from_preset(preset, given.get("config")) | given
    load_format = values.get("load_format", "auto")
    if not models and load_format != "dummy":
        raise UsageError("MODEL is missing: expected a model's folder, or the command demo")
    _check(values)
    engine = EngineConfig(
        model=Path(models[0]) if models else None,
        shape=preset.shape or None,
        **{name: values[name] for name in _ENGINE if name in values},
    )
    sampling = SamplingParams(**{name: values[name] for name in _SAMPLING if name in values})
    if values.get("logprobs"):
        sampling = replace(sampling, logprobs=values["logprobs"])
    if models and "/" in models[0]:
        from mistral_chat.cli.download import cached_folder, is_repository

        if is_repository(models[0]):
            engine = replace(engine, model=cached_folder(models[0]))
    names = ("nproc_per_node", "instruct", "prompt", "system", "system_file", "tools", "json",
             "json_schema", "json_object",
             "stats", "quiet", "plain", "resume")  # fmt: skip
    return Options(
        engine=engine,
        sampling=sampling,
        save=not values.get("no_save", False),
        files=tuple(values.get("file", ())),
        **{name: values[name] for name in names if name in values},
    )


def _put_back_dashes(value: Any) -> Any:
    """Undo what argparse before 3.13 does to a value of `--`: it leaves an empty list."""
    if isinstance(value, list):
        return [_put_back_dashes(entry) for entry in value] or "--"
    return value


def _from_preset(preset: Preset, path: Path | None) -> dict[str, Any]:
    values: dict[str, Any] = {}
    for table, entries in (("run", preset.run), ("generation", preset.generation)):
        for name, value in entries.items():
            flag = _FLAGS.get(name)
            if flag is None or flag.table != table:
                known = [f.name for f in _FLAGS.values() if f.table == table]
                close = difflib.get_close_matches(name, known, n=1)
                hint = f"did you mean {close[0]}?" if close else f"expected {', '.join(known)}"
                raise UsageError(f"--config {path}: unknown key {name} in [{table}]: {hint}")
            try:
                values[name] = _preset_value(flag, value)
            except argparse.ArgumentTypeError as error:
                raise UsageError(f"--config {path}: [{table}] {name}: {error}") from error
    return values


def _preset_value(flag: Flag, value: Any) -> Any:
    if flag.convert is None:
        if not isinstance(value, bool):
            raise argparse.ArgumentTypeError(f"{value!r} is neither true nor false")
        return value
    if flag.repeats:
        listed = value if isinstance(value, list) else [value]
        return [flag.convert(str(entry)) for entry in listed]
    return flag.convert(str(value))


def _check(values: dict[str, Any]) -> None:
    """Flags that need or exclude each other, and ranges that no settings class checks."""
    if "system" in values and "system_file" in values:
        raise UsageError("--system and --system_file: expected one of them")
    if not values.get("instruct"):
        for name in ("system", "system_file", "tools", "resume"):
            if name in values:
                raise UsageError(f"--{name} needs --instruct: a plain completion has no template")
    if "resume" in values and "prompt" in values:
        raise UsageError("--resume goes on with a chat at a terminal: leave --prompt out")
    for name in ("json_schema", "json_object"):
        for other in ("tools", "stop", "json_schema"):
            if name in values and other in values and name != other:
                raise UsageError(f"--{other} and --{name}: expected one of them")
    if values.get("logprobs") is not None and not values.get("json"):
        raise UsageError("--logprobs needs --json")
    if values.get("nproc_per_node", 1) < 1:
        raise UsageError(
            f"--nproc_per_node is {values['nproc_per_node']}: expected a whole number of at least 1"
        )
    if "tools" in values and values["tools"].suffix != ".json":
        raise UsageError(
            f"--tools {values['tools']}: expected a .json file of function schemas "
            f"(running .py functions is not built yet)"
        )
    if values.get("stats") and values.get("quiet"):
        raise UsageError("--stats and --quiet: expected one of them")
