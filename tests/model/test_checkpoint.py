"""Weights on disk: every layout gives the same model, every fault is named, memory stays small."""

import json
import math
import os
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from mistral_chat.errors import CheckpointError
from mistral_chat.model.args import TransformerArgs
from mistral_chat.model.checkpoint import (
    MOST_FAULTS,
    PICKLE,
    local_bytes,
)
from mistral_chat.model.operations import Alone
from mistral_chat.model.sharding import Placement, Shard, placements
from mistral_chat.model.transformer import Transformer
from tests.conftest import folder_of, load_weights, random_weights

ARGS = TransformerArgs(
    dim=24,
    n_layers=2,
    head_dim=6,
    hidden_dim=40,
    n_heads=9,
    n_kv_heads=3,
    norm_eps=1e-5,
    vocab_size=1031,
)
Weights = dict[str, Tensor]
SINGLE = "consolidated.safetensors"
INDEX = "consolidated.safetensors.index.json"


def shard_name(n: int, total: int) -> str:
    return f"consolidated-{n:05}-of-{total:05}.safetensors"


def divide(weights: Weights, n_files: int) -> list[Weights]:
    names = sorted(weights)
    return [{name: weights[name] for name in names[i::n_files]} for i in range(n_files)]


def write_single(folder: Path, weights: Weights) -> None:
    save_file(weights, folder / SINGLE)


def write_pickle(folder: Path, weights: Weights) -> None:
    torch.save(weights, folder / PICKLE)


def write_shards(folder: Path, weights: Weights) -> None:
    for n, part in enumerate(divide(weights, 3), 1):
        save_file(part, folder / shard_name(n, 3))


def write_shards_from_zero(folder: Path, weights: Weights) -> None:
    for n, part in enumerate(divide(weights, 3)):
        save_file(part, folder / shard_name(n, 3))


def write_indexed(folder: Path, weights: Weights) -> None:
    parts = {shard_name(n, 3): part for n, part in enumerate(divide(weights, 3), 1)}
    for name, part in parts.items():
        save_file(part, folder / name)
    write_index(folder, {tensor: file for file, part in parts.items() for tensor in part})


def write_indexed_single(folder: Path, weights: Weights) -> None:
    save_file(weights, folder / SINGLE)
    write_index(folder, dict.fromkeys(weights, SINGLE))


def write_index(folder: Path, weight_map: Any) -> None:
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


LAYOUTS: list[Callable[[Path, Weights], None]] = [
    write_single,
    write_pickle,
    write_shards,
    write_shards_from_zero,
    write_indexed,
    write_indexed_single,
]


def load(
    folder: Path, args: TransformerArgs = ARGS, dtype: torch.dtype = torch.float32, **place: int
) -> Transformer:
    model = Transformer(args, Shard(args, **place), Alone()).to(dtype)
    for parameter in model.parameters():
        parameter.data.fill_(torch.nan)
    load_weights(model, folder_of(folder, args).headers)
    return model


def slices(model: Transformer, weights: Weights) -> Weights:
    """What a rank must hold of each tensor, by plain indexing."""
    wanted = {}
    for name, placement in model.placements().items():
        rows = weights[name][placement.rows.start : placement.rows.stop]
        if placement.cols is not None:
            rows = rows[:, placement.cols.start : placement.cols.stop]
        wanted[name] = rows
    return wanted


def assert_holds(model: Transformer, weights: Weights) -> None:
    for name, wanted in slices(model, weights).items():
        got = model.destination(model.placements()[name])
        assert torch.equal(got, wanted.to(got.dtype)), name


def faults_of(folder: Path, args: TransformerArgs = ARGS) -> str:
    with pytest.raises(CheckpointError) as caught:
        _ = folder_of(folder, args).headers
    assert "\n" not in str(caught.value)  # errors are one line
    return str(caught.value)


@pytest.mark.parametrize("write", [write_single, write_shards, write_indexed])
def test_find_weights_ignores_hugging_faces_copy(
    tmp_path: Path, write: Callable[[Path, Weights], None]
) -> None:
    weights = random_weights(ARGS)
    write(tmp_path, weights)
    (tmp_path / "model-00001-of-00002.safetensors").write_bytes(b"not even a safetensors file")
    (tmp_path / "model-00002-of-00002.safetensors").write_bytes(b"")
    (tmp_path / "model.safetensors.index.json").write_text("{}")
    assert_holds(load(tmp_path), weights)


