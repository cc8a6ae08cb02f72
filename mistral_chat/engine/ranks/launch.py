"""How a process becomes a rank: as a launcher set it up, or as rank 0 of ranks that it starts.

Only this file reads a launcher's environment variables. Imports nothing heavy until needed.
"""

import hashlib
import os
import subprocess
from collections.abc import Mapping
from functools import cache
from typing import TYPE_CHECKING

from mistral_chat.engine import rank as rank_entry
from mistral_chat.engine.gpus import visible_gpus
from mistral_chat.engine.ranks import parent
from mistral_chat.engine.ranks.launcher import environment_of_ranks, how_it_ended
from mistral_chat.errors import DeviceError, RankLostError, UsageError

if TYPE_CHECKING:
    from mistral_chat.engine.ranks.group import Group
    from mistral_chat.engine.ranks.place import Place

__all__ = [
    "current_group",
    "is_launched",
    "launched_rank",
    "launched_ranks",
    "launched_ranks_here",
    "place",
    "set_up_environment",
    "spawn_ranks",
    "visible_gpus",
]

_VARIABLES = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
_OF_A_RUN = ("TORCHELASTIC_RUN_ID", "TORCHELASTIC_RESTART_COUNT", "MASTER_ADDR", "MASTER_PORT")
_SECRET = "MISTRAL_CHAT_SECRET"


def is_launched(environment: Mapping[str, str] = os.environ) -> bool:
    """Whether torchrun, or a launcher that sets its variables, started this process."""
    return all(name in environment for name in _VARIABLES)


def launched_rank() -> int | None:
    """This process's rank; None if no launcher started it."""
    if not is_launched():
        return None
    return _number("RANK")


def launched_ranks_here() -> int:
    """Ranks that the launcher started on this node."""
    return _number("LOCAL_WORLD_SIZE", _number("WORLD_SIZE"))


def launched_ranks() -> int:
    """Ranks on all nodes; one if no launcher started this process."""
    return _number("WORLD_SIZE") if is_launched() else 1


def _number(
    name: str, default: int | None = None, environment: Mapping[str, str] = os.environ
) -> int:
    text = environment.get(name, "" if default is None else str(default))
    if not text.isdigit():
        raise UsageError(f"the launcher set {name}={text!r}: expected a whole number")
    return int(text)


def place(environment: Mapping[str, str] = os.environ) -> "Place":
    """Where a process stands among the ranks; a single rank if no launcher started it.

    Args:
        environment: of the process.
    """
    from mistral_chat.engine.ranks.place import Place

    if not is_launched(environment):
        return Place()
    rank, world_size = (_number(name, None, environment) for name in ("RANK", "WORLD_SIZE"))
    # The launcher sets these alike for all ranks of this run and for no others.
    known = "\n".join(environment.get(name, "") for name in (*_OF_A_RUN, "WORLD_SIZE"))
    return Place(
        rank=rank,
        world_size=world_size,
        local_rank=_number("LOCAL_RANK", rank, environment),
        local_world_size=_number("LOCAL_WORLD_SIZE", world_size, environment),
        master_addr=environment["MASTER_ADDR"],
        run=hashlib.sha256(known.encode()).hexdigest()[:32],
        secret=(environment.get(_SECRET) or known).encode(),
    )


@cache
def current_group() -> "Group":
    """The ranks that this process belongs to; meets them on the first call."""
    from mistral_chat.engine.ranks.group import Group

    set_up_environment()
    parent.end_with_launcher()  # our own command has done this already, a script has not
    return Group(place())


def spawn_ranks(n_ranks: int, arguments: str) -> tuple["Group", list[subprocess.Popen[bytes]]]:
    """Become rank 0 of `n_ranks` on this node, the others being `mistral_chat.engine.worker`.

    Args:
        n_ranks: number of ranks.
        arguments: the workers' command line.

    Returns:
        the group and the other ranks' processes.

    Raises:
        RankLostError: one of them ended while ranks were meeting.
        DeviceError: one of them could not be started.
    """
    from mistral_chat.engine.ranks.group import Group

    set_up_environment()
    common = environment_of_ranks(n_ranks)
    workers: list[subprocess.Popen[bytes]] = []

    def look() -> None:
        for rank, worker in enumerate(workers, 1):
            if worker.poll() is not None:
                raise RankLostError(f"rank {rank} {how_it_ended(worker)} before all ranks had met")

    try:
        for rank in range(1, n_ranks):
            workers.append(_spawn(rank, common, arguments))
        own = common | {"RANK": "0", "LOCAL_RANK": "0"}
        return Group(place(own), look=look), workers
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
        env=common | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
        stdin=subprocess.DEVNULL,
        process_group=0,  # the program handles Ctrl-C
    )


def set_up_environment() -> None:
    """Set what NCCL and torch read from the environment; call it before torch is imported.

    - No NVLink multicast: it gains nothing at our sizes, and a process that dies while using it
      can leave the host's GPUs unusable.
    - No health service of NCCL (RAS): it listens on a port for anyone, and keeps calling ranks
      that were closed.
    - No monitoring thread of torch, which kills a process that was stopped for some minutes: the
      lifeline notices lost ranks.
    - Huge pages for large tensors on CPU: fresh weights cost a page fault per 2 MiB instead of
      4 KiB, and steps have fewer TLB misses (BENCHMARKS.md).
    """
    os.environ.setdefault("NCCL_NVLS_ENABLE", "0")
    os.environ.setdefault("NCCL_RAS_ENABLE", "0")
    os.environ.setdefault("TORCH_NCCL_ENABLE_MONITORING", "0")
    os.environ.setdefault("TORCH_SYMM_MEM_DISABLE_MULTICAST", "1")
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
