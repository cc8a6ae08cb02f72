"""A folder's files of weights and their headers: where each tensor lies, and all faults at once.

Knows the file names of Mistral's layout and of Hugging Face's. Reads no data of weights; what a
model needs comes from its placements.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mistral_chat.errors import CheckpointError, named, shown
from mistral_chat.files import is_there, read_json_object
from mistral_chat.model import hf
from mistral_chat.model.formats.values import wrong_values
from mistral_chat.model.sharding import Placement, Shard, Table, placements
from mistral_chat.model.stored import FLOATS, TYPES, StoredTensor, read_header

if TYPE_CHECKING:
    import torch

__all__ = ["Headers", "StoredTensor", "WeightFiles", "find_files", "local_bytes"]

PICKLE = "consolidated.00.pth"
MOST_FAULTS = 8  # named in one error
MOST_FILES = 10_000
_FILE = re.compile(r"[\w.+-]{1,200}\.safetensors", re.ASCII)

_STEMS: dict[hf.Layout, str] = {"consolidated": "consolidated", "hf": "model"}
_OF: dict[hf.Layout, str] = {"consolidated": "Mistral's layout", "hf": "Hugging Face's layout"}


@dataclass(frozen=True, kw_only=True)
class WeightFiles:
    """A folder's one set of weights.

    Args:
        folder: where the files are.
        layout: decides the names of files and tensors.
        paths: the files in order; some may be missing.
        index: tensor to file name, where the folder has an index.
    """

    folder: Path
    layout: hf.Layout
    paths: list[Path]
    index: dict[str, str] | None

    @classmethod
    def find(cls, folder: Path, layout: hf.Layout) -> "WeightFiles":
        """Find the folder's one set of weights in a layout.

        Raises:
            CheckpointError: no set, or more than one.
        """
        stem = _STEMS[layout]
        single, index_path = f"{stem}.safetensors", _index_path(folder, layout)
        index = _read_index(index_path) if is_there(index_path) else None
        sets: dict[str, list[Path]] = {}
        if index is not None:
            sets[index_path.name] = [folder / name for name in sorted(set(index.values()))]
        elif shards := _shards(folder, stem):
            sets[f"{stem}-*-of-*.safetensors"] = shards
        if is_there(folder / single) and sets.get(index_path.name) != [folder / single]:
            sets[single] = [folder / single]
        pickles = sorted(folder.glob("consolidated.*.pth")) if layout == "consolidated" else []
        if pickles:
            if [path.name for path in pickles] != [PICKLE]:
                raise CheckpointError(
                    f"{folder}: found {', '.join(p.name for p in pickles)}; expected {PICKLE} "
                    f"alone (parts for several pipeline or model ranks are not supported)"
                )
            sets[PICKLE] = pickles
        if len(sets) > 1:
            raise CheckpointError(
                f"{folder}: found {len(sets)} sets of weights ({', '.join(sets)}); expected one: "
                f"remove or move the others"
            )
        if not sets:
            other: hf.Layout = "hf" if layout == "consolidated" else "consolidated"
            theirs = find_files(folder, other) or sorted(folder.glob("pytorch_model*.bin"))
            found = "none"
            if theirs:
                whose = _OF[other] if theirs[0].suffix != ".bin" else "which is never read"
                found = f"only {theirs[0].name}, {whose}"
            or_pickle = f" or {PICKLE}" if layout == "consolidated" else ""
            raise CheckpointError(
                f"{folder}: weights are missing (found {found}); expected {single}, "
                f"{stem}-*-of-*.safetensors{or_pickle}"
            )
        (paths,) = sets.values()
        return cls(folder=folder, layout=layout, paths=paths, index=index)

    @property
    def are_safetensors(self) -> bool:
        """Whether their headers can be read without importing torch."""
        return all(path.suffix == ".safetensors" for path in self.paths)


@dataclass(frozen=True, slots=True)
class Headers:
    """Where each tensor of a model is stored; rank 0 reads it and hands it to the other ranks.

    Args:
        layout: decides the tensors' names, and the order of the rows of wq and wk.
        tensors: by the names that they are stored under.
        prefix: of their names in Hugging Face's layout, one of `hf.PREFIXES`.
    """

    layout: hf.Layout
    tensors: dict[str, StoredTensor]
    prefix: str = hf.PREFIXES[0]

    @classmethod
    def read(cls, files: WeightFiles, table: Table) -> "Headers":
        """Read the headers of all files, and check that they hold the tensors that a model needs.

        Args:
            files: of the weights.
            table: what the model needs, under the layout's names; of any rank, since only names and
                whole shapes count.

        Raises:
            CheckpointError: every fault at once: a file that is missing, unreadable, truncated or
                malformed, a tensor that stands twice, an index that disagrees with its files, and
                each tensor that is missing, unexpected, of the wrong shape or not a float, by name.
        """
        tensors: dict[str, StoredTensor] = {}
        faults: list[str] = []
        unread = set()  # names of files of which nothing is known
        index, index_name = files.index or {}, _index_path(files.folder, files.layout).name
        for path in files.paths:
            if not is_there(path):
                by_index = f"{index_name} names {path.name}, which"
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
                faults.append(
                    f"{named(name)} stands in {tensors[name].path.name} and in {path.name}"
                )
            tensors |= found
        if index:
            for name, file in sorted(index.items()):
                elsewhere = name not in tensors or tensors[name].path.name != file
                if elsewhere and file not in unread:
                    holds = f"{file} holds {named(name)}"
                    faults.append(f"{index_name} says that {holds}, which it does not")
            for name in sorted(tensors.keys() - index.keys()):
                holds = f"{tensors[name].path.name} holds {named(name)}"
                faults.append(f"{holds}, which {index_name} omits")
        prefix = hf.prefix_of(tensors)
        table = {hf.with_prefix(name, prefix): placement for name, placement in table.items()}
        if other_kind := _other_kind(tensors, table, files.layout):
            faults.append(other_kind)  # all else would follow from it
        else:
            for name, placement in table.items():
                may_be_unread = index.get(name) in unread if index else bool(unread)
                if name not in tensors and not may_be_unread and not placement.optional:
                    faults.append(f"{name} is missing")
            faults += _wrong_tensors(tensors, table, files.layout)
        if not faults:
            faults += wrong_values(tensors, table)
        if faults:
            n_more = len(faults) - MOST_FAULTS
            more = f"; and {n_more} more" if n_more > 0 else ""
            raise CheckpointError(f"{files.folder}: {'; '.join(faults[:MOST_FAULTS])}{more}")
        return cls(files.layout, tensors, prefix)

    def placements(self, shard: Shard) -> Table:
        """Where each tensor that is read goes on one rank, by the names in the files."""
        table = placements(shard, self.layout)
        return {hf.with_prefix(name, self.prefix): p for name, p in table.items() if p.target}

    def to_json(self) -> dict[str, Any]:
        """The same as lists, texts and numbers, for another process."""
        tensors = {
            name: [stored.path.name, stored.dtype, list(stored.shape), stored.offset]
            for name, stored in self.tensors.items()
        }
        return {"layout": self.layout, "tensors": tensors, "prefix": self.prefix}

    @classmethod
    def from_json(cls, told: dict[str, Any], folder: Path) -> "Headers":
        """The inverse of `to_json`, for files in a folder."""
        tensors = {
            name: StoredTensor(folder / file, dtype, tuple(shape), offset)
            for name, (file, dtype, shape, offset) in told["tensors"].items()
        }
        return cls(told["layout"], tensors, told["prefix"])


def find_files(folder: Path, layout: hf.Layout) -> list[Path]:
    """Files of weights with a layout's names; an index is not one."""
    names = ["model*.safetensors"]
    if layout == "consolidated":
        names = ["consolidated*.safetensors", "consolidated.*.pth"]
    return sorted(path for name in names for path in folder.glob(name))


