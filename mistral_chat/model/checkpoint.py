"""Weights on disk: which files, which tensors where in them, and all faults at once.

Knows Mistral's layout and Hugging Face's, and reads headers alone; what a model needs comes from
its placements. Imports torch only for its files, so that the others are checked before ranks are.
"""

import json
import math
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from mistral_chat.config import LoadFormat
from mistral_chat.errors import CheckpointError
from mistral_chat.model import hf
from mistral_chat.model.args import read_json_object
from mistral_chat.model.sharding import Placement

if TYPE_CHECKING:
    import torch

__all__ = [
    "Headers",
    "StoredTensor",
    "check_tensors",
    "find_weights",
    "local_bytes",
    "read_headers",
]

PICKLE = "consolidated.00.pth"
MAX_HEADER_BYTES = 100_000_000  # the safetensors format's own limit
MOST_FAULTS = 8  # named in one error

_STEMS: dict[hf.Layout, str] = {"consolidated": "consolidated", "hf": "model"}
_OF: dict[hf.Layout, str] = {"consolidated": "Mistral's layout", "hf": "Hugging Face's layout"}

# Types of stored weights: torch's names, and bytes.
_FLOATS = {"F64": ("float64", 8), "F32": ("float32", 4), "F16": ("float16", 2),
           "BF16": ("bfloat16", 2)}  # fmt: skip


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
    def torch_dtype(self) -> "torch.dtype":
        """Type as torch has it; a KeyError where it is not a float."""
        import torch

        dtype = getattr(torch, _FLOATS[self.dtype][0])
        assert isinstance(dtype, torch.dtype)
        return dtype


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
            known = _FLOATS.get(entry["dtype"])
            if known is not None and last - first != math.prod(shape) * known[1]:
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
    import torch
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
    names = {getattr(torch, dtype): name for name, (dtype, _) in _FLOATS.items()}
    tensors = {}
    faults = []
    for name, tensor in state.items():
        if not isinstance(tensor, torch.Tensor):
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


def local_bytes(table: Iterable[Placement], dtype: "torch.dtype") -> int:
    """Bytes of one rank's weights in a type."""
    return sum(math.prod(p.local_shape) for p in table) * dtype.itemsize
