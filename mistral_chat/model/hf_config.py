"""config.json of a model that this program writes: the inverse of `hf.to_params`.

Also the inverse of `quantization.from_config`, for the compressed-tensors that we write: only
weights are quantized, so what a matrix means does not depend on the program that reads it.
"""

from typing import Any

from mistral_chat.errors import CheckpointError
from mistral_chat.model import hf
from mistral_chat.model.args import TransformerArgs
from mistral_chat.model.quantization import Quantization

__all__ = ["config_of"]

_BITS = {"fp8": 8, "int8": 8, "int4": 4}
_FORMATS = {"fp8": "float-quantized", "int8": "pack-quantized", "int4": "pack-quantized"}


def config_of(args: TransformerArgs) -> dict[str, Any]:
    """A config.json that is read back as the same shape.

    Args:
        args: whose quantization is compressed-tensors, as we write it.

    Raises:
        CheckpointError: windows that no class of transformers has; named.
    """
    assert args.quantization is not None
    kind, window, types = _class_of(args)
    sizes = {theirs: getattr(args, ours) for ours, theirs in hf.KEYS.items()}
    config: dict[str, Any] = {
        "architectures": [f"{kind}ForCausalLM"],
        "model_type": kind.lower(),
        "torch_dtype": "bfloat16",
        "hidden_act": "silu",
        **{name: value for name, value in sizes.items() if value is not None},
        "rope_theta": args.theta,
        "rope_parameters": _rope(args),
        "sliding_window": window,
    }
    if types is not None:
        config["layer_types"] = types
    return config | {"quantization_config": _quantization(args.quantization)}


def _class_of(args: TransformerArgs) -> tuple[str, int | None, list[str] | None]:
    """The class of transformers, its window, and the kind of each layer where they differ."""
    windows = args.window_by_layer
    sizes = {window for window in windows if window is not None}
    is_scaled = args.yarn is not None or args.llama_4_scaling is not None
    if len(sizes) > 1 or (is_scaled and len(set(windows)) > 1):
        beside = " beside yarn" if len(sizes) == 1 else ""
        raise CheckpointError(
            f"sliding_window differs from layer to layer{beside} ({sorted(sizes)}): Hugging Face's "
            f"layout has no such model, so it cannot be written"
        )
    window = next(iter(sizes), None)
    if len(set(windows)) == 1:
        return ("Ministral3" if is_scaled else "Mistral"), window, None
    kinds = ["full_attention" if size is None else "sliding_attention" for size in windows]
    return "Ministral", window, kinds


def _rope(args: TransformerArgs) -> dict[str, Any]:
    yarn, scaling = args.yarn, args.llama_4_scaling
    table: dict[str, Any] = {"rope_type": "default", "rope_theta": args.theta}
    original = scaling and scaling.original_max_position_embeddings
    if yarn is not None:
        if original not in (None, yarn.original_max_position_embeddings):
            raise CheckpointError(
                f"original_max_position_embeddings is {yarn.original_max_position_embeddings} in "
                f"yarn and {original} in llama_4_scaling: Hugging Face's layout has one for both, "
                f"so it cannot be written"
            )
        original = yarn.original_max_position_embeddings
        table |= {
            "rope_type": "yarn",
            "factor": yarn.factor,
            "beta_fast": yarn.beta_fast,
            "beta_slow": yarn.beta_slow,
            "attention_factor": yarn.magnitude,
        }
    if original is not None:
        table["original_max_position_embeddings"] = original
        table["llama_4_scaling_beta"] = scaling.beta if scaling else 0.0
    return table


def _quantization(how: Quantization) -> dict[str, Any]:
    """`quantization_config` in the words of compressed-tensors' QuantizationConfig."""
    form = _FORMATS[how.kind]
    weights: dict[str, Any] = {
        "num_bits": _BITS[how.kind],
        "type": "float" if how.kind == "fp8" else "int",
        "strategy": "group" if how.group_size else "channel",
        "group_size": how.group_size or None,
        "symmetric": not how.has_zeros,
        "dynamic": False,
        "actorder": None,
        "block_structure": None,
        "observer": "minmax",
        "observer_kwargs": {},
    }
    group = {
        "targets": ["Linear"],
        "weights": weights,
        "input_activations": None,
        "output_activations": None,
        "format": form,
    }
    said: dict[str, Any] = {
        "quant_method": "compressed-tensors",
        "quantization_status": "compressed",
        "format": form,
        "config_groups": {"group_0": group},
        "ignore": ["lm_head"],
        "kv_cache_scheme": None,
        "global_compression_ratio": None,
    }
    if how.has_zeros:
        # transformers 5.24 with compressed-tensors 0.20 would expect zeros that are not packed; it
        # dequantizes as it loads instead of at the first token
        said["dequantize"] = True
    return said
