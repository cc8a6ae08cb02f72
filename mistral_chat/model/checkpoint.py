"""Weights on disk: which files, which tensors where in them, and all faults at once.

Knows Mistral's layout and Hugging Face's, and reads headers alone; what a model needs comes from
its placements.
"""

import math
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mistral_chat.config import LoadFormat
from mistral_chat.errors import CheckpointError, named, shown
from mistral_chat.files import is_there
from mistral_chat.model import hf
from mistral_chat.model.args import read_json_object
from mistral_chat.model.sharding import Placement
from mistral_chat.model.stored import FLOATS, StoredTensor, read_header

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
MOST_FAULTS = 8  # named in one error
MOST_FILES = 10_000
_FILE = re.compile(r"[\w.+-]{1,200}\.safetensors", re.ASCII)

_STEMS: dict[hf.Layout, str] = {"consolidated": "consolidated", "hf": "model"}
_OF: dict[hf.Layout, str] = {"consolidated": "Mistral's layout", "hf": "Hugging Face's layout"}


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

    def to_json(self) -> dict[str, Any]:
        """The same as lists, texts and numbers, for another process."""
        files = sorted({str(stored.path) for stored in self.tensors.values()})
        number = {path: n for n, path in enumerate(files)}
        return {
            "layout": self.layout,
            "files": files,
            "tensors": {
                name: [number[str(stored.path)], stored.dtype, list(stored.shape), stored.offset]
                for name, stored in self.tensors.items()
            },
            "faults": list(self.faults),
            "index": self.index,
            "unread": sorted(self.unread),
        }

    @classmethod
    def from_json(cls, told: dict[str, Any]) -> "Headers":
        """What `to_json` gave."""
        files = [Path(path) for path in told["files"]]
        return cls(
            layout=told["layout"],
            tensors={
                name: StoredTensor(files[n], dtype, tuple(shape), offset)
                for name, (n, dtype, shape, offset) in told["tensors"].items()
            },
            faults=tuple(told["faults"]),
            index=told["index"],
            unread=frozenset(told["unread"]),
        )


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
    if is_there(index):
        sets[index.name] = [folder / name for name in sorted(set(_read_index(index).values()))]
    elif shards := _shards(folder, stem):
        sets[f"{stem}-*-of-*.safetensors"] = shards
    if is_there(folder / single) and sets.get(index.name) != [folder / single]:
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
        match = re.fullmatch(stem + r"-(\d{1,5})-of-(\d{1,5})\.safetensors", path.name)
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
    files = set(weight_map.values())
    for name in files:
        if not _FILE.fullmatch(name):
            raise CheckpointError(
                f"{path} names the file {shown(name)}: expected NAME.safetensors in that folder"
            )
    if len(files) > MOST_FILES:
        raise CheckpointError(f"{path} names {len(files):,} files: expected at most {MOST_FILES:,}")
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
    index = _read_index(index_path) if is_there(index_path) else {}
    tensors: dict[str, StoredTensor] = {}
    faults: list[str] = []
    unread = set()
    for path in find_weights(folder, layout):
        if not is_there(path):
            by_index = f"{index_path.name} names {path.name}, which"
            faults.append(f"{by_index if index else path.name} is missing")
            unread.add(path.name)
            continue
        try:
            found, wrong = read_header(path)
        except CheckpointError as error:
            faults.append(str(error))
            unread.add(path.name)
            continue
        faults += wrong
        for name in sorted(tensors.keys() & found.keys()):
            faults.append(f"{named(name)} stands in {tensors[name].path.name} and in {path.name}")
        tensors |= found
    if index:
        for name, file in sorted(index.items()):
            elsewhere = name not in tensors or tensors[name].path.name != file
            if elsewhere and file not in unread:
                holds = f"{file} holds {named(name)}"
                faults.append(f"{index_path.name} says that {holds}, which it does not")
        for name in sorted(tensors.keys() - index.keys()):
            holds = f"{tensors[name].path.name} holds {named(name)}"
            faults.append(f"{holds}, which {index_path.name} omits")
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
            if ".lora" in name:
                adapter = f"{named(name)} in {tensor.path.name} is of an adapter (LoRA)"
                faults.append(f"{adapter}: merge it into the model")
            elif headers.layout != "hf" or not hf.is_unused(name):
                faults.append(f"{named(name)} in {tensor.path.name} is not a tensor of this model")
            continue
        if tensor.dtype not in FLOATS:
            faults.append(
                f"{name} in {tensor.path.name} has type {named(tensor.dtype)}; "
                f"expected one of {', '.join(FLOATS)}"
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


def local_bytes(table: Iterable[Placement], dtype: "torch.dtype") -> int:
    """Bytes of one rank's weights in a type."""
    return sum(math.prod(p.local_shape) for p in table) * dtype.itemsize
