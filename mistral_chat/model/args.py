"""The shape of a model, read from Mistral's params.json or Hugging Face's config.json.

Knows which keys exist and what they mean; knows nothing of files of weights or of ranks.
"""

import errno
import os
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from mistral_chat.config import EngineConfig, LoadFormat
from mistral_chat.errors import CheckpointError, named, shown
from mistral_chat.files import is_there, read_json
from mistral_chat.model import hf
from mistral_chat.model.end_ids import read_end_ids

__all__ = ["TransformerArgs", "args_of", "read_args"]

# A folder that says nothing about its context: what Mistral's dense models have at least had
# since 7B v0.2. --max_seq_len may go beyond it, since nothing says that the model does not.
DEFAULT_MAX_SEQ_LEN = 32_768

# Far above any dense model there is, and so low that tables of them are made in no time.
_MOST = {
    "dim": 1 << 20,
    "n_layers": 1000,
    "head_dim": 1 << 14,
    "hidden_dim": 1 << 22,
    "n_heads": 1 << 14,
    "n_kv_heads": 1 << 14,
    "vocab_size": 1 << 22,
}
MOST_POSITIONS = 1 << 24  # float32 holds every whole number up to here, as angles need them
_RANGES = {"norm_eps": (1e-30, 1.0), "rope_theta": (1.0, 1e15)}  # float32 computes with them

_UNSUPPORTED = ("moe", "vision_encoder", "quantization", "yarn", "llama_4_scaling")
_IGNORED = ("use_biases", "causal", "ragged_attention")  # only refused when they ask for something
# What mistral-finetune writes of its training. Whether the adapters are merged, tensors tell.
_LORA = {"enable", "rank", "dropout", "scaling"}


