"""Hugging Face's layout: the model that transformers wrote, and every other one refused by name."""

import json
import os
import shutil
import string
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from mistral_chat.errors import CheckpointError
from mistral_chat.model.args import TransformerArgs
from mistral_chat.model.cache import KVCache
from mistral_chat.model.folder import choose_layout
from mistral_chat.model.operations import Alone, Span
from mistral_chat.model.sharding import Shard, placements
from mistral_chat.model.transformer import Transformer
from tests.conftest import (
    TINY,
    Run,
    folder_of,
    load_weights,
    open_folder,
    random_weights,
    read_args,
    shipped_tokenizer,
    write_params,
)
from tests.model.test_checkpoint import write_zeros
from tests.model.test_loading import load_share_apart
from tests.scripts import load_share

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"

# Groups of three queries; heads are wider than dim / n_heads, and n_heads is odd.
WIDE = TransformerArgs(
    dim=24,
    n_layers=2,
    head_dim=6,
    hidden_dim=40,
    n_heads=9,
    n_kv_heads=3,
    norm_eps=1e-5,
    vocab_size=211,
    rope_theta=1e4,
    max_seq_len=64,
)
SHAPES = {
    "wide": WIDE,
    "even": replace(WIDE, n_heads=4, n_kv_heads=2, rope_theta=1e6),
    "tied": replace(WIDE, tied_embeddings=True),
    "window": replace(WIDE, sliding_window=5),
    "all-heads": replace(WIDE, n_heads=4, n_kv_heads=4, head_dim=2),
}
Weights = dict[str, Tensor]
YARN = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}


