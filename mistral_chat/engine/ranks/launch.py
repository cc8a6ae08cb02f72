"""How ranks come to be: adopt what a launcher set up, or become rank 0 of others.

The only place that reads environment variables of a launch. Imports nothing heavy until asked.
"""

import hashlib
import os
import secrets
import subprocess
from collections.abc import Mapping
from functools import cache
from typing import TYPE_CHECKING

from mistral_chat.engine import rank as rank_entry
from mistral_chat.engine.gpus import visible_gpus
from mistral_chat.engine.ranks import parent
from mistral_chat.engine.ranks.launcher import how_it_ended, threads_each
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
_RUN = "TORCHELASTIC_RUN_ID"
_OF_A_RUN = (_RUN, "TORCHELASTIC_RESTART_COUNT", "MASTER_ADDR", "MASTER_PORT")
_SECRET = "MISTRAL_CHAT_SECRET"


def is_launched(environment: Mapping[str, str] = os.environ) -> bool:
    """Whether torchrun (or a launcher that speaks its variables) started this process."""
    return all(name in environment for name in _VARIABLES)


def launched_rank() -> int | None:
    """This process's rank where a launcher started it."""
    if not is_launched():
        return None
    return _number("RANK")


def launched_ranks_here() -> int:
    """How many ranks the launcher started on this node."""
    return _number("LOCAL_WORLD_SIZE", _number("WORLD_SIZE"))


def launched_ranks() -> int:
    """How many ranks there are on all nodes; one where no launcher started this process."""
    return _number("WORLD_SIZE") if is_launched() else 1


def _number(
    name: str, default: int | None = None, environment: Mapping[str, str] = os.environ
) -> int:
    text = environment.get(name, "" if default is None else str(default))
    if not text.isdigit():
        raise UsageError(f"the launcher set {name}={text!r}: expected a whole number")
    return int(text)


def place(environment: Mapping[str, str] = os.environ) -> "Place":
    """Where a process stands among the ranks; alone when no launcher started it.

    Args:
        environment: of the process.
    """
    from mistral_chat.engine.ranks.place import Place

    if not is_launched(environment):
        return Place()
    rank, world_size = (_number(name, None, environment) for name in ("RANK", "WORLD_SIZE"))
    # What the launcher gives all ranks of this run, and no others.
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
    from mistral_chat.engine.ranks.group import Group

    set_up_environment()
    # No store listens for them: they meet on this node, under the name of the run.
    common = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0", _RUN: secrets.token_hex(16)}
    common |= {"WORLD_SIZE": str(n_ranks), "LOCAL_WORLD_SIZE": str(n_ranks)}
    common |= {"OMP_NUM_THREADS": threads_each(n_ranks)}
    workers: list[subprocess.Popen[bytes]] = []

    def look() -> None:
        for rank, worker in enumerate(workers, 1):
            if worker.poll() is not None:
                raise RankLostError(f"rank {rank} {how_it_ended(worker)} before all ranks had met")

    try:
        for rank in range(1, n_ranks):
            workers.append(_spawn(rank, common, arguments))
        own = os.environ | common | {"RANK": "0", "LOCAL_RANK": "0"}
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
        env=os.environ | common | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
        stdin=subprocess.DEVNULL,
        process_group=0,  # Ctrl-C at a terminal is the program's to handle
    )


def set_up_environment() -> None:
    """What NCCL and torch read from the environment; to be called before torch is imported.

    No NVLink multicast: it gains nothing at our sizes, and a process that dies while using it can
    leave the GPUs of the host unusable. No health service of NCCL's (RAS): it listens for anybody,
    and keeps calling ranks that were closed. No thread of torch's that ends a process which was
    stopped for some minutes: the lifeline knows better who is gone. Huge pages for large tensors
    on CPU: fresh weights cost a page fault for each 2 MiB instead of 4 KiB, and steps miss the TLB
    less (BENCHMARKS.md).
    """
    os.environ.setdefault("NCCL_NVLS_ENABLE", "0")
    os.environ.setdefault("NCCL_RAS_ENABLE", "0")
    os.environ.setdefault("TORCH_NCCL_ENABLE_MONITORING", "0")
    os.environ.setdefault("TORCH_SYMM_MEM_DISABLE_MULTICAST", "1")
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
