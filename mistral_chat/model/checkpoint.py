"""Weights on disk: which files, which tensors, all faults at once, and only this rank's slices.

Knows files and bytes, in Mistral's layout and in Hugging Face's; what goes where, and under which
name, comes from the model's placements. Tensors are read with
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

from mistral_chat.config import LoadFormat
from mistral_chat.errors import CheckpointError
from mistral_chat.model import hf
from mistral_chat.model.args import read_json_object
from mistral_chat.model.sharding import Placement, placements
from mistral_chat.model.transformer import Transformer

__all__ = [
    "Headers",
    "StoredTensor",
    "check_tensors",
    "find_weights",
    "load_weights",
    "read_headers",
]

PICKLE = "consolidated.00.pth"
BUFFER_BYTES = 32 * 2**20
MAX_HEADER_BYTES = 100_000_000  # the safetensors format's own limit
MOST_FAULTS = 8  # named in one error

_STEMS: dict[hf.Layout, str] = {"consolidated": "consolidated", "hf": "model"}
_OF: dict[hf.Layout, str] = {"consolidated": "Mistral's layout", "hf": "Hugging Face's layout"}

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


@dataclass(frozen=True, slots=True)
class Headers:
    """What a folder's files of weights say they hold; `check_tensors` before they are used.

    Args:
        layout: whose files they are.
        tensors: by the names that they are stored under.
        faults: what is wrong with the files.
        index: tensor to file name, where the folder has an index.
        unread: names of the files of which nothing is known.
    """

    layout: hf.Layout
    tensors: dict[str, StoredTensor]
    faults: tuple[str, ...]
    index: dict[str, str]
    unread: frozenset[str]

    def lacks(self, name: str) -> bool:
        """Whether a tensor is in no file, as far as the headers tell."""
        may_be_unread = self.index.get(name) in self.unread if self.index else bool(self.unread)
        return name not in self.tensors and not may_be_unread


def find_weights(folder: Path, load_format: LoadFormat = "auto") -> list[Path]:
    """The files of the folder's one set of weights; some of them may be missing.

    Args:
        folder: of the model.
        load_format: which layout; auto chooses as `hf.choose_layout` says.

    Raises:
        CheckpointError: no set, or more than one.
    """
    layout = hf.choose_layout(folder, load_format)
    stem = _STEMS[layout]
    single, index = f"{stem}.safetensors", _index_path(folder, layout)
    sets: dict[str, list[Path]] = {}
    if index.exists():
        sets[index.name] = [folder / name for name in sorted(set(_read_index(index).values()))]
    elif shards := _shards(folder, stem):
        sets[f"{stem}-*-of-*.safetensors"] = shards
    if (folder / single).exists() and sets.get(index.name) != [folder / single]:
        sets[single] = [folder / single]
    pickles = sorted(folder.glob("consolidated.*.pth")) if layout == "consolidated" else []
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
        other: hf.Layout = "hf" if layout == "consolidated" else "consolidated"
        theirs = hf.find_files(folder, other) or sorted(folder.glob("pytorch_model*.bin"))
        found = "none"
        if theirs:
            whose = _OF[other] if theirs[0].suffix != ".bin" else "which is never read"
            found = f"only {theirs[0].name}, {whose}"
        or_pickle = f" or {PICKLE}" if layout == "consolidated" else ""
        raise CheckpointError(
            f"{folder}: weights are missing (found {found}); expected {single}, "
            f"{stem}-*-of-*.safetensors{or_pickle}"
        )
    (files,) = sets.values()
    return files


def _shards(folder: Path, stem: str) -> list[Path]:
    """`STEM-NNNNN-of-MMMMM.safetensors` in order, all of one set, the missing ones too.

    An index decides instead where there is one; then only its files are read.
    """
    numbered: dict[tuple[int, int], Path] = {}
    for path in folder.glob(f"{stem}-*-of-*.safetensors"):
        match = re.fullmatch(stem + r"-(\d+)-of-(\d+)\.safetensors", path.name)
        if match:
            numbered[int(match[2]), int(match[1])] = path
    totals = {total for total, _ in numbered}
    if not totals:
        return []
    if len(totals) > 1:
        raise CheckpointError(
            f"{folder}: shards of several sets (of {', '.join(map(str, sorted(totals)))}); "
            f"expected one set"
        )
    (total,) = totals
    first = 0 if (total, 0) in numbered else 1
    return [
        numbered.get((total, n), folder / f"{stem}-{n:05}-of-{total:05}.safetensors")
        for n in range(first, first + total)
    ]


def _index_path(folder: Path, layout: hf.Layout) -> Path:
    return folder / f"{_STEMS[layout]}.safetensors.index.json"


def _read_index(path: Path) -> dict[str, str]:
    weight_map = read_json_object(path).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(v, str) for v in weight_map.values()):
        raise CheckpointError(f"{path}: expected a weight_map of tensor to file names")
    return weight_map


def read_headers(folder: Path, load_format: LoadFormat = "auto") -> Headers:
    """All tensors of the folder's weights, without reading any of their data.

    A file that is missing, unreadable, truncated or malformed, a tensor that stands twice and an
    index that disagrees with its files are among the result's faults.

    Args:
        folder: of the model.
        load_format: which layout; auto chooses as `hf.choose_layout` says.

    Raises:
        CheckpointError: no set of weights, or more than one.
    """
    layout = hf.choose_layout(folder, load_format)
    index_path = _index_path(folder, layout)
    index = _read_index(index_path) if index_path.exists() else {}
    tensors: dict[str, StoredTensor] = {}
    faults: list[str] = []
    unread = set()
    for path in find_weights(folder, layout):
        if not path.exists():
            by_index = f"{index_path.name} names {path.name}, which"
            faults.append(f"{by_index if index else path.name} is missing")
            unread.add(path.name)
            continue
        try:
            found, wrong = (_pickle_header if path.suffix == ".pth" else _safetensors_header)(path)
        except CheckpointError as error:
            faults.append(str(error))
            unread.add(path.name)
            continue
        faults += wrong
        for name in sorted(tensors.keys() & found.keys()):
            faults.append(f"{name} stands in {tensors[name].path.name} and in {path.name}")
        tensors |= found
    if index:
        for name, file in sorted(index.items()):
            elsewhere = name not in tensors or tensors[name].path.name != file
            if elsewhere and file not in unread:
                faults.append(f"{index_path.name} says that {file} holds {name}, which it does not")
        for name in sorted(tensors.keys() - index.keys()):
            faults.append(f"{tensors[name].path.name} holds {name}, which {index_path.name} omits")
    return Headers(layout, tensors, tuple(faults), index, frozenset(unread))


def check_tensors(folder: Path, headers: Headers, table: dict[str, Placement]) -> None:
    """Refuse files that are at fault, or whose tensors are not the ones that the model needs.

    Args:
        folder: where they are, for the error.
        headers: of its files.
        table: what the model needs, under the layout's names.

    Raises:
        CheckpointError: everything that is wrong with the files, and every tensor that is
            missing, unexpected, of the wrong shape or not a float, by name.
    """
    faults = [*headers.faults]
    faults += [f"{name} is missing" for name in table if headers.lacks(name)]
    shapes_from = "params.json" if headers.layout == "consolidated" else "config.json"
    for name, tensor in headers.tensors.items():
        if name not in table:
            if headers.layout != "hf" or not hf.is_unused(name):
                faults.append(f"{name} in {tensor.path.name} is not a tensor of this model")
            continue
        if tensor.dtype not in _FLOATS:
            faults.append(
                f"{name} in {tensor.path.name} has type {tensor.dtype}; "
                f"expected one of {', '.join(_FLOATS)}"
            )
        if tensor.shape != table[name].shape:
            faults.append(
                f"{name} in {tensor.path.name} has shape {list(tensor.shape)}; "
                f"expected {list(table[name].shape)} from {shapes_from}"
            )
    if faults:
        n_more = len(faults) - MOST_FAULTS
        more = f"; and {n_more} more" if n_more > 0 else ""
        raise CheckpointError(f"{folder}: {'; '.join(faults[:MOST_FAULTS])}{more}")


def _safetensors_header(path: Path) -> tuple[dict[str, StoredTensor], list[str]]:
    """Parse one safetensors header; gives its tensors, and what the file's length belies.

    Format: https://huggingface.co/docs/safetensors: 8 bytes of length, JSON, data.

    Raises:
        CheckpointError: what it holds cannot be known.
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
    faults = []
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
                faults.append(
                    f"{path.name}: {name} has {last - first:,} bytes, which is not its shape "
                    f"{list(shape)} in {entry['dtype']}"
                )
            end = max(end, last)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{path.name}: its header is malformed ({error!r})") from error
    if size != end:
        faults.append(
            f"{path.name} has {size:,} bytes, its header says {end:,}: "
            f"{'truncated' if size < end else 'damaged'}; fetch it again"
        )
    return tensors, faults


