"""Hugging Face's layout of a Mistral model in Mistral's terms: config.json and tensor names.

Translates; reads no files and knows no ranks. A key that config.json leaves out has the meaning it
has in transformers' MistralConfig (transformers 5, `models/mistral/configuration_mistral.py`).
"""

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal

from mistral_chat.errors import CheckpointError, named, shown
from mistral_chat.model.rope import QueryScaling, Yarn, yarn_magnitude
from mistral_chat.model.values import read_table, require_number

__all__ = [
    "KEYS",
    "MATRICES",
    "PREFIXES",
    "Layout",
    "default_theta",
    "disagreements",
    "in_config_words",
    "is_unused",
    "prefix_of",
    "stored_name",
    "text_config",
    "to_params",
    "with_prefix",
]

Layout = Literal["consolidated", "hf"]
SHAPE_FILES: dict[Layout, str] = {"consolidated": "params.json", "hf": "config.json"}

ARCHITECTURES = (
    "MistralForCausalLM",
    "MinistralForCausalLM",
    "Ministral3ForCausalLM",
    "Mistral3ForConditionalGeneration",  # with an encoder of pictures
)
# MistralConfig's window, for a config.json without the key. The classes after it have none.
DEFAULT_SLIDING_WINDOW = {"MistralForCausalLM": 4096, "mistral": 4096}
# What texts in a model with pictures may be.
TEXT_TYPES = ("mistral", "ministral", "ministral3")

_SIZES = {
    "dim": "hidden_size",
    "n_layers": "num_hidden_layers",
    "head_dim": "head_dim",
    "hidden_dim": "intermediate_size",
    "n_heads": "num_attention_heads",
    "n_kv_heads": "num_key_value_heads",
    "vocab_size": "vocab_size",
}
KEYS = _SIZES | {
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
_YARN = {
    "factor": "factor",
    "original_max_position_embeddings": "original_max_position_embeddings",
    "beta_fast": "beta_fast",
    "beta_slow": "beta_slow",
    "mscale": "mscale",
    "mscale_all_dim": "mscale_all_dim",
    "attention_factor": "attention_factor",
    "truncate": "truncate",
}
# Keys of the table that are read elsewhere, or that repeat the configuration's own.
_NOT_YARN = {"type", "rope_type", "rope_theta", "partial_rotary_factor", "llama_4_scaling_beta",
             "max_position_embeddings", "finetuned"}  # fmt: skip

# The matrices of a layer, and Hugging Face's modules of them.
MATRICES = {
    "attention.wq": "self_attn.q_proj",
    "attention.wk": "self_attn.k_proj",
    "attention.wv": "self_attn.v_proj",
    "attention.wo": "self_attn.o_proj",
    "feed_forward.w1": "mlp.gate_proj",
    "feed_forward.w2": "mlp.down_proj",
    "feed_forward.w3": "mlp.up_proj",
}
# What stands before `layers`: of texts alone, and of two ways of models with pictures.
PREFIXES = ("model.", "model.language_model.", "language_model.model.")
# Modules that see pictures, beside the text model.
_VISION = {"vision_tower", "vision_encoder", "multi_modal_projector", "vision_language_adapter",
           "patch_merger", "pre_mm_projector_norm"}  # fmt: skip
_OUTER = {
    "tok_embeddings": "model.embed_tokens",
    "norm": "model.norm",
    "output": "lm_head",
}
_IN_LAYER = {
    "attention_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
} | MATRICES


def text_config(config: dict[str, Any]) -> dict[str, Any]:
    """The part of a config.json that is about texts, with what stands beside it."""
    inner = config.get("text_config")
    if not isinstance(inner, dict):
        return config
    # null is a value, such as for no window, unless there is another one beside it
    said = {key: value for key, value in inner.items() if value is not None or key not in config}
    return config | said | {"architectures": config.get("architectures")}


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
    expected = " or ".join(ARCHITECTURES)
    if not (isinstance(kinds, list) and kinds and all(isinstance(kind, str) for kind in kinds)):
        raise CheckpointError(f"{path}: architectures is {shown(kinds)}: expected [{expected}]")
    if len(kinds) > 1 or kinds[0] not in ARCHITECTURES:
        names = ", ".join(map(named, kinds[:4]))
        raise CheckpointError(f"{path} says {names}: expected {expected}")
    kind: object = kinds[0]
    if config.get("text_config") is not None:
        inner = config["text_config"]
        kind = inner.get("model_type") if isinstance(inner, dict) else None
        config = text_config(config)
        if kind not in TEXT_TYPES:
            raise CheckpointError(
                f"{path}: text_config is of model_type {shown(kind)}: expected one of "
                f"{', '.join(TEXT_TYPES)}"
            )
    for key, values in _ONLY.items():
        if config.get(key) not in values:
            raise CheckpointError(
                f"{path}: {key} {shown(config[key])} is not supported: expected {values[-1]!r}"
            )
    params = {ours: config.get(theirs) for ours, theirs in KEYS.items()}
    if params["head_dim"] is None:
        params["head_dim"] = _derive_head_dim(path, params["dim"], params["n_heads"])
    if params["tied_embeddings"] is None:
        params["tied_embeddings"] = False
    try:
        rope = _rope(config)
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error}") from error
    return (
        params
        | rope
        | {
            "sliding_window": _windows(path, config, DEFAULT_SLIDING_WINDOW.get(str(kind))),
            "quantization_config": config.get("quantization_config"),
            "vision_encoder": config.get("vision_config"),
        }
    )


