"""Reads one rank's slices of a checkpoint: several threads, large reads, in the order of the files.

Every file is opened before the first byte is read. Files are read at given positions, never mapped:
a file that shrinks raises an error instead of killing the process, and a network disk gets large
requests. Where only some columns of a matrix are kept, one call reads whole rows and the kernel
drops the others as it copies. Knows nothing of ranks, nor of how progress is shown.
"""

import math
import os
import stat
import threading
import time
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mistral_chat.errors import CheckpointError
from mistral_chat.kernels.quantize import quantize
from mistral_chat.kernels.weight import Quantized
from mistral_chat.model.checkpoint import Headers, StoredTensor
from mistral_chat.model.formats.decode import decode
from mistral_chat.model.formats.values import BAD_SCALE
from mistral_chat.model.placement import Packing, Placement
from mistral_chat.model.sharding import Table
from mistral_chat.model.transformer import Transformer

__all__ = ["Reading"]

# Bytes that one read keeps. Large reads hide Python's overhead, small ones stay in the CPU's cache
# until they are converted.
GPU_PIECE_BYTES = 8 * 2**20
CPU_PIECE_BYTES = 2 * 2**20
UNPACKED = 4  # times as much memory passes through where numbers are unpacked
MOST_RANGES = 1024  # of one preadv (IOV_MAX)
TRUNCATED = "the file ended early: it shrank since its header was read"
JOIN_S = 1.0  # to wait for the other threads after a failure; one may hang


@dataclass(frozen=True, slots=True)
class _Piece:
    """Neighbouring rows of one tensor, read at once.

    Args:
        name: under which the file has the tensor.
        tensor: all of it.
        offset: where in the file the first kept byte lies.
        size: bytes that are kept.
        n_rows: rows of the file; a vector's elements are rows of one.
        kept: bytes of a row that are kept.
        skipped: bytes between them and those of the next row.
        into: (n_rows, columns) of a parameter, or what the packing makes of them; or a quantized
            matrix's rows, where they are floats in the file.
        half_split: head_dim where a head's rows change places, else 0.
        packing: how stored numbers become ours, where they are not ours already.
        are_scales: they must be positive and finite.
    """

    name: str
    tensor: StoredTensor
    offset: int
    size: int
    n_rows: int
    kept: int
    skipped: int
    into: Tensor | Quantized
    half_split: int
    packing: Packing | None
    are_scales: bool

    @property
    def tensor_end(self) -> int:
        """Where in the file the whole tensor ends."""
        size = math.prod(self.tensor.shape) * self.tensor.torch_dtype.itemsize
        return self.tensor.offset + size


