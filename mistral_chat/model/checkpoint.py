"""Weights on disk: which files, which tensors, all faults at once, and only this rank's slices.

Knows files and bytes; what goes where comes from the model's placements. Tensors are read with
positioned reads into small buffers, never mapped, so host memory grows by the slices alone.
"""

import json
import math
import os
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from mistral_chat.errors import CheckpointError
from mistral_chat.model.args import read_json_object
from mistral_chat.model.sharding import Placement
from mistral_chat.model.transformer import Transformer

__all__ = ["StoredTensor", "check_tensors", "find_weights", "load_weights", "read_headers"]

SINGLE = "consolidated.safetensors"
INDEX = "consolidated.safetensors.index.json"
PICKLE = "consolidated.00.pth"
BUFFER_BYTES = 32 * 2**20
MAX_HEADER_BYTES = 100_000_000  # the safetensors format's own limit

_FLOATS = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
}

OnBytes = Callable[[int], None]


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """One tensor of a checkpoint: row-major, uncompressed.

    Args:
        path: the file that holds it.
        dtype: its type's name, as the file has it.
        shape: its whole shape.
        offset: first byte in the file.
    """

    path: Path
    dtype: str
    shape: tuple[int, ...]
    offset: int

    @property
    def torch_dtype(self) -> torch.dtype:
        """Type as torch has it; a KeyError where it is not a float."""
        return _FLOATS[self.dtype]


def find_weights(folder: Path) -> list[Path]:
    """The files of the folder's one set of weights in Mistral's layout.

    Raises:
        CheckpointError: no set, more than one, or a shard that is not there.
    """
    shards = _shards(folder)
    sets: dict[str, list[Path]] = {}
    if (folder / INDEX).exists():
        sets[INDEX] = [folder / name for name in sorted(set(_read_index(folder).values()))]
    elif shards:
        sets["consolidated-*-of-*.safetensors"] = shards
    if (folder / SINGLE).exists() and sets.get(INDEX) != [folder / SINGLE]:
        sets[SINGLE] = [folder / SINGLE]
    pickles = sorted(folder.glob("consolidated.*.pth"))
    if pickles:
        if [path.name for path in pickles] != [PICKLE]:
            raise CheckpointError(
                f"{folder}: found {', '.join(p.name for p in pickles)}; expected {PICKLE} alone "
                f"(parts for several pipeline or model ranks are not supported)"
            )
        sets[PICKLE] = pickles
    if len(sets) > 1:
        raise CheckpointError(
            f"{folder}: found {len(sets)} sets of weights ({', '.join(sets)}); expected one: "
            f"remove or move the others"
        )
    if not sets:
        other = sorted(p.name for p in folder.glob("model*.safetensors"))
        found = f"only {other[0]}, Hugging Face's layout" if other else "none"
        raise CheckpointError(
            f"{folder}: weights are missing (found {found}); expected {SINGLE}, "
            f"consolidated-*-of-*.safetensors or {PICKLE}"
        )
    (files,) = sets.values()
    missing = [path.name for path in files if not path.exists()]
    if missing:
        raise CheckpointError(f"{folder}: {INDEX} names {', '.join(missing)}, which is missing")
    return files


def _shards(folder: Path) -> list[Path]:
    """`consolidated-NNNNN-of-MMMMM.safetensors` in order, all of one complete set.

    An index decides instead where there is one; then only its files are read.
    """
    numbered: dict[tuple[int, int], Path] = {}
    for path in folder.glob("consolidated-*-of-*.safetensors"):
        match = re.fullmatch(r"consolidated-(\d+)-of-(\d+)\.safetensors", path.name)
        if match:
            numbered[int(match[2]), int(match[1])] = path
    totals = {total for total, _ in numbered}
    if not totals or (folder / INDEX).exists():
        return []
    if len(totals) > 1:
        raise CheckpointError(
            f"{folder}: shards of several sets (of {', '.join(map(str, sorted(totals)))}); "
            f"expected one set"
        )
    (total,) = totals
    first = 0 if (total, 0) in numbered else 1
    missing = [n for n in range(first, first + total) if (total, n) not in numbered]
    if missing:
        raise CheckpointError(
            f"{folder}: shard {', '.join(map(str, missing))} of {total} is missing; "
            f"expected {total} files consolidated-NNNNN-of-{total:05}.safetensors"
        )
    return [numbered[total, n] for n in range(first, first + total)]


def _read_index(folder: Path) -> dict[str, str]:
    weight_map = read_json_object(folder / INDEX).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(v, str) for v in weight_map.values()):
        raise CheckpointError(f"{folder / INDEX}: expected a weight_map of tensor to file names")
    return weight_map