def _pickle_header(path: Path) -> tuple[dict[str, StoredTensor], list[str]]:
    """Where a `torch.save` file keeps its tensors; read with weights_only, without their data.

    Raises:
        CheckpointError: what it holds cannot be known.
    """
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
    faults = []
    for name, tensor in state.items():
        if not isinstance(tensor, Tensor):
            raise CheckpointError(f"{path.name}: {name} is no tensor")
        start = tensor.untyped_storage()._checkpoint_offset
        if start is None or not tensor.is_contiguous():
            faults.append(
                f"{path.name}: {name} is not stored whole and in order; save it again as "
                f"safetensors"
            )
        offset = (start or 0) + int(tensor.storage_offset()) * tensor.dtype.itemsize
        dtype = names.get(tensor.dtype, str(tensor.dtype))
        tensors[str(name)] = StoredTensor(path, dtype, tuple(tensor.shape), offset)
    return tensors, faults


def load_weights(model: Transformer, headers: Headers, on_bytes: OnBytes = lambda n: None) -> None:
    """Fill the model's parameters with this rank's slices.

    Args:
        model: whose parameters are filled, in their own type and on their own device.
        headers: of the files, checked.
        on_bytes: told the number of bytes read since the last call.

    Raises:
        CheckpointError: a read that fails or ends early, with file and tensor.
    """
    tensors, table = headers.tensors, placements(model.shard, headers.layout)
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

    Rows that are wanted whole, in the file's type and in its order go straight to a CPU
    parameter's memory; everything else passes through the buffer, whole rows (or heads, where
    their rows change places) at a time, so that a read is sequential also where only some columns
    are kept.
    """
    dtype = tensor.torch_dtype
    n_cols = tensor.shape[1] if len(tensor.shape) == 2 else 1
    cols = placement.cols or range(1)
    row_bytes = n_cols * dtype.itemsize
    offset = tensor.offset + placement.rows.start * row_bytes
    as_stored = len(cols) == n_cols and not placement.half_split and into.dtype == dtype
    if as_stored and into.device.type == "cpu":
        _read_into(fd, offset, into.view(torch.uint8).view(-1), on_bytes)
        return
    unit = placement.half_split or 1  # rows that must be read together
    unit_bytes = unit * row_bytes
    rows_each = unit * max(1, len(buffer) // unit_bytes)
    if unit_bytes > len(buffer):
        buffer = torch.empty(unit_bytes, dtype=torch.uint8)
    into = into.view(len(placement.rows), len(cols))
    for done in range(0, len(placement.rows), rows_each):
        n_rows = min(rows_each, len(placement.rows) - done)
        part = buffer[: n_rows * row_bytes]
        _read_into(fd, offset + done * row_bytes, part, on_bytes)
        rows = part.view(dtype).view(n_rows, n_cols)[:, cols.start : cols.stop]
        here = into[done : done + n_rows]
        if placement.half_split:
            here, rows = _in_halves(here, unit), rows.view(-1, 2, unit // 2, len(cols))
        here.copy_(rows)


def _in_halves(rows: Tensor, head_dim: int) -> Tensor:
    """A view of whole heads whose pairs are neighbours, in the order of a file that splits them.

    Row `head * head_dim + 2 * pair + element` is at `[head, element, pair]`.
    """
    return rows.view(-1, head_dim // 2, 2, rows.shape[1]).transpose(1, 2)


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
