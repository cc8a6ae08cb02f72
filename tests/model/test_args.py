"""params.json: every key is honoured or refused by name."""

import json
import math
import os
import re
import time
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import pytest

from mistral_chat.errors import CheckpointError
from mistral_chat.model.args import TransformerArgs
from mistral_chat.model.quantization import Quantization
from mistral_chat.model.sharding import Shard, placements
from tests.conftest import open_folder, read_args

# Mistral-Large-Instruct-2407, as its params.json has it.
LARGE: dict[str, Any] = {
    "dim": 12288,
    "n_layers": 88,
    "head_dim": 128,
    "hidden_dim": 28672,
    "n_heads": 96,
    "n_kv_heads": 8,
    "norm_eps": 1e-05,
    "vocab_size": 32768,
    "rope_theta": 1000000.0,
}
SMALL: dict[str, Any] = {
    "dim": 8,
    "n_layers": 4,
    "head_dim": 6,
    "hidden_dim": 12,
    "n_heads": 4,
    "n_kv_heads": 2,
    "norm_eps": 1e-5,
    "vocab_size": 11,
}
# In mistral-inference's order, which scripts may rely on.
REQUIRED = ("dim", "n_layers", "head_dim", "hidden_dim", "n_heads", "n_kv_heads", "norm_eps",
            "vocab_size")  # fmt: skip


def test_args_keep_the_names_of_mistral_inference() -> None:
    names = [f.name for f in fields(TransformerArgs)]
    assert tuple(names[:8]) == REQUIRED
    assert {"max_batch_size", "rope_theta", "sliding_window", "model_type"} < set(names)


def test_from_dict_reads_the_model_that_it_is_made_for() -> None:
    args = TransformerArgs.from_dict(LARGE)
    assert {key: value for key, value in asdict(args).items() if key in LARGE} == LARGE
    assert args.window_by_layer == (None,) * 88
    assert not args.tied_embeddings
    assert round(args.n_params / 1e9, 2) == 122.61  # as published


@pytest.mark.parametrize("tied", [False, True])
def test_n_params_counts_every_tensor_once(tied: bool) -> None:
    args = TransformerArgs(**SMALL, tied_embeddings=tied)
    table = placements(Shard(args))
    assert args.n_params == sum(math.prod(placement.shape) for placement in table.values())


@pytest.mark.parametrize("name", REQUIRED)
def test_from_dict_names_a_missing_key(name: str) -> None:
    with pytest.raises(CheckpointError, match=f"{name} is missing"):
        TransformerArgs.from_dict({k: v for k, v in SMALL.items() if k != name})


def test_from_dict_names_all_missing_keys_at_once() -> None:
    with pytest.raises(CheckpointError, match="dim, vocab_size is missing"):
        TransformerArgs.from_dict(
            {k: v for k, v in SMALL.items() if k not in ("dim", "vocab_size")}
        )


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("moe", {"num_experts": 8}, "moe: a mixture of experts is not supported"),
        ("q_lora_rank", 512, r"q_lora_rank: multi-head latent attention \(MLA\) is not supported"),
        ("v_head_dim", 128, r"v_head_dim: multi-head latent attention \(MLA\) is not supported"),
        ("lora", {"some": "thing"}, "lora is not supported"),
        ("vision_encoder", "pixtral", "vision_encoder is 'pixtral': expected an object"),
        ("yarn", {"some": "thing"}, "some in yarn is not supported: not a key we know"),
        ("llama_4_scaling", {"beta": 1}, "original_max_position_embeddings in llama_4_scaling is"),
        ("quantization", {"some": "thing"}, "qformat_weight None is not supported: expected fp8_"),
        ("quantization_config", {}, "quant_method None is not supported: expected fp8, compressed"),
    ],
)
def test_from_dict_refuses_another_architecture_by_name(name: str, value: Any, said: str) -> None:
    with pytest.raises(CheckpointError, match=said):
        TransformerArgs.from_dict(SMALL | {name: value})
    assert TransformerArgs.from_dict(SMALL | {name: None}) == TransformerArgs(**SMALL)


