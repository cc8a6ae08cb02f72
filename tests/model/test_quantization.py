"""What `quantization` and `quantization_config` say: read, or refused by name in one line."""

from typing import Any

import pytest

from mistral_chat.errors import CheckpointError
from mistral_chat.model.hf import MATRICES
from mistral_chat.model.quantization import Quantization, from_config, from_params

N_LAYERS = 3
ALL = {f"layers.{n}.{matrix}" for n in range(N_LAYERS) for matrix in MATRICES}
PER_TENSOR = Quantization(method="hf-fp8", kind="fp8", per_tensor=True)


def packed(bits: int = 4, group: int | None = 128, **changes: Any) -> dict[str, Any]:
    """compressed-tensors' pack-quantized, as llm-compressor writes it."""
    weights = {
        "num_bits": bits, "type": "int", "symmetric": True, "actorder": None, "dynamic": False,
        "strategy": "group" if group else "channel", "group_size": group,
        "observer": "minmax", "observer_kwargs": {}, "block_structure": None,
    } | changes  # fmt: skip
    return {
        "quant_method": "compressed-tensors", "format": "pack-quantized",
        "config_groups": {
            "group_0": {
                "targets": ["Linear"], "weights": weights, "input_activations": None,
                "output_activations": None,
            }
        },
        "ignore": ["lm_head"], "kv_cache_scheme": None, "quantization_status": "compressed",
        "global_compression_ratio": None, "sparsity_config": {}, "transform_config": {},
    }  # fmt: skip


def fp8(strategy: str = "channel", activations: Any = None) -> dict[str, Any]:
    config = packed(8, None, type="float", strategy=strategy)
    config["config_groups"]["group_0"]["input_activations"] = activations
    return config | {"format": "float-quantized"}


def read(config: Any, **changes: Any) -> Quantization:
    return from_config(config | changes, N_LAYERS)


def test_fp8_of_params() -> None:
    said = {"qformat_weight": "fp8_e4m3", "qscheme_act": "TENSOR"}
    native = Quantization(method="native-fp8", kind="fp8", per_tensor=True, static_activations=True)
    assert from_params(said) == native
    for without in (said | {"qscheme_act": "NO_SCALES"}, {"qformat_weight": "fp8_e4m3"}):
        assert not from_params(without).static_activations


@pytest.mark.parametrize(
    ("table", "said"),
    [
        ({"qformat_weight": "nvfp4"}, "qformat_weight 'nvfp4' is not supported: expected fp8_e4m3"),
        ({"qformat_weight": ["fp8_e4m3"]}, "qformat_weight .* is not supported"),
        ({"qscheme_act": "BLOCK"}, "qscheme_act 'BLOCK' is not supported: expected TENSOR"),
        ({"qformat_kv": "fp8"}, "qformat_kv in quantization is not supported"),
        ("fp8", "quantization is 'fp8': expected an object"),
    ],
)
def test_other_formats_of_params_are_refused_by_name(table: Any, said: str) -> None:
    if isinstance(table, dict):
        table = {"qformat_weight": "fp8_e4m3"} | table
    with pytest.raises(CheckpointError, match=said):
        from_params(table)


def test_hugging_face_fp8() -> None:
    config = {
        "quant_method": "fp8", "activation_scheme": "static", "weight_block_size": None,
        "dequantize": False, "modules_to_not_convert": ["model.vision_tower", "lm_head"],
    }  # fmt: skip
    static = read(config)
    assert static.static_activations
    assert (static.method, static.kind, static.per_tensor) == ("hf-fp8", "fp8", True)
    assert static.kept == frozenset()  # its names match no matrix of a layer
    assert read(config, activation_scheme="dynamic") == PER_TENSOR


@pytest.mark.parametrize("strategy", ["tensor", "channel"])
@pytest.mark.parametrize("dynamic", [None, True, False])
def test_compressed_tensors_fp8(strategy: str, dynamic: bool | None) -> None:
    activations = None if dynamic is None else {"num_bits": 8, "dynamic": dynamic}
    assert read(fp8(strategy, activations)) == Quantization(
        method="compressed-tensors", kind="fp8", per_tensor=strategy == "tensor",
        static_activations=dynamic is False,
    )  # fmt: skip


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("group", [None, 32, 128])
@pytest.mark.parametrize("symmetric", [True, False])
def test_compressed_tensors_packed(bits: int, group: int | None, symmetric: bool) -> None:
    assert read(packed(bits, group, symmetric=symmetric)) == Quantization(
        method="compressed-tensors", kind="int4" if bits == 4 else "int8",
        group_size=group or 0, has_zeros=not symmetric,
    )  # fmt: skip


def test_awq_and_gptq() -> None:
    awq = {
        "quant_method": "awq", "bits": 4, "group_size": 128, "zero_point": True, "version": "gemm",
        "modules_to_not_convert": None,
    }  # fmt: skip
    assert read(awq) == Quantization(method="awq", kind="int4", group_size=128, has_zeros=True)
    gptq = {
        "quant_method": "gptq", "bits": 4, "group_size": 128, "desc_act": False, "sym": True,
        "lm_head": False, "true_sequential": True,
    }  # fmt: skip
    first = Quantization(method="gptq", kind="int4", group_size=128, has_zeros=True)
    assert read(gptq) == first
    assert read(gptq, checkpoint_format="gptq_v2", group_size=-1) == Quantization(
        method="gptq-v2", kind="int4", has_zeros=True
    )


