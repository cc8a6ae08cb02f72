"""The header of one file of weights: a safetensors or a torch.save file.

The formats' own libraries decide whether a file is valid; no tensor data is read. Where each tensor
lies is worked out here, because slices are read. Knows nothing of models. Imports torch only for
torch.save files, so that safetensors files can be checked before ranks are started.
"""

import io
import math
import os
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError, safe_open

from mistral_chat.errors import CheckpointError, named, one_line, shown
from mistral_chat.files import decode_text, open_regular, parse_json

if TYPE_CHECKING:
    import torch

__all__ = ["FLOATS", "TYPES", "StoredTensor", "read_header"]

MAX_HEADER_BYTES = 1 << 24  # ten times a thousand layers' header; safetensors stops at 100 MB
MOST_DIMENSIONS = 8
MOST_RECORDS = 100_000  # of a torch.save file, whose pickle has at most 256 bytes for each
LOCAL_HEADER_BYTES = 30  # of a zip file's record, before its name

# Types that matrices, norms and scales may be stored in: torch's name, the bytes of an element.
FLOATS = {
    "F64": ("float64", 8),
    "F32": ("float32", 4),
    "F16": ("float16", 2),
    "BF16": ("bfloat16", 2),
}
# With those of quantized matrices.
TYPES = FLOATS | {
    "F8_E4M3": ("float8_e4m3fn", 1),
    "I8": ("int8", 1),
    "I32": ("int32", 4),
    "I64": ("int64", 8),
}


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """Where a file holds one tensor, row-major and uncompressed.

    Args:
        path: the file.
        dtype: name of the type, as the file writes it.
        shape: of the whole tensor.
        offset: of its first byte in the file.
    """

    path: Path
    dtype: str
    shape: tuple[int, ...]
    offset: int

    @property
    def torch_dtype(self) -> "torch.dtype":
        """The type in torch; raises KeyError if no weights have it."""
        import torch

        dtype = getattr(torch, TYPES[self.dtype][0])
        assert isinstance(dtype, torch.dtype)
        return dtype


Found = tuple[dict[str, StoredTensor], list[str]]


def read_header(path: Path) -> Found:
    """Read a file's tensors by name, and what is wrong with some of them.

    Args:
        path: of a safetensors file, or with the suffix .pth of a torch.save file.

    Raises:
        CheckpointError: the file cannot be read, or its header makes no sense.
    """
    with open_regular(path, CheckpointError) as (fd, size):
        if path.suffix == ".pth":
            return _pickle_header(path, fd, size)
        return _safetensors_header(path, fd, size)


def _safetensors_header(path: Path, fd: int, size: int) -> Found:
    """Format: https://huggingface.co/docs/safetensors: 8 bytes of length, JSON, data."""
    length = int.from_bytes(os.pread(fd, 8, 0), "little")
    if size < 8 or length > min(size - 8, MAX_HEADER_BYTES):
        raise CheckpointError(
            f"{path.name} is truncated or no safetensors file: {size:,} bytes, of which "
            f"the header claims {length:,}"
        )
    where = f"the header of {path.name}"
    text = decode_text(os.pread(fd, length, 8), where, CheckpointError)
    header = parse_json(text, where, CheckpointError)
    if not isinstance(header, dict):
        raise CheckpointError(f"{where} is {shown(header)}: expected a JSON object")
    tensors = {}
    faults = []
    end = 8 + length
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        tensor, n_bytes = _entry(path, name, entry, 8 + length)
        tensors[name] = tensor
        known = TYPES.get(tensor.dtype)
        if known is not None and n_bytes != math.prod(tensor.shape) * known[1]:
            faults.append(
                f"{path.name}: {named(name)} has {n_bytes:,} bytes, which is not its shape "
                f"{list(tensor.shape)} in {tensor.dtype}"
            )
        end = max(end, tensor.offset + n_bytes)
    if size != end:
        faults.append(
            f"{path.name} has {size:,} bytes, its header says {end:,}: "
            f"{'truncated' if size < end else 'damaged'}; fetch it again"
        )
    if not faults:
        try:
            with safe_open(path, "np"):  # maps the file, and reads its header alone
                pass
        except (SafetensorError, OSError) as error:  # overlaps, holes, types that it does not know
            raise CheckpointError(
                f"{path.name} is refused by safetensors ({one_line(error, 120)}): fetch it again"
            ) from error
    return tensors, faults


def _entry(path: Path, name: str, entry: Any, begin: int) -> tuple[StoredTensor, int]:
    """One tensor of a safetensors header, and its bytes."""
    try:
        dtype, shape, (first, last) = entry["dtype"], entry["shape"], entry["data_offsets"]
        is_sound = (
            isinstance(dtype, str)
            and isinstance(shape, list)
            and len(shape) <= MOST_DIMENSIONS
            and all(type(n) is int and 0 <= n < 2**63 for n in (*shape, first, last))
            and first <= last
        )
    except (KeyError, TypeError, ValueError):
        is_sound = False
    if not is_sound:
        raise CheckpointError(
            f"the header of {path.name} is malformed: {named(name)} is {shown(entry, 100)}"
        )
    return StoredTensor(path, dtype, tuple(shape), begin + first), last - first