@pytest.mark.parametrize(
    "pair",
    [
        (write_single, write_shards),
        (write_single, write_indexed),
        (write_single, write_pickle),
        (write_shards, write_pickle),
        (write_indexed, write_pickle),
        (write_indexed_single, write_pickle),
    ],
)
def test_find_weights_refuses_two_sets(
    tmp_path: Path, pair: tuple[Callable[[Path, Weights], None], ...]
) -> None:
    for write in pair:
        write(tmp_path, random_weights(ARGS))
    with pytest.raises(CheckpointError, match=r"found 2 sets of weights .* expected one"):
        _ = folder_of(tmp_path).weights


def test_find_weights_says_what_is_there_instead(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"weights are missing \(found none\)"):
        _ = folder_of(tmp_path).weights
    (tmp_path / "pytorch_model.bin").touch()
    with pytest.raises(CheckpointError, match=r"found only pytorch_model.bin, which is never read"):
        _ = folder_of(tmp_path).weights
    (tmp_path / "model-00001-of-00002.safetensors").touch()
    (tmp_path / "params.json").touch()
    with pytest.raises(
        CheckpointError, match=r"found only model-00001-of-00002.safetensors, Hugging Face's"
    ):
        _ = folder_of(tmp_path).weights


@pytest.mark.parametrize("lost", [1, 2, 3])
def test_check_tensors_names_a_missing_shard(tmp_path: Path, lost: int) -> None:
    write_shards(tmp_path, random_weights(ARGS))
    (tmp_path / shard_name(lost, 3)).unlink()
    assert faults_of(tmp_path) == f"{tmp_path}: {shard_name(lost, 3)} is missing"


def test_check_tensors_names_a_missing_shard_of_an_index(tmp_path: Path) -> None:
    write_indexed(tmp_path, random_weights(ARGS))
    (tmp_path / shard_name(2, 3)).unlink()
    said = f"{tmp_path}: {INDEX} names {shard_name(2, 3)}, which is missing"
    assert faults_of(tmp_path) == said


def test_check_tensors_names_faults_of_files_and_of_tensors_at_once(tmp_path: Path) -> None:
    write_indexed(tmp_path, random_weights(ARGS))
    weight_map = json.loads((tmp_path / INDEX).read_text())["weight_map"]
    broken, lost, long = (shard_name(n, 3) for n in (1, 2, 3))
    (tmp_path / broken).write_bytes(b"<html>not found</html>")
    (tmp_path / lost).unlink()
    with (tmp_path / long).open("ab") as file:
        file.write(b"x")
    write_index(tmp_path, weight_map | {"phantom": long})
    message = faults_of(tmp_path, replace(ARGS, dim=26))
    for said in (
        f"{broken} is truncated or no safetensors file",
        f"{INDEX} names {lost}, which is missing",
        f"{long} has",
        f"{INDEX} says that {long} holds phantom, which it does not",
        f"in {long} has shape",
    ):
        assert said in message
    # What lies in files that nothing is known of is not called missing too.
    assert message.count(" is missing") == 1


def test_check_tensors_calls_a_tensor_missing_that_no_lost_file_can_hold(tmp_path: Path) -> None:
    weights = random_weights(ARGS)
    del weights["norm.weight"]
    write_indexed(tmp_path, weights)
    (tmp_path / shard_name(2, 3)).unlink()
    assert faults_of(tmp_path).endswith("which is missing; norm.weight is missing")


def test_find_weights_refuses_shards_of_two_sets(tmp_path: Path) -> None:
    write_shards(tmp_path, random_weights(ARGS))
    save_file({}, tmp_path / shard_name(1, 2))
    with pytest.raises(CheckpointError, match="shards of several sets"):
        _ = folder_of(tmp_path).weights


def test_find_weights_refuses_pickles_of_several_ranks(tmp_path: Path) -> None:
    for n in range(2):
        torch.save(random_weights(ARGS), tmp_path / f"consolidated.{n:02}.pth")
    with pytest.raises(CheckpointError, match=r"consolidated.00.pth, consolidated.01.pth"):
        _ = folder_of(tmp_path).weights


def test_find_weights_with_an_index_leaves_other_shards_alone(tmp_path: Path) -> None:
    weights = random_weights(ARGS)
    write_indexed(tmp_path, weights)
    save_file({"stray": torch.zeros(1)}, tmp_path / shard_name(1, 9))
    assert_holds(load(tmp_path), weights)


@pytest.mark.parametrize("text", ["", "[]", '{"weight_map": []}', '{"weight_map": {"a": 1}}'])
def test_find_weights_names_an_index_that_is_none(tmp_path: Path, text: str) -> None:
    write_indexed(tmp_path, random_weights(ARGS))
    (tmp_path / INDEX).write_text(text)
    with pytest.raises(CheckpointError, match=re.escape(str(tmp_path / INDEX))):
        _ = folder_of(tmp_path).weights


