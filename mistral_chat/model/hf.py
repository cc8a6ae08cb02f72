"""Hugging Face's layout of a Mistral model in Mistral's terms: config.json and tensor names.

Translates; reads no files and knows no ranks. A key that config.json leaves out has the meaning it
has in transformers' MistralConfig (transformers 5, `models/mistral/configuration_mistral.py`).
"""

import re
from pathlib import Path
from typing import Any, Literal

from mistral_chat.errors import CheckpointError, named, shown

__all__ = [
    "Layout",
    "default_theta",
    "disagreements",
    "in_config_words",
    "is_unused",
    "stored_name",
    "to_params",
]

Layout = Literal["consolidated", "hf"]
SHAPE_FILES: dict[Layout, str] = {"consolidated": "params.json", "hf": "config.json"}

ARCHITECTURE = "MistralForCausalLM"
DEFAULT_SLIDING_WINDOW = 4096  # MistralConfig's, for a config.json without the key

_SIZES = {
    "dim": "hidden_size",
    "n_layers": "num_hidden_layers",
    "head_dim": "head_dim",
    "hidden_dim": "intermediate_size",
    "n_heads": "num_attention_heads",
    "n_kv_heads": "num_key_value_heads",
    "vocab_size": "vocab_size",
}
_KEYS = _SIZES | {
    "norm_eps": "rms_norm_eps",
    "tied_embeddings": "tie_word_embeddings",
    "max_seq_len": "max_position_embeddings",
}
# What a dense Mistral model computes anyway; any other value asks for another model.
_ONLY: dict[str, tuple[object, ...]] = {
    "hidden_act": (None, "silu"),
    "attention_bias": (None, False),
    "mlp_bias": (None, False),
    "partial_rotary_factor": (None, 1),
}
_ROPE_TABLES = ("rope_parameters", "rope_scaling")  # of transformers 5 and of those before it

_OUTER = {
    "tok_embeddings": "model.embed_tokens",
    "norm": "model.norm",
    "output": "lm_head",
}
_IN_LAYER = {
    "attention_norm": "input_layernorm",
    "attention.wq": "self_attn.q_proj",
    "attention.wk": "self_attn.k_proj",
    "attention.wv": "self_attn.v_proj",
    "attention.wo": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "feed_forward.w1": "mlp.gate_proj",
    "feed_forward.w2": "mlp.down_proj",
    "feed_forward.w3": "mlp.up_proj",
}


def to_params(path: Path, config: dict[str, Any]) -> dict[str, Any]:
    """A config.json in the keys of params.json.

    Args:
        path: of config.json, for errors.
        config: its content.

    Returns:
        unchecked values by params.json's keys; None for a required key that config.json lacks.

    Raises:
        CheckpointError: names another architecture, or a value that asks for one.
    """
    kinds = config.get("architectures")
    if not (isinstance(kinds, list) and kinds and all(isinstance(kind, str) for kind in kinds)):
        raise CheckpointError(f"{path}: architectures is {shown(kinds)}: expected {[ARCHITECTURE]}")
    if kinds != [ARCHITECTURE]:
        names = ", ".join(map(named, kinds[:4]))
        raise CheckpointError(f"{path} says {names}: expected {ARCHITECTURE}")
    if config.get("quantization_config") is not None:
        raise CheckpointError(
            f"{path}: quantization_config is not supported: expected weights that are floats"
        )
    for key, values in _ONLY.items():
        if config.get(key) not in values:
            raise CheckpointError(
                f"{path}: {key} {shown(config[key])} is not supported: expected {values[-1]!r}"
            )
    window = config.get("sliding_window", DEFAULT_SLIDING_WINDOW)
    if isinstance(window, list):
        raise CheckpointError(
            f"{path}: sliding_window is {shown(window)}: expected one number or null"
        )
    params = {ours: config.get(theirs) for ours, theirs in _KEYS.items()}
    if params["head_dim"] is None:
        params["head_dim"] = _derive_head_dim(path, params["dim"], params["n_heads"])
    if params["tied_embeddings"] is None:
        params["tied_embeddings"] = False
    return params | {"sliding_window": window, "rope_theta": _rope_theta(path, config)}


def _derive_head_dim(path: Path, dim: object, n_heads: object) -> int:
    if type(dim) is not int or type(n_heads) is not int or min(dim, n_heads) < 1:
        return 2  # any: what it would follow from is refused by name
    if dim % n_heads:
        raise CheckpointError(
            f"{path}: head_dim is missing and hidden_size ({dim}) is no multiple of "
            f"num_attention_heads ({n_heads})"
        )
    return dim // n_heads