def their_state(weights: Weights, args: TransformerArgs) -> Weights:
    """Mistral's tensors as transformers has them; written out apart from the package's table."""
    names = string.Template(
        "layers.$n.attention_norm model.layers.$n.input_layernorm "
        "layers.$n.attention.wq model.layers.$n.self_attn.q_proj "
        "layers.$n.attention.wk model.layers.$n.self_attn.k_proj "
        "layers.$n.attention.wv model.layers.$n.self_attn.v_proj "
        "layers.$n.attention.wo model.layers.$n.self_attn.o_proj "
        "layers.$n.ffn_norm model.layers.$n.post_attention_layernorm "
        "layers.$n.feed_forward.w1 model.layers.$n.mlp.gate_proj "
        "layers.$n.feed_forward.w2 model.layers.$n.mlp.down_proj "
        "layers.$n.feed_forward.w3 model.layers.$n.mlp.up_proj "
    )
    words = ["tok_embeddings", "model.embed_tokens", "norm", "model.norm", "output", "lm_head"]
    for n in range(args.n_layers):
        words += names.substitute(n=n).split()
    state = {}
    for ours, theirs in zip(words[::2], words[1::2], strict=True):
        if f"{ours}.weight" not in weights:
            continue
        weight = weights[f"{ours}.weight"]
        if ours.endswith((".wq", ".wk")):
            size = args.head_dim
            order = [
                head * size + 2 * pair + element
                for head in range(len(weight) // size)
                for element in (0, 1)
                for pair in range(size // 2)
            ]
            weight = weight[order]
        state[f"{theirs}.weight"] = weight.contiguous()
    return state


def save_by_transformers(folder: Path, args: TransformerArgs, max_shard_size: str = "1GB") -> Any:
    """Have transformers write `random_weights(args)` as it writes any model; gives its model."""
    from transformers import MistralConfig, MistralForCausalLM

    config = MistralConfig(
        vocab_size=args.vocab_size,
        hidden_size=args.dim,
        intermediate_size=args.hidden_dim,
        num_hidden_layers=args.n_layers,
        num_attention_heads=args.n_heads,
        num_key_value_heads=args.n_kv_heads,
        head_dim=args.head_dim,
        rms_norm_eps=args.norm_eps,
        max_position_embeddings=args.max_seq_len,
        sliding_window=args.sliding_window,
        tie_word_embeddings=args.tied_embeddings,
        rope_parameters={"rope_type": "default", "rope_theta": args.rope_theta},
        attn_implementation="eager",
    )
    model = MistralForCausalLM(config).eval()
    state = their_state(random_weights(args), args)
    if args.tied_embeddings:
        state["lm_head.weight"] = state["model.embed_tokens.weight"]
    model.load_state_dict(state)
    model.save_pretrained(folder, max_shard_size=max_shard_size)
    return model


def config_of(args: TransformerArgs, **changes: Any) -> dict[str, Any]:
    """A config.json as repositories have it; a change to `...` leaves the key out."""
    config = {
        "architectures": ["MistralForCausalLM"],
        "model_type": "mistral",
        "hidden_act": "silu",
        "hidden_size": args.dim,
        "intermediate_size": args.hidden_dim,
        "num_hidden_layers": args.n_layers,
        "num_attention_heads": args.n_heads,
        "num_key_value_heads": args.n_kv_heads,
        "head_dim": args.head_dim,
        "rms_norm_eps": args.norm_eps,
        "rope_theta": args.rope_theta,
        "max_position_embeddings": args.max_seq_len,
        "sliding_window": args.sliding_window,
        "tie_word_embeddings": args.tied_embeddings,
        "vocab_size": args.vocab_size,
        "use_cache": True,
    } | changes
    return {key: value for key, value in config.items() if value is not ...}


def write_config(folder: Path, args: TransformerArgs = WIDE, **changes: Any) -> None:
    (folder / "config.json").write_text(json.dumps(config_of(args, **changes)))


def write_hf(folder: Path, args: TransformerArgs = WIDE, **extra: Tensor) -> Weights:
    """A folder in Hugging Face's layout, written without transformers; gives its tensors."""
    state = their_state(random_weights(args), args) | extra
    save_file(state, folder / SINGLE)
    write_config(folder, args)
    return state


def load(folder: Path, load_format: Any = "auto", **place: int) -> Transformer:
    opened = open_folder(folder, load_format)
    args = opened.args
    model = Transformer(args, Shard(args, **place), Alone())
    for parameter in model.parameters():
        parameter.data.fill_(torch.nan)
    load_weights(model, opened.headers)
    return model


def faults_of(folder: Path, args: TransformerArgs = WIDE) -> str:
    with pytest.raises(CheckpointError) as caught:
        _ = folder_of(folder, args).headers
    assert "\n" not in str(caught.value)
    return str(caught.value)


def assert_cover(parts: list[Transformer], weights: Weights) -> None:
    """All that ranks hold, put together, is every tensor whole, and where two hold it, the same."""
    for name, weight in weights.items():
        whole = torch.full_like(weight, torch.nan)
        for part in parts:
            placement = part.placements()[name]
            held = part.destination(placement)
            cols = slice(None) if placement.cols is None else slice(*_ends(placement.cols))
            where = (slice(*_ends(placement.rows)), *([cols] if weight.dim() == 2 else []))
            there = whole[where]
            assert bool((there.isnan() | (there == held)).all()), name
            whole[where] = held
        assert torch.equal(whole, weight), name


def _ends(part: range) -> tuple[int, int]:
    return part.start, part.stop


@torch.inference_mode()
def logits(model: Transformer, tokens: Tensor) -> Tensor:
    cache = KVCache(model.shard, 1, len(tokens), model.dtype, model.device)
    scored = model(tokens, [Span(0, 0, len(tokens))], cache, "all")
    assert scored is not None
    return scored


@pytest.mark.parametrize("max_shard_size", ["1GB", "10KB"])
@pytest.mark.parametrize("shape", SHAPES)
def test_both_layouts_are_the_model_that_transformers_runs(
    tmp_path: Path, shape: str, max_shard_size: str
) -> None:
    args = SHAPES[shape]
    theirs = save_by_transformers(tmp_path, args, max_shard_size)
    assert (tmp_path / INDEX).exists() is (max_shard_size == "10KB")
    save_file(random_weights(args), tmp_path / "consolidated.safetensors")
    write_params(tmp_path, args)
    ours = {name: load(tmp_path, name) for name in ("consolidated", "hf")}
    tokens = torch.randint(args.vocab_size, (40,), generator=torch.Generator().manual_seed(3))
    scored = {name: logits(model, tokens) for name, model in ours.items()}
    assert torch.equal(scored["hf"], scored["consolidated"])
    with torch.inference_mode():
        wanted = theirs(tokens[None]).logits[0]
    # Float32 on both sides; products and softmax may be summed in another order.
    torch.testing.assert_close(scored["hf"], wanted, rtol=0, atol=1e-4)


@pytest.mark.parametrize("shape", SHAPES)
def test_ranks_of_every_number_hold_each_tensor_once_or_alike(tmp_path: Path, shape: str) -> None:
    args = SHAPES[shape]
    write_hf(tmp_path, args)
    for world_size in range(1, args.n_heads + 1):
        parts = [load(tmp_path, world_size=world_size, rank=rank) for rank in range(world_size)]
        assert_cover(parts, random_weights(args))


@pytest.mark.parametrize("size", [1, 50, 6 * 96, 13 * 96, 100_000])
def test_heads_are_put_in_order_through_a_buffer_of_any_size(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, size: int
) -> None:
    write_hf(tmp_path)  # a row of wq has 96 bytes, a head 6 rows
    monkeypatch.setattr("mistral_chat.model.loading.CPU_PIECE_BYTES", size)
    assert_cover([load(tmp_path, world_size=2, rank=rank) for rank in range(2)],
                 random_weights(WIDE))  # fmt: skip


@pytest.mark.parametrize("held", [torch.float32, torch.bfloat16])
def test_heads_are_put_in_order_in_any_type(tmp_path: Path, held: torch.dtype) -> None:
    weights = random_weights(WIDE, torch.bfloat16)
    save_file(their_state(weights, WIDE), tmp_path / SINGLE)
    write_config(tmp_path)
    model = Transformer(WIDE, Shard(WIDE), Alone()).to(held)
    load_weights(model, folder_of(tmp_path, WIDE).headers)
    assert_cover([model], {name: weight.to(held) for name, weight in weights.items()})


@pytest.mark.parametrize("rank", range(4))
def test_a_rank_reads_its_rows_and_no_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rank: int
) -> None:
    write_hf(tmp_path)
    whole, read = os.preadv, []

    def note(fd: int, buffers: list[memoryview], offset: int) -> int:
        n = whole(fd, buffers, offset)
        read.append(range(offset, offset + n))
        return n

    monkeypatch.setattr("mistral_chat.model.loading.os.preadv", note)
    model = load(tmp_path, world_size=4, rank=rank)
    tensors = folder_of(tmp_path, WIDE).headers.tensors
    wanted = []
    for name, placement in placements(model.shard, "hf").items():
        n_cols = placement.shape[1] if len(placement.shape) == 2 else 1
        rows, cols, at = placement.rows, placement.cols or range(1), tensors[name].offset
        first, last = rows.start * n_cols + cols.start, (rows.stop - 1) * n_cols + cols.stop
        wanted.append(range(at + 4 * first, at + 4 * last))
    assert sorted(read, key=min) == sorted(wanted, key=min)


@pytest.mark.skipif(sys.platform != "linux", reason="reads the peak memory from /proc")
def test_loading_takes_little_more_memory_than_the_share(tmp_path: Path) -> None:
    table = placements(Shard(load_share.ARGS), "hf")
    assert write_zeros(tmp_path / SINGLE, table, "F32", 4) > 600e6
    grown, share = load_share_apart(tmp_path, "float32")
    assert grown <= share + 80e6  # as in Mistral's layout: the buffer, and what allocators take


@pytest.mark.parametrize("tied", [False, True])
def test_unused_tensors_may_be_there(tmp_path: Path, tied: bool) -> None:
    args = replace(WIDE, tied_embeddings=tied)
    extra = {
        "model.rotary_emb.inv_freq": torch.ones(3),
        "model.layers.1.self_attn.rotary_emb.inv_freq": torch.ones(3),
    }
    if tied:
        extra["lm_head.weight"] = torch.zeros(args.vocab_size, args.dim)
    write_hf(tmp_path, args, **extra)
    assert_cover([load(tmp_path)], random_weights(args))


def test_an_untied_output_must_be_there(tmp_path: Path) -> None:
    write_hf(tmp_path, replace(WIDE, tied_embeddings=True))
    assert faults_of(tmp_path) == f"{tmp_path}: lm_head.weight is missing"


def test_faults_of_files_and_tensors_are_named_at_once(tmp_path: Path) -> None:
    state = their_state(random_weights(WIDE), WIDE)
    del state["model.layers.1.self_attn.k_proj.weight"]
    state["model.layers.7.mlp.up_proj.weight"] = torch.zeros(2)
    state["model.layers.0.self_attn.q_proj.bias"] = torch.zeros(2)
    state["model.norm.weight"] = torch.zeros(25)
    state["lm_head.weight"] = torch.zeros(211, 24, dtype=torch.int8)
    save_file(state, tmp_path / SINGLE)
    write_config(tmp_path)
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": dict.fromkeys(state, SINGLE)
                                              | {"phantom": SINGLE}}))  # fmt: skip
    size = (tmp_path / SINGLE).stat().st_size
    os.truncate(tmp_path / SINGLE, size - 4)
    message = faults_of(tmp_path)
    for fault in (
        f"{SINGLE} has {size - 4:,} bytes, its header says {size:,}: truncated",
        f"{INDEX} says that {SINGLE} holds phantom",
        "model.layers.1.self_attn.k_proj.weight is missing",
        f"model.layers.7.mlp.up_proj.weight in {SINGLE} is not a tensor of this model",
        f"model.layers.0.self_attn.q_proj.bias in {SINGLE} is not a tensor of this model",
        f"model.norm.weight in {SINGLE} has shape [25]; expected [24] from config.json",
        f"lm_head.weight in {SINGLE} has type I8",
    ):
        assert fault in message
    assert message.count(";") == 6 + 3  # 7 faults, three of which have a part of their own