class Reading:
    """Fills a model's parameters from files, by threads of its own.

    Args:
        model: whose parameters are filled, in their own type and on their own device.
        headers: where each tensor is stored.
        table: where this rank's slice of each tensor goes, by the same names.
        n_threads: that read side by side.
    """

    def __init__(
        self, model: Transformer, headers: Headers, table: Table, n_threads: int = 1
    ) -> None:
        self._model = model
        piece_bytes = GPU_PIECE_BYTES if model.device.type == "cuda" else CPU_PIECE_BYTES
        self._pieces = list(_divide(model, headers.tensors, table, piece_bytes))
        self._n_threads = max(1, min(n_threads, len(self._pieces)))
        self.total = sum(piece.size for piece in self._pieces)
        self._read = [0] * self._n_threads  # by thread: no lock needed
        self._at: list[tuple[_Piece, float] | None] = [None] * self._n_threads
        self._next = iter(self._pieces)
        self._changed = threading.Condition()
        self._n_running = 0
        self._failure: BaseException | None = None
        self._stopped = False
        self._files: dict[Path, int] = {}
        self.threads: list[threading.Thread] = []
        self.seconds = 0.0  # from start to the last byte

    @property
    def read(self) -> int:
        """Bytes of this rank's share that have been read."""
        return sum(self._read)

    @property
    def failed(self) -> bool:
        """Whether a read has failed; `finish` says why."""
        return self._failure is not None

    def waits_for(self) -> str | None:
        """What the read that is longest under way reads; None where no read is."""
        at = [place for place in self._at if place is not None]
        if not at:
            return None
        piece, _ = min(at, key=lambda place: place[1])
        return f"{piece.tensor.path.name} at byte {piece.offset:,} ({piece.name})"

    def start(self) -> None:
        """Open the files and begin to read.

        Raises:
            CheckpointError: a file that cannot be opened.
        """
        lasts = {piece.tensor.path: piece for piece in self._pieces}  # in the order of the files
        try:
            for path, piece in lasts.items():
                # O_NONBLOCK: a FIFO in the file's place would wait for a writer.
                self._files[path] = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
                status = os.fstat(self._files[path])
                if not stat.S_ISREG(status.st_mode):
                    raise OSError(0, "it is no regular file any more")
                if status.st_size < piece.tensor_end:
                    raise OSError(0, TRUNCATED)
        except OSError as error:
            self._close()
            raise _cannot_read(piece, error) from error
        self._started = time.monotonic()
        self._n_running = self._n_threads
        # A thread that hangs on a dead disk must not keep the process from ending.
        self.threads = [
            threading.Thread(target=self._run, args=(n,), name=f"read-{n}", daemon=True)
            for n in range(self._n_threads)
        ]
        for thread in self.threads:
            thread.start()

    def finish(self) -> bool:
        """Wait until all is read, or until reading has stopped.

        Returns:
            whether all of it was read; False if `stop` was called before the end.

        Raises:
            CheckpointError: names file and tensor of a read that failed or ended early.
        """
        with self._changed:
            self._changed.wait_for(lambda: self.failed or self._stopped or not self._n_running)
        self._join(JOIN_S if self.failed or self._stopped else 1e6)
        if self._failure is not None:
            raise self._failure
        return self.read == self.total

    def stop(self) -> None:
        """Begin no more reads; `finish` then waits for none that hangs."""
        with self._changed:
            self._stopped = True
            self._next = iter(())
            self._changed.notify_all()

    def abandon(self) -> None:
        """Stop because something else has failed."""
        self.stop()
        self._join(JOIN_S)

    def _join(self, timeout_s: float) -> None:
        # A thread that still frees torch's memory while the interpreter ends would abort it.
        deadline = time.monotonic() + timeout_s
        for thread in self.threads:
            if thread.ident is None:  # an interrupt came before it was started
                continue
            thread.join(max(0.0, deadline - time.monotonic()))

    def _run(self, n: int) -> None:
        try:
            reader = _Reader(self._model.device)
            with reader.at_work:
                while (piece := self._take()) is not None:
                    self._at[n] = (piece, time.monotonic())
                    try:
                        reader.read(self._files[piece.tensor.path], piece)
                    except OSError as error:
                        raise _cannot_read(piece, error) from error
                    self._read[n] += piece.size
                self._at[n] = None
                reader.finish()
        except BaseException as error:  # finish() raises it in the thread that waits
            with self._changed:
                self._failure = self._failure or error
                self._next = iter(())
        self._at[n] = None
        with self._changed:
            self._n_running -= 1
            if not self._n_running:
                self.seconds = time.monotonic() - self._started
                self._close()
            self._changed.notify_all()

    def _take(self) -> _Piece | None:
        with self._changed:
            return next(self._next, None)

    def _close(self) -> None:
        for fd in self._files.values():
            os.close(fd)
        self._files.clear()


def _cannot_read(piece: _Piece, error: OSError) -> CheckpointError:
    return CheckpointError(
        f"{piece.tensor.path}: reading {piece.name} failed ({error.strerror or error}); check the "
        f"disk or fetch the file again"
    )


