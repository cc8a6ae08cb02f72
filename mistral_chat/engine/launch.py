"""How ranks come to be: adopt what torchrun set up, or start torchrun's launcher.

The only place that reads environment variables of a launch. Imports nothing heavy until asked.
"""

import logging
import os
import signal
import subprocess
import sys
import uuid
from collections.abc import Sequence
from functools import cache
from typing import TYPE_CHECKING

from mistral_chat.errors import DeviceError, UsageError

if TYPE_CHECKING:
    from mistral_chat.engine.group import Group, Place

__all__ = [
    "current_group",
    "is_launched",
    "launched_rank",
    "launched_ranks",
    "launched_ranks_here",
    "place",
    "set_up_environment",
    "spawn_ranks",
    "start_torchrun",
    "visible_gpus",
]

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


def launched_ranks() -> int:
    """How many ranks there are on all nodes; one where no launcher started this process."""
    return _number("WORLD_SIZE") if is_launched() else 1


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
    return Group(place())


def spawn_ranks(n_ranks: int, arguments: str) -> tuple["Group", list[subprocess.Popen[bytes]]]:
    """Become rank 0 of `n_ranks` on this node, the others being `mistral_chat.engine.worker`.

    Args:
        n_ranks: number of ranks.
        arguments: what the workers get on their command line.

    Returns:
        the group and the other ranks' processes.
    """
    from torch.distributed import TCPStore  # type: ignore[attr-defined]

    from mistral_chat.engine.group import START_TIMEOUT, Group, Place

    set_up_environment()
    store = TCPStore(
        "127.0.0.1", 0, n_ranks, is_master=True, timeout=START_TIMEOUT, wait_for_workers=False
    )
    common = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(store.port)}
    common |= {"WORLD_SIZE": str(n_ranks), "LOCAL_WORLD_SIZE": str(n_ranks)}
    common |= {"OMP_NUM_THREADS": _threads_each(n_ranks)}
    workers = [
        subprocess.Popen(
            [sys.executable, "-m", "mistral_chat.engine.worker", arguments],
            env=os.environ | common | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdin=subprocess.DEVNULL,
        )
        for rank in range(1, n_ranks)
    ]
    return Group(Place(world_size=n_ranks, local_world_size=n_ranks), store), workers


def _threads_each(n_ranks: int) -> str:
    """OMP_NUM_THREADS of each rank: an equal part of the cores, unless it is already set."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return os.environ.get("OMP_NUM_THREADS", str(max(1, (cores or 1) // n_ranks)))


def set_up_environment() -> None:
    """What NCCL and torch read from the environment; to be called before torch is imported.

    No NVLink multicast: it gains nothing at our sizes, and a process that dies while using it can
    leave the GPUs of the host unusable. Huge pages for large tensors on CPU: fresh weights cost
    a page fault for each 2 MiB instead of 4 KiB, and steps miss the TLB less (BENCHMARKS.md).
    """
    os.environ.setdefault("NCCL_NVLS_ENABLE", "0")
    os.environ.setdefault("TORCH_SYMM_MEM_DISABLE_MULTICAST", "1")
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")


def visible_gpus() -> int:
    """GPUs that torch sees."""
    import torch

    return torch.cuda.device_count() if torch.cuda.is_available() else 0


def start_torchrun(nproc_per_node: int, argv: Sequence[str]) -> int:
    """Run `python -m mistral_chat ARGV` on this node's ranks under torchrun's launcher.

    Returns:
        the exit code to end with: rank 0's where it failed, else that of the first that did.

    Raises:
        DeviceError: a worker could not be started.
    """
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    # The launcher's own report of a failed rank: 37 lines that repeat what rank 0 said in one.
    logging.disable(logging.CRITICAL)  # its loggers have levels of their own
    os.environ["OMP_NUM_THREADS"] = _threads_each(nproc_per_node)
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=nproc_per_node,
        run_id=str(uuid.uuid4()),
        rdzv_backend="c10d",
        rdzv_endpoint="127.0.0.1:0",
        local_addr="127.0.0.1",
        max_restarts=0,
        monitor_interval=0.1,
    )
    try:
        elastic_launch(config, sys.executable)("-m", "mistral_chat", *argv)
    except ChildFailedError as error:
        # The launcher ends the others with SIGTERM, which says nothing of why.
        own = {rank: f for rank, f in error.failures.items() if f.exitcode != -signal.SIGTERM}
        failure = own.get(0) or min(
            (own or error.failures).values(), key=lambda failure: failure.timestamp
        )
        if failure.exitcode < 0:
            name = signal.Signals(-failure.exitcode).name
            said = f"rank {failure.local_rank} was ended by {name}; all ranks end"
            print(f"mistral-chat: error: {said}", file=sys.stderr)
            return 1
        return failure.exitcode
    except SignalException as error:
        return 128 + int(error.sigval)
    except (OSError, subprocess.SubprocessError) as error:
        raise DeviceError(f"the ranks could not be started ({error})") from error
    return 0