def _windows(path: Path, config: dict[str, Any], default: int | None) -> object:
    """The sliding window; of MinistralConfig a list, since `layer_types` names layers without."""
    window = config.get("sliding_window", default)
    if isinstance(window, list):
        raise CheckpointError(
            f"{path}: sliding_window is {shown(window)}: expected one number or null"
        )
    types = config.get("layer_types")
    if types is None or window is None:
        return window
    known = {"sliding_attention": window, "full_attention": None}
    n_layers = config.get("num_hidden_layers")
    if not isinstance(types, list) or len(types) != n_layers or set(map(str, types)) - set(known):
        raise CheckpointError(
            f"{path}: layer_types is {shown(types)}: expected {shown(n_layers)} of "
            f"{', '.join(known)}"
        )
    return [known[str(of_layer)] for of_layer in types]


def _derive_head_dim(path: Path, dim: object, n_heads: object) -> int:
    if type(dim) is not int or type(n_heads) is not int or min(dim, n_heads) < 1:
        return 2  # any: what it would follow from is refused by name
    if dim % n_heads:
        raise CheckpointError(
            f"{path}: head_dim is missing and hidden_size ({dim}) is no multiple of "
            f"num_attention_heads ({n_heads})"
        )
    return dim // n_heads


def _rope(config: dict[str, Any]) -> dict[str, Any]:
    """RoPE's base, YaRN and llama-4 scaling, from wherever versions of config.json keep them.

    Raises:
        CheckpointError: names a kind of RoPE that is not supported, or two that disagree.
    """
    thetas = {"": config.get("rope_theta")}
    found: dict[str, Any] = {"yarn": None, "llama_4_scaling": None}
    for name in _ROPE_TABLES:
        table = config.get(name)
        if table is None:
            continue
        if not isinstance(table, dict):
            raise CheckpointError(f"{name} is {shown(table)}: expected an object or null")
        if table.get("partial_rotary_factor") not in _ONLY["partial_rotary_factor"]:
            raise CheckpointError(
                f"partial_rotary_factor {shown(table['partial_rotary_factor'])} in {name} is not "
                f"supported: expected 1"
            )
        thetas[f" in {name}"] = table.get("rope_theta")
        for key, value in (("yarn", _yarn(name, table)), ("llama_4_scaling", _scaling(table))):
            if None not in (value, found[key]) and value != found[key]:
                raise CheckpointError(f"{' and '.join(_ROPE_TABLES)} disagree: expected one")
            found[key] = found[key] or value
    said = {where: theta for where, theta in thetas.items() if theta is not None}
    if not said:
        raise CheckpointError("rope_theta is missing")
    first = next(iter(said.values()))
    if any(theta != first for theta in said.values()):
        values = ", ".join(f"{shown(theta)}{where}" for where, theta in said.items())
        raise CheckpointError(f"rope_theta is {values}: expected one value")
    return found | {"rope_theta": first}


