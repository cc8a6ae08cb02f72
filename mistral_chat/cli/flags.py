"""The flags of the main job: one table, read into frozen settings before anything is loaded.

argparse does help and types (`parser`); what it cannot do is done before it (`words`): `-` for `_`,
values that look like flags, suggestions for misspelt names. Imports nothing heavy.
"""

import argparse
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from mistral_chat.cli import words
from mistral_chat.cli.parser import make_parser
from mistral_chat.cli.presets import values_of
from mistral_chat.cli.words import split, wants_help
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
from mistral_chat.errors import CheckpointError, UsageError, shown

__all__ = ["COMMANDS", "Options", "help_text", "normalize", "parse", "shared", "wants_help"]

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
        raise argparse.ArgumentTypeError(f"{shown(text)} is no whole number") from None


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{shown(text)} is no number") from None


def _one_of(*choices: str) -> Callable[[str], str]:
    def convert(text: str) -> str:
        if text not in choices:
            raise argparse.ArgumentTypeError(f"{shown(text)} is none of {', '.join(choices)}")
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
        Flag("tools", Path, "functions to offer: schemas (.json), or Python to run (.py)", "FILE"),
        Flag("yes", None, "run the functions of --tools FILE.py without asking"),
        Flag("tools_env", str, "let them see this secret of the environment (repeatable)", "NAME",
             repeats=True),
        Flag("tool_timeout", _number, "seconds that a call of a Python function may take (60)",
             "SECONDS"),
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
        tools: file of function schemas, or of Python functions.
        yes: run Python functions without asking.
        tools_env: variables of the environment that they see although their names are of secrets.
        tool_timeout: seconds that a call of one may take.
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
    yes: bool = False
    tools_env: tuple[str, ...] = ()
    tool_timeout: float = 60.0
    json_schema: Path | None = None
    json_object: bool = False
    json: bool = False
    stats: bool = False
    quiet: bool = False
    plain: bool = False
    resume: str | None = None
    save: bool = True


def help_text(command: str | None = None) -> str:
    """What `--help` prints."""
    prog = "mistral-chat" if command is None else f"mistral-chat {command}"
    return make_parser(_GROUPS, prog, positional=command is None).format_help()


def shared(*names: str) -> dict[str, bool]:
    """Flags of the main job that another command takes too: name -> whether it takes a value."""
    return {name: _FLAGS[name].convert is not None for name in names}


def normalize(argv: Sequence[str]) -> list[str]:
    """Write flags of the main job as `--name` or `--name=value`; see `words.normalize`."""
    return words.normalize(
        argv,
        shared(*_FLAGS) | {"help": False, "version": False},
        {"resume": (SESSION_ID, LATEST_SESSION)},
    )


def parse(words: Sequence[str], *, takes_text: bool = True) -> Options:
    """Read normalized words of the main job.

    Args:
        words: of the command line.
        takes_text: a word after MODEL is the prompt.

    Raises:
        UsageError: a value of the wrong kind or out of its range, or flags that exclude each other.
    """
    # argparse takes no words that stand in several places among flags.
    flags, typed = split(words)
    given = vars(make_parser(_GROUPS, "mistral-chat", positional=False).parse_args(flags))
    models, texts = typed[:1], typed[1:]
    given = {name: _put_back_dashes(value) for name, value in given.items()}
    if texts:
        given["prompt"] = _read_text(texts, given if takes_text else None)
    preset = read_preset(given["config"]) if "config" in given else Preset()
    values = values_of(preset, given.get("config"), _FLAGS) | given
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
        from mistral_chat.cli.repository import is_repository

        if is_repository(models[0]):
            engine = replace(engine, model=_cached(models[0]))
    names = ("nproc_per_node", "instruct", "prompt", "system", "system_file", "tools", "json",
             "json_schema", "json_object", "yes", "tool_timeout",
             "stats", "quiet", "plain", "resume")  # fmt: skip
    return Options(
        engine=engine,
        sampling=sampling,
        save=not values.get("no_save", False),
        files=tuple(values.get("file", ())),
        tools_env=tuple(values.get("tools_env", ())),
        **{name: values[name] for name in names if name in values},
    )


def _cached(repo: str) -> Path:
    from mistral_chat.cli.repository import cached_folder
    from mistral_chat.cli.suggestions import near_model

    try:
        return cached_folder(repo)
    except CheckpointError as error:
        near = near_model(repo)
        if near in (None, repo):
            raise
        raise CheckpointError(f"{error}; or did you mean {near}?") from error


def _read_text(texts: Sequence[str], given: Mapping[str, Any] | None) -> str:
    """The prompt that stands after MODEL; None for the flags is a command that takes none."""
    found = shown(" ".join(texts), 100)
    if given is None:
        raise UsageError(f"found {found} after MODEL: expected one MODEL and flags")
    if len(texts) > 1:
        raise UsageError(
            f"found {len(texts)} words after MODEL: expected one MODEL and one text, which is "
            f"quoted: mistral-chat MODEL {found}"
        )
    if "prompt" in given:
        raise UsageError(f"found the text {found} after MODEL and --prompt: expected one of them")
    return texts[0]


def _put_back_dashes(value: Any) -> Any:
    """Undo what argparse before 3.13 does to a value of `--`: it leaves an empty list."""
    if isinstance(value, list):
        return [_put_back_dashes(entry) for entry in value] or "--"
    return value


def _check(values: dict[str, Any]) -> None:
    """Flags that need or exclude each other, and ranges that no settings class checks."""
    if "system" in values and "system_file" in values:
        raise UsageError("--system and --system_file: expected one of them")
    if not values.get("instruct"):
        for name in ("system", "system_file", "tools", "resume"):
            if name in values:
                raise UsageError(f"--{name} needs --instruct: a plain completion has no template")
    if "resume" in values and "prompt" in values:
        raise UsageError("--resume goes on with a chat at a terminal: leave the prompt out")
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
    tools = values.get("tools")
    if tools is not None and tools.suffix not in (".json", ".py"):
        raise UsageError(
            f"--tools {tools}: expected a .json file of schemas, or a .py file of functions"
        )
    for name in ("yes", "tools_env", "tool_timeout"):
        if name in values and (tools is None or tools.suffix != ".py"):
            raise UsageError(f"--{name} needs --tools FILE.py: it says how Python functions run")
    if not 0 < values.get("tool_timeout", 1) < math.inf:
        raise UsageError(
            f"--tool_timeout is {values['tool_timeout']!r}: expected a number above 0, of seconds"
        )
    if values.get("stats") and values.get("quiet"):
        raise UsageError("--stats and --quiet: expected one of them")