def _pickle_header(path: Path, fd: int, size: int) -> Found:
    """Read what `torch.save` wrote: a zip file of one pickle and a record for each storage.

    torch unpickles it from an archive in memory whose records are empty, and sees nothing else of
    the file. The offset that torch then gives for a storage identifies the record. The record's
    real offset comes from the file's zip directory: torch computes offsets as torch.save lays them
    out, and a file may have been repacked since.
    """
    import torch
    from torch._subclasses.fake_tensor import FakeTensorMode  # the documented way to load headers

    try:
        with _SmallReads(fd, closefd=False) as file, zipfile.ZipFile(file) as archive:
            pickled, records = _records(path, archive, fd, size)
        skeleton, places = _skeleton(pickled, records)
        with FakeTensorMode():
            state = torch.load(skeleton, map_location="cpu", weights_only=True)
        return _placed(path, state, places)
    except CheckpointError:
        raise
    except Exception as error:  # torch.load raises its own, pickle's, zip's and OS errors
        first_line = (str(error) or type(error).__name__).splitlines()[0]
        raise CheckpointError(
            f"{path.name}: cannot be read as tensors by name (weights_only): "
            f"{one_line(first_line, 120)}"
        ) from error


def _placed(path: Path, state: Any, places: dict[int | None, "_Record"]) -> Found:
    if not isinstance(state, dict):
        raise CheckpointError(f"{path.name}: found a {type(state).__name__}, expected a dict")
    import torch

    names = {getattr(torch, dtype): name for name, (dtype, _) in TYPES.items()}
    tensors = {}
    faults = []
    for name, tensor in state.items():
        if not isinstance(name, str) or not isinstance(tensor, torch.Tensor):
            raise CheckpointError(f"{path.name}: {shown(name)} is no tensor with a name")
        record = places.get(getattr(tensor.untyped_storage(), "_checkpoint_offset", None))
        begin = int(tensor.storage_offset()) * tensor.dtype.itemsize
        n_bytes = tensor.numel() * tensor.dtype.itemsize
        if record is None or not tensor.is_contiguous():
            faults.append(
                f"{path.name}: {named(name)} is not stored whole and in order; save it again as "
                f"safetensors"
            )
        elif begin + n_bytes > record.n_bytes:
            faults.append(
                f"{path.name}: {named(name)} needs {begin + n_bytes:,} bytes of a record that has "
                f"{record.n_bytes:,}: damaged; fetch it again"
            )
        dtype = names.get(tensor.dtype, str(tensor.dtype))
        offset = begin + (record.offset if record else 0)
        tensors[name] = StoredTensor(path, dtype, tuple(tensor.shape), offset)
    return tensors, faults


@dataclass(frozen=True, slots=True)
class _Record:
    """Where a zip file holds the bytes of a storage."""

    offset: int
    n_bytes: int


class _SmallReads(io.FileIO):
    """A file whose reads are limited to the size that a zip directory may have."""

    def read(self, size: int | None = -1, /) -> bytes:
        if size is None or size < 0:
            size = MAX_HEADER_BYTES
        if size > MAX_HEADER_BYTES:
            raise zipfile.BadZipFile(f"its directory claims {size:,} bytes")
        return super().read(size) or b""


def _records(
    path: Path, archive: zipfile.ZipFile, fd: int, size: int
) -> tuple[bytes, dict[str, _Record]]:
    """The pickle of a torch.save file, and the records of its storages by key.

    Raises:
        CheckpointError: it is no such file, or it does not hold the tensors' bytes as they are.
    """
    again = "save it again as safetensors, or with torch.save"
    infos = archive.infolist()
    pickles = [info for info in infos if info.filename.endswith("/data.pkl")]
    if len(pickles) != 1 or len({info.filename for info in infos}) < len(infos):
        raise CheckpointError(f"{path.name} is no file of torch.save's: {again}")
    if max(len(infos), pickles[0].file_size >> 8) > MOST_RECORDS:
        raise CheckpointError(
            f"{path.name} has {len(infos):,} records, named in {pickles[0].file_size:,} bytes: "
            f"more than a model has"
        )
    folder = pickles[0].filename.removesuffix("data.pkl")
    records = {}
    for info in infos:
        if info.filename == f"{folder}byteorder" and (
            info.file_size > 16 or archive.read(info).strip() != b"little"
        ):
            raise CheckpointError(f"{path.name} is of a machine of the other byte order: {again}")
        key = info.filename.removeprefix(f"{folder}data/")
        if key == info.filename:
            continue
        if info.compress_type != zipfile.ZIP_STORED or info.flag_bits & 1:
            raise CheckpointError(f"{path.name} is compressed or encrypted: {again}")
        local = os.pread(fd, LOCAL_HEADER_BYTES, info.header_offset)
        name_bytes, extra_bytes = (int.from_bytes(local[at : at + 2], "little") for at in (26, 28))
        offset = info.header_offset + LOCAL_HEADER_BYTES + name_bytes + extra_bytes
        if not local.startswith(b"PK\x03\x04") or offset + info.file_size > size:
            raise CheckpointError(f"{path.name} is damaged at its record {named(key)}: {again}")
        records[key] = _Record(offset, info.file_size)
    return archive.read(pickles[0]), records


def _skeleton(
    pickled: bytes, records: dict[str, _Record]
) -> tuple[io.BytesIO, dict[int | None, _Record]]:
    """An archive with the pickle and empty records, and the real record for each offset in it."""
    file = io.BytesIO()
    places: dict[int | None, _Record] = {}
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("archive/data.pkl", pickled)
        archive.writestr("archive/version", "3\n")
        for key, record in records.items():
            archive.writestr(f"archive/data/{key}", b"")
            places[file.tell()] = record
    file.seek(0)
    return file, places
