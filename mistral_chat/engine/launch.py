"""How ranks come to be: adopt what torchrun set up, or start torchrun's launcher.

The only place that reads environment variables of a launch. Imports nothing heavy until asked.
"""

import hashlib
import logging
import os
import secrets
import signal
import subprocess
import sys
import uuid
from collections.abc import Mapping, Sequence
from functools import cache
from typing import TYPE_CHECKING

from mistral_chat.errors import DeviceError, UsageError

if TYPE_CHECKING:
    from mistral_chat.engine.group import Group
    from mistral_chat.engine.place import Place

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
    from mistral_chat.engine.place import Place

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
    from mistral_chat.engine.group import Group

    set_up_environment()
    # No store listens for them: they meet on this node, under the name of the run.
    common = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0", _RUN: secrets.token_hex(16)}
    common |= {"WORLD_SIZE": str(n_ranks), "LOCAL_WORLD_SIZE": str(n_ranks)}
    common |= {"OMP_NUM_THREADS": _threads_each(n_ranks)}
    environments = [
        os.environ | common | {"RANK": str(rank), "LOCAL_RANK": str(rank)}
        for rank in range(n_ranks)
    ]
    workers = [
        subprocess.Popen(
            [sys.executable, "-m", "mistral_chat.engine.worker", arguments],
            env=environment,
            stdin=subprocess.DEVNULL,
        )
        for environment in environments[1:]
    ]
    return Group(place(environments[0])), workers


def _threads_each(n_ranks: int) -> str:
    """OMP_NUM_THREADS of each rank: an equal part of the cores, unless it is already set."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return os.environ.get("OMP_NUM_THREADS", str(max(1, (cores or 1) // n_ranks)))


def set_up_environment() -> None:
    """What NCCL and torch read from the environment; to be called before torch is imported.

    No NVLink multicast: it gains nothing at our sizes, and a process that dies while using it can
    leave the GPUs of the host unusable. No thread of torch's that ends a process which was stopped
    for some minutes: the lifeline knows better who is gone. Huge pages for large tensors on CPU:
    fresh weights cost a page fault for each 2 MiB instead of 4 KiB, and steps miss the TLB less
    (BENCHMARKS.md).
    """
    os.environ.setdefault("NCCL_NVLS_ENABLE", "0")
    os.environ.setdefault("TORCH_NCCL_ENABLE_MONITORING", "0")
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