# As the params.json of Devstral-2-123B-Instruct-2512 has it beside the sizes.
DEVSTRAL_2: dict[str, Any] = {
    "max_position_embeddings": 262144,
    **dict.fromkeys(
        ("q_lora_rank", "qk_rope_head_dim", "qk_nope_head_dim", "kv_lora_rank", "v_head_dim")
    ),
    "quantization": {"qformat_weight": "fp8_e4m3", "qscheme_act": "TENSOR"},
    "yarn": {
        "original_max_position_embeddings": 4096,
        "factor": 64,
        "apply_scale": True,
        "beta": 4,
        "alpha": 1,
    },
    "llama_4_scaling": None,
}


def test_from_dict_reads_devstral_2() -> None:
    args = TransformerArgs.from_dict(LARGE | DEVSTRAL_2 | {"vocab_size": 131072})
    assert args.max_seq_len == 262144
    assert args.yarn is not None
    assert (args.yarn.factor, args.yarn.original_max_position_embeddings) == (64, 4096)
    assert (args.yarn.beta_fast, args.yarn.beta_slow) == (4, 1)
    assert args.yarn.magnitude == pytest.approx(1.41589, abs=1e-5)
    assert args.llama_4_scaling is None
    assert args.quantization == Quantization(
        method="native-fp8", kind="fp8", per_tensor=True, static_activations=True
    )
    assert not args.vision_encoder


def test_from_dict_takes_a_vision_encoder_for_what_is_not_run() -> None:
    vision = {"hidden_size": 1664, "num_hidden_layers": 48, "image_size": 1540}
    assert TransformerArgs.from_dict(SMALL | {"vision_encoder": vision}).vision_encoder


def test_from_dict_takes_one_kind_of_quantization() -> None:
    both = DEVSTRAL_2 | {"quantization_config": {"quant_method": "fp8"}}
    with pytest.raises(CheckpointError, match="quantization and quantization_config: expected one"):
        TransformerArgs.from_dict(SMALL | both)


def test_from_dict_refuses_keys_that_it_does_not_know() -> None:
    with pytest.raises(CheckpointError, match="alibi, n_experts is not supported"):
        TransformerArgs.from_dict(SMALL | {"n_experts": 8, "alibi": True})


@pytest.mark.parametrize(
    ("name", "harmless", "refused"),
    [("use_biases", False, True), ("causal", True, False), ("ragged_attention", False, True)],
)
def test_from_dict_takes_a_flag_only_when_it_asks_for_nothing(
    name: str, harmless: bool, refused: bool
) -> None:
    assert TransformerArgs.from_dict(SMALL | {name: harmless}) == TransformerArgs(**SMALL)
    with pytest.raises(CheckpointError, match=name):
        TransformerArgs.from_dict(SMALL | {name: refused})


@pytest.mark.parametrize("kind", ["mamba", "Transformer", ""])
def test_from_dict_refuses_another_model_type(kind: str) -> None:
    with pytest.raises(CheckpointError, match="not supported"):
        TransformerArgs.from_dict(SMALL | {"model_type": kind})


@pytest.mark.parametrize("key", ["sliding_window", "_sliding_window"])
@pytest.mark.parametrize(
    ("window", "by_layer"),
    [
        (None, (None, None, None, None)),
        (5, (5, 5, 5, 5)),
        ([3, None, None, 7], (3, None, None, 7)),
        ([3, None], (3, None, 3, None)),
        ([6], (6, 6, 6, 6)),
        ("5", (5, 5, 5, 5)),
        ([None, "7"], (None, 7, None, 7)),
        (["null", 7], (None, 7, None, 7)),
    ],
)
def test_sliding_window_is_one_entry_a_layer(
    key: str, window: Any, by_layer: tuple[int | None, ...]
) -> None:
    assert TransformerArgs.from_dict(SMALL | {key: window}).window_by_layer == by_layer


def test_sliding_window_may_stand_under_both_names_only_when_they_agree() -> None:
    both = {"sliding_window": 4, "_sliding_window": 4}
    assert TransformerArgs.from_dict(SMALL | both).sliding_window == 4
    with pytest.raises(CheckpointError, match="disagree"):
        TransformerArgs.from_dict(SMALL | both | {"_sliding_window": 5})


