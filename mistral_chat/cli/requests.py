"""What each command can be asked for: frozen requests, whose fields are the commands' flags.

A flag is declared once, here or among the settings in `config`. Docstrings are the help: `Args:`
and other titles hold a line for each flag; where two classes have one, the request's own counts.
Flags that need or exclude each other are checked when a request is made. Imports nothing heavy.
"""

import math
import re
from dataclasses import dataclass, fields, replace
from itertools import product
from pathlib import Path
from typing import Any, Literal, TypeVar

from mistral_chat.cli.command_line import flags_of, preset_values
from mistral_chat.config import EngineConfig, Preset, SamplingParams, WeightsConfig, flag
from mistral_chat.errors import CheckpointError, UsageError

__all__ = [
    "LATEST_SESSION",
    "SESSION_ID",
    "AnswersRequest",
    "BatchRequest",
    "BenchRequest",
    "ChatRequest",
    "DemoRequest",
    "DownloadRequest",
    "InspectRequest",
    "ModelRequest",
    "QuantizeRequest",
    "make",
    "place_of",
]

SESSION_ID = r"\d{8}-\d{6}-[0-9a-f]{4}"
LATEST_SESSION = "latest"
_UNITS = {"kB": 10**3, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12, "KiB": 2**10,
          "MiB": 2**20, "GiB": 2**30, "TiB": 2**40}  # fmt: skip

R = TypeVar("R", bound="ModelRequest")


def _whole_from(least: int) -> dict[str, Any]:
    """What `flag` takes of a whole number of at least this."""

    def read(text: str) -> int:
        if not (text.isascii() and text.isdigit() and int(text) >= least):
            raise ValueError
        return int(text)

    return {"reads": read, "expected": f"a whole number of at least {least}"}


def _whole_numbers(text: str) -> tuple[int, ...]:
    numbers = tuple(int(n) for n in text.split(","))
    if min(numbers) < 1:
        raise ValueError
    return numbers


def _bytes(text: str) -> int:
    match = re.fullmatch(r"(\d+(?:\.\d+)?) ?([A-Za-z]+)", text)
    if not match or match[2] not in _UNITS:
        raise ValueError
    return int(float(match[1]) * _UNITS[match[2]])