def test_check_tensors_names_all_faults_in_one_error(tmp_path: Path) -> None:
    weights = random_weights(ARGS)
    del weights["layers.1.attention.wk.weight"]
    del weights["norm.weight"]
    weights["layers.7.attention.wq.weight"] = torch.zeros(2)
    weights["layers.0.attention.wo.weight"] = torch.zeros(24, 53)
    weights["layers.0.ffn_norm.weight"] = torch.zeros(24, 1)
    weights["output.weight"] = torch.zeros(1031, 24, dtype=torch.int8)
    write_single(tmp_path, weights)
    message = faults_of(tmp_path)
    assert str(tmp_path) in message
    for fault in (
        "layers.1.attention.wk.weight is missing",
        "norm.weight is missing",
        f"layers.7.attention.wq.weight in {SINGLE} is not a tensor of this model",
        f"layers.0.attention.wo.weight in {SINGLE} has shape [24, 53]; expected [24, 54]",
        f"layers.0.ffn_norm.weight in {SINGLE} has shape [24, 1]; expected [24]",
        f"output.weight in {SINGLE} has type I8",
    ):
        assert fault in message


def test_check_tensors_says_how_many_faults_it_leaves_out(tmp_path: Path) -> None:
    write_single(tmp_path, {f"stray.{n}": torch.zeros(1) for n in range(5)})
    message = faults_of(tmp_path)
    n_tensors = len(placements(Shard(ARGS)))
    assert message.count("is missing") + message.count("is not a tensor") == MOST_FAULTS
    assert message.endswith(f"; and {n_tensors + 5 - MOST_FAULTS} more")


@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.float8_e4m3fn])
@pytest.mark.parametrize("write", [write_single, write_pickle])
def test_check_tensors_names_a_type_that_is_no_float(
    tmp_path: Path, write: Callable[[Path, Weights], None], dtype: torch.dtype
) -> None:
    weights = random_weights(ARGS)
    weights["norm.weight"] = torch.ones(24).to(dtype)
    write(tmp_path, weights)
    assert "norm.weight in consolidated" in faults_of(tmp_path)
    assert "has type" in faults_of(tmp_path)


@pytest.mark.parametrize("tied", [False, True])
def test_check_tensors_tells_tied_from_untied_embeddings(tmp_path: Path, tied: bool) -> None:
    write_single(tmp_path, random_weights(replace(ARGS, tied_embeddings=tied)))
    fault = faults_of(tmp_path, replace(ARGS, tied_embeddings=not tied))
    assert "output.weight" in fault


def test_read_headers_names_a_tensor_that_stands_twice(tmp_path: Path) -> None:
    weights = random_weights(ARGS)
    write_shards(tmp_path, weights)
    second = tmp_path / shard_name(2, 3)
    save_file(load_file(second) | {"norm.weight": weights["norm.weight"]}, second)
    first = next(
        shard_name(n, 3)
        for n in (1, 2, 3)
        if n != 2 and "norm.weight" in load_file(tmp_path / shard_name(n, 3))
    )
    message = faults_of(tmp_path)
    assert re.search(r"norm\.weight stands in \S+ and in \S+", message)
    assert first in message
    assert second.name in message


def test_read_headers_names_where_index_and_files_disagree(tmp_path: Path) -> None:
    weights = random_weights(ARGS)
    write_indexed(tmp_path, weights)
    weight_map = json.loads((tmp_path / INDEX).read_text())["weight_map"]
    here = weight_map["norm.weight"]
    other = next(name for name in weight_map.values() if name != here)
    write_index(tmp_path, weight_map | {"norm.weight": other, "phantom.weight": here})
    message = faults_of(tmp_path)
    assert f"{INDEX} says that {other} holds norm.weight" in message
    assert f"{INDEX} says that {here} holds phantom.weight" in message


def test_read_headers_names_a_tensor_that_the_index_leaves_out(tmp_path: Path) -> None:
    write_indexed(tmp_path, random_weights(ARGS))
    weight_map = json.loads((tmp_path / INDEX).read_text())["weight_map"]
    del weight_map["norm.weight"]
    write_index(tmp_path, weight_map)
    assert "norm.weight" in faults_of(tmp_path)


@pytest.mark.parametrize("kept", [0, 4, 8, 100, -1])
def test_read_headers_names_a_truncated_file(tmp_path: Path, kept: int) -> None:
    write_shards(tmp_path, random_weights(ARGS))
    path = tmp_path / shard_name(2, 3)
    os.truncate(path, kept if kept >= 0 else path.stat().st_size + kept)
    message = faults_of(tmp_path)
    assert path.name in message
    assert "truncated" in message


def test_read_headers_names_a_file_that_is_too_long(tmp_path: Path) -> None:
    write_single(tmp_path, random_weights(ARGS))
    with (tmp_path / SINGLE).open("ab") as file:
        file.write(b"x")
    assert f"{SINGLE} has" in faults_of(tmp_path)