def read_headers(folder: Path) -> dict[str, StoredTensor]:
    """All tensors of the folder's weights by name, without reading any of their data.

    Raises:
        CheckpointError: a file that is unreadable, truncated or malformed, a tensor that stands
            twice, or an index that disagrees with its files; all faults at once.
    """
    tensors: dict[str, StoredTensor] = {}
    faults: list[str] = []
    for path in find_weights(folder):
        try:
            found = _pickle_header(path) if path.suffix == ".pth" else _safetensors_header(path)
        except CheckpointError as error:
            faults.append(str(error))
            continue
        for name in sorted(tensors.keys() & found.keys()):
            faults.append(f"{name} stands in {tensors[name].path.name} and in {path.name}")
        tensors |= found
    if not faults and (folder / INDEX).exists():
        index = _read_index(folder)
        for name, file in sorted(index.items()):
            if name not in tensors or tensors[name].path.name != file:
                faults.append(f"{INDEX} says that {file} holds {name}, which it does not")
        for name in sorted(tensors.keys() - index.keys()):
            faults.append(f"{tensors[name].path.name} holds {name}, which {INDEX} leaves out")
    _raise_faults(folder, faults)
    return tensors


def check_tensors(
    folder: Path, tensors: dict[str, StoredTensor], table: dict[str, Placement]
) -> None:
    """Hold a checkpoint's tensors against the ones that the model needs.

    Raises:
        CheckpointError: every tensor that is missing, unexpected, of the wrong shape or not a
            float, by name.
    """
    faults = [f"{name} is missing" for name in table if name not in tensors]
    for name, tensor in tensors.items():
        if name not in table:
            faults.append(f"{name} in {tensor.path.name} is not a tensor of this model")
        elif tensor.dtype not in _FLOATS:
            faults.append(
                f"{name} in {tensor.path.name} has type {tensor.dtype}; "
                f"expected one of {', '.join(_FLOATS)}"
            )
        elif tensor.shape != table[name].shape:
            faults.append(
                f"{name} in {tensor.path.name} has shape {list(tensor.shape)}; "
                f"expected {list(table[name].shape)} from params.json"
            )
    _raise_faults(folder, faults)


def _raise_faults(folder: Path, faults: list[str]) -> None:
    if not faults:
        return
    shown = "; ".join(faults[:20])
    more = f"; and {len(faults) - 20} more" if len(faults) > 20 else ""
    raise CheckpointError(f"{folder}: {shown}{more}")


def _safetensors_header(path: Path) -> dict[str, StoredTensor]:
    """Parse and check one safetensors header against the file's length.

    Format: https://huggingface.co/docs/safetensors: 8 bytes of length, JSON, data.
    """
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if size < 8 or length > min(size - 8, MAX_HEADER_BYTES):
                raise CheckpointError(
                    f"{path.name} is truncated or no safetensors file: {size:,} bytes, of which "
                    f"the header claims {length:,}"
                )
            header = json.loads(file.read(length))
    except OSError as error:
        raise CheckpointError(f"{path.name}: cannot be read ({error.strerror})") from error
    except ValueError as error:
        raise CheckpointError(f"{path.name}: its header is not valid JSON ({error})") from error
    tensors = {}
    end = 8 + length
    try:
        for name, entry in header.items():
            if name == "__metadata__":
                continue
            shape = tuple(int(n) for n in entry["shape"])
            first, last = (8 + length + int(n) for n in entry["data_offsets"])
            if not 8 + length <= first <= last:
                raise ValueError(f"{name} lies at bytes {entry['data_offsets']}")
            tensors[name] = StoredTensor(path, str(entry["dtype"]), shape, first)
            dtype = _FLOATS.get(entry["dtype"])
            if dtype is not None and last - first != math.prod(shape) * dtype.itemsize:
                raise CheckpointError(
                    f"{path.name}: {name} has {last - first:,} bytes, which is not its shape "
                    f"{list(shape)} in {entry['dtype']}"
                )
            end = max(end, last)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{path.name}: its header is malformed ({error!r})") from error
    if size != end:
        raise CheckpointError(
            f"{path.name} has {size:,} bytes, its header says {end:,}: "
            f"{'truncated' if size < end else 'damaged'}; fetch it again"
        )
    return tensors


