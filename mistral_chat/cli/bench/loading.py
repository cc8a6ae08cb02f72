"""`mistral-chat bench --loading`: how fast weights are read, beside the limits of files and copies.

All ranks read at once, as they do when a model loads: a speed is all bytes over the seconds of the
slowest rank. Prints nothing.
"""

import os
import re
import statistics
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from mistral_chat.config import EngineConfig
from mistral_chat.engine.collectives import collective_of
from mistral_chat.engine.ranks.group import Group, Place
from mistral_chat.engine.start_up import choose_device, choose_dtype, default_dtype, reading_threads
from mistral_chat.errors import UsageError
from mistral_chat.model.checkpoint import Headers
from mistral_chat.model.folder import ModelFolder
from mistral_chat.model.loading import Reading
from mistral_chat.model.sharding import Shard, Table
from mistral_chat.model.transformer import Transformer

__all__ = ["measure_loading"]

REPEATS = 3
READ_BYTES = 16 * 2**20
COPY_BYTES = 2**30


def measure_loading(
    config: EngineConfig,
    group: Group,
    folder: ModelFolder | None,
    *,
    shard_of: int | None,
    cold: bool,
    competitor: bool,
) -> dict[str, Any]:
    """Read a folder's weights in several ways; every rank must call it.

    Args:
        config: which folder, device and type.
        group: the ranks.
        folder: of the config, where this rank has opened it already; None opens it.
        shard_of: as `load_runner` takes it.
        cold: drop the files from the system's cache before each way, and take each way once.
        competitor: read the same slices with safetensors, too.

    Returns:
        seconds, bytes and bytes a second, of all ranks together except where a name says "share"
        or "rank".

    Raises:
        CheckpointError: the folder's weights cannot be used.
        UsageError: no folder, or safetensors cannot read its files.
    """
    if config.model is None:
        raise UsageError("--loading reads a MODEL folder: found none")
    folder = folder or ModelFolder.open(config)
    args = folder.args
    shard = Shard(args, shard_of or group.world_size, group.rank)
    device = choose_device(config.device, group.place.local_rank)
    dtype = choose_dtype(config.dtype, device)
    headers = folder.headers
    table = headers.placements(shard)
    paths = sorted({tensor.path for tensor in headers.tensors.values()})
    if competitor and paths[0].suffix != ".safetensors":
        raise UsageError(f"--peer safetensors: found {paths[0].name}")
    n_threads = reading_threads(device, group.place)
    ready = _forget if cold else lambda paths: None
    repeats = 1 if cold else REPEATS

    def timed(way: Callable[[], float]) -> float:
        """Seconds of the slowest rank, the median over the repeats."""
        taken = []
        for _ in range(repeats):
            if group.place.local_rank == 0:
                ready(paths)
            group.minimum(0)
            taken.append(-group.minimum(-int(way() * 1e9)) / 1e9)
        return statistics.median(taken)

    size = sum(path.stat().st_size for path in paths)
    if not cold:
        _read_plainly(paths, group, n_threads, device)  # into the system's cache

    def make() -> Transformer:
        return Transformer(args, shard, collective_of(group, shard))

    seconds, share, host_bytes = _read_as_loading_does(
        headers, table, make, device, dtype, n_threads, timed
    )
    wanted = share if shard_of else -group.minimum(-size)
    plain_s = timed(lambda: _read_plainly(paths, group, n_threads, device))
    result: dict[str, Any] = {
        "files": len(paths),
        "files_bytes": size,
        "cold": cold,
        "threads_a_rank": n_threads,
        "bytes_wanted": wanted,
        "share_bytes": share,
        "ours_s": seconds,
        "ours_bytes_per_s": wanted / seconds,
        "plain_read_bytes_per_s": size / plain_s,
        "host_bytes_beside": -group.minimum(-host_bytes),
    }
    ceilings = [size / plain_s]
    if device.type == "cpu":
        alone = Group(Place())
        result["read_once_s"] = timed(lambda: _read_plainly(paths, alone, 1, device))
    else:
        torch.cuda.empty_cache()
        result["copy_bytes_per_s"] = _copies(device, group) * group.world_size
        ceilings.append(result["copy_bytes_per_s"])
    result["share_of_lower_ceiling"] = wanted / seconds / min(ceilings)
    if competitor:
        competitor_s = timed(lambda: _read_by_safetensors(headers, table, device, dtype))
        result["safetensors_s"] = competitor_s
        result["safetensors_bytes_per_s"] = wanted / competitor_s
    return result


