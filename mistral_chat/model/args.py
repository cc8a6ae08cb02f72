"""The shape of a model, in the keys of Mistral's params.json.

Knows which keys exist and what they mean; knows nothing of files or ranks.
"""

import re
from collections.abc import Callable
from dataclasses import MISSING, dataclass, fields, is_dataclass
from typing import Any

from mistral_chat.errors import CheckpointError, named, shown
from mistral_chat.model import hf, quantization
from mistral_chat.model.quantization import Quantization
from mistral_chat.model.rope import QueryScaling, Yarn
from mistral_chat.model.values import (
    MOST_POSITIONS,
    require_flag,
    require_number,
    require_whole,
)

__all__ = ["TransformerArgs"]

# The context where a folder does not say it: at least what Mistral's dense models have had since
# 7B v0.2. --max_seq_len may go beyond it, since the model may know more.
DEFAULT_MAX_SEQ_LEN = 32_768

# Far above every dense model, and low enough that tables of layers are made at once.
_MOST = {
    "dim": 1 << 20,
    "n_layers": 1000,
    "head_dim": 1 << 14,
    "hidden_dim": 1 << 22,
    "n_heads": 1 << 14,
    "n_kv_heads": 1 << 14,
    "vocab_size": 1 << 22,
}
_RANGES = {"norm_eps": (1e-30, 1.0), "rope_theta": (1.0, 1e15)}  # safe in float32

# Keys of models that are no dense transformers, and what those are.
_OTHERS = {
    "moe": "a mixture of experts",
    **dict.fromkeys(
        ("q_lora_rank", "kv_lora_rank", "qk_rope_head_dim", "qk_nope_head_dim", "v_head_dim"),
        "multi-head latent attention (MLA)",
    ),
}
_DIGITS = re.compile(r"[0-9]{1,12}")
_IGNORED = ("use_biases", "causal", "ragged_attention")  # refused only if they ask for a change
# What mistral-finetune writes about its training. Tensors tell whether adapters are merged.
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
        rope_theta: base of the rotary embedding; None is 1e6, or 1e4 with a sliding window (as
            in Mistral's models before 7B v0.2 and in mistral-inference).
        sliding_window: number of tokens, itself included, that a token attends to; None is all. A
            list has one entry a layer and is repeated where it is shorter.
        tied_embeddings: the output matrix is the embedding.
        max_seq_len: positions that the model was trained for; None if the folder does not say.
        model_type: must be "transformer".
        yarn: how the context was made longer; None is not at all.
        llama_4_scaling: how queries grow with their position; None is not at all.
        quantization: how the matrices of the layers are stored; None is as floats.
        vision_encoder: the folder also holds an encoder of pictures, which is not run.

    Raises:
        CheckpointError: names a value that no model can have.
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
    yarn: Yarn | None = None
    llama_4_scaling: QueryScaling | None = None
    quantization: Quantization | None = None
    vision_encoder: bool = False

    def __post_init__(self) -> None:
        for name, most in _MOST.items():
            require_whole(name, getattr(self, name), 1, most)
        for name, bounds in _RANGES.items():
            if name != "rope_theta" or self.rope_theta is not None:
                require_number(name, getattr(self, name), *bounds)
        require_flag("tied_embeddings", self.tied_embeddings)
        if self.yarn is not None and self.theta == 1:
            raise CheckpointError("rope_theta is 1: expected more, since yarn slows down rotations")
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
            require_whole("max_seq_len", self.max_seq_len, 2, MOST_POSITIONS)
        windows = self.sliding_window
        for window in windows if isinstance(windows, list) else [windows]:
            if window is not None:
                require_whole("sliding_window", window, 1, 1 << 30)
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
        """Base of the rotary embedding; a default where the folder does not say it."""
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
        """Read the keys of params.json; every key is either honoured or refused by name.

        Raises:
            CheckpointError: names a missing, unknown or unsupported key.
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
        for name, kind_of_it in _OTHERS.items():
            value = params.pop(name, None)
            if value and not (isinstance(value, dict) and value.get("enable") is False):
                raise CheckpointError(
                    f"{name}: {kind_of_it} is not supported; expected a dense transformer"
                )
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
        if "sliding_window" in params:
            params["sliding_window"] = _windows(params["sliding_window"])
        n_layers = params.get("n_layers")
        readers: dict[str, Callable[[object], object]] = {
            "yarn": Yarn.from_params,
            "llama_4_scaling": QueryScaling.from_params,
            "quantization": quantization.from_params,
            "quantization_config": lambda table: quantization.from_config(table, n_layers),
        }
        for name, read in readers.items():
            if name in params and not is_dataclass(params[name]):
                params[name] = read(params[name])
        vision = params.pop("vision_encoder", False)
        if not isinstance(vision, (bool, dict)):
            raise CheckpointError(f"vision_encoder is {shown(vision)}: expected an object")
        is_off = isinstance(vision, dict) and vision.get("enable") is False
        params["vision_encoder"] = bool(vision) and not is_off
        if "quantization_config" in params:
            if "quantization" in params:
                raise CheckpointError("quantization and quantization_config: expected one of them")
            params["quantization"] = params.pop("quantization_config")
        unknown = sorted(set(params) - {f.name for f in fields(cls)})
        if unknown:
            names = ", ".join(map(named, unknown[:8]))
            raise CheckpointError(f"{names} is not supported: not a key we know")
        required = [f.name for f in fields(cls) if f.default is MISSING]
        missing = [name for name in required if params.get(name) is None]
        if missing:
            raise CheckpointError(f"{', '.join(missing)} is missing")
        return cls(**params)


def _windows(value: object) -> Any:
    """A sliding window, or a list of them: numbers in quotes too, and "null" for presets (TOML)."""
    if isinstance(value, list):
        return [_windows(window) for window in value]
    if value == "null":
        return None
    return int(value) if isinstance(value, str) and _DIGITS.fullmatch(value) else value