@pytest.mark.parametrize("kept", [0, 100, -1000])
def test_read_headers_names_a_truncated_pickle(tmp_path: Path, kept: int) -> None:
    write_pickle(tmp_path, random_weights(ARGS))
    path = tmp_path / PICKLE
    os.truncate(path, kept if kept >= 0 else path.stat().st_size + kept)
    assert f"{PICKLE}: cannot be read" in faults_of(tmp_path)


def test_read_headers_names_all_broken_files_at_once(tmp_path: Path) -> None:
    write_shards(tmp_path, random_weights(ARGS))
    os.truncate(tmp_path / shard_name(1, 3), 50)
    (tmp_path / shard_name(3, 3)).write_bytes(b"<html>not found</html>")
    message = faults_of(tmp_path)
    assert shard_name(1, 3) in message
    assert shard_name(3, 3) in message


def safetensors_bytes(header: bytes, n_bytes: int) -> bytes:
    return len(header).to_bytes(8, "little") + header + bytes(n_bytes)


@pytest.mark.parametrize(
    ("header", "n_bytes"),
    [
        (b"not json", 0),
        (b"\xff\xfe{}", 0),
        (b"[]", 0),
        (b'{"norm.weight": 3}', 0),
        (b'{"norm.weight": {"dtype": "F32", "shape": [2]}}', 8),
        (b'{"norm.weight": {"dtype": "F32", "shape": 2, "data_offsets": [0, 8]}}', 8),
        (b'{"norm.weight": {"dtype": "F32", "shape": [2], "data_offsets": [0]}}', 8),
        (b'{"norm.weight": {"dtype": "F32", "shape": [3], "data_offsets": [0, 8]}}', 8),
        (b'{"norm.weight": {"dtype": "F32", "shape": ["x"], "data_offsets": [0, 8]}}', 8),
        (b'{"norm.weight": {"dtype": "F32", "shape": [2], "data_offsets": [-8, 0]}}', 0),
        (b'{"norm.weight": {"dtype": [], "shape": [2], "data_offsets": [0, 8]}}', 8),
    ],
)
def test_read_headers_names_a_file_with_garbage_for_a_header(
    tmp_path: Path, header: bytes, n_bytes: int
) -> None:
    (tmp_path / SINGLE).write_bytes(safetensors_bytes(header, n_bytes))
    assert SINGLE in faults_of(tmp_path)


def test_read_headers_refuses_a_length_that_no_header_has(tmp_path: Path) -> None:
    (tmp_path / SINGLE).write_bytes((2**62).to_bytes(8, "little") + bytes(100))
    assert SINGLE in faults_of(tmp_path)


@pytest.mark.parametrize("value", [[1, 2], {"norm.weight": [1.0]}])
def test_read_headers_refuses_a_pickle_of_anything_else(tmp_path: Path, value: Any) -> None:
    torch.save(value, tmp_path / PICKLE)
    assert PICKLE in faults_of(tmp_path)


class Malicious:
    """Unpickling this runs code: the path is created."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return Path.touch, (self.path,)


def test_read_headers_runs_nothing_that_a_pickle_holds(tmp_path: Path) -> None:
    torch.save({"norm.weight": Malicious(tmp_path / "ran")}, tmp_path / PICKLE)
    assert PICKLE in faults_of(tmp_path)
    assert not (tmp_path / "ran").exists()


def test_read_headers_refuses_a_pickled_tensor_that_is_not_in_order(tmp_path: Path) -> None:
    weights = random_weights(ARGS)
    weights["layers.0.attention.wq.weight"] = weights["layers.0.attention.wq.weight"].T
    torch.save(weights, tmp_path / PICKLE)
    assert "layers.0.attention.wq.weight is not stored whole and in order" in faults_of(tmp_path)


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_local_bytes_is_what_the_parameters_take(world_size: int) -> None:
    for rank in range(world_size):
        model = Transformer(ARGS, Shard(ARGS, world_size, rank), Alone())
        held = sum(p.numel() for p in model.parameters())
        assert local_bytes(model.placements().values(), torch.bfloat16) == 2 * held


def write_zeros(path: Path, table: dict[str, Placement], dtype: str, itemsize: int) -> int:
    """A checkpoint of zeros that takes no room on disk; gives its size."""
    header: dict[str, Any] = {}
    at = 0
    for name, placement in table.items():
        end = at + itemsize * math.prod(placement.shape)
        header[name] = {"dtype": dtype, "shape": placement.shape, "data_offsets": [at, end]}
        at = end
    text = json.dumps(header).encode()
    path.write_bytes(safetensors_bytes(text, 0))
    os.truncate(path, 8 + len(text) + at)
    return at
