"""What a quantized checkpoint will hold, file by file, before a byte of it is written.

Names, shapes and types are those that our own reader asks a checkpoint of the kind for. Imports no
torch.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

from mistral_chat.config import AskedQuantization
from mistral_chat.errors import CheckpointError
from mistral_chat.model import hf
from mistral_chat.model.args import TransformerArgs
from mistral_chat.model.checkpoint import Headers
from mistral_chat.model.folder import ModelFolder
from mistral_chat.model.formats import as_asked
from mistral_chat.model.quantization import Quantization
from mistral_chat.model.sharding import Shard, placements
from mistral_chat.model.stored import TYPES, StoredTensor

__all__ = ["Part", "Plan", "PlannedShard", "plan"]

SHARD_BYTES = 4_000_000_000

Tensors = dict[str, tuple[str, tuple[int, ...]]]  # type and shape, by name


@dataclass(frozen=True, kw_only=True)
class Part:
    """A matrix or a vector of the source, and the tensors that it becomes.

    Args:
        name: in the target, without `.weight`.
        source: where it is stored.
        tensors: of the target.
        is_quantized: its numbers become others; else they become bfloat16.
        to_halves: size of heads whose rows must change from pairs to halves; 0 for none.
    """

    name: str
    source: StoredTensor
    tensors: Tensors
    is_quantized: bool
    to_halves: int

    @property
    def source_bytes(self) -> int:
        """Bytes to read."""
        return math.prod(self.source.shape) * TYPES[self.source.dtype][1]

    @property
    def n_bytes(self) -> int:
        """Bytes to write."""
        return sum(math.prod(shape) * TYPES[dtype][1] for dtype, shape in self.tensors.values())


@dataclass(frozen=True, kw_only=True)
class PlannedShard:
    """One file."""

    file: str
    parts: tuple[Part, ...]

    @property
    def tensors(self) -> Tensors:
        """All that it holds."""
        return {name: about for part in self.parts for name, about in part.tensors.items()}

    @property
    def n_bytes(self) -> int:
        """Bytes of its tensors."""
        return sum(part.n_bytes for part in self.parts)

    @property
    def source_bytes(self) -> int:
        """Bytes to read for it."""
        return sum(part.source_bytes for part in self.parts)


@dataclass(frozen=True, kw_only=True)
class Plan:
    """All files of weights.

    Args:
        args: the shape of what is written, with its quantization.
        shards: in order.
    """

    args: TransformerArgs
    shards: tuple[PlannedShard, ...]

    @property
    def quantization(self) -> Quantization:
        """How matrices are written."""
        assert self.args.quantization is not None
        return self.args.quantization

    @property
    def n_bytes(self) -> int:
        """Bytes of all tensors."""
        return sum(shard.n_bytes for shard in self.shards)

    @property
    def source_bytes(self) -> int:
        """Bytes of all tensors of the source."""
        return sum(shard.source_bytes for shard in self.shards)


def plan(folder: ModelFolder, kind: AskedQuantization, shard_bytes: int = SHARD_BYTES) -> Plan:
    """Plan a folder's quantized checkpoint.

    Args:
        folder: of the source.
        kind: fp8, int8 or int4, in the groups that `--quantization` takes while loading.
        shard_bytes: a file holds more only where a single matrix does.

    Raises:
        CheckpointError: the source is quantized already, or sizes that the kind cannot have.
        UsageError: no group divides the matrices.
    """
    how = folder.args.quantization
    if how is not None:
        raise CheckpointError(
            f"{folder.path} is stored as {how.kind} ({how.method}) already: expected a checkpoint "
            f"of floats"
        )
    asked = as_asked(folder.args, kind).quantization
    assert asked is not None
    written = replace(asked, method="compressed-tensors")
    args = replace(folder.args, quantization=written, vision_encoder=False)
    units = list(_units(folder.headers, folder.args, args))
    files: list[list[Part]] = [[]]
    room = shard_bytes
    for unit in units:
        whole = sum(part.n_bytes for part in unit)
        # a layer that no file holds is divided between its matrices
        for parts in [unit] if whole <= shard_bytes else [[part] for part in unit]:
            size = sum(part.n_bytes for part in parts)
            if size > room and files[-1]:
                files.append([])
                room = shard_bytes
            files[-1] += parts
            room -= size
    return Plan(
        args=args,
        shards=tuple(
            PlannedShard(file=f"model-{n:05}-of-{len(files):05}.safetensors", parts=tuple(parts))
            for n, parts in enumerate(files, 1)
        ),
    )


def _units(
    headers: Headers, source: TransformerArgs, target: TransformerArgs
) -> Iterator[list[Part]]:
    """Parts that belong together: a layer, or what stands outside of layers, one by one."""
    tensors: dict[str, Tensors] = {}
    for name, placed in placements(Shard(target), "hf").items():
        if placed.target or placed.check == "shape":
            dtype = "BF16" if len(placed.types) > 1 and placed.check != "shape" else placed.types[0]
            shape = placed.shape
            tensors.setdefault(name.rpartition(".")[0], {})[name] = (dtype, shape)
    layers: dict[str, list[Part]] = {}
    for name, placed in placements(Shard(source)).items():
        theirs = hf.stored_name(name)
        stored = hf.with_prefix(theirs, headers.prefix) if headers.layout == "hf" else name
        is_turned = headers.layout != "hf" and name.endswith((".wq.weight", ".wk.weight"))
        stem = theirs.removesuffix(".weight")
        part = Part(
            name=stem,
            source=headers.tensors[stored],
            tensors=tensors[stem],
            is_quantized=placed.kind in ("column", "row"),
            to_halves=source.head_dim if is_turned else 0,
        )
        words = name.split(".")
        layers.setdefault(".".join(words[:2]) if words[0] == "layers" else name, []).append(part)
    last = [layers.pop(name) for name in ("norm.weight", "output.weight") if name in layers]
    yield from layers.values()  # the embedding first
    yield from last
