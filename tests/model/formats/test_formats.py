"""Quantized checkpoints: each format means what its rule says, on any number of ranks."""

import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from mistral_chat.errors import CheckpointError, DeviceError
from mistral_chat.model import loading
from mistral_chat.model.checkpoint import local_bytes
from mistral_chat.model.operations import Alone, Span
from mistral_chat.model.sharding import Placement, Shard, placements
from mistral_chat.model.transformer import Transformer
from tests.conftest import folder_of, load_weights, random_weights
from tests.model.quantized_files import FORMATS, SHAPE, Format, Weights, write_folder
from tests.model.test_transformer import Ranks, assert_close, make_cache

by_format = pytest.mark.parametrize("form", FORMATS.values(), ids=FORMATS)
WORLDS = (1, 2, 3)


def load(folder: Path, form: Format, world_size: int = 1, rank: int = 0) -> Transformer:
    shard = Shard(form.args, world_size, rank)
    model = Transformer(form.args, shard, Alone())
    load_weights(model, folder_of(folder, form.args).headers, 2)
    return model


def held(model: Transformer, placement: Placement) -> Tensor:
    if placement.held is None:
        return model.destination(placement)
    return model.quantized(placement).dequantize(torch.float32)


def part(tensor: Tensor, placement: Placement) -> Tensor:
    tensor = tensor[placement.rows.start : placement.rows.stop]
    return (
        tensor if placement.cols is None else tensor[:, placement.cols.start : placement.cols.stop]
    )


def assert_holds(model: Transformer, meant: Weights) -> None:
    for name, placement in model.placements().items():
        assert torch.equal(held(model, placement), part(meant[name], placement)), name


@by_format
@pytest.mark.parametrize("seed", range(3))
def test_every_rank_holds_its_part_of_what_the_format_means(
    tmp_path: Path, form: Format, seed: int
) -> None:
    meant = write_folder(tmp_path, form, seed)
    for world_size in WORLDS:
        for rank in range(world_size):
            assert_holds(load(tmp_path, form, world_size, rank), meant)


