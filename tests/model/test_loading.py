"""Reading a rank's slices: every layout, type and division gives the same, every fault is named."""

import errno
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from mistral_chat.errors import CheckpointError
from mistral_chat.model import loading
from mistral_chat.model.checkpoint import PICKLE
from mistral_chat.model.operations import Alone
from mistral_chat.model.sharding import Shard, placements
from mistral_chat.model.transformer import Transformer
from tests.conftest import (
    ROOT,
    folder_of,
    load_weights,
    random_weights,
    reading_of,
)
from tests.model.test_checkpoint import (
    ARGS,
    LAYOUTS,
    SINGLE,
    Weights,
    assert_holds,
    load,
    shard_name,
    write_pickle,
    write_shards,
    write_single,
    write_zeros,
)
from tests.scripts import load_share


@pytest.mark.parametrize("write", LAYOUTS)
def test_load_weights_is_the_same_from_every_layout(
    tmp_path: Path, write: Callable[[Path, Weights], None]
) -> None:
    weights = random_weights(ARGS)
    write(tmp_path, weights)
    assert_holds(load(tmp_path), weights)


@pytest.mark.parametrize("write", [write_single, write_pickle, write_shards])
@pytest.mark.parametrize("world_size", [2, 3, 4, 9])
def test_load_weights_gives_each_rank_its_slices(
    tmp_path: Path, write: Callable[[Path, Weights], None], world_size: int
) -> None:
    weights = random_weights(ARGS)
    write(tmp_path, weights)
    for rank in range(world_size):
        assert_holds(load(tmp_path, world_size=world_size, rank=rank), weights)


@pytest.mark.parametrize("tied", [False, True])
def test_load_weights_of_tied_embeddings_wants_no_output(tmp_path: Path, tied: bool) -> None:
    args = replace(ARGS, tied_embeddings=tied)
    weights = random_weights(args)
    assert ("output.weight" in weights) is not tied
    write_single(tmp_path, weights)
    model = load(tmp_path, args)
    assert_holds(model, weights)
    assert (model.output is None) is tied