@pytest.mark.parametrize("window", [0, -1, 2.5, True, "4k", "-1", [4, 0], [4, 4, 4], [], [4] * 8])
def test_sliding_window_that_fits_no_layers_is_refused(window: Any) -> None:
    with pytest.raises(CheckpointError, match="sliding_window"):
        TransformerArgs.from_dict(SMALL | {"sliding_window": window})


@pytest.mark.parametrize("name", [n for n in REQUIRED if n != "norm_eps"])
@pytest.mark.parametrize("value", [0, -4, 2.0, "8", True, [8]])
def test_args_refuse_a_size_that_is_no_whole_number(name: str, value: Any) -> None:
    with pytest.raises(CheckpointError, match=f"{name} is .*whole number"):
        TransformerArgs.from_dict(SMALL | {name: value})


@pytest.mark.parametrize("name", ["norm_eps", "rope_theta"])
@pytest.mark.parametrize("value", [0, -1e-5, "1e-5", math.nan, True])
def test_args_refuse_a_number_that_is_not_above_zero(name: str, value: Any) -> None:
    with pytest.raises(CheckpointError, match=name):
        TransformerArgs.from_dict(SMALL | {name: value})


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"n_kv_heads": 3}, "n_heads is 4.*n_kv_heads"),
        ({"n_kv_heads": 8}, "n_heads is 4.*n_kv_heads"),
        ({"head_dim": 5}, "head_dim is 5"),
        ({"max_seq_len": 1}, "max_seq_len is 1"),
        ({"max_seq_len": "4096"}, "max_seq_len is '4096'"),
        ({"max_position_embeddings": 0}, "max_seq_len is 0"),
        ({"tied_embeddings": "no"}, "tied_embeddings is 'no'"),
    ],
)
def test_args_refuse_what_no_model_can_have(changes: dict[str, Any], named: str) -> None:
    with pytest.raises(CheckpointError, match=named):
        TransformerArgs.from_dict(SMALL | changes)


def write(folder: Path, params: Any, name: str = "params.json") -> None:
    (folder / name).write_text(params if isinstance(params, str) else json.dumps(params))


@pytest.mark.parametrize(
    ("params", "config", "wanted"),
    [
        ({}, None, None),
        ({"max_seq_len": 64}, {"max_position_embeddings": 128}, 64),
        ({"max_position_embeddings": 96}, {"max_position_embeddings": 128}, 96),
        ({"max_seq_len": 64, "max_position_embeddings": 96}, None, 64),
        ({}, {"max_position_embeddings": 128}, 128),
        ({}, {"hidden_size": 8}, None),
    ],
)
def test_read_args_takes_the_context_from_where_it_stands(
    tmp_path: Path, params: dict[str, int], config: dict[str, int] | None, wanted: int | None
) -> None:
    write(tmp_path, SMALL | params)
    if config is not None:
        write(tmp_path, config, "config.json")
    assert read_args(tmp_path).max_seq_len == wanted


def test_read_args_names_folder_and_what_is_missing(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"nowhere: no such folder"):
        read_args(tmp_path / "nowhere")
    with pytest.raises(CheckpointError, match=r"params.json is missing \(found none\)"):
        read_args(tmp_path)
    write(tmp_path, {}, "config.json")
    with pytest.raises(CheckpointError, match=r"params.json is missing \(found config.json\)"):
        read_args(tmp_path, "consolidated")
    (tmp_path / "consolidated.safetensors").touch()
    with pytest.raises(CheckpointError, match=r"params.json is missing \(found config.json\)"):
        read_args(tmp_path)
    with pytest.raises(CheckpointError, match=r"config.json is a file; expected the folder"):
        read_args(tmp_path / "config.json")


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("", "not JSON"),
        ('{"dim": 8', "not JSON"),
        ("[1, 2]", "found a list"),
        ("null", "found a NoneType"),
        (json.dumps(SMALL | {"dim": -8}), "params.json: dim is -8"),
    ],
)
def test_read_args_names_the_file_that_it_cannot_use(tmp_path: Path, text: str, named: str) -> None:
    write(tmp_path, text)
    with pytest.raises(CheckpointError, match=named) as caught:
        read_args(tmp_path)
    assert str(tmp_path / "params.json") in str(caught.value)


