"""torch's process groups, as one run's ranks own them: all-reduce, gather, broadcast.

gloo on CPU, which may wait for a month and does not spin, and NCCL on GPUs; CPU ranks of one node
sum through memory that they share. The groups belong to a `Group` and end with it: torch's global
default group is not used, since a process has only one and may have several models open. Knows
nothing of steps or of lifelines.
"""

import hmac
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch._C._distributed_c10d import (
    AllreduceOptions,
    AllToAllOptions,
    BroadcastOptions,
    GatherOptions,
    ProcessGroup,
)

from mistral_chat.engine.ranks.node_memory import NodeMemory
from mistral_chat.engine.ranks.notes import Notes, NotesStore
from mistral_chat.engine.ranks.place import Place

__all__ = ["ProcessGroups", "StrangerError"]

# Waiting for a person to type: longer than anyone thinks. gloo counts in nanoseconds in 63 bits.
PATIENCE = timedelta(days=30)
START_TIMEOUT = timedelta(minutes=10)
_PROOF_BYTES = 32


class StrangerError(RuntimeError):
    """A process that is no rank of this run has connected through gloo."""


class ProcessGroups:
    """What passes between all ranks through torch; every rank makes one at the same time.

    Args:
        place: of this process.
        notes: where the ranks tell each other how to connect.
        key: what all ranks know and nobody else; they prove it to each other.
        node_memory: memory that the ranks of one node share; None where gloo carries CPU tensors.

    Raises:
        RuntimeError: a rank has gone, or a stranger came in between.
    """

    def __init__(
        self, place: Place, notes: Notes, key: bytes, node_memory: NodeMemory | None
    ) -> None:
        self.node_memory = node_memory
        self._rank, self._world_size = place.rank, place.world_size
        # Keep the stores: torch holds only their C++ half, whose methods are gone without the
        # Python half, and NCCL first uses its store in the first all-reduce.
        self._stores = {name: NotesStore(notes, f"{name}/") for name in ("group", "gloo", "nccl")}
        self._group = ProcessGroup(self._stores["group"], place.rank, place.world_size)
        self._gloo = _make_gloo(place, self._stores["gloo"])
        self._group._register_backend(
            torch.device("cpu"), ProcessGroup.BackendType.GLOO, self._gloo
        )
        self._group._set_default_backend(ProcessGroup.BackendType.GLOO)
        self._check_ranks(key)
        self._gloo._set_default_timeout(PATIENCE)
        if torch.cuda.is_available() and place.local_rank < torch.cuda.device_count():
            torch.cuda.set_device(place.local_rank)
            self._group._register_backend(
                torch.device("cuda"),
                ProcessGroup.BackendType.NCCL,
                _make_nccl(place, self._stores["nccl"]),
            )

    def _check_ranks(self, key: bytes) -> None:
        """Have all ranks prove who they are: gloo accepts whoever connects first."""

        def proof(by: int, to: int) -> Tensor:
            said = hmac.digest(key, b"%d to %d" % (by, to), "sha256")
            return torch.frombuffer(bytearray(said), dtype=torch.uint8)

        everyone = range(self._world_size)
        ours = torch.cat([proof(self._rank, to) for to in everyone])
        theirs = torch.zeros_like(ours)
        self._gloo.alltoall_base(theirs, ours, [], [], AllToAllOptions()).wait()
        if not torch.equal(theirs, torch.cat([proof(by, self._rank) for by in everyone])):
            raise StrangerError("a stranger connected to a rank as if it were another")

    def all_reduce(self, tensor: Tensor) -> None:
        """Sum over ranks, in place."""
        if self.node_memory is not None and tensor.device.type == "cpu":
            self.node_memory.all_reduce(tensor)
        else:
            self._all_reduce(tensor, dist.ReduceOp.SUM)

    def minimum(self, tensor: Tensor) -> None:
        """Take the least of the ranks' values, element by element, in place."""
        self._all_reduce(tensor, dist.ReduceOp.MIN)

    def _all_reduce(self, tensor: Tensor, op: Any) -> None:
        options = AllreduceOptions()
        options.reduceOp = op
        self._run("allreduce", [tensor], options)

    def broadcast(self, tensor: Tensor) -> None:
        """Give rank 0's tensor to all, in place."""
        options = BroadcastOptions()
        options.rootRank, options.rootTensor = 0, 0
        self._run("broadcast", [tensor], options)

    def gather(self, tensor: Tensor) -> list[Tensor] | None:
        """Every rank's tensor on rank 0, None on the others; of the same shape on all ranks."""
        if self.node_memory is not None and tensor.device.type == "cpu":
            return self.node_memory.gather(tensor)
        parts = [torch.empty_like(tensor) for _ in range(self._world_size)]
        options = GatherOptions()
        options.rootRank = 0
        self._run("gather", [parts] if self._rank == 0 else [], [tensor], options)
        return parts if self._rank == 0 else None

    def _run(self, verb: str, *arguments: Any) -> None:
        arguments[-1].asyncOp = False  # on the current stream, where a graph may be captured
        work = getattr(self._group, verb)(*arguments)
        if work is not None:
            work.wait()

    def close(self, *, abort: bool) -> None:
        """Release connections, threads and communicators.

        Args:
            abort: do not wait for what was begun: another rank may never take its part in it.
        """
        if abort:
            self._group.abort()
        else:
            self._group.shutdown()
        del self._group, self._gloo, self._stores
        self.node_memory = None


def _make_gloo(place: Place, store: NotesStore) -> Any:
    gloo: Any = dist.ProcessGroupGloo
    options = gloo._Options()
    options._timeout = START_TIMEOUT
    on_one_node = place.is_on_one_node
    options._devices = [
        # What listens for ranks of one node is not to be reached from others.
        gloo.create_device(hostname="127.0.0.1") if on_one_node else gloo.create_default_device()
    ]
    return gloo(store, place.rank, place.world_size, options)


def _make_nccl(place: Place, store: NotesStore) -> Any:
    nccl: Any = dist.ProcessGroupNCCL
    return nccl(store, place.rank, place.world_size, nccl.Options())