def _read_as_loading_does(
    headers: Headers,
    table: Table,
    make: Callable[[], Transformer],
    device: torch.device,
    dtype: torch.dtype,
    n_threads: int,
    timed: Callable[[Callable[[], float]], float],
) -> tuple[float, int, int]:
    """Read as a start does.

    Returns:
        seconds, bytes of this rank's share, and bytes of host memory that it took besides weights.
    """
    host_before = _resident_bytes()
    share = 0

    def read() -> float:
        nonlocal share
        with device, default_dtype(dtype):
            model = make()  # anew each time: on CPU its memory must be fresh, as at a start
        reading = Reading(model, headers, table, n_threads)
        share = reading.total
        reading.start()
        reading.finish()
        return reading.seconds

    seconds = timed(read)
    host_bytes = _resident_bytes() - host_before
    if device.type == "cpu":  # there the weights themselves lie on the host
        host_bytes -= (
            share * dtype.itemsize // next(iter(headers.tensors.values())).torch_dtype.itemsize
        )
    return seconds, share, host_bytes


def _forget(paths: Sequence[Path]) -> None:
    """Drop files from the system's cache; those on a file system in memory stay."""
    for path in paths:
        fd = os.open(path, os.O_RDONLY)
        os.fsync(fd)
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(fd)


def _resident_bytes() -> int:
    """Peak resident memory of this process so far."""
    found = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found
    return int(found[1]) * 1024


def _read_plainly(
    paths: Sequence[Path], group: Group, n_threads: int, device: torch.device
) -> float:
    """Seconds to read an equal part of all files, each byte once, into buffers on the host."""
    parts = [
        (path, offset) for path in paths for offset in range(0, path.stat().st_size, READ_BYTES)
    ][group.rank :: group.world_size]
    files = {path: os.open(path, os.O_RDONLY) for path in paths}
    left, lock = iter(parts), threading.Lock()
    buffers = [_buffer(pinned=device.type == "cuda") for _ in range(n_threads)]

    def work(buffer: memoryview) -> None:
        while True:
            with lock:
                part = next(left, None)
            if part is None:
                return
            path, offset = part
            while (n := os.preadv(files[path], [buffer], offset)) and n < READ_BYTES:
                offset += n

    group.minimum(0)  # all ranks begin together
    with ThreadPoolExecutor(n_threads) as pool:
        begin = time.monotonic()
        list(pool.map(work, buffers))
        seconds = time.monotonic() - begin
    for fd in files.values():
        os.close(fd)
    return seconds


def _buffer(*, pinned: bool) -> memoryview:
    data = torch.empty(READ_BYTES, dtype=torch.uint8, pin_memory=pinned)
    return memoryview(data.numpy())  # type: ignore[arg-type]  # numpy's stubs know no buffers


def _copies(device: torch.device, group: Group) -> float:
    """Bytes a second from pinned memory to each device, all at once; the slowest rank's."""
    host = torch.empty(COPY_BYTES, dtype=torch.uint8, pin_memory=True)
    there = torch.empty_like(host, device=device)
    taken = []
    for _ in range(REPEATS + 1):
        torch.cuda.synchronize(device)
        group.minimum(0)
        begin = time.monotonic()
        for _ in range(4):
            there.copy_(host, non_blocking=True)
        torch.cuda.synchronize(device)
        taken.append(time.monotonic() - begin)
    return group.minimum(int(4 * COPY_BYTES / statistics.median(taken[1:])))


def _read_by_safetensors(
    headers: Headers, table: Table, device: torch.device, dtype: torch.dtype
) -> float:
    """Seconds to read this rank's slices by `safe_open` and `get_slice`."""
    by_path: dict[Path, list[str]] = {}
    for name in table:
        by_path.setdefault(headers.tensors[name].path, []).append(name)
    kept = []
    begin = time.monotonic()
    for path, names in by_path.items():
        with safe_open(path, "pt", device=str(device)) as file:
            for name in names:
                rows, cols = table[name].rows, table[name].cols
                stored = file.get_slice(name)
                part = stored[rows.start : rows.stop]
                if cols is not None:
                    part = stored[rows.start : rows.stop, cols.start : cols.stop]
                # On CPU it maps the file, which reads nothing until somebody copies.
                kept.append(part.to(dtype, copy=device.type == "cpu"))
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.monotonic() - begin