@dataclass(frozen=True, kw_only=True)
class TransformerArgs:
    """Shape of a dense Mistral transformer; names and order are mistral-inference's.

    Args:
        dim: width of the residual stream.
        n_layers: number of blocks.
        head_dim: width of one head; need not be dim / n_heads.
        hidden_dim: width of the feed-forward layer.
        n_heads: query heads.
        n_kv_heads: key and value heads; divides n_heads.
        norm_eps: epsilon of RMSNorm.
        vocab_size: rows of the embedding.
        max_batch_size: most sequences that `generate` runs at once.
        rope_theta: base of the rotary embedding; None is 1e6, or 1e4 with a sliding window: what
            Mistral's models before 7B v0.2 had, and mistral-inference takes.
        sliding_window: how many tokens back, itself included, a token attends; None is all, a
            list is one entry a layer, repeated over the layers where it is shorter.
        tied_embeddings: the output matrix is the embedding.
        max_seq_len: positions that the model was trained for; None when the folder does not say.
        model_type: must be "transformer".

    Raises:
        CheckpointError: a value that no model can have, named.
    """

    dim: int
    n_layers: int
    head_dim: int
    hidden_dim: int
    n_heads: int
    n_kv_heads: int
    norm_eps: float
    vocab_size: int
    max_batch_size: int = 0
    rope_theta: float | None = None
    sliding_window: int | list[int | None] | None = None
    tied_embeddings: bool = False
    max_seq_len: int | None = None
    model_type: str = "transformer"

    def __post_init__(self) -> None:
        for name, most in _MOST.items():
            _check_whole(name, getattr(self, name), 1, most)
        for name, (least, most_of_it) in _RANGES.items():
            value = getattr(self, name)
            is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
            if not (value is None and name == "rope_theta") and not (
                is_number and least <= value <= most_of_it
            ):
                raise CheckpointError(
                    f"{name} is {shown(value)}: expected a number from {least:g} to {most_of_it:g}"
                )
        if not isinstance(self.tied_embeddings, bool):
            raise CheckpointError(
                f"tied_embeddings is {shown(self.tied_embeddings)}: expected true or false"
            )
        if self.model_type != "transformer":
            raise CheckpointError(
                f"model_type {shown(self.model_type)} is not supported: expected 'transformer'"
            )
        if self.n_heads % self.n_kv_heads:
            raise CheckpointError(
                f"n_heads is {self.n_heads}: expected a multiple of n_kv_heads ({self.n_kv_heads})"
            )
        if self.head_dim % 2:
            raise CheckpointError(
                f"head_dim is {self.head_dim}: expected an even number (RoPE rotates pairs)"
            )
        if self.max_seq_len is not None:
            _check_whole("max_seq_len", self.max_seq_len, 2, MOST_POSITIONS)
        windows = self.sliding_window
        for window in windows if isinstance(windows, list) else [windows]:
            if window is not None:
                _check_whole("sliding_window", window, 1, 1 << 30)
        if isinstance(windows, list) and (not windows or self.n_layers % len(windows)):
            raise CheckpointError(
                f"sliding_window lists {len(windows)} layers: expected a number that divides "
                f"n_layers ({self.n_layers})"
            )

    @property
    def window_by_layer(self) -> tuple[int | None, ...]:
        """Sliding window of each layer, `n_layers` entries; None attends to everything."""
        if isinstance(self.sliding_window, list):
            repeats = self.n_layers // len(self.sliding_window)
            return tuple(self.sliding_window) * repeats
        return (self.sliding_window,) * self.n_layers

    @property
    def theta(self) -> float:
        """Base of the rotary embedding, also where the folder does not say it."""
        return self.rope_theta or hf.default_theta(self.sliding_window)

    @property
    def n_params(self) -> int:
        """Number of weights, tied ones counted once."""
        attention = self.dim * self.head_dim * (2 * self.n_heads + 2 * self.n_kv_heads)
        block = attention + 3 * self.dim * self.hidden_dim + 2 * self.dim
        embeddings = self.vocab_size * self.dim * (1 if self.tied_embeddings else 2)
        return self.n_layers * block + embeddings + self.dim

    @classmethod
    def from_dict(cls, params: dict[str, Any]) -> "TransformerArgs":
        """Read params.json's keys; every key is honoured or refused by name.

        Raises:
            CheckpointError: a missing, unknown or unsupported key, named.
        """
        params = {name: value for name, value in params.items() if value is not None}
        kind = params.get("model_type", "transformer")
        if kind != "transformer":
            raise CheckpointError(f"{shown(kind)} is not supported: expected a dense transformer")
        lora = params.pop("lora", {})
        if not isinstance(lora, dict) or lora.keys() - _LORA:
            raise CheckpointError(
                f"lora is not supported as {shown(lora)}: expected a merged model"
            )
        for name in _UNSUPPORTED:
            value = params.pop(name, None)
            if value and not (isinstance(value, dict) and value.get("enable") is False):
                raise CheckpointError(f"{name} is not supported: expected a dense text model")
        for name in _IGNORED:
            value = params.pop(name, None)
            if value not in (None, name == "causal"):
                raise CheckpointError(f"{name} = {shown(value)} is not supported")
        alias = params.pop("_sliding_window", None)
        if alias is not None:
            if params.get("sliding_window") not in (None, alias):
                raise CheckpointError(
                    "sliding_window and _sliding_window disagree: expected one of them"
                )
            params["sliding_window"] = alias
        positions = params.pop("max_position_embeddings", None)
        params.setdefault("max_seq_len", positions)
        known = {f.name: f for f in fields(cls)}
        unknown = sorted(set(params) - set(known))
        if unknown:
            names = ", ".join(map(named, unknown[:8]))
            raise CheckpointError(f"{names} is not supported: not a key we know")
        required = ("dim", "n_layers", "head_dim", "hidden_dim", "n_heads", "n_kv_heads",
                    "norm_eps", "vocab_size")  # fmt: skip
        missing = [name for name in required if params.get(name) is None]
        if missing:
            raise CheckpointError(f"{', '.join(missing)} is missing")
        return cls(**params)