def test_shards_without_an_index_are_read(tmp_path: Path) -> None:
    state = write_hf(tmp_path)
    (tmp_path / SINGLE).unlink()
    for n in (1, 2):
        part = {name: state[name] for name in sorted(state)[n - 1 :: 2]}
        save_file(part, tmp_path / f"model-{n:05}-of-00002.safetensors")
    assert_cover([load(tmp_path)], random_weights(WIDE))
    (tmp_path / "model-00001-of-00002.safetensors").unlink()
    said = f"{tmp_path}: model-00001-of-00002.safetensors is missing"
    assert faults_of(tmp_path) == said


def test_two_sets_of_weights_are_refused(tmp_path: Path) -> None:
    state = write_hf(tmp_path)
    save_file(state, tmp_path / "model-00001-of-00001.safetensors")
    with pytest.raises(CheckpointError, match=r"found 2 sets of weights .* expected one"):
        _ = folder_of(tmp_path).weights


@pytest.mark.parametrize(
    ("files", "auto"),
    [
        ("", "consolidated"),
        ("params", "consolidated"),
        ("config", "hf"),
        ("params config", "consolidated"),
        ("config theirs", "hf"),
        ("params ours", "consolidated"),
        ("params ours config theirs", "consolidated"),
        ("params config theirs", "hf"),  # Mistral's weights were left out of the download
        ("ours config theirs", "hf"),
        ("params ours theirs", "consolidated"),
        ("params theirs", "consolidated"),
        ("ours config", "consolidated"),
        ("theirs", "hf"),
        ("ours", "consolidated"),
    ],
)
@pytest.mark.parametrize("ours", ["consolidated.safetensors", "consolidated.00.pth",
                                  "consolidated-00001-of-00002.safetensors"])  # fmt: skip
