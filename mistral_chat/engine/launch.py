"""How ranks come to be: adopt what a launcher set up, or become rank 0 of others.

The only place that reads environment variables of a launch. Imports nothing heavy until asked.
"""

import contextlib
import os
import queue
import subprocess
import threading
from collections.abc import Callable, Sequence
from functools import cache
from typing import TYPE_CHECKING, TypeVar

from mistral_chat.engine import parent
from mistral_chat.engine import rank as rank_entry
from mistral_chat.engine.gpus import visible_gpus
from mistral_chat.engine.launcher import how_it_ended, threads_each
from mistral_chat.errors import DeviceError, RankLostError, UsageError

if TYPE_CHECKING:
    from mistral_chat.engine.group import Group, Place

__all__ = [
    "current_group",
    "is_launched",
    "launched_rank",
    "launched_ranks_here",
    "place",
    "set_up_environment",
    "spawn_ranks",
    "visible_gpus",
]

Met = TypeVar("Met")

POLL_S = 0.1
_VARIABLES = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


def is_launched() -> bool:
    """Whether torchrun (or a launcher that speaks its variables) started this process."""
    return all(name in os.environ for name in _VARIABLES)


def launched_rank() -> int | None:
    """This process's rank where a launcher started it."""
    if not is_launched():
        return None
    return _number("RANK")


def launched_ranks_here() -> int:
    """How many ranks the launcher started on this node."""
    return _number("LOCAL_WORLD_SIZE", _number("WORLD_SIZE"))


def _number(name: str, default: int | None = None) -> int:
    text = os.environ.get(name, "" if default is None else str(default))
    if not text.isdigit():
        raise UsageError(f"the launcher set {name}={text!r}: expected a whole number")
    return int(text)


def place() -> "Place":
    """Where this process stands among the ranks; alone when no launcher started it."""
    from mistral_chat.engine.group import Place

    if launched_rank() is None:
        return Place()
    rank, world_size = _number("RANK"), _number("WORLD_SIZE")
    return Place(
        rank=rank,
        world_size=world_size,
        local_rank=_number("LOCAL_RANK", rank),
        local_world_size=launched_ranks_here(),
        master_addr=os.environ["MASTER_ADDR"],
    )


@cache
def current_group() -> "Group":
    """The ranks that this process belongs to; meets them on the first call."""
    from mistral_chat.engine.group import Group

    set_up_environment()
    parent.end_with_launcher()  # in a program of a person's, which has not asked for it before
    return Group(place())


def spawn_ranks(n_ranks: int, arguments: str) -> tuple["Group", list[subprocess.Popen[bytes]]]:
    """Become rank 0 of `n_ranks` on this node, the others being `mistral_chat.engine.worker`.

    Args:
        n_ranks: number of ranks.
        arguments: what the workers get on their command line.

    Returns:
        the group and the other ranks' processes.

    Raises:
        RankLostError: one of them ended before all had met.
        DeviceError: one of them could not be started.
    """
    from torch.distributed import TCPStore  # type: ignore[attr-defined]

    from mistral_chat.engine.group import START_TIMEOUT, Group, Place

    set_up_environment()
    store = TCPStore(
        "127.0.0.1", 0, n_ranks, is_master=True, timeout=START_TIMEOUT, wait_for_workers=False
    )
    common = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(store.port)}
    common |= {"WORLD_SIZE": str(n_ranks), "LOCAL_WORLD_SIZE": str(n_ranks)}
    common |= {"OMP_NUM_THREADS": threads_each(n_ranks)}
    workers: list[subprocess.Popen[bytes]] = []
    try:
        for rank in range(1, n_ranks):
            workers.append(_spawn(rank, common, arguments))
        place = Place(world_size=n_ranks, local_world_size=n_ranks)
        return _while_all_live(workers, lambda: Group(place, store)), workers
    except BaseException as error:
        for worker in workers:
            worker.kill()
            worker.wait()
        if isinstance(error, OSError):
            raise DeviceError(
                f"rank {len(workers) + 1} could not be started ({error.strerror})"
            ) from error
        raise


def _spawn(rank: int, common: dict[str, str], arguments: str) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        rank_entry.command("program", "mistral_chat.engine.worker", arguments),
        env=os.environ | common | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
        stdin=subprocess.DEVNULL,
        process_group=0,  # Ctrl-C at a terminal is the program's to handle
    )


def _while_all_live(workers: Sequence[subprocess.Popen[bytes]], meet: Callable[[], Met]) -> Met:
    """Meet the other ranks, unless one of them ends: it would be waited for in vain.

    The meeting is a thread's, since nothing can be made to let go of a thread that waits in it.

    Raises:
        RankLostError: a rank has ended.
    """
    outcome: queue.SimpleQueue[Met | BaseException] = queue.SimpleQueue()

    def run() -> None:
        try:
            outcome.put(meet())
        except BaseException as error:  # raised where somebody waits
            outcome.put(error)

    threading.Thread(target=run, name="meeting", daemon=True).start()
    while True:
        with contextlib.suppress(queue.Empty):
            met = outcome.get(timeout=POLL_S)
            if isinstance(met, BaseException):
                raise met
            return met
        for rank, worker in enumerate(workers, 1):
            if worker.poll() is not None:
                raise RankLostError(f"rank {rank} {how_it_ended(worker)} before all ranks had met")


def set_up_environment() -> None:
    """What NCCL and torch read from the environment; to be called before torch is imported.

    No NVLink multicast: it gains nothing at our sizes, and a process that dies while using it can
    leave the GPUs of the host unusable. Huge pages for large tensors on CPU: fresh weights cost
    a page fault for each 2 MiB instead of 4 KiB, and steps miss the TLB less (BENCHMARKS.md).
    """
    os.environ.setdefault("NCCL_NVLS_ENABLE", "0")
    os.environ.setdefault("TORCH_SYMM_MEM_DISABLE_MULTICAST", "1")
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