def _check_whole(name: str, value: object, least: int, most: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or not least <= value <= most:
        raise CheckpointError(
            f"{name} is {shown(value)}: expected a whole number of at least {least} and at most "
            f"{most:,}"
        )


def args_of(config: EngineConfig) -> TransformerArgs:
    """The shape of what is to be loaded: its folder's or, for dummy weights, a preset's.

    Raises:
        CheckpointError: as `read_args`, or a preset's table that is no shape.
    """
    if config.model is not None:
        return read_args(config.model, config.load_format)
    assert config.shape is not None
    try:
        return TransformerArgs.from_dict(config.shape)
    except CheckpointError as error:
        raise CheckpointError(f"--config, table [model]: {error}") from error


def read_args(folder: Path, load_format: LoadFormat = "auto") -> TransformerArgs:
    """Read a model folder's shape: `params.json`, or `config.json` in Hugging Face's layout.

    Where both are there they must agree on all that both say. The context length is taken from
    params.json, else from a config.json beside it.

    Args:
        folder: of the model.
        load_format: which layout; auto and dummy choose as `hf.choose_layout` says.

    Raises:
        CheckpointError: no folder that can be listed, no such file, not JSON, a key or value not
            supported, an end token that is none, or two files that disagree.
    """
    _check_folder(folder)
    found = {
        path.name: read_json_object(path)
        for path in (folder / "params.json", folder / "config.json")
        if is_there(path)
    }
    layout = hf.choose_layout(folder, load_format)
    path = folder / ("params.json" if layout == "consolidated" else "config.json")
    if path.name not in found:
        raise CheckpointError(
            f"{folder}: {path.name} is missing (found {', '.join(found) or 'none'}); expected "
            f"a folder in Mistral's format (params.json, consolidated safetensors, tokenizer) or "
            f"Hugging Face's (config.json, model safetensors, tokenizer)"
        )
    args = _from_params(path, found) if layout == "consolidated" else _from_config(path, found)
    if len(found) == 2 and (faults := hf.disagreements(found["params.json"], found["config.json"])):
        raise CheckpointError(
            f"{folder}: {'; '.join(faults)}; expected one shape: remove the file that is not "
            f"this model's"
        )
    read_end_ids(folder, args.vocab_size)
    return args


def _check_folder(folder: Path) -> None:
    """Refuse what is no folder whose files can be seen."""
    expected = "params.json or config.json"
    try:
        with os.scandir(folder) as entries:
            next(entries, None)
        if not os.access(folder, os.X_OK):  # a right that listing does not need
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
    except NotADirectoryError:
        wrong = f"is a file; expected the folder that holds {expected}"
    except FileNotFoundError:
        raise CheckpointError(
            f"{folder}: no such folder; expected a model folder with {expected}"
        ) from None
    except (OSError, ValueError) as error:  # ValueError: a NUL byte in the name
        reason = error.strerror if isinstance(error, OSError) else str(error)
        wrong = f"cannot be read ({reason}); expected a model folder with {expected}"
    else:
        return
    raise CheckpointError(f"{folder} {wrong}")


def _from_params(path: Path, found: dict[str, dict[str, Any]]) -> TransformerArgs:
    try:
        args = TransformerArgs.from_dict(found["params.json"])
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error}") from error
    positions = found.get("config.json", {}).get("max_position_embeddings")
    if args.max_seq_len is None and type(positions) is int and 2 <= positions <= MOST_POSITIONS:
        args = replace(args, max_seq_len=positions)
    return args


def _from_config(path: Path, found: dict[str, dict[str, Any]]) -> TransformerArgs:
    params = hf.to_params(path, found["config.json"])
    try:
        return TransformerArgs.from_dict(params)
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {hf.in_config_words(str(error))}") from error


def read_json_object(path: Path) -> dict[str, Any]:
    """Read a JSON file that holds one object.

    Raises:
        CheckpointError: unreadable, not UTF-8, not JSON, or not an object.
    """
    value = read_json(path, CheckpointError)
    if not isinstance(value, dict):
        raise CheckpointError(f"{path}: found a {type(value).__name__}, expected a JSON object")
    return value