@pytest.mark.parametrize("theirs", [SINGLE, "model-00001-of-00002.safetensors"])
def test_choose_layout_prefers_mistrals_own_where_all_of_it_is_there(
    tmp_path: Path, files: str, auto: str, ours: str, theirs: str
) -> None:
    names = {"params": "params.json", "config": "config.json", "ours": ours, "theirs": theirs}
    for word in files.split():
        (tmp_path / names[word]).touch()
    assert choose_layout(tmp_path) == choose_layout(tmp_path, "dummy") == auto
    assert choose_layout(tmp_path, "consolidated") == "consolidated"
    assert choose_layout(tmp_path, "hf") == "hf"


def test_load_format_names_what_it_misses(tmp_path: Path) -> None:
    write_hf(tmp_path)
    with pytest.raises(CheckpointError, match=r"params.json is missing \(found config.json\)"):
        read_args(tmp_path, "consolidated")
    with pytest.raises(CheckpointError, match=rf"weights are missing \(found only {SINGLE}, Hugg"):
        _ = folder_of(tmp_path, load_format="consolidated").weights
    (tmp_path / "config.json").rename(tmp_path / "params.json")
    with pytest.raises(CheckpointError, match=r"config.json is missing \(found params.json\)"):
        read_args(tmp_path, "hf")
    (tmp_path / SINGLE).rename(tmp_path / "consolidated.safetensors")
    with pytest.raises(
        CheckpointError, match=r"found only consolidated.safetensors, Mistral's .* expected model"
    ):
        _ = folder_of(tmp_path, load_format="hf").weights