@pytest.mark.parametrize("stored", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("held", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("write", [write_single, write_pickle])
def test_load_weights_converts_as_torch_does(
    tmp_path: Path,
    write: Callable[[Path, Weights], None],
    stored: torch.dtype,
    held: torch.dtype,
) -> None:
    weights = random_weights(ARGS, stored)
    write(tmp_path, weights)
    assert_holds(load(tmp_path, dtype=held, world_size=2, rank=1), weights)


@pytest.mark.parametrize("n_threads", [1, 3])
@pytest.mark.parametrize("size", [1, 50, 7 * 48, 1000])  # a row of most tensors has 48 bytes
def test_load_weights_reads_rows_wider_than_a_piece(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, size: int, n_threads: int
) -> None:
    weights = random_weights(ARGS, torch.bfloat16)
    write_single(tmp_path, weights)
    monkeypatch.setattr(loading, "CPU_PIECE_BYTES", size)
    model = Transformer(ARGS, Shard(ARGS, 2, 1), Alone())
    load_weights(model, folder_of(tmp_path, ARGS).headers, n_threads)
    assert_holds(model, weights)


def test_load_weights_goes_on_after_a_short_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    weights = random_weights(ARGS)
    write_single(tmp_path, weights)
    whole = os.preadv

    def short(fd: int, buffers: list[memoryview], offset: int) -> int:
        return whole(fd, [buffers[0][:37]], offset)

    monkeypatch.setattr("mistral_chat.model.loading.os.preadv", short)
    assert_holds(load(tmp_path, replace(ARGS, n_layers=2)), weights)


def test_load_weights_reads_a_pickle_of_views_of_one_storage(tmp_path: Path) -> None:
    weights = random_weights(ARGS)
    pool = torch.cat([tensor.reshape(-1) for tensor in weights.values()])
    views, at = {}, 0
    for name, tensor in weights.items():
        views[name] = pool[at : at + tensor.numel()].view(tensor.shape)
        at += tensor.numel()
    torch.save(views, tmp_path / PICKLE)
    assert_holds(load(tmp_path), weights)


@pytest.mark.parametrize("world_size", [1, 4])
def test_a_reading_counts_the_bytes_of_its_share(tmp_path: Path, world_size: int) -> None:
    write_single(tmp_path, random_weights(ARGS))
    model = Transformer(ARGS, Shard(ARGS, world_size, 0), Alone())
    reading = reading_of(model, folder_of(tmp_path, ARGS).headers)
    assert reading.read == 0
    reading.start()
    reading.finish()
    assert reading.read == reading.total == sum(4 * p.numel() for p in model.parameters())
    assert reading.seconds > 0


def test_a_reading_that_hangs_says_what_it_waits_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    weights = random_weights(ARGS)
    write_single(tmp_path, weights)
    headers = folder_of(tmp_path, ARGS).headers
    hung, go_on = threading.Event(), threading.Event()
    whole = os.preadv
    slow = headers.tensors["layers.1.feed_forward.w2.weight"]

    def hang(fd: int, buffers: list[memoryview], offset: int) -> int:
        if offset == slow.offset:
            hung.set()
            go_on.wait(60)
        return whole(fd, buffers, offset)

    monkeypatch.setattr(loading.os, "preadv", hang)
    model = Transformer(ARGS)
    reading = reading_of(model, headers, n_threads=2)
    reading.start()
    assert hung.wait(60)
    while reading.read < reading.total - 4 * weights["layers.1.feed_forward.w2.weight"].numel():
        time.sleep(0.01)  # the other thread reads the rest
    time.sleep(0.1)
    assert reading.waits_for() == (
        f"{SINGLE} at byte {slow.offset:,} (layers.1.feed_forward.w2.weight)"
    )
    go_on.set()
    reading.finish()
    assert reading.waits_for() is None
    assert_holds(model, weights)


def test_a_failure_is_told_while_another_thread_hangs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_single(tmp_path, random_weights(ARGS))
    headers = folder_of(tmp_path, ARGS).headers
    go_on = threading.Event()
    first = min(headers.tensors.values(), key=lambda tensor: tensor.offset)

    def fail(_fd: int, _buffers: list[memoryview], offset: int) -> int:
        if offset == first.offset:
            go_on.wait(60)
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(loading.os, "preadv", fail)
    monkeypatch.setattr(loading, "JOIN_S", 0.1)
    reading = reading_of(Transformer(ARGS), headers, n_threads=2)
    reading.start()
    with pytest.raises(CheckpointError, match=os.strerror(errno.EIO)):
        reading.finish()
    go_on.set()
    for thread in reading.threads:
        thread.join(60)


def test_abandon_after_an_interrupt_before_all_threads_were_started(tmp_path: Path) -> None:
    write_shards(tmp_path, random_weights(ARGS))
    reading = reading_of(Transformer(ARGS), folder_of(tmp_path, ARGS).headers, n_threads=2)
    reading.threads = [threading.Thread(target=print)]
    reading.abandon()


def test_a_fifo_that_took_the_place_of_a_file_does_not_hang(tmp_path: Path) -> None:
    write_shards(tmp_path, random_weights(ARGS))
    headers = folder_of(tmp_path, ARGS).headers
    path = headers.tensors["norm.weight"].path
    path.unlink()
    os.mkfifo(path)
    with pytest.raises(CheckpointError, match="no regular file any more"):
        reading_of(Transformer(ARGS), headers).start()


def test_load_weights_names_file_and_tensor_when_a_read_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_shards(tmp_path, random_weights(ARGS))
    headers = folder_of(tmp_path, ARGS).headers
    tensors = headers.tensors
    broken = "layers.1.feed_forward.w2.weight"
    whole = os.preadv

    def fail_in_one_tensor(fd: int, buffers: list[memoryview], offset: int) -> int:
        tensor = tensors[broken]
        here = os.fstat(fd).st_ino == tensor.path.stat().st_ino
        if here and tensor.offset <= offset < tensor.offset + 24 * 40 * 4:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return whole(fd, buffers, offset)

    monkeypatch.setattr("mistral_chat.model.loading.os.preadv", fail_in_one_tensor)
    with pytest.raises(CheckpointError) as caught:
        load_weights(Transformer(ARGS), headers, 2)
    assert str(tensors[broken].path) in str(caught.value)
    assert broken in str(caught.value)
    assert os.strerror(errno.EIO) in str(caught.value)


def test_load_weights_names_file_and_tensor_when_a_file_shrank(tmp_path: Path) -> None:
    write_shards(tmp_path, random_weights(ARGS))
    headers = folder_of(tmp_path, ARGS).headers
    path = tmp_path / shard_name(2, 3)
    last = max((t.offset, n) for n, t in headers.tensors.items() if t.path == path)[1]
    os.truncate(path, path.stat().st_size - 4)
    with pytest.raises(CheckpointError, match="shrank") as caught:
        load_weights(Transformer(ARGS), headers, 2)
    assert str(path) in str(caught.value)
    assert last in str(caught.value)


def test_load_weights_names_a_file_that_is_gone(tmp_path: Path) -> None:
    write_shards(tmp_path, random_weights(ARGS))
    headers = folder_of(tmp_path, ARGS).headers
    (tmp_path / shard_name(3, 3)).unlink()
    with pytest.raises(CheckpointError, match=shard_name(3, 3)):
        load_weights(Transformer(ARGS), headers, 2)


@pytest.mark.parametrize("fails", [False, True])
def test_load_weights_closes_its_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fails: bool
) -> None:
    write_shards(tmp_path, random_weights(ARGS))
    headers = folder_of(tmp_path, ARGS).headers
    opened: list[int] = []
    really_open, really_close = os.open, os.close

    def note_open(path: Path, flags: int) -> int:
        opened.append(really_open(path, flags))
        return opened[-1]

    def note_close(fd: int) -> None:
        opened.remove(fd)
        really_close(fd)

    monkeypatch.setattr("mistral_chat.model.loading.os.open", note_open)
    monkeypatch.setattr("mistral_chat.model.loading.os.close", note_close)
    if fails:
        os.truncate(tmp_path / shard_name(3, 3), 200)
        with pytest.raises(CheckpointError):
            load_weights(Transformer(ARGS), headers, 2)
    else:
        load_weights(Transformer(ARGS), headers, 2)
    assert opened == []


def load_share_apart(folder: Path, dtype: str) -> tuple[int, int]:
    """How much the peak memory of a process grew that loaded a share, and the share: bytes."""
    done = subprocess.run(  # a fork's memory would begin with its parent's
        [sys.executable, "-m", "tests.scripts.load_share", str(folder), dtype],
        capture_output=True,
        text=True,
        check=True,
        cwd=ROOT,
        timeout=300,
    )
    grown, share = map(int, done.stdout.split())
    return grown, share


@pytest.mark.skipif(sys.platform != "linux", reason="reads the peak memory from /proc")
@pytest.mark.parametrize(
    ("stored", "itemsize", "held"),
    [("F32", 4, "float32"), ("BF16", 2, "float32")],
)
def test_load_weights_takes_little_more_memory_than_the_share(
    tmp_path: Path, stored: str, itemsize: int, held: str
) -> None:
    table = placements(Shard(load_share.ARGS))
    size = write_zeros(tmp_path / SINGLE, table, stored, itemsize)
    assert size * 4 / itemsize > 600e6
    grown, share = load_share_apart(tmp_path, held)
    # Buffers have 2 x 2 MiB; the rest is what allocator, page tables and headers take. Reading an
    # embedding whole (168 MB in float32, 84 in bfloat16) or mapping the file would break it.
    assert share <= grown + 2e6  # the pages of all parameters were touched
    assert grown <= share + 80e6
