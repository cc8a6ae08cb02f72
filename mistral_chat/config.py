"""Settings of a run, from a TOML preset and flags: frozen, and checked on creation.

Knows nothing of how flags are written, of torch, or of the machine.
"""

from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

from mistral_chat.errors import UsageError, shown
from mistral_chat.files import read_toml

__all__ = ["EngineConfig", "Preset", "SamplingParams", "read_preset"]

Device = Literal["auto", "cuda", "cpu"]
Dtype = Literal["auto", "bfloat16", "float16", "float32"]
LoadFormat = Literal["auto", "consolidated", "hf", "dummy"]

DEVICES = ("auto", "cuda", "cpu")
DTYPES = ("auto", "bfloat16", "float16", "float32")
LOAD_FORMATS = ("auto", "consolidated", "hf", "dummy")
COMPLETION_MAX_TOKENS = 256
HOTTEST = 1e30  # logits are divided in float32, where a banned token's over infinity is NaN


def _require(ok: bool, name: str, value: object, expected: str) -> None:
    if not ok:
        raise UsageError(f"--{name} is {shown(value)}: expected {expected}")


@dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """How to choose the tokens of an answer.

    Args:
        max_tokens: most tokens of the answer; None continues until the context is full.
        temperature: divides the logits; 0 takes the most likely token; at most 1e30.
        top_p: keep the smallest set of most likely tokens whose probability reaches this.
        top_k: keep this many most likely tokens; 0 keeps all.
        min_p: drop tokens less likely than this times the most likely one; 0 keeps all.
        seed: the same seed and number of ranks give the same answer; None draws a random one.
        stop: texts that end the answer; it stops before them.
        logprobs: how many of the most likely tokens to report per token; 0 reports only the chosen
            one, None nothing.
        prompt_logprobs: whether to report the log-probability of every prompt token after the
            first.
        ignore_eos: whether to continue after the end token (for measuring).

    Raises:
        UsageError: a value is out of range; it is named.
    """

    max_tokens: int | None = None
    temperature: float = 0.7
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    seed: int | None = None
    stop: tuple[str, ...] = ()
    logprobs: int | None = None
    prompt_logprobs: bool = False
    ignore_eos: bool = False

    def __post_init__(self) -> None:
        if isinstance(self.stop, str):
            object.__setattr__(self, "stop", (self.stop,))
        else:
            object.__setattr__(self, "stop", tuple(self.stop))
        _require(
            self.max_tokens is None or self.max_tokens >= 1,
            "max_tokens", self.max_tokens, "a whole number of at least 1",
        )  # fmt: skip
        _require(
            0 <= self.temperature <= HOTTEST,
            "temperature", self.temperature, f"a number from 0 (greedy) to {HOTTEST:.0e}",
        )  # fmt: skip
        _require(0 < self.top_p <= 1, "top_p", self.top_p, "a number above 0 and at most 1")
        _require(self.top_k >= 0, "top_k", self.top_k, "a whole number of at least 0 (0 is off)")
        _require(0 <= self.min_p <= 1, "min_p", self.min_p, "a number from 0 to 1 (0 is off)")
        _require(
            self.seed is None or 0 <= self.seed < 2**63,
            "seed", self.seed, "a whole number from 0 to 2^63 - 1",
        )  # fmt: skip
        _require(all(self.stop), "stop", "", "a text that is not empty")
        _require(
            self.logprobs is None or 0 <= self.logprobs <= 1000,
            "logprobs", self.logprobs, "a whole number from 0 to 1000",
        )  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class EngineConfig:
    """Where and how a model runs; the same for every rank.

    Args:
        model: the model's folder; None with `load_format="dummy"` and a shape.
        device: where it runs; auto is cuda if there is a GPU, else cpu.
        dtype: of weights and cache; auto is bfloat16 on GPUs that support it, float16 on others,
            float32 on CPU.
        max_seq_len: context to plan memory for, in tokens; None is what fits, at most the model's.
        max_batch_size: how many sequences the cache holds at once.
        chunk_size: most new tokens per forward pass; None is 2048 on GPUs and 256 on CPU, each
            about half a second, so that Ctrl-C takes effect.
        load_format: where weights come from; `dummy` makes random ones of the model's shape.
        shape: keys of params.json, for dummy weights without a folder.
        seed: seed of dummy weights.
    """

    model: Path | None
    device: Device = "auto"
    dtype: Dtype = "auto"
    max_seq_len: int | None = None
    max_batch_size: int = 1
    chunk_size: int | None = None
    load_format: LoadFormat = "auto"
    shape: dict[str, Any] | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        _require(self.device in DEVICES, "device", self.device, f"one of {', '.join(DEVICES)}")
        _require(self.dtype in DTYPES, "dtype", self.dtype, f"one of {', '.join(DTYPES)}")
        _require(
            self.load_format in LOAD_FORMATS,
            "load_format", self.load_format, f"one of {', '.join(LOAD_FORMATS)}",
        )  # fmt: skip
        _require(
            self.max_seq_len is None or self.max_seq_len >= 2,
            "max_seq_len", self.max_seq_len, "a whole number of at least 2",
        )  # fmt: skip
        _require(
            self.max_batch_size >= 1,
            "max_batch_size", self.max_batch_size, "a whole number of at least 1",
        )  # fmt: skip
        _require(
            self.chunk_size is None or self.chunk_size >= 1,
            "chunk_size", self.chunk_size, "a whole number of at least 1",
        )  # fmt: skip
        if self.model is None and (self.load_format != "dummy" or self.shape is None):
            raise UsageError(
                "no MODEL: expected a model folder, or --load_format dummy with a --config "
                "that has a [model] table"
            )

    def require_positions(self, known: int | None) -> None:
        """Refuse a context longer than the model's; None if that is unknown.

        Raises:
            UsageError: it is longer.
        """
        if self.max_seq_len and known and self.max_seq_len > known:
            raise UsageError(f"--max_seq_len {self.max_seq_len}: the model knows {known} positions")


@dataclass(frozen=True, kw_only=True)
class Preset:
    """The tables of a TOML preset.

    Args:
        shape: table [model]: keys of params.json, for dummy weights.
        run: table [run]: flags that say where and how to run.
        generation: table [generation]: sampling flags.
    """

    shape: dict[str, Any] = field(default_factory=dict)
    run: dict[str, Any] = field(default_factory=dict)
    generation: dict[str, Any] = field(default_factory=dict)


def read_preset(path: Path) -> Preset:
    """Read a TOML preset.

    Raises:
        UsageError: no such file, not TOML, or an unknown table.
    """
    try:
        tables = read_toml(path, UsageError, pipes=True)
    except UsageError as error:
        raise UsageError(f"--config {error}") from error
    names = {"model": "shape", "run": "run", "generation": "generation"}
    assert set(names.values()) == {f.name for f in fields(Preset)}
    for name, table in tables.items():
        if name not in names or not isinstance(table, dict):
            raise UsageError(
                f"--config {path}: found {shown(name)}, expected the tables [model], [run], "
                f"[generation]"
            )
    return Preset(**{names[name]: table for name, table in tables.items()})