@pytest.mark.parametrize("shape", SHAPES)
def test_read_args_of_a_config_are_those_of_params(tmp_path: Path, shape: str) -> None:
    write_config(tmp_path, SHAPES[shape])
    assert read_args(tmp_path) == SHAPES[shape]


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_theta": 3e5},
        {"rope_theta": 3e5, "rope_scaling": None, "rope_parameters": None},
        {"rope_theta": ..., "rope_parameters": {"rope_theta": 3e5}},
        {"rope_theta": ..., "rope_parameters": {"rope_theta": 3e5, "rope_type": "default"}},
        {"rope_theta": ..., "rope_scaling": {"rope_theta": 3e5, "type": "default"}},
        {"rope_theta": 3e5, "rope_scaling": {"rope_theta": 3e5}},
        {"rope_theta": 3e5, "rope_parameters": {"rope_type": "default"}},
    ],
)
def test_rope_theta_is_taken_from_where_it_stands(tmp_path: Path, rope: dict[str, Any]) -> None:
    write_config(tmp_path, **rope)
    assert read_args(tmp_path).rope_theta == 3e5


@pytest.mark.parametrize(
    ("changes", "wanted"),
    [
        ({"head_dim": ..., "num_attention_heads": 3}, {"head_dim": 8, "n_heads": 3}),
        ({"head_dim": None, "num_attention_heads": 3}, {"head_dim": 8, "n_heads": 3}),
        ({"sliding_window": None}, {"sliding_window": None}),
        ({"sliding_window": ...}, {"sliding_window": 4096}),  # as transformers has it
        ({"tie_word_embeddings": ...}, {"tied_embeddings": False}),
        ({"max_position_embeddings": ...}, {"max_seq_len": None}),
        ({"hidden_act": ..., "attention_bias": False, "mlp_bias": None}, {}),
        ({"quantization_config": None, "torch_dtype": "bfloat16"}, {}),
    ],
)
def test_read_args_of_a_config_that_leaves_keys_out(
    tmp_path: Path, changes: dict[str, Any], wanted: dict[str, Any]
) -> None:
    write_config(tmp_path, **changes)
    assert read_args(tmp_path) == replace(WIDE, **wanted)


@pytest.mark.parametrize("key", ["architectures", "hidden_size", "num_hidden_layers",
                                 "num_attention_heads", "num_key_value_heads", "intermediate_size",
                                 "vocab_size", "rms_norm_eps", "rope_theta"])  # fmt: skip
@pytest.mark.parametrize("value", [..., None, "8", [8], {}, True, -1])
def test_a_config_without_a_key_or_with_a_wrong_value_is_named(
    tmp_path: Path, key: str, value: Any
) -> None:
    for head_dim in (6, None):  # None follows from two of the others
        write_config(tmp_path, SHAPES["even"], **{"head_dim": head_dim, key: value})
        with pytest.raises(CheckpointError) as caught:
            read_args(tmp_path)
        assert f"config.json: {key} is " in str(caught.value)