def test_read_args_refuses_bytes_that_are_no_text(tmp_path: Path) -> None:
    (tmp_path / "params.json").write_bytes(b'{"dim": "\xff"}')
    with pytest.raises(CheckpointError, match=r"params.json is not UTF-8 text"):
        read_args(tmp_path)


@pytest.mark.parametrize("load_format", ["auto", "consolidated", "dummy"])
def test_read_args_refuses_a_config_of_another_shape(tmp_path: Path, load_format: Any) -> None:
    write(tmp_path, SMALL)
    config = {"hidden_size": 8, "num_hidden_layers": 5, "head_dim": None, "vocab_size": 12}
    write(tmp_path, config, "config.json")
    with pytest.raises(CheckpointError) as caught:
        read_args(tmp_path, load_format)
    message = str(caught.value)
    assert "n_layers is 4 in params.json, num_hidden_layers is 5 in config.json" in message
    assert "vocab_size is 11 in params.json, vocab_size is 12 in config.json" in message
    assert "head_dim" not in message  # null says nothing
    assert "hidden_size" not in message  # equal


def test_read_args_compares_what_a_config_of_mistrals_layout_says_and_no_more(
    tmp_path: Path,
) -> None:
    write(tmp_path, SMALL)
    config = {"architectures": ["Other"], "hidden_size": 8, "rms_norm_eps": 1e-5, "moe": {}}
    write(tmp_path, config, "config.json")
    assert read_args(tmp_path) == TransformerArgs(**SMALL)


@pytest.mark.parametrize(
    ("params", "config", "said"),
    [
        ({}, {"rope_theta": 1e4}, "rope_theta is 1000000.0 in params.json, rope_theta is 10000.0"),
        ({"rope_theta": 1e4}, {"rope_theta": 1e6}, "rope_theta is 10000.0 in params.json"),
        ({}, {"rope_parameters": {"rope_theta": 5e5}}, "rope_theta is 500000.0 in config.json"),
        ({"sliding_window": 4}, {"rope_theta": 1e6}, "rope_theta is 10000.0 in params.json"),
        ({}, {"rms_norm_eps": 1e-6}, "norm_eps is 1e-05 in params.json, rms_norm_eps is 1e-06"),
        ({}, {"tie_word_embeddings": True}, "tied_embeddings is False in params.json"),
        ({"tied_embeddings": True}, {"tie_word_embeddings": False}, "tie_word_embeddings is False"),
        ({}, {"sliding_window": 4}, "sliding_window is None in params.json, sliding_window is 4"),
        ({"sliding_window": 4}, {"sliding_window": None}, "sliding_window is 4 in params.json"),
        ({"_sliding_window": [4, None]}, {"sliding_window": 8}, "sliding_window is 8 in config"),
        ({}, {"rope_theta": 1e6, "rms_norm_eps": 1e-5, "tie_word_embeddings": False}, None),
        ({"sliding_window": 4}, {"rope_theta": 1e4, "sliding_window": 4}, None),
        ({"_sliding_window": [4, None]}, {"sliding_window": 4}, None),
        ({"sliding_window": None}, {"sliding_window": None}, None),
    ],
)
def test_read_args_names_what_params_and_config_say_differently(
    tmp_path: Path, params: dict[str, Any], config: dict[str, Any], said: str | None
) -> None:
    write(tmp_path, SMALL | params)
    write(tmp_path, config, "config.json")
    if said is None:
        read_args(tmp_path)
        return
    with pytest.raises(CheckpointError, match=re.escape(said)):
        read_args(tmp_path)