def _divide(
    model: Transformer, tensors: dict[str, StoredTensor], table: Table, piece_bytes: int
) -> Iterator[_Piece]:
    """All that this rank reads, in the order of the files."""
    for name in sorted(table, key=lambda name: (tensors[name].path.name, tensors[name].offset)):
        tensor, placement = tensors[name], table[name]
        n_cols = tensor.shape[1] if len(tensor.shape) == 2 else 1
        cols, itemsize = placement.cols or range(1), tensor.torch_dtype.itemsize
        row, kept = n_cols * itemsize, len(cols) * itemsize
        begin = tensor.offset + placement.rows.start * row + cols.start * itemsize
        unit = placement.unit
        is_converted = placement.packing is not None or placement.held is not None
        most = piece_bytes // UNPACKED if is_converted else piece_bytes
        rows_each = max(1, most // (kept * unit)) * unit
        if kept < row:
            assert unit <= MOST_RANGES // 2
            rows_each = min(rows_each, MOST_RANGES // 2 // unit * unit)
        for first in range(0, len(placement.rows), rows_each):
            n_rows = min(rows_each, len(placement.rows) - first)
            yield _Piece(
                name=name,
                tensor=tensor,
                offset=begin + first * row,
                size=n_rows * kept,
                n_rows=n_rows,
                kept=kept,
                skipped=row - kept,
                into=_part(model, placement, first, n_rows),
                half_split=placement.half_split,
                packing=placement.packing,
                are_scales=placement.check == "scale",
            )


def _part(model: Transformer, placement: Placement, first: int, n_rows: int) -> Tensor | Quantized:
    """Where some of a placement's rows go."""
    if placement.held is not None:
        return model.quantized(placement).rows(first, n_rows)
    into = model.destination(placement)
    return into.view(len(into), -1).narrow(*placement.region(first, n_rows))


class _Buffer:
    """Host memory that one piece at a time passes through.

    Args:
        size: in bytes.
        pinned: so that a GPU can read it by itself.
    """

    def __init__(self, size: int, *, pinned: bool) -> None:
        self.bytes = torch.empty(size, dtype=torch.uint8, pin_memory=pinned)
        self.copied = torch.cuda.Event() if pinned else None  # the GPU has read it
        self._ranges: dict[tuple[int, int, int], list[memoryview]] = {}

    def ranges_of(self, piece: _Piece) -> list[memoryview]:
        """Where a piece's bytes go; cached, since it is much of Python's time for a piece."""
        key = (piece.n_rows, piece.kept, piece.skipped)
        if key not in self._ranges:
            self._ranges[key] = _ranges(piece, self.bytes[: piece.size])
        return self._ranges[key]


class _Reader:
    """One thread's memory, and on a GPU its stream.

    Args:
        device: of the parameters.
    """

    def __init__(self, device: torch.device) -> None:
        self._on_gpu = device.type == "cuda"
        self._device = device
        # Two, so that the file is read into one while the GPU copies the other.
        self._buffers: list[_Buffer | None] = [None, None]
        self._staging: Tensor | None = None
        self._judged: list[tuple[_Piece, Tensor]] = []
        self.at_work: Any = nullcontext()
        if self._on_gpu:
            torch.cuda.set_device(device)
            self._stream = torch.cuda.Stream(device)
            self.at_work = torch.cuda.stream(self._stream)

    def read(self, fd: int, piece: _Piece) -> None:
        """Read a piece, and put it where it belongs or on its way there."""
        into, dtype = piece.into, piece.tensor.torch_dtype
        as_stored = (
            isinstance(into, Tensor)
            and into.dtype == dtype
            and not piece.half_split
            and piece.packing is None
        )
        if as_stored and not self._on_gpu:
            assert isinstance(into, Tensor)
            _read_ranges(fd, piece, _ranges(piece, into.view(torch.uint8).view(-1)))
            self._judge(piece)
            return
        buffer = self._free_buffer(piece.size)
        _read_ranges(fd, piece, buffer.ranges_of(piece))
        read = buffer.bytes[: piece.size]
        if as_stored:
            assert isinstance(into, Tensor)
            into.view(torch.uint8).view(-1).copy_(read, non_blocking=True)
        else:
            if self._on_gpu:
                if self._staging is None or len(self._staging) < piece.size:
                    self._staging = torch.empty_like(buffer.bytes, device=self._device)
                read = self._staging[: piece.size].copy_(read, non_blocking=True)
            values = read.view(dtype).view(piece.n_rows, -1)
            if piece.packing is not None:
                values = decode(values, piece.packing)
            unit, n_cols = piece.half_split, into.shape[1]
            if isinstance(into, Quantized):
                if unit:
                    halves = values.view(-1, 2, unit // 2, n_cols).transpose(1, 2)
                    values = halves.reshape(-1, n_cols)
                quantize(values, into)
            elif unit:
                _in_halves(into, unit).copy_(values.reshape(-1, 2, unit // 2, n_cols))
            else:
                into.copy_(values)
        self._judge(piece)
        if buffer.copied is not None:
            buffer.copied.record(self._stream)

    def finish(self) -> None:
        """Until all copies have arrived.

        Raises:
            CheckpointError: scales that no matrix has.
        """
        if self._on_gpu:
            self._stream.synchronize()
        for piece, sound in self._judged:
            if not sound:
                raise CheckpointError(f"{piece.name} in {piece.tensor.path.name}: {BAD_SCALE}")

    def _judge(self, piece: _Piece) -> None:
        """Note whether scales that have arrived are sound; `finish` looks, so that none waits."""
        if piece.are_scales:
            assert isinstance(piece.into, Tensor)
            self._judged.append((piece, ((piece.into > 0) & (piece.into < torch.inf)).all()))

    def _free_buffer(self, size: int) -> _Buffer:
        """The buffer that was not used last, once it may be written."""
        buffer, other = self._buffers
        if buffer is None or len(buffer.bytes) < size:
            least = GPU_PIECE_BYTES if self._on_gpu else CPU_PIECE_BYTES
            buffer = _Buffer(max(size, least), pinned=self._on_gpu)
        elif buffer.copied is not None:
            buffer.copied.synchronize()
        self._buffers = [other, buffer]
        return buffer


def _ranges(piece: _Piece, into: Tensor) -> list[memoryview]:
    """Memory for the kept rows, in a flat uint8 CPU tensor, and for what lies between them."""
    view = memoryview(into.numpy())  # type: ignore[arg-type]  # numpy's stubs know no buffers
    if not piece.skipped:
        return [view]
    dropped = memoryview(bytearray(piece.skipped))
    rows = (view[at : at + piece.kept] for at in range(0, piece.size, piece.kept))
    return [part for row in rows for part in (row, dropped)][:-1]


def _read_ranges(fd: int, piece: _Piece, ranges: list[memoryview]) -> None:
    """Read a piece's neighbouring bytes of its file into memory, range after range.

    Raises:
        OSError: the system's, or the file ended early.
    """
    left = piece.size + (piece.n_rows - 1) * piece.skipped
    offset = piece.offset
    if hasattr(os, "posix_fadvise"):  # lets the disk prepare all of it at once
        os.posix_fadvise(fd, offset, left, os.POSIX_FADV_WILLNEED)
    while (n := os.preadv(fd, ranges, offset)) < left:
        if n == 0:
            raise OSError(0, TRUNCATED)
        left -= n
        offset += n
        done = 0
        while n >= len(ranges[done]):
            n -= len(ranges[done])
            done += 1
        ranges = [ranges[done][n:], *ranges[done + 1 :]]


def _in_halves(rows: Tensor, head_dim: int) -> Tensor:
    """A view of whole heads whose pairs are neighbours, in the order of a file that splits them.

    Row `head * head_dim + 2 * pair + element` is at `[head, element, pair]`.
    """
    return rows.view(-1, head_dim // 2, 2, rows.shape[1]).transpose(1, 2)