def _yarn(name: str, table: dict[str, Any]) -> Yarn | None:
    """The table's YaRN; None where it is of the default kind."""
    kinds = {key: table[key] for key in ("rope_type", "type") if table.get(key) is not None}
    for key, kind in kinds.items():
        if kind not in ("default", "yarn"):
            raise CheckpointError(
                f"{key} {shown(kind)} in {name} is not supported: expected 'default' or 'yarn'"
            )
    if len(set(kinds.values())) > 1:
        raise CheckpointError(f"type and rope_type in {name} disagree: expected one of them")
    if "yarn" not in kinds.values():
        return None
    said = read_table(
        name,
        {key: value for key, value in table.items() if key not in _NOT_YARN},
        _YARN,
        required=2,
    )
    if said.pop("truncate", True) is not True:
        raise CheckpointError(f"truncate in {name} is not supported as false: expected true")
    factor = require_number("factor", said["factor"], 1.0, 1e6)
    scale, scale_all = (said.pop(key, None) for key in ("mscale", "mscale_all_dim"))
    for key, value in (("mscale", scale), ("mscale_all_dim", scale_all)):
        if value is not None:
            require_number(key, value, 0.0, 1e3)
    magnitude = said.pop("attention_factor", None)
    if magnitude is None:
        magnitude = yarn_magnitude(factor)
        if scale and scale_all:
            magnitude = yarn_magnitude(factor, scale) / yarn_magnitude(factor, scale_all)
    return Yarn(**said, magnitude=magnitude)


def _scaling(table: dict[str, Any]) -> QueryScaling | None:
    beta = table.get("llama_4_scaling_beta")
    if beta is None or beta == 0:
        return None
    original = table.get("original_max_position_embeddings")
    return QueryScaling(beta=beta, original_max_position_embeddings=original)  # type: ignore[arg-type]


def in_config_words(message: str) -> str:
    """An error about params.json's keys, with config.json's names of them."""
    return re.sub(r"\w+", lambda word: KEYS.get(word[0], word[0]), message)


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
    config = text_config(config)
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
    yarn = None if params.get("yarn") is None else Yarn.from_params(params["yarn"])
    for table in tables:
        kind = table.get("rope_type") or table.get("type")
        if kind in ("default", "yarn") and (yarn is not None) != (kind == "yarn"):
            faults.append(("yarn", params.get("yarn"), "rope_type", kind))
        for key in ("factor", "original_max_position_embeddings", "beta_fast", "beta_slow"):
            if yarn is not None and table.get(key) not in (None, getattr(yarn, key)):
                faults.append((f"yarn's {key}", getattr(yarn, key), key, table[key]))
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


def prefix_of(names: Iterable[str]) -> str:
    """Which of `PREFIXES` a checkpoint's tensors have; the first where none has any."""
    for name in names:
        for prefix in PREFIXES[1:]:
            if name.startswith((f"{prefix}layers.", f"{prefix}embed_tokens.")):
                return prefix
    return PREFIXES[0]


def with_prefix(name: str, prefix: str) -> str:
    """A `stored_name` in a checkpoint of another prefix."""
    before = prefix.removesuffix(PREFIXES[0]) if prefix.endswith(f".{PREFIXES[0]}") else ""
    if name.startswith(PREFIXES[0]):
        return prefix + name.removeprefix(PREFIXES[0])
    return before + name


def is_unused(name: str) -> bool:
    """Whether a stored tensor that the model does not take may be there all the same.

    Tables of rotations, the output matrix of a model that has tied it to its embedding, what sees
    pictures, scales of a cache, and those of quantizers that only training had.
    """
    first = name.removeprefix("model.").partition(".")[0]
    return (
        first in _VISION
        or name.removeprefix("language_model.") == "lm_head.weight"
        or ".rotary_emb." in name
        or "fake_quantizer." in name
        or name.endswith((".k_scale", ".v_scale"))
    )