def _shards(folder: Path, stem: str) -> list[Path]:
    """The set of `STEM-NNNNN-of-MMMMM.safetensors` in order, missing files included."""
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
    weight_map = read_json_object(path, CheckpointError).get("weight_map")
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


def _other_kind(tensors: dict[str, StoredTensor], table: Table, layout: hf.Layout) -> str | None:
    """What is wrong where a matrix is quantized and the configuration says floats, or the reverse.

    It knows no formats: a float matrix is `.weight`, and numbers of others have other types.
    """
    config = hf.SHAPE_FILES[layout]
    for name, placement in table.items():
        if placement.kind not in ("column", "row") or not placement.target:
            continue
        stem = name.rpartition(".")[0]
        weight = tensors.get(f"{stem}.weight")
        if placement.target.endswith(".data") and weight and weight.dtype in FLOATS:
            holds = f"{stem}.weight in {weight.path.name} holds {weight.dtype}"
            return f"{config} says that matrices are quantized, but {holds}: expected one kind"
        is_float = name.endswith(".weight") and placement.types == tuple(FLOATS)
        if is_float and (weight is None or weight.dtype not in FLOATS):
            numbers = [
                f"{other} in {tensor.path.name} holds {tensor.dtype}"
                for other, tensor in tensors.items()
                if other.rpartition(".")[0] == stem and tensor.dtype in TYPES.keys() - FLOATS.keys()
            ]
            if numbers:
                return (
                    f"{config} says that matrices are floats, but {numbers[0]}: expected one kind"
                )
    return None


def _wrong_tensors(tensors: dict[str, StoredTensor], table: Table, layout: hf.Layout) -> list[str]:
    """The faults of tensors that were found."""
    faults = []
    for name, tensor in tensors.items():
        if name not in table:
            if ".lora" in name:
                adapter = f"{named(name)} in {tensor.path.name} is of an adapter (LoRA)"
                faults.append(f"{adapter}: merge it into the model")
            elif not hf.is_unused(name):
                faults.append(f"{named(name)} in {tensor.path.name} is not a tensor of this model")
            continue
        if tensor.dtype not in table[name].types:
            one_of = "one of " if len(table[name].types) > 1 else ""
            faults.append(
                f"{name} in {tensor.path.name} has type {named(tensor.dtype)}; "
                f"expected {one_of}{', '.join(table[name].types)}"
            )
        if tensor.shape not in (table[name].shape, *table[name].other_shapes):
            faults.append(
                f"{name} in {tensor.path.name} has shape {list(tensor.shape)}; "
                f"expected {list(table[name].shape)} from {hf.SHAPE_FILES[layout]}"
            )
    return faults


def local_bytes(table: Iterable[Placement], dtype: "torch.dtype") -> int:
    """Bytes of one rank's weights, floats in a type."""
    return sum(p.local_bytes(dtype.itemsize) for p in table)