@pytest.mark.parametrize(
    ("window", "said", "theta"),
    [(None, None, 1e6), (4, None, 1e4), ([4, None], None, 1e4), ([None], None, 1e6),
     (4, 1e6, 1e6), (None, 5e5, 5e5)],
)  # fmt: skip
def test_theta_follows_from_the_window_where_params_do_not_say_it(
    window: Any, said: float | None, theta: float
) -> None:
    params = SMALL | {"sliding_window": window, "rope_theta": said}
    assert TransformerArgs.from_dict(params).theta == theta


# What mistral-finetune writes, and null for every key there is: both ask for nothing.
@pytest.mark.parametrize(
    "asked",
    [
        {"lora": {"enable": False, "rank": 16, "dropout": 0.0, "scaling": 2.0}},
        {"lora": {"enable": True, "rank": 64, "scaling": 2.0}},  # merged, unless tensors say not
        {"lora": {"rank": 64, "scaling": 2.0}},
        {"moe": {}, "vision_encoder": False},
        {"moe": {"enable": False}},
    ],
)
def test_from_dict_takes_what_asks_for_nothing(asked: dict[str, Any]) -> None:
    assert TransformerArgs.from_dict(SMALL | asked) == TransformerArgs(**SMALL)


def test_from_dict_takes_null_for_any_key_that_may_be_absent() -> None:
    optional = {f.name: None for f in fields(TransformerArgs)[8:]}
    others = ("moe", "lora", "yarn", "vision_encoder", "quantization", "use_biases", "causal",
              "_sliding_window", "max_position_embeddings", "a_key_of_tomorrow")  # fmt: skip
    nulls = optional | dict.fromkeys(others)
    assert TransformerArgs.from_dict(SMALL | nulls) == TransformerArgs(**SMALL)


@pytest.mark.parametrize("value", [10**7, 2**63, 10**29, -(10**29), 1e300, 10**400])
@pytest.mark.parametrize("name", [*REQUIRED, "rope_theta", "max_seq_len", "sliding_window"])
def test_absurd_numbers_are_refused_in_one_short_line(name: str, value: float) -> None:
    if name == "max_seq_len" and value == 10**7:
        value = 10**12
    if name in ("rope_theta", "sliding_window") and value == 10**7:
        return
    started = time.monotonic()
    with pytest.raises(CheckpointError, match=f"{name} is ") as caught:
        TransformerArgs.from_dict(SMALL | {name: value})
    assert len(str(caught.value)) < 200
    assert time.monotonic() - started < 60  # a table of ten million layers takes longer


@pytest.mark.parametrize("value", [[2], 2, [2, 3], 0, None, []])
@pytest.mark.parametrize("name", ["config.json", "generation_config.json"])
def test_end_ids_are_what_the_folder_says(tmp_path: Path, name: str, value: Any) -> None:
    write(tmp_path, SMALL)
    write(tmp_path, {"eos_token_id": value}, name)
    wanted = value if isinstance(value, list) else [] if value is None else [value]
    assert open_folder(tmp_path).end_ids == frozenset(wanted)


@pytest.mark.parametrize("value", [11, -1, [2, 11], "2", True, 2.0, {"id": 2}, [None], [[2]]])
@pytest.mark.parametrize("name", ["config.json", "generation_config.json"])
def test_read_args_refuses_end_ids_that_the_model_does_not_have(
    tmp_path: Path, name: str, value: Any
) -> None:
    write(tmp_path, SMALL)
    write(tmp_path, {"eos_token_id": value}, name)
    with pytest.raises(CheckpointError, match=f"{name}: eos_token_id is .* from 0 to 10"):
        read_args(tmp_path)


def test_read_args_says_of_a_folder_that_it_cannot_be_looked_into(tmp_path: Path) -> None:
    name = "n" * 5000
    with pytest.raises(CheckpointError, match=r"cannot be read \(File name too long\)"):
        read_args(tmp_path / name)
    with pytest.raises(CheckpointError, match="cannot be read"):
        read_args(tmp_path / "nul\0")
    write(tmp_path, SMALL)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "access", lambda path, mode: False)  # root may look into anything
        with pytest.raises(CheckpointError, match=r"cannot be read \(Permission denied\)"):
            read_args(tmp_path)