@pytest.mark.parametrize(
    ("ignored", "kept"),
    [
        (["lm_head"], set()),
        (["model.layers.1.self_attn.q_proj"], {"layers.1.attention.wq"}),
        (["model.language_model.layers.0.mlp.up_proj"], {"layers.0.feed_forward.w3"}),
        (["language_model.model.layers.0.mlp.up_proj"], {"layers.0.feed_forward.w3"}),
        (["re:.*self_attn.*"], {name for name in ALL if ".attention." in name}),
        (["re:.*lm_head", "re:model.layers.[01].mlp.down_proj$"],
         {"layers.0.feed_forward.w2", "layers.1.feed_forward.w2"}),
        (["re:vision_tower.*", "re:.*multi_modal_projector.*"], set()),
        (["layers.2.attention.wo"], {"layers.2.attention.wo"}),
        (["Linear"], set()),
    ],
)  # fmt: skip
def test_matrices_that_are_ignored_are_kept_as_floats(ignored: list[str], kept: set[str]) -> None:
    assert read(packed(), ignore=ignored).kept == kept


def test_matrices_that_are_no_targets_are_kept_as_floats() -> None:
    config = packed()
    config["config_groups"]["group_0"]["targets"] = ["re:.*mlp.*"]
    assert read(config).kept == {name for name in ALL if ".attention." in name}


@pytest.mark.parametrize(
    ("names", "kept"),
    [
        (["self_attn"], {name for name in ALL if ".attention." in name}),
        (["layers.1"], {name for name in ALL if name.startswith("layers.1.")}),
        (["mlp.gate_proj"], {name for name in ALL if name.endswith(".w1")}),
        (["gate", "attn", "1"], {name for name in ALL if name.startswith("layers.1.")}),
    ],
)
def test_modules_that_are_not_converted_are_meant_by_whole_parts_of_names(
    names: list[str], kept: set[str]
) -> None:
    config = {"quant_method": "fp8", "modules_to_not_convert": names}
    assert read(config).kept == kept


AWQ = {"quant_method": "awq", "bits": 4}
GPTQ = {"quant_method": "gptq", "bits": 4}


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ([], r"quantization_config is \[\]: expected an object"),
        ({}, "quant_method None is not supported: expected fp8, compressed-tensors, awq, gptq"),
        *(
            ({"quant_method": name}, f"quant_method '{name}' is not supported")
            for name in ("bitsandbytes", "gguf", "exl3", "modelopt", "hqq", "mxfp4", "fbgemm_fp8")
        ),
        ({"quant_method": "fp8", "weight_block_size": [128, 128]}, "weight_block_size .128, 128."),
        ({"quant_method": "fp8", "activation_scheme": "other"}, "activation_scheme 'other' is not"),
        ({"quant_method": "fp8", "modules_to_not_convert": "lm_head"}, "expected a list of modul"),
        ({"quant_method": "fp8", "modules_to_not_convert": [1]}, "expected a list of modules' na"),
        (AWQ | {"bits": 8}, "bits 8 of awq is not supported: expected 4"),
        (GPTQ | {"bits": 3}, "bits 3 of gptq is not supported: expected 4 or 8"),
        (AWQ | {"version": "gemv"}, "version 'gemv' of awq is not supported: expected gemm"),
        (AWQ | {"zero_point": False}, "zero_point false of awq is not supported"),
        (AWQ | {"group_size": 48}, "group_size is 48: expected a multiple of 32"),
        (AWQ | {"group_size": "128"}, "group_size is '128'"),
        (AWQ | {"group_size": 0}, "group_size is 0"),
        (GPTQ | {"desc_act": True}, r"desc_act \(act-order\) of gptq is not supported"),
        (GPTQ | {"checkpoint_format": "marlin"}, "checkpoint_format 'marlin' of gptq is not"),
        (GPTQ | {"dynamic": {"-:x": {}}}, "dynamic of gptq is not supported"),
        (packed() | {"config_groups": None}, "config_groups is None: expected one group"),
        (packed() | {"config_groups": {"a": 1}}, "config_groups is 1: expected an object"),
        (packed() | {"config_groups": {"a": {}, "b": {}}}, "config_groups is .*expected one gro"),
        (packed() | {"format": "marlin-24"}, "format 'marlin-24' of 4 bits .* is not supported"),
        (packed(actorder="group"), "actorder 'group' is not supported: expected null or weight"),
        (packed(3), "of 3 bits"),
        (packed(strategy="block"), "'block'"),
        (packed(group=24), "group_size is 24: expected a multiple of 32"),
        (packed(strategy="tensor"), "'tensor'"),
        (fp8("block"), "fp8 weights of strategy 'block' are not supported: expected tensor or ch"),
        (packed() | {"format": "nvfp4-pack-quantized"}, "format 'nvfp4-pack-quantized' of 4 bits"),
        (packed() | {"sparsity_config": {"format": "sparse-24-bitmask"}}, "sparsity_config"),
        (packed() | {"ignore": ["re:(a+)+b"]}, "the pattern .* is not supported: too complex"),
        (packed() | {"ignore": ["re:" + ".*a" * 30]}, "the pattern .* is not supported: too com"),
        (packed() | {"ignore": ["re:[z-a]"]}, "the pattern .* is malformed"),
    ],
)
def test_other_formats_are_refused_by_name(config: Any, said: str) -> None:
    with pytest.raises(CheckpointError, match=said) as caught:
        from_config(config, N_LAYERS)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 300