def test_all_missing_keys_are_named_at_once(tmp_path: Path) -> None:
    write_config(tmp_path, hidden_size=..., num_hidden_layers=..., head_dim=..., vocab_size=...)
    with pytest.raises(
        CheckpointError, match="hidden_size, num_hidden_layers, vocab_size is missing"
    ):
        read_args(tmp_path)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (
            {"architectures": ["LlamaForCausalLM"]},
            "config.json says LlamaForCausalLM: expected MistralForCausalLM",
        ),
        (
            {"architectures": ["MistralForCausalLM", "B"]},
            "config.json says MistralForCausalLM, B: expected MistralForCausalLM",
        ),
        ({"architectures": []}, "architectures is []"),
        ({"hidden_act": "gelu"}, "hidden_act 'gelu' is not supported: expected 'silu'"),
        ({"attention_bias": True}, "attention_bias True is not supported: expected False"),
        ({"mlp_bias": True}, "mlp_bias True is not supported"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor 0.5 is not supported"),
        ({"quantization_config": {"quant_method": "gguf"}}, "quant_method 'gguf' is not supported"),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "type 'linear' in rope_scaling"),
        ({"rope_parameters": {"rope_type": "llama3"}}, "rope_type 'llama3' in rope_parameters is"),
        (
            {"rope_scaling": {"type": "yarn", "factor": 4.0}},
            "original_max_position_embeddings in rope_scaling is missing",
        ),
        (
            {"rope_scaling": YARN | {"attn_temperature": 2}},
            "attn_temperature in rope_scaling is not supported: not a key we know",
        ),
        ({"rope_scaling": YARN | {"truncate": False}}, "truncate in rope_scaling is not supported"),
        ({"rope_scaling": YARN | {"factor": 0.5}}, "factor is 0.5: expected a number from 1"),
        ({"rope_scaling": YARN | {"mscale": "1"}}, "mscale is '1': expected a number"),
        (
            {"rope_scaling": YARN | {"rope_type": "default"}},
            "type and rope_type in rope_scaling disagree",
        ),
        (
            {"rope_scaling": YARN, "rope_parameters": YARN | {"factor": 5.0}},
            "rope_parameters and rope_scaling disagree",
        ),
        (
            {"architectures": ["Mistral3ForConditionalGeneration"], "text_config": {"dim": 1}},
            "text_config is of model_type None: expected one of mistral",
        ),
        (
            {"sliding_window": 4, "layer_types": ["sliding_attention"]},
            "layer_types is ['sliding_attention']: expected 2 of sliding_attention, full_attention",
        ),
        ({"rope_parameters": {"partial_rotary_factor": 0.5}}, "partial_rotary_factor 0.5 in rope"),
        ({"rope_parameters": [1]}, "rope_parameters is [1]: expected an object"),
        (
            {"rope_parameters": {"rope_theta": 5e4}},
            "rope_theta is 10000.0, 50000.0 in rope_parameters: expected one value",
        ),
        ({"rope_theta": ..., "rope_parameters": {}}, "rope_theta is missing"),
        ({"num_key_value_heads": 2}, "num_attention_heads is 9: expected a multiple of num_key"),
        ({"head_dim": None}, "head_dim is missing and hidden_size (24) is no multiple of num_att"),
        ({"head_dim": 5}, "head_dim is 5: expected an even number"),
        ({"head_dim": "6"}, "head_dim is '6'"),
        ({"sliding_window": [4, None]}, "sliding_window is [4, None]: expected one number or null"),
        ({"sliding_window": 0}, "sliding_window is 0"),
        ({"sliding_window": "4k"}, "sliding_window is '4k'"),
        ({"tie_word_embeddings": "no"}, "tie_word_embeddings is 'no'"),
        ({"max_position_embeddings": "many"}, "max_position_embeddings is 'many'"),
    ],
)
def test_a_config_of_another_model_is_refused_by_name(
    tmp_path: Path, changes: dict[str, Any], said: str
) -> None:
    write_config(tmp_path, **changes)
    with pytest.raises(CheckpointError) as caught:
        read_args(tmp_path)
    assert said in str(caught.value)
    assert str(tmp_path / "config.json") in str(caught.value)


def test_a_params_file_of_another_shape_is_refused(tmp_path: Path) -> None:
    write_hf(tmp_path)
    write_params(tmp_path, replace(WIDE, hidden_dim=48))
    said = "hidden_dim is 48 in params.json, intermediate_size is 40 in config.json"
    for load_format in ("auto", "hf", "consolidated"):
        with pytest.raises(CheckpointError, match=said):
            read_args(tmp_path, load_format)