_SOME: dict[str, Any] = {
    "metavar": "N,N", "reads": _whole_numbers, "expected": "whole numbers like 128,512",
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class ModelRequest:
    """A model, and where and how it runs: all commands but download.

    Where and how to run:
        nproc_per_node: ranks on this machine (every GPU the model can use; one without GPUs).
        engine: what to load, and where.
        config: a TOML preset; flags win over it.
    """

    engine: EngineConfig
    nproc_per_node: int | None = flag(None, table="run")
    config: Path | None = flag(None)

    def __post_init__(self) -> None:
        if self.nproc_per_node is not None and self.nproc_per_node < 1:
            raise UsageError(
                f"--nproc_per_node is {self.nproc_per_node}: expected a whole number of at least 1"
            )


@dataclass(frozen=True, kw_only=True)
class Schema:
    """What answers are valid against.

    How to choose words:
        json_schema: the answer is JSON, valid against this schema.
    """

    json_schema: Path | None = flag(None)


@dataclass(frozen=True, kw_only=True)
class Json:
    """The form of what is printed.

    What to print:
        json: one JSON object on stdout instead of text.
    """

    json: bool = flag(False)


@dataclass(frozen=True, kw_only=True)
class BatchSize:
    """How many sequences a cache holds; None leaves it to the command."""

    max_batch_size: int | None = flag(None, metavar="N", **_whole_from(1))


@dataclass(frozen=True, kw_only=True)
class AnswersRequest(Schema, ModelRequest):
    """What answers are given and kept to, whatever the prompt: the main job and batch.

    What to answer:
        instruct: use the model's chat template; off is plain completion.
        system: system prompt; the word default is the SYSTEM_PROMPT.txt beside the weights, with
            the model's name and today's date filled in (for that word itself: --system_file).
        system_file: system prompt from a file.
        reasoning: how much to think before the answer, where the template knows it (the model's).
        tools: functions to offer: schemas (.json), or Python to run (.py).

    How to choose words:
        sampling: how tokens are chosen.
        json_object: the answer is a JSON object.

    What to print:
        quiet: nothing on stderr but errors.
    """

    sampling: SamplingParams
    instruct: bool = flag(False, table="run")
    system: str | None = flag(None)
    system_file: Path | None = flag(None)
    reasoning: Literal["none", "high"] | None = flag(None, table="generation")
    tools: Path | None = flag(None)
    json_object: bool = flag(False)
    quiet: bool = flag(False, table="run")

    @property
    def has_python(self) -> bool:
        """Whether the tools are Python functions."""
        return self.tools is not None and self.tools.suffix == ".py"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.system is not None and self.system_file is not None:
            raise UsageError("--system and --system_file: expected one of them")
        _require_instruct(self, "system", "system_file", "reasoning", "tools")
        given = {**vars(self), "stop": self.sampling.stop}
        kept_to, others = ("json_schema", "json_object"), ("tools", "stop", "json_schema")
        for name, other in product(kept_to, others):
            if name != other and given[name] and given[other]:
                raise UsageError(f"--{other} and --{name}: expected one of them")
        if self.tools is not None and self.tools.suffix not in (".json", ".py"):
            raise UsageError(
                f"--tools {self.tools}: expected a .json file of schemas, or a .py file of "
                f"functions"
            )
        if self.sampling.logprobs == 0:  # of a command line it is none at all
            object.__setattr__(self, "sampling", replace(self.sampling, logprobs=None))


@dataclass(frozen=True, kw_only=True)
class ChatRequest(Json, AnswersRequest):
    """The main job: a prompt to answer, or a chat.

    What to answer:
        prompt: answer this and exit.
        file: put this text before the prompt.
        yes: run the functions of --tools FILE.py without asking.
        tools_env: let them see this secret of the environment.
        tool_timeout: seconds that a call of a Python function may take (60).

    What to print:
        stats: figures on stderr after each answer.
        show_thinking: what the model thinks before it answers, whole, on stderr.

    The chat:
        plain: answers of a chat as raw text, not as Markdown.
        resume: go on with an earlier chat (the last one).
        no_save: keep nothing of this chat on disk.
    """

    prompt: str | None = flag(None)
    file: tuple[Path, ...] = flag(())
    yes: bool = flag(False)
    tools_env: tuple[str, ...] = flag((), metavar="NAME")
    tool_timeout: float | None = flag(None, metavar="SECONDS")
    stats: bool = flag(False, table="run")
    show_thinking: bool = flag(False, table="run")
    plain: bool = flag(False, table="run")
    resume: str | None = flag(None, metavar="ID", or_else=(SESSION_ID, LATEST_SESSION))
    no_save: bool = flag(False, table="run")

    def __post_init__(self) -> None:
        if self.sampling.logprobs is not None and not self.json:
            raise UsageError("--logprobs needs --json")
        super().__post_init__()
        _require_instruct(self, "resume")
        if self.resume is not None and self.prompt is not None:
            raise UsageError("--resume goes on with a chat at a terminal: leave the prompt out")
        for name in ("yes", "tools_env", "tool_timeout"):
            if getattr(self, name) != flags_of(ChatRequest)[name].default and not self.has_python:
                raise UsageError(
                    f"--{name} needs --tools FILE.py: it says how Python functions run"
                )
        if self.tool_timeout is not None and not 0 < self.tool_timeout < math.inf:
            raise UsageError(
                f"--tool_timeout is {self.tool_timeout!r}: expected a number above 0, of seconds"
            )
        for name in ("stats", "show_thinking"):
            if getattr(self, name) and self.quiet:
                raise UsageError(f"--{name} and --quiet: expected one of them")


def _require_instruct(request: AnswersRequest, *names: str) -> None:
    for name in names:
        if getattr(request, name) is not None and not request.instruct:
            raise UsageError(f"--{name} needs --instruct: a plain completion has no template")


@dataclass(frozen=True, kw_only=True)
class DemoRequest(ChatRequest):
    """The main job on the embedded model.

    What to answer:
        path: print the embedded model's folder and exit.
    """

    path: bool = flag(False)


@dataclass(frozen=True, kw_only=True)
class DownloadRequest:
    """A repository to fetch, and where to; None is huggingface_hub's cache, and main.

    Args:
        revision: a branch, tag or commit (main).
        layout: auto is consolidated where there is one.
    """

    repo: str
    folder: Path | None = None
    revision: str | None = flag(None, metavar="REVISION")
    layout: Literal["auto", "consolidated", "hf"] = flag(
        "auto", expected="auto | consolidated | hf"
    )

    def __post_init__(self) -> None:
        if self.revision == "":
            raise UsageError("--revision is '': expected a branch, tag or commit")


@dataclass(frozen=True, kw_only=True)
class QuantizeRequest(WeightsConfig):
    """A model of floats to write as a quantized one.

    Args:
        device: that quantizes; auto is cuda where there is one.
        quantization: what is written: fp8 or int8 with a scale a row, or int4 in groups of 128
            columns; it must be given.
    """

    model: Path
    folder: Path

    def __post_init__(self) -> None:
        if self.quantization in ("auto", "none"):
            raise UsageError(
                f"--quantization is {self.quantization}: expected fp8, int8 or int4, to write"
            )


@dataclass(frozen=True, kw_only=True)
class InspectRequest(BatchSize, Json, ModelRequest):
    """What to say of a model.

    Args:
        gpu_memory: assume GPUs with this much free, such as 80GB or 141GB.
        max_batch_size: sequences held at once (1).
        json: one JSON object on stdout instead of text.
        nproc_per_node: how many ranks share the model (1, 2, 4 and 8).
    """

    gpu_memory: int | None = flag(
        None, metavar="SIZE", reads=_bytes, expected="bytes with a unit, such as 141GB"
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.gpu_memory is not None and self.engine.device == "cpu":
            raise UsageError("--gpu_memory and --device cpu: expected one of them")


@dataclass(frozen=True, kw_only=True)
class BenchRequest(Schema, Json, ModelRequest):
    """What to measure.

    Args:
        batches: sequences decoded together (1,2,4,8; on CPU 1,2).
        contexts: contexts to decode at (512,8192,32768 as far as they fit).
        prompts: prompt lengths for the time to the first token (128,512,2048,8192).
        shard_of: one process: measure one rank's share of N, with nobody to sum with.
        peer: measure transformers on the same weights too (one rank), or safetensors beside
            --loading.
        loading: measure how fast the folder's weights are read, and nothing else.
        cold: with --loading: have the system forget the files before each reading.
        json_schema: measure answers kept to this schema beside free text, too.
        quality: measure how well the model predicts this text (its first 16,384 tokens), and
            nothing else.
        window: with --quality: tokens of each piece of the text that is scored on its own (2048).
        write_logprobs: with --quality: keep what was predicted in this file (.safetensors).
        against: with --quality: compare with what another run has kept so.
        plot: draw the figures (.svg, .png; needs matplotlib).
        json: one JSON object on stdout instead of tables.
    """

    batches: tuple[int, ...] | None = flag(None, **_SOME)
    contexts: tuple[int, ...] = flag((512, 8192, 32768), **_SOME)
    prompts: tuple[int, ...] = flag((128, 512, 2048, 8192), **_SOME)
    shard_of: int | None = flag(None, metavar="N", **_whole_from(2))
    peer: Literal["transformers", "safetensors"] | None = flag(
        None, expected="transformers or safetensors"
    )
    loading: bool = flag(False)
    cold: bool = flag(False)
    quality: Path | None = flag(None)
    window: int | None = flag(None, metavar="N", **_whole_from(2))
    write_logprobs: Path | None = flag(None)
    against: Path | None = flag(None)
    plot: str | None = flag(None, metavar="FILE")

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("window", "write_logprobs", "against"):
            if getattr(self, name) is not None and self.quality is None:
                raise UsageError(f"--{name} belongs to --quality")
        for name in ("loading", "peer", "plot", "json_schema", "shard_of"):
            if getattr(self, name) and self.quality is not None:
                raise UsageError(f"--{name} and --quality: expected one of them")
        if self.cold and not self.loading:
            raise UsageError("--cold belongs to --loading")
        if self.peer and self.loading != (self.peer == "safetensors"):
            raise UsageError(
                "--peer safetensors belongs to --loading, --peer transformers does not"
            )
        if self.loading and (self.plot or self.json_schema):
            name, why = ("plot", "draw") if self.plot else ("json_schema", "answer")
            raise UsageError(f"--loading and --{name}: there is nothing to {why}")


@dataclass(frozen=True, kw_only=True)
class BatchRequest(BatchSize, AnswersRequest):
    """Which lines to answer, and where to.

    Args:
        max_batch_size: sequences that decode together (8 on GPUs, 4 on CPU).
        retry_errors: run lines again that had an error, such as after IN was mended.
    """

    source: str
    target: str
    retry_errors: bool = flag(False)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.retry_errors and self.target == "-":
            raise UsageError(
                "--retry_errors and OUT is -: expected a file that an earlier run wrote"
            )
        if self.has_python:
            raise UsageError(
                f"--tools {self.tools}: batch runs no functions, it reports calls: expected a "
                f".json file of function schemas"
            )


def make(kind: type[R], model: str | None, given: dict[str, Any]) -> R:
    """A request about a model.

    Args:
        kind: of request.
        model: a folder, or a repository's name in the hub's cache.
        given: the flags that were given by name, and what fields are no flags. A preset that is
            one of them sets what they leave open.

    Raises:
        UsageError: a preset that cannot be read, a value out of its range, or flags that exclude
            each other.
        CheckpointError: no such repository in the cache.
    """
    preset, values = Preset(), dict[str, Any]()
    if "config" in given:
        preset, values = preset_values(given["config"], flags_of(ChatRequest))
    values |= given
    if model is None and values.get("load_format") != "dummy":
        raise UsageError("MODEL is missing: expected a model's folder, or the command demo")

    def flags(settings: type) -> dict[str, Any]:
        return {name: values[name] for name in flags_of(settings) if name in values}

    parts: dict[str, Any] = {
        "engine": EngineConfig(
            model=None if model is None else Path(model),
            shape=preset.shape or None,
            **flags(EngineConfig),
        )
    }
    if issubclass(kind, AnswersRequest):
        parts["sampling"] = SamplingParams(**flags(SamplingParams))
    own = {field.name: values[field.name] for field in fields(kind) if field.name in values}
    request = kind(**parts, **own)
    if model is not None:
        return replace(request, engine=replace(request.engine, model=place_of(model)))
    return request


def place_of(model: str) -> Path:
    """Where a MODEL lies: a folder, or a repository's in the hub's cache.

    Raises:
        CheckpointError: no such repository in the cache.
    """
    if "/" in model:
        from mistral_chat.cli.repository import is_repository

        if is_repository(model):
            return _cached(model)
    return Path(model)


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
