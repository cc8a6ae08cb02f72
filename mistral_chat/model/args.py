"""The shape of a model, read from Mistral's params.json or Hugging Face's config.json.

Knows which keys exist and what they mean; knows nothing of files of weights or of ranks.
"""

import json
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from mistral_chat.config import EngineConfig, LoadFormat
from mistral_chat.errors import CheckpointError
from mistral_chat.model import hf

__all__ = ["TransformerArgs", "args_of", "read_args"]

DEFAULT_ROPE_THETA = 1e6
# A folder that says nothing about its context: what Mistral's dense models have at least had
# since 7B v0.2. --max_seq_len may go beyond it, since nothing says that the model does not.
DEFAULT_MAX_SEQ_LEN = 32_768

_UNSUPPORTED = ("moe", "lora", "vision_encoder", "quantization", "yarn", "llama_4_scaling")
_IGNORED = ("use_biases", "causal", "ragged_attention")  # only refused when they ask for something


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
        rope_theta: base of the rotary embedding; None is 1e6.
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
        for name in ("dim", "n_layers", "head_dim", "hidden_dim", "n_heads", "n_kv_heads",
                     "vocab_size"):  # fmt: skip
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise CheckpointError(f"{name} is {value!r}: expected a whole number of at least 1")
        for name in ("norm_eps", "rope_theta"):
            value = getattr(self, name)
            is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
            if value is not None and not (is_number and value > 0):
                raise CheckpointError(f"{name} is {value!r}: expected a number above 0")
        if not isinstance(self.tied_embeddings, bool):
            raise CheckpointError(
                f"tied_embeddings is {self.tied_embeddings!r}: expected true or false"
            )
        if self.model_type != "transformer":
            raise CheckpointError(
                f"model_type {self.model_type!r} is not supported: expected 'transformer'"
            )
        if self.n_heads % self.n_kv_heads:
            raise CheckpointError(
                f"n_heads is {self.n_heads}: expected a multiple of n_kv_heads ({self.n_kv_heads})"
            )
        if self.head_dim % 2:
            raise CheckpointError(
                f"head_dim is {self.head_dim}: expected an even number (RoPE turns pairs)"
            )
        if self.max_seq_len is not None and (
            not isinstance(self.max_seq_len, int) or self.max_seq_len < 2
        ):
            raise CheckpointError(
                f"max_seq_len is {self.max_seq_len!r}: expected a whole number of at least 2"
            )
        windows = self.sliding_window
        for window in windows if isinstance(windows, list) else [windows]:
            if window is not None and (
                not isinstance(window, int) or isinstance(window, bool) or window < 1
            ):
                raise CheckpointError(
                    f"sliding_window holds {window!r}: expected whole numbers of at least 1 or null"
                )
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
        params = dict(params)
        if params.get("model_type", "transformer") != "transformer":
            raise CheckpointError(
                f"{params['model_type']} is not supported: expected a dense transformer"
            )
        for name in _UNSUPPORTED:
            if params.pop(name, None) is not None:
                raise CheckpointError(f"{name} is not supported: expected a dense text model")
        for name in _IGNORED:
            value = params.pop(name, None)
            if value not in (None, name == "causal"):
                raise CheckpointError(f"{name} = {value!r} is not supported")
        alias = params.pop("_sliding_window", None)
        if alias is not None:
            if params.get("sliding_window") not in (None, alias):
                raise CheckpointError(
                    "sliding_window and _sliding_window disagree: expected one of them"
                )
            params["sliding_window"] = alias
        positions = params.pop("max_position_embeddings", None)
        if params.get("max_seq_len") is None:
            params["max_seq_len"] = positions
        known = {f.name: f for f in fields(cls)}
        unknown = sorted(set(params) - set(known))
        if unknown:
            raise CheckpointError(f"{', '.join(unknown)} is not supported: not a key we know")
        required = ("dim", "n_layers", "head_dim", "hidden_dim", "n_heads", "n_kv_heads",
                    "norm_eps", "vocab_size")  # fmt: skip
        missing = [name for name in required if params.get(name) is None]
        if missing:
            raise CheckpointError(f"{', '.join(missing)} is missing")
        return cls(**params)


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

    Where both are there they must agree on every size that both give. The context length is
    taken from params.json, else from a config.json beside it.

    Args:
        folder: of the model.
        load_format: which layout; auto and dummy choose as `hf.choose_layout` says.

    Raises:
        CheckpointError: no folder, no such file, not JSON, a key or value not supported, or two
            files that disagree.
    """
    expected = "params.json or config.json"
    if not folder.exists():
        raise CheckpointError(f"{folder}: no such folder; expected a model folder with {expected}")
    if not folder.is_dir():
        raise CheckpointError(f"{folder} is a file; expected the folder that holds {expected}")
    found = {
        path.name: read_json_object(path)
        for path in (folder / "params.json", folder / "config.json")
        if path.exists()
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
    return args


def _from_params(path: Path, found: dict[str, dict[str, Any]]) -> TransformerArgs:
    try:
        args = TransformerArgs.from_dict(found["params.json"])
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error}") from error
    positions = found.get("config.json", {}).get("max_position_embeddings")
    if args.max_seq_len is None and isinstance(positions, int) and positions >= 2:
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
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror})") from error
    except ValueError as error:  # JSON and UTF-8 errors both are ValueErrors
        raise CheckpointError(f"{path}: not valid JSON ({error})") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path}: found a {type(value).__name__}, expected a JSON object")
    return value
