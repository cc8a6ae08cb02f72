"""`--quantization` of a checkpoint of floats: the same as quantizing the matrices themselves."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from mistral_chat.errors import UsageError
from mistral_chat.kernels.quantize import quantize
from mistral_chat.model import loading
from mistral_chat.model.formats import as_asked
from mistral_chat.model.operations import Alone
from mistral_chat.model.sharding import Shard
from mistral_chat.model.transformer import Transformer
from mistral_chat.model.weight import QuantizedMatrix
from tests.conftest import TINY, folder_of, load_weights, random_weights
from tests.model.quantized_files import FORMATS, SHAPE
from tests.model.test_hf import their_state

KINDS = ("fp8", "int8", "int4")


def load(folder: Path, kind: Any, world_size: int, rank: int) -> Transformer:
    args = as_asked(SHAPE, kind)
    model = Transformer(args, Shard(args, world_size, rank), Alone())
    # the headers are read for floats, as the folder says
    load_weights(model, folder_of(folder, SHAPE).headers, 2)
    return model


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("layout", ["consolidated", "hf"])
@pytest.mark.parametrize("piece_bytes", [None, 5000])
def test_each_rank_quantizes_its_part(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    kind: str,
    layout: str,
    piece_bytes: int | None,
) -> None:
    weights = random_weights(SHAPE, torch.bfloat16)
    state = weights if layout == "consolidated" else their_state(weights, SHAPE)
    name = "consolidated" if layout == "consolidated" else "model"
    save_file(state, tmp_path / f"{name}.safetensors")
    if piece_bytes:
        monkeypatch.setattr(loading, "CPU_PIECE_BYTES", piece_bytes)
    for world_size in (1, 2, 3):
        model = load(tmp_path, kind, world_size, world_size - 1)
        n_quantized = 0
        for tensor, placement in model.placements().items():
            part = weights[tensor][placement.rows.start : placement.rows.stop]
            if placement.cols is not None:
                part = part[:, placement.cols.start : placement.cols.stop]
            if placement.held is None:
                assert torch.equal(model.destination(placement), part.float()), tensor
                continue
            got = model.quantized(placement)
            wanted = QuantizedMatrix(placement.held, *part.shape).quantized
            quantize(part, wanted)
            assert torch.equal(got.dequantize(torch.float32), wanted.dequantize(torch.float32))
            n_quantized += 1
        assert n_quantized == 7 * SHAPE.n_layers


def test_int4_takes_the_largest_group_that_divides_all_matrices() -> None:
    for changes, group in (
        ({}, 64),
        ({"hidden_dim": 256, "n_heads": 12}, 128),
        ({"dim": 96, "hidden_dim": 96, "n_heads": 3}, 96),
        ({"dim": 160}, 32),
    ):
        quantization = as_asked(replace(SHAPE, **changes), "int4").quantization  # type: ignore[arg-type]
        assert quantization is not None
        assert quantization.group_size == group
    with pytest.raises(UsageError, match="no group of 32 columns or more divides dim"):
        as_asked(replace(SHAPE, dim=100), "int4")


@pytest.mark.parametrize("kind", ["none", *KINDS])
def test_a_quantized_checkpoint_is_not_quantized_again(kind: Any) -> None:
    said = rf"^--quantization {kind}: the checkpoint is stored as int4 \(awq\): leave the flag out$"
    with pytest.raises(UsageError, match=said):
        as_asked(FORMATS["awq"].args, kind)


def test_floats_stay_floats_unless_asked() -> None:
    assert as_asked(TINY, "auto") is TINY
    assert as_asked(TINY, "none") is TINY
