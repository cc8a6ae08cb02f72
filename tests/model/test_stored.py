"""Headers of weights: the formats' own libraries judge them, and no kind of file hangs us."""

import io
import json
import os
import pickle
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from mistral_chat.errors import CheckpointError, one_line
from mistral_chat.model.checkpoint import PICKLE
from mistral_chat.model.stored import StoredTensor, read_header
from tests.conftest import folder_of
from tests.model.test_checkpoint import ARGS, INDEX, SINGLE, random_weights, safetensors_bytes

LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 5\n"
PAIR: dict[str, Any] = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}


def refusal(path: Path) -> str:
    """Why a file is refused, in words for a terminal."""
    try:
        _, faults = read_header(path)
    except CheckpointError as error:
        return one_line(error)
    assert faults
    return one_line("; ".join(faults))


def value_of(tensor: StoredTensor) -> torch.Tensor:
    """What lies where a header says."""
    dtype = tensor.torch_dtype
    data = tensor.path.read_bytes()[tensor.offset :]
    n = torch.Size(tensor.shape).numel()
    return torch.frombuffer(bytearray(data), dtype=dtype, count=n).view(tensor.shape)


@pytest.mark.parametrize(
    ("header", "n_bytes"),
    [
        ({"a": PAIR, "b": PAIR}, 8),  # they overlap
        ({"a": PAIR, "b": PAIR | {"data_offsets": [4, 12]}}, 12),
        ({"a": PAIR, "b": PAIR | {"data_offsets": [12, 20]}}, 20),  # a hole between them
        ({"a": PAIR | {"data_offsets": [8, 16]}}, 16),  # a hole before it
        ({"a": PAIR | {"shape": [2.0]}}, 8),
        ({"a": PAIR | {"shape": [2.5]}}, 8),
        ({"a": PAIR | {"shape": ["2"]}}, 8),
        ({"a": PAIR | {"shape": [True, 2]}}, 8),
        ({"a": PAIR | {"shape": [-1, -2]}}, 8),
        ({"a": PAIR | {"shape": [2**63, 0]}}, 8),
        ({"a": PAIR | {"shape": [10**29]}}, 8),
        ({"a": PAIR | {"shape": [1] * 100_000}}, 8),
        ({"a": PAIR | {"data_offsets": [0.0, 8.0]}}, 8),
        ({"a": PAIR | {"data_offsets": [0, 8.7]}}, 8),
        ({"a": PAIR | {"data_offsets": [8, 0]}}, 8),
        ({"a": PAIR | {"data_offsets": [-8, 8]}}, 8),
        ({"a": PAIR | {"data_offsets": "08"}}, 8),
        ({"a": PAIR | {"dtype": "F33"}}, 8),
        ({"a" * 5000: PAIR | {"dtype": "\x1b[2J" * 900}}, 8),
        ({"a": PAIR, "__metadata__": {"format": 1}}, 8),
        ('{"a": 1e999}', 0),
        ('{"a": {"dtype": "F32", "shape": [1e999], "data_offsets": [0, 8]}}', 8),
        ('{"a": ' + "[" * 100_000, 0),
        ('{"a": ' + "9" * 4000 + "}", 0),
        (f'{{"a": {json.dumps(PAIR)}, "a": {json.dumps(PAIR)}}}', 8),
        ('{"a": {"dtype": "F32", "shape": [2], "shape": [2], "data_offsets": [0, 8]}}', 8),
    ],
)
def test_a_safetensors_header_that_the_library_would_not_write_is_refused(
    tmp_path: Path, header: Any, n_bytes: int
) -> None:
    text = header if isinstance(header, str) else json.dumps(header)
    path = tmp_path / SINGLE
    path.write_bytes(safetensors_bytes(text.encode(), n_bytes))
    said = refusal(path)
    assert SINGLE in said
    assert "\x1b" not in said


@pytest.mark.parametrize("name", [SINGLE, PICKLE])
def test_no_kind_of_file_in_the_place_of_weights_hangs_or_fills_memory(
    tmp_path: Path, name: str
) -> None:
    path = tmp_path / name
    os.mkfifo(path)
    assert "no regular file" in refusal(path)
    path.unlink()
    path.symlink_to("/dev/zero")
    assert "no regular file" in refusal(path)
    path.unlink()
    path.mkdir()
    assert "is a folder" in refusal(path)
    path.rmdir()
    path.symlink_to(path)
    assert "cannot be read" in refusal(path)
    path.unlink()
    path.write_bytes(LFS)
    assert "Git LFS pointer" in refusal(path)
    assert "git lfs pull" in refusal(path)
    path.write_bytes(b"")
    os.truncate(path, 1 << 40)  # a terabyte that takes no room
    assert refusal(path)
    path.write_bytes((1 << 39).to_bytes(8, "little"))
    os.truncate(path, 1 << 40)
    assert refusal(path)


def rewrite(source: Path, into: Path, method: int, **changes: bytes) -> None:
    """A zip file's records in another one, as zip tools write them."""
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(into, "w", method) as new:
        for info in old.infolist():
            data = changes.get(Path(info.filename).name, old.read(info))
            new.writestr(info.filename, data)


