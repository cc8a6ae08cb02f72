"""One file of a quantized checkpoint: read a matrix, quantize it, and write what it becomes.

Memory holds one matrix of floats and one file. A file has its name only once it is whole.
"""

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from mistral_chat.cli.quantize.job import UNFINISHED, put_in_place
from mistral_chat.cli.quantize.plan import Part, PlannedShard
from mistral_chat.errors import CheckpointError
from mistral_chat.files import open_regular
from mistral_chat.kernels.quantize import quantize
from mistral_chat.kernels.weight import Quantized
from mistral_chat.model.formats import held
from mistral_chat.model.formats.encode import SCALE_DTYPE, encode
from mistral_chat.model.quantization import Quantization
from mistral_chat.model.stored import StoredTensor
from mistral_chat.model.weight import QuantizedMatrix

__all__ = ["quantized", "write_shard"]

CPU_NUMBERS = 1 << 18  # of a block of rows
N_CORES = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
MOST_READ = 1 << 30  # bytes of a call; Linux reads at most 2 GiB


def write_shard(
    folder: Path,
    shard: PlannedShard,
    quantization: Quantization,
    device: torch.device,
    on_read: Callable[[int], None],
) -> None:
    """Write a file, whole or not at all.

    Args:
        folder: where to.
        shard: what it holds.
        quantization: how matrices are written.
        device: that quantizes.
        on_read: told the bytes of each matrix that is done.

    Raises:
        OSError: it cannot be written.
        CheckpointError: the source cannot be read.
    """
    tensors: dict[str, Tensor] = {}
    for part in shard.parts:
        tensors |= _tensors(part, quantization, device)
        on_read(part.source_bytes)
    about = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    assert about == {name: shape for name, (_, shape) in shard.tensors.items()}
    unfinished = folder / f"{shard.file}{UNFINISHED}"
    try:
        try:
            save_file(tensors, unfinished, metadata={"format": "pt"})
        except SafetensorError as error:  # how it reports a full disk
            raise OSError(0, str(error)) from error
        put_in_place(unfinished, folder / shard.file)
    finally:
        unfinished.unlink(missing_ok=True)


def _tensors(part: Part, how: Quantization, device: torch.device) -> dict[str, Tensor]:
    floats = _read_whole(part.source).to(device)
    if part.to_halves:
        pairs = floats.view(-1, part.to_halves // 2, 2, floats.shape[1])
        floats = pairs.transpose(1, 2).reshape(floats.shape)
    if not part.is_quantized:
        return {f"{part.name}.weight": floats.to(torch.bfloat16).cpu()}
    if not torch.isfinite(floats).all():
        raise CheckpointError(
            f"{part.source.path.name}: {part.name} holds numbers that are not finite, which no "
            f"quantized matrix has"
        )
    encoded = encode(quantized(floats, how))
    return {f"{part.name}.{suffix}": tensor.cpu() for suffix, tensor in encoded.items()}


def quantized(floats: Tensor, how: Quantization) -> Quantized:
    """A matrix in numbers of a kind, with scales that bfloat16 has.

    A row does not depend on the others, so blocks of rows are quantized one after another on a GPU,
    whose memory they spare, and side by side on CPU, where they stay in its cache.

    Args:
        floats: (n_out, n_in).
        how: kind and groups.
    """
    with floats.device:
        matrix = QuantizedMatrix(held(how), *floats.shape).quantized
    if floats.is_cuda:
        _fill(floats, matrix)
        return matrix
    # a thread for each core: torch's own threads wait for each other in every operation, which is
    # 20 to 200 times slower where others use the cores as well
    with ThreadPoolExecutor(N_CORES, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        rows = max(1, CPU_NUMBERS // floats.shape[1])
        blocks = zip(floats.split(rows), matrix.blocks(rows * floats.shape[1]), strict=True)
        for _ in pool.map(lambda block: _fill(*block), blocks):
            pass
    return matrix


def _fill(floats: Tensor, matrix: Quantized) -> None:
    start = 0
    for rows in matrix.blocks():
        quantize(floats[start : start + len(rows)], rows, SCALE_DTYPE)
        start += len(rows)


def _read_whole(stored: StoredTensor) -> Tensor:
    """Read a tensor.

    Raises:
        CheckpointError: it cannot be read, or its file has shrunk.
    """
    tensor = torch.empty(stored.shape, dtype=stored.torch_dtype)
    view = memoryview(tensor.view(-1).view(torch.uint8).numpy())  # type: ignore[arg-type]
    with open_regular(stored.path, CheckpointError) as (fd, _):
        at = 0
        while at < len(view):
            n = os.preadv(fd, [view[at : at + MOST_READ]], stored.offset + at)
            if n == 0:
                raise CheckpointError(f"{stored.path} ended early: it shrank since it was checked")
            at += n
    return tensor