@by_format
@pytest.mark.parametrize("size", [1, 3000])
def test_pieces_of_any_size_make_the_same(
    tmp_path: Path, form: Format, size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    meant = write_folder(tmp_path, form)
    monkeypatch.setattr(loading, "CPU_PIECE_BYTES", size)
    assert_holds(load(tmp_path, form, 2, 1), meant)


@by_format
def test_logits_are_those_of_the_dequantized_checkpoint(tmp_path: Path, form: Format) -> None:
    meant = write_folder(tmp_path, form)
    plain = tmp_path / "plain"
    plain.mkdir()
    save_file(meant, plain / "consolidated.safetensors")
    floats = Transformer(SHAPE)
    load_weights(floats, folder_of(plain, SHAPE).headers)
    tokens = torch.randint(SHAPE.vocab_size, (7,), generator=torch.Generator().manual_seed(1))

    spans = [Span(0, 0, 7)]
    wanted = floats(tokens, spans, make_cache(floats), "all")
    assert wanted is not None
    assert torch.isfinite(wanted).all()
    for world_size in WORLDS:
        ranks = Ranks([load(tmp_path, form, world_size, rank) for rank in range(world_size)])
        assert_close(ranks.forward(tokens, spans), wanted)


@by_format
def test_local_bytes_is_what_a_quantized_model_takes(form: Format) -> None:
    for world_size in WORLDS:
        model = Transformer(form.args, Shard(form.args, world_size, 0), Alone())
        taken = sum(p.numel() * p.element_size() for p in model.parameters())
        assert local_bytes(model.placements().values(), torch.float32) == taken


@by_format
def test_dummy_weights_are_the_same_for_any_number_of_ranks(form: Format) -> None:
    whole = Transformer(form.args)
    whole.init_weights(5)
    full = {name: held(whole, p) for name, p in whole.placements().items()}
    for name, placement in whole.placements().items():
        if placement.held is not None:
            deviation = placement.shape[1] ** -0.5
            assert float(full[name].std()) == pytest.approx(deviation, rel=0.05)
    for rank in range(3):
        model = Transformer(form.args, Shard(form.args, 3, rank), Alone())
        model.init_weights(5)
        assert_holds(model, full)


def test_a_conversion_of_the_model_leaves_quantized_numbers_alone() -> None:
    model = Transformer(FORMATS["native-fp8"].args).to(torch.float16)
    wo = model.blocks[0].attention.get_submodule("wo")
    assert model.dtype == torch.float16
    assert [p.dtype for p in wo.parameters()] == [torch.float8_e4m3fn, torch.float32]


@pytest.mark.parametrize("name", ["native-fp8", "ct-int4-zeros"])
def test_matrices_that_are_kept_stay_floats(tmp_path: Path, name: str) -> None:
    kept = {f"layers.0.attention.w{x}" for x in "qkv"} | {"layers.1.feed_forward.w2"}
    form = FORMATS[name]
    form = replace(form, quantization=replace(form.quantization, kept=frozenset(kept)))
    meant = write_folder(tmp_path, form)
    for rank in range(2):
        model = load(tmp_path, form, 2, rank)
        assert_holds(model, meant)
        assert isinstance(model.blocks[0].attention.wqkv, Tensor)
        assert not isinstance(model.blocks[1].attention.wqkv, Tensor)


def test_scales_of_keys_and_values_are_not_used(tmp_path: Path) -> None:
    def add(stored: Weights) -> None:
        stored["layers.0.attention.k_fake_quantizer.qscale_act"] = torch.ones(())
        stored["layers.1.attention.kv_fake_quantizer.qscale_act"] = torch.zeros(1)

    meant = write_folder(tmp_path, FORMATS["native-fp8"], change=add)
    assert_holds(load(tmp_path, FORMATS["native-fp8"]), meant)


def test_a_kept_part_of_one_matmul_is_refused() -> None:
    form = FORMATS["native-fp8"]
    some = replace(form.quantization, kept=frozenset({"layers.1.feed_forward.w3"}))
    args = replace(SHAPE, quantization=some)
    said = (
        "layers.1.feed_forward.w3 is stored as floats and layers.1.feed_forward.w1 as fp8: "
        "expected both alike, since one matmul has them together"
    )
    with pytest.raises(CheckpointError, match=f"^{re.escape(said)}$"):
        placements(Shard(args))


# Bad input.


def fault(folder: Path, form: Format) -> str:
    """What is said before a byte of weights is read, or while they are."""
    with pytest.raises(CheckpointError) as caught:
        load(folder, form)
    assert "\n" not in str(caught.value)
    return str(caught.value)


SCALES = {
    "native-fp8": "layers.1.attention.wk.qscale_weight",
    "hf-fp8": "model.layers.1.self_attn.k_proj.weight_scale_inv",
    "ct-fp8-row": "model.layers.1.self_attn.k_proj.weight_scale",
    "ct-int4-zeros": "model.layers.1.self_attn.k_proj.weight_scale",
    "awq": "model.layers.1.self_attn.k_proj.scales",
    "gptq": "model.layers.1.self_attn.k_proj.scales",
}
by_scale = pytest.mark.parametrize("name", SCALES)


@by_scale
@pytest.mark.parametrize("value", [0.0, -1.0, torch.nan, torch.inf])
@pytest.mark.parametrize("while_loading", [False, True])
def test_scales_must_be_positive_numbers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, value: float, while_loading: bool
) -> None:
    def spoil(stored: Weights) -> None:
        stored[SCALES[name]].view(-1)[-1] = value

    write_folder(tmp_path, FORMATS[name], change=spoil)
    if while_loading:  # as with scales that are too many to be judged before
        monkeypatch.setattr("mistral_chat.model.formats.values.MOST_BYTES", 0)
    said = fault(tmp_path, FORMATS[name])
    assert SCALES[name] in said
    assert "expected scales that are positive and finite" in said
    if not while_loading:
        assert f"holds {value:g}" in said


@by_scale
def test_scales_that_are_missing_are_named(tmp_path: Path, name: str) -> None:
    write_folder(tmp_path, FORMATS[name], change=lambda stored: stored.pop(SCALES[name]))
    assert fault(tmp_path, FORMATS[name]) == f"{tmp_path}: {SCALES[name]} is missing"


@by_scale
def test_scales_of_another_shape_are_named(tmp_path: Path, name: str) -> None:
    def spoil(stored: Weights) -> None:
        stored[SCALES[name]] = torch.ones(5, 7)

    write_folder(tmp_path, FORMATS[name], change=spoil)
    assert f"{SCALES[name]} in " in (said := fault(tmp_path, FORMATS[name]))
    assert "has shape [5, 7]; expected [" in said