def _rope_theta(path: Path, config: dict[str, Any]) -> object:
    found = {"": config.get("rope_theta")}
    for name in _ROPE_TABLES:
        table = config.get(name)
        if table is None:
            continue
        if not isinstance(table, dict):
            raise CheckpointError(f"{path}: {name} is {shown(table)}: expected an object or null")
        for key in ("rope_type", "type"):
            if table.get(key, "default") != "default":
                raise CheckpointError(
                    f"{path}: {key} {shown(table[key])} in {name} is not supported: expected "
                    f"'default'"
                )
        if table.get("partial_rotary_factor") not in _ONLY["partial_rotary_factor"]:
            raise CheckpointError(
                f"{path}: partial_rotary_factor {shown(table['partial_rotary_factor'])} in {name} "
                f"is not supported: expected 1"
            )
        found[f" in {name}"] = table.get("rope_theta")
    said = {where: theta for where, theta in found.items() if theta is not None}
    if not said:
        raise CheckpointError(f"{path}: rope_theta is missing")
    first = next(iter(said.values()))
    if any(theta != first for theta in said.values()):
        values = ", ".join(f"{shown(theta)}{where}" for where, theta in said.items())
        raise CheckpointError(f"{path}: rope_theta is {values}: expected one value")
    return first


def in_config_words(message: str) -> str:
    """An error about params.json's keys, with config.json's names of them."""
    return re.sub(r"\w+", lambda word: _KEYS.get(word[0], word[0]), message)


def default_theta(sliding_window: object) -> float:
    """RoPE's base where params.json does not say it: 1e4 with a sliding window, else 1e6.

    Only Mistral 7B v0.1 has windows and no rope_theta (mistral-inference, `transformer.py`).
    """
    windows = sliding_window if isinstance(sliding_window, list) else [sliding_window]
    return 1e6 if all(window is None for window in windows) else 1e4


def disagreements(params: dict[str, Any], config: dict[str, Any]) -> list[str]:
    """What a params.json and a config.json both say, and say differently.

    What params.json leaves out has a meaning there, so that it is compared as well; what
    config.json leaves out is not.
    """
    faults = []
    for ours, theirs in _SIZES.items():
        if None not in (params.get(ours), config.get(theirs)) and params[ours] != config[theirs]:
            faults.append((ours, params[ours], theirs, config[theirs]))
    windows = params.get("sliding_window") or params.get("_sliding_window")
    eps, theta = params.get("norm_eps"), params.get("rope_theta") or default_theta(windows)
    thetas = [config.get("rope_theta")]
    tables = [config[name] for name in _ROPE_TABLES if isinstance(config.get(name), dict)]
    thetas += [table.get("rope_theta") for table in tables]
    faults += [
        ("rope_theta", theta, "rope_theta", said) for said in thetas if said not in (None, theta)
    ]
    if config.get("rms_norm_eps") not in (None, eps):
        faults.append(("norm_eps", eps, "rms_norm_eps", config["rms_norm_eps"]))
    tied = bool(params.get("tied_embeddings"))
    if config.get("tie_word_embeddings") not in (None, tied):
        faults.append(
            ("tied_embeddings", tied, "tie_word_embeddings", config["tie_word_embeddings"])
        )
    # config.json of these models has one number where params.json lists layers.
    listed = windows if isinstance(windows, list) else [windows]
    if "sliding_window" in config and config["sliding_window"] not in listed:
        faults.append(("sliding_window", windows, "sliding_window", config["sliding_window"]))
    return [
        f"{ours} is {shown(mine)} in params.json, {theirs} is {shown(other)} in config.json"
        for ours, mine, theirs, other in faults
    ]


def stored_name(name: str) -> str:
    """Hugging Face's name of a tensor of Mistral's: `layers.0.attention.wq.weight` and so on."""
    stem = name.removesuffix(".weight")
    if stem in _OUTER:
        return f"{_OUTER[stem]}.weight"
    _, layer, part = stem.split(".", 2)
    return f"model.layers.{layer}.{_IN_LAYER[part]}.weight"


def is_unused(name: str) -> bool:
    """Whether a stored tensor that the model does not take may be there all the same.

    Tables of rotations, and the output matrix of a model that has tied it to its embedding.
    """
    return name == "lm_head.weight" or ".rotary_emb." in name