def _pickle_header(path: Path) -> dict[str, StoredTensor]:
    """Where a `torch.save` file keeps its tensors; read with weights_only, without their data."""
    from torch._subclasses.fake_tensor import FakeTensorMode  # the documented way to load headers

    try:
        with FakeTensorMode():
            state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch.load raises its own, pickle's, zip's and OS errors
        raise CheckpointError(
            f"{path.name}: cannot be read as tensors by name (weights_only): "
            f"{(str(error) or type(error).__name__).splitlines()[0]}"
        ) from error
    if not isinstance(state, dict):
        raise CheckpointError(f"{path.name}: found a {type(state).__name__}, expected a dict")
    names = {dtype: name for name, dtype in _FLOATS.items()}
    tensors = {}
    for name, tensor in state.items():
        if not isinstance(tensor, Tensor):
            raise CheckpointError(f"{path.name}: {name} is no tensor")
        start = tensor.untyped_storage()._checkpoint_offset
        if start is None or not tensor.is_contiguous():
            raise CheckpointError(
                f"{path.name}: {name} is not stored whole and in order; save it again as "
                f"safetensors"
            )
        offset = start + int(tensor.storage_offset()) * tensor.dtype.itemsize
        dtype = names.get(tensor.dtype, str(tensor.dtype))
        tensors[str(name)] = StoredTensor(path, dtype, tuple(tensor.shape), offset)
    return tensors


def load_weights(
    model: Transformer, tensors: dict[str, StoredTensor], on_bytes: OnBytes = lambda n: None
) -> None:
    """Fill the model's parameters with this rank's slices.

    Args:
        model: whose parameters are filled, in their own type and on their own device.
        tensors: checked headers.
        on_bytes: told the number of bytes read since the last call.

    Raises:
        CheckpointError: a read that fails or ends early, with file and tensor.
    """
    table = model.placements()
    by_place = sorted(table, key=lambda name: (tensors[name].path.name, tensors[name].offset))
    buffer = _buffer(model.device)
    opened: dict[Path, int] = {}
    try:
        for name in by_place:
            tensor, placement = tensors[name], table[name]
            try:
                if tensor.path not in opened:
                    opened[tensor.path] = os.open(tensor.path, os.O_RDONLY)
                fd = opened[tensor.path]
                _read_slice(fd, tensor, placement, model.destination(placement), buffer, on_bytes)
            except OSError as error:
                reason = error.strerror or str(error)
                raise CheckpointError(
                    f"{tensor.path}: reading {name} failed ({reason}); check the disk or fetch "
                    f"the file again"
                ) from error
    finally:
        for fd in opened.values():
            os.close(fd)


def _buffer(device: torch.device) -> Tensor:
    return torch.empty(BUFFER_BYTES, dtype=torch.uint8, pin_memory=device.type == "cuda")


def _read_slice(
    fd: int,
    tensor: StoredTensor,
    placement: Placement,
    into: Tensor,
    buffer: Tensor,
    on_bytes: OnBytes,
) -> None:
    """Read `placement`'s rows and columns of one tensor into `into`.

    Rows that are wanted whole and in the file's type go straight to a CPU parameter's memory;
    everything else passes through the buffer, whole rows at a time, so that a read is sequential
    also where only some columns are kept.
    """
    dtype = tensor.torch_dtype
    n_cols = tensor.shape[1] if len(tensor.shape) == 2 else 1
    cols = placement.cols or range(1)
    row_bytes = n_cols * dtype.itemsize
    offset = tensor.offset + placement.rows.start * row_bytes
    whole_rows = len(cols) == n_cols
    if whole_rows and into.dtype == dtype and into.device.type == "cpu":
        _read_into(fd, offset, into.view(torch.uint8).view(-1), on_bytes)
        return
    rows_each = max(1, len(buffer) // row_bytes)
    if row_bytes > len(buffer):
        buffer = torch.empty(row_bytes, dtype=torch.uint8)
    into = into.view(len(placement.rows), len(cols))
    for done in range(0, len(placement.rows), rows_each):
        n_rows = min(rows_each, len(placement.rows) - done)
        part = buffer[: n_rows * row_bytes]
        _read_into(fd, offset + done * row_bytes, part, on_bytes)
        rows = part.view(dtype).view(n_rows, n_cols)
        into[done : done + n_rows].copy_(rows[:, cols.start : cols.stop])


def _read_into(fd: int, offset: int, into: Tensor, on_bytes: OnBytes) -> None:
    """Fill the bytes of a flat uint8 tensor on CPU from a file."""
    view = memoryview(into.numpy())  # type: ignore[arg-type]  # numpy's stubs know no buffers
    while view:
        n = os.preadv(fd, [view[:BUFFER_BYTES]], offset)
        if n == 0:
            raise OSError(0, "the file ended early: it shrank since its header was read")
        on_bytes(n)
        view = view[n:]
        offset += n


def local_bytes(table: Iterable[Placement], dtype: torch.dtype) -> int:
    """Bytes of one rank's weights in a type."""
    return sum(math.prod(p.local_shape) for p in table) * dtype.itemsize
