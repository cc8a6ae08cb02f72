"""params.json: every key is honoured or refused by name."""

import json
import math
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import pytest

from mistral_chat.errors import CheckpointError
from mistral_chat.model.args import TransformerArgs, read_args
from mistral_chat.model.sharding import Shard, placements

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


@pytest.mark.parametrize("name", ["moe", "lora", "vision_encoder", "quantization", "yarn"])
def test_from_dict_refuses_another_architecture_by_name(name: str) -> None:
    with pytest.raises(CheckpointError, match=f"{name} is not supported"):
        TransformerArgs.from_dict(SMALL | {name: {"some": "thing"}})
    assert TransformerArgs.from_dict(SMALL | {name: None}) == TransformerArgs(**SMALL)


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
    ],
)
def test_sliding_window_is_one_entry_a_layer(
    key: str, window: int | list[int | None] | None, by_layer: tuple[int | None, ...]
) -> None:
    assert TransformerArgs.from_dict(SMALL | {key: window}).window_by_layer == by_layer


def test_sliding_window_may_stand_under_both_names_only_when_they_agree() -> None:
    both = {"sliding_window": 4, "_sliding_window": 4}
    assert TransformerArgs.from_dict(SMALL | both).sliding_window == 4
    with pytest.raises(CheckpointError, match="disagree"):
        TransformerArgs.from_dict(SMALL | both | {"_sliding_window": 5})


@pytest.mark.parametrize("window", [0, -1, 2.5, True, "4096", [4, 0], [4, 4, 4], [], [4] * 8])
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
        ("", "not valid JSON"),
        ('{"dim": 8', "not valid JSON"),
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
    with pytest.raises(CheckpointError, match=r"params.json: not valid JSON"):
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


def test_read_args_compares_a_config_of_mistrals_layout_in_sizes_alone(tmp_path: Path) -> None:
    write(tmp_path, SMALL)
    config = {"architectures": ["Other"], "hidden_size": 8, "rms_norm_eps": 1.0, "moe": {}}
    write(tmp_path, config, "config.json")
    assert read_args(tmp_path) == TransformerArgs(**SMALL)