def test_the_command_answers_alike_from_both_layouts(
    run: Run, tiny_folder: Path, tmp_path: Path
) -> None:
    args = replace(TINY, rope_theta=1e6)
    save_by_transformers(tmp_path, args, "4MB")
    assert len(list(tmp_path.glob("model-*-of-*.safetensors"))) > 1
    shutil.copy(shipped_tokenizer(), tmp_path / "tokenizer.model.v3")
    (tmp_path / "tokenizer.json").write_text("never read")
    words = ("--prompt", "A long enough prompt to tell positions apart", "--max_tokens", 24,
             "--temperature", 0, "--dtype", "float32", "--device", "cpu", "--quiet")  # fmt: skip
    done = [run(tiny_folder, *words), run(tmp_path, *words),
            run(tmp_path, *words, "--load_format", "hf", "--nproc_per_node", 2)]  # fmt: skip
    assert [(each.code, each.err) for each in done] == [(0, "")] * 3
    assert len(done[0].out) > 24
    assert done[0].out == done[1].out == done[2].out


@pytest.mark.parametrize("prefix", ["model.", "model.language_model.", "language_model.model."])
@pytest.mark.parametrize("tied", [False, True])
def test_texts_of_a_model_with_pictures_are_read_under_every_prefix(
    tmp_path: Path, prefix: str, tied: bool
) -> None:
    args = replace(WIDE, tied_embeddings=tied)
    state = their_state(random_weights(args), args)
    head = "language_model.lm_head" if prefix == "language_model.model." else "lm_head"
    renamed = {
        prefix + name.removeprefix("model.") if name.startswith("model.") else f"{head}.weight": w
        for name, w in state.items()
    }
    of_pictures = ("vision_tower.patch_conv.weight", "multi_modal_projector.linear_1.bias",
                   "model.vision_tower.transformer.layers.0.attention.q_proj.weight")  # fmt: skip
    save_file(renamed | {name: torch.zeros(3) for name in of_pictures}, tmp_path / SINGLE)
    config = config_of(args)
    outer = {"architectures": ["Mistral3ForConditionalGeneration"], "vision_config": {"depth": 1}}
    del config["architectures"]
    (tmp_path / "config.json").write_text(
        json.dumps(outer | {"text_config": config | {"model_type": "mistral"}})
    )
    assert read_args(tmp_path) == replace(args, vision_encoder=True)
    for world_size in (1, 2):
        parts = [load(tmp_path, world_size=world_size, rank=rank) for rank in range(world_size)]
        assert_cover(parts, random_weights(args))
    save_file(renamed | {"model.sound_tower.weight": torch.zeros(3)}, tmp_path / SINGLE)
    with pytest.raises(CheckpointError, match=r"model.sound_tower.weight .* is not a tensor of th"):
        _ = open_folder(tmp_path).headers
    del renamed[f"{prefix}norm.weight"]
    save_file(renamed, tmp_path / SINGLE)
    with pytest.raises(CheckpointError, match=f": {prefix}norm.weight is missing"):
        _ = open_folder(tmp_path).headers


def test_texts_of_a_model_with_pictures_are_what_transformers_computes(tmp_path: Path) -> None:
    from transformers import Mistral3Config, Mistral3ForConditionalGeneration

    torch.manual_seed(2)
    texts = {
        "model_type": "ministral3", "vocab_size": 97, "hidden_size": 16, "head_dim": 8,
        "intermediate_size": 20, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "rms_norm_eps": 1e-5, "max_position_embeddings": 512,
        "initializer_range": 0.5, "tie_word_embeddings": False,
        "rope_parameters": YARN | {"rope_type": "yarn", "rope_theta": 1e4,
                                   "llama_4_scaling_beta": 0.1},
    }  # fmt: skip
    pictures = {
        "model_type": "pixtral", "hidden_size": 16, "intermediate_size": 16, "image_size": 32,
        "num_hidden_layers": 1, "num_attention_heads": 2, "patch_size": 16, "head_dim": 8,
    }  # fmt: skip
    theirs = Mistral3ForConditionalGeneration(
        Mistral3Config(text_config=texts, vision_config=pictures, tie_word_embeddings=False)
    ).eval()
    theirs.save_pretrained(tmp_path)
    tokens = torch.randint(97, (60,), generator=torch.Generator().manual_seed(3))
    tokens[tokens == 10] = 11  # which stands for a picture there
    with torch.inference_mode():
        wanted = theirs(input_ids=tokens[None]).logits[0]
    torch.testing.assert_close(logits(load(tmp_path), tokens), wanted, rtol=0, atol=5e-4)