@pytest.mark.parametrize("order", [1, -1])
@pytest.mark.parametrize("prefix", [b"", b"#!/bin/sh\nexit 0\n"])
def test_a_pickle_that_a_zip_tool_rewrote_is_read_where_its_records_lie(
    tmp_path: Path, order: int, prefix: bytes
) -> None:
    weights = {f"t{n}": torch.randn(n + 1, 3) for n in range(20)}
    torch.save(weights, tmp_path / "saved")
    path = tmp_path / PICKLE
    with zipfile.ZipFile(tmp_path / "saved") as old, zipfile.ZipFile(path, "w") as new:
        for info in old.infolist()[::order]:
            new.writestr(info.filename, old.read(info))
    path.write_bytes(prefix + path.read_bytes())
    tensors, faults = read_header(path)
    assert faults == []
    for name, weight in weights.items():
        assert torch.equal(value_of(tensors[name]), weight), name


def test_tensors_of_one_storage_are_read_from_it(tmp_path: Path) -> None:
    whole = torch.randn(6, 4)
    torch.save({"whole": whole, "part": whole[2:5], "same": whole}, tmp_path / PICKLE)
    tensors, faults = read_header(tmp_path / PICKLE)
    assert faults == []
    for name, wanted in (("whole", whole), ("part", whole[2:5]), ("same", whole)):
        assert torch.equal(value_of(tensors[name]), wanted)


def test_a_pickle_whose_bytes_are_not_its_tensors_is_refused(tmp_path: Path) -> None:
    saved, path = tmp_path / "saved", tmp_path / PICKLE
    torch.save({"a": torch.randn(100), "b": torch.zeros(100)}, saved)
    rewrite(saved, path, zipfile.ZIP_DEFLATED)
    assert "compressed" in refusal(path)
    rewrite(saved, path, zipfile.ZIP_STORED, byteorder=b"big")
    assert "byte order" in refusal(path)
    rewrite(saved, path, zipfile.ZIP_STORED, **{"1": b"short"})
    assert "b needs 400 bytes of a record that has 5" in refusal(path)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("x/data.pkl", pickle.dumps({"a": 1}))
        archive.writestr("y/data.pkl", pickle.dumps({"a": 1}))
    assert "no file of torch.save's" in refusal(path)
    torch.save({"a": torch.randn(100)}, path, _use_new_zipfile_serialization=False)
    assert "cannot be read as tensors" in refusal(path)


def test_a_directory_of_a_pickle_that_claims_terabytes_is_refused(tmp_path: Path) -> None:
    path = tmp_path / PICKLE
    torch.save({"a": torch.randn(4)}, tmp_path / "saved")
    rewrite(tmp_path / "saved", path, zipfile.ZIP_STORED)
    data = bytearray(path.read_bytes())
    end = data.rindex(b"PK\x05\x06")
    struct.pack_into("<I", data, end + 12, 3 << 30)  # the size of the directory
    with path.open("wb") as file:
        file.seek(4 << 30)  # a hole, which takes no room
        file.write(data)
    assert "its directory claims 3,221,225,472 bytes" in refusal(path)


def test_the_pickle_is_all_that_torch_sees(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.save({"a": torch.randn(1000)}, tmp_path / PICKLE)
    seen: list[tuple[Any, dict[str, Any]]] = []
    load = torch.load

    def spy(file: Any, **options: Any) -> Any:
        seen.append((file, options))
        return load(file, **options)

    monkeypatch.setattr(torch, "load", spy)
    read_header(tmp_path / PICKLE)
    ((file, options),) = seen
    assert isinstance(file, io.BytesIO)
    assert len(file.getvalue()) < 2000
    assert options["weights_only"]


@pytest.mark.parametrize(
    "name",
    ["../secret.safetensors", "/etc/passwd", "a/b.safetensors", "n" * 300 + ".safetensors", "",
     "..", "nul\0.safetensors", "half\ud800.safetensors", "\x1b[2J.safetensors",
     "model.bin"],
)  # fmt: skip
def test_an_index_names_files_of_its_folder_alone(tmp_path: Path, name: str) -> None:
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": {"norm.weight": name}}))
    with pytest.raises(CheckpointError, match=r"names the file .* expected NAME.safetensors") as no:
        _ = folder_of(tmp_path).weights
    assert "\x1b" not in one_line(no.value)


def test_shards_of_a_number_that_no_set_has_are_not_counted_out(tmp_path: Path) -> None:
    save_file({}, tmp_path / "consolidated-00001-of-99999999999999.safetensors")
    with pytest.raises(CheckpointError, match="weights are missing"):
        _ = folder_of(tmp_path).weights


def test_adapters_that_are_not_merged_are_named(tmp_path: Path) -> None:
    weights = random_weights(ARGS) | {"layers.0.attention.wq.lora_A.weight": torch.zeros(2, 2)}
    save_file(weights, tmp_path / SINGLE)
    with pytest.raises(CheckpointError, match=r"lora_A.weight in .* is of an adapter \(LoRA\)"):
        _ = folder_of(tmp_path, ARGS).headers


@pytest.mark.parametrize("save", [save_file, torch.save])
def test_headers_of_sound_files_say_where_tensors_lie(
    tmp_path: Path, save: Callable[..., None]
) -> None:
    weights = random_weights(ARGS)
    path = tmp_path / (SINGLE if save is save_file else PICKLE)
    save(weights, path)
    tensors, faults = read_header(path)
    assert faults == []
    loaded = load_file(path) if save is save_file else torch.load(path)
    for name, weight in loaded.items():
        assert torch.equal(value_of(tensors[name]), weight)
