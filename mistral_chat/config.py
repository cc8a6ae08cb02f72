"""Settings of sampling and of the engine, declared once: frozen, and checked when they are made.

A field made with `flag` is a flag of every command that takes these settings, a key of presets and
a name for `/set`; its line in the docstring is the flag's help. This file does not know how flags
are written, torch, or what a machine offers.
"""

from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args

from mistral_chat.errors import UsageError, shown
from mistral_chat.files import read_toml

__all__ = [
    "EngineConfig",
    "Preset",
    "SamplingParams",
    "WeightsConfig",
    "flag",
    "read_preset",
]

Device = Literal["auto", "cuda", "cpu"]
Dtype = Literal["auto", "bfloat16", "float16", "float32"]
KVCacheDtype = Literal["auto", "fp8"]
LoadFormat = Literal["auto", "consolidated", "hf", "dummy"]
AskedQuantization = Literal["auto", "none", "fp8", "int8", "int4"]

COMPLETION_MAX_TOKENS = 256
HOTTEST = 1e30  # logits are divided in float32, where a banned token's over infinity is NaN


T = TypeVar("T")


def flag(default: T, **about: Any) -> T:
    """A dataclass field that a flag of the same name sets.

    Args:
        default: what the field is where the flag is not given.
        **about: more of the flag, by the names of the fields of `cli.command_line.Flag`.
    """
    return field(default=default, metadata={"flag": about})


def _require(ok: bool, name: str, value: object, expected: str) -> None:
    if not ok:
        raise UsageError(f"--{name} is {shown(value)}: expected {expected}")


@dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """How to choose the tokens of an answer.

    What None stands for is in parentheses; `logprobs=0` reports the chosen token alone.

    Args:
        max_tokens: most tokens of one answer (chat: until the context is full; plain: 256).
        temperature: divides the logits; 0 takes the most likely token.
        top_p: keep the most likely tokens up to this probability.
        top_k: keep this many most likely tokens; 0 keeps all.
        min_p: drop tokens less likely than this times the best; 0 drops none.
        seed: same seed, same ranks, same answer (random).
        stop: text that ends the answer, which stops before it.
        logprobs: with --json: the N most likely tokens at each place (none).
        prompt_logprobs: report the log-probability of every prompt token after the first.
        ignore_eos: go on after the end token (for measuring).

    Raises:
        UsageError: a value is out of range; it is named.
    """

    max_tokens: int | None = flag(None, table="generation")
    temperature: float = flag(0.7, table="generation")
    top_p: float = flag(1.0, table="generation")
    top_k: int = flag(0, table="generation")
    min_p: float = flag(0.0, table="generation")
    seed: int | None = flag(None, table="generation")
    stop: tuple[str, ...] = flag((), table="generation")
    logprobs: int | None = flag(None)
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
class WeightsConfig:
    """Where a model's weights go, and as which numbers.

    Args:
        device: where it runs; auto is cuda where there is one.
        quantization: of the layers' matrices; auto is as stored, any other one quantizes a
            checkpoint of floats while it loads.
    """

    device: Device = flag("auto", table="run")
    quantization: AskedQuantization = flag("auto", table="run")


@dataclass(frozen=True, kw_only=True)
class EngineConfig(WeightsConfig):
    """Where and how a model runs; the same for every rank.

    Args:
        model: the model's folder; None with `load_format="dummy"` and a shape.
        dtype: of weights and cache; auto is bfloat16 or float16 on GPUs, float32 on CPU.
        kv_cache_dtype: of keys and values; fp8 has room for about twice the context (auto: as
            weights are computed).
        max_seq_len: context to plan memory for, in tokens (what fits, at most the model's).
        max_batch_size: sequences that the cache holds at once.
        chunk_size: most new tokens of one forward pass; None is 2048 on GPUs and 256 on CPU,
            about half a second of either, so that Ctrl-C is heard.
        load_format: layout of the weights; dummy makes random ones of the model's shape.
        shape: params.json's keys, for dummy weights without a folder.
        seed: of dummy weights.
    """

    model: Path | None
    dtype: Dtype = flag("auto", table="run")
    kv_cache_dtype: KVCacheDtype = flag("auto", table="run")
    max_seq_len: int | None = flag(None, table="run")
    max_batch_size: int = 1
    chunk_size: int | None = None
    load_format: LoadFormat = flag("auto", table="run")
    shape: dict[str, Any] | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        kinds = {
            "device": Device,
            "dtype": Dtype,
            "load_format": LoadFormat,
            "quantization": AskedQuantization,
            "kv_cache_dtype": KVCacheDtype,
        }
        for name, kind in kinds.items():
            value, choices = getattr(self, name), get_args(kind)
            _require(value in choices, name, value, f"one of {', '.join(choices)}")
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