def test_a_packed_shape_that_disagrees_is_named(tmp_path: Path) -> None:
    name = "model.layers.0.mlp.up_proj.weight_shape"

    def spoil(stored: Weights) -> None:
        stored[name] = torch.tensor([192, 127])

    write_folder(tmp_path, FORMATS["ct-int4-group"], change=spoil)
    said = fault(tmp_path, FORMATS["ct-int4-group"])
    assert f"{name} in model.safetensors says [192, 127]: expected [192, 128]" in said


def test_columns_in_another_order_are_refused(tmp_path: Path) -> None:
    name = "model.layers.0.mlp.up_proj.g_idx"

    def spoil(stored: Weights) -> None:
        stored[name] = stored[name].flip(0)

    write_folder(tmp_path, FORMATS["gptq"], change=spoil)
    assert f"{name} in model.safetensors has columns in another order (act-order)" in fault(
        tmp_path, FORMATS["gptq"]
    )


@pytest.mark.parametrize("name", ["native-fp8", "ct-int4-group", "awq"])
def test_floats_where_the_configuration_says_otherwise_are_refused(
    tmp_path: Path, name: str
) -> None:
    form = FORMATS[name]
    floats = replace(form, quantization=replace(form.quantization, kept=frozenset(MATRICES)))
    write_folder(tmp_path, floats)
    config, wq = NAMES[form.layout]
    assert fault(tmp_path, form) == (
        f"{tmp_path}: {config} says that matrices are quantized, but {wq}.weight in "
        f"{FILES[form.layout]} holds F32: expected one kind"
    )


@by_format
def test_quantized_numbers_where_the_configuration_says_floats_are_refused(
    tmp_path: Path, form: Format
) -> None:
    write_folder(tmp_path, form)
    floats = replace(form, quantization=replace(form.quantization, kept=frozenset(MATRICES)))
    config, wq = NAMES[form.layout]
    said = fault(tmp_path, floats)
    assert said.startswith(f"{tmp_path}: {config} says that matrices are floats, but {wq}.")
    assert said.endswith(": expected one kind")


NAMES = {
    "consolidated": ("params.json", "layers.0.attention.wq"),
    "hf": ("config.json", "model.layers.0.self_attn.q_proj"),
}
FILES = {"consolidated": "consolidated.safetensors", "hf": "model.safetensors"}
MATRICES = [
    name.removesuffix(".weight")
    for name, tensor in random_weights(SHAPE).items()
    if name.startswith("layers.") and tensor.dim() == 2
]


@pytest.mark.parametrize(
    ("group", "world_size", "most"),
    [(64, 4, 3), (32, 7, 6)],
)
def test_more_ranks_than_groups_are_refused(group: int, world_size: int, most: int) -> None:
    quantization = replace(FORMATS["ct-int4-group"].quantization, group_size=group)
    args = replace(SHAPE, n_heads=12, head_dim=16, quantization=quantization)
    Shard(args, most)
    with pytest.raises(DeviceError, match=f"expected at most {most} ranks"):
        Shard(args, world_size)


@pytest.mark.parametrize(
    "changes", [{"dim": 144}, {"hidden_dim": 200}, {"n_heads": 3, "head_dim": 40}]
)
def test_groups_that_do_not_divide_a_matrix_are_refused(changes: dict[str, int]) -> None:
    args = replace(SHAPE, quantization=FORMATS["ct-int4-group"].quantization, **changes)
    with pytest.raises(CheckpointError, match="expected a multiple of 32"):
        Shard(args)


@pytest.mark.parametrize("world_size", range(1, 7))
@pytest.mark.parametrize("group", [32, 64])
def test_ranks_together_hold_whole_groups(world_size: int, group: int) -> None:
    quantization = replace(FORMATS["ct-int4-group"].quantization, group_size=group)
    args = replace(SHAPE, n_heads=24, head_dim=16, hidden_dim=384, quantization=quantization)
    shards = [Shard(args, world_size, rank) for rank in range(world_size)]
    for parts in ([s.hidden for s in shards], [s.heads for s in shards]):
        assert [i for part in parts for i in part] == list(range(parts[-1].stop))
    for shard in shards:
        assert len(shard.hidden) % group == 0
        assert len(shard.heads) * 16 % group == 0
