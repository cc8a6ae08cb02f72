"""The ranks of a run, and everything that passes between them.

Waiting for rank 0's next step happens on a CPU process group (gloo) that may wait for a month and
does not spin; sums of activations use NCCL on GPUs and, on CPU, memory that the ranks of one node
share, or gloo across nodes. Knows nothing of sequences.
"""

import contextlib
import secrets
import socket
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.distributed_c10d import Store
from torch.distributed.rendezvous import rendezvous

from mistral_chat.engine.lifeline import Lifeline, OnLost
from mistral_chat.engine.node_memory import NodeMemory
from mistral_chat.engine.step import Step
from mistral_chat.errors import MistralChatError, RankLostError
from mistral_chat.kernels import ops

__all__ = ["Group", "PeerFailedError", "Place"]

# Waiting for a person to type: longer than anyone thinks. gloo counts in nanoseconds in 63 bits.
PATIENCE = timedelta(days=30)
START_TIMEOUT = timedelta(minutes=10)
HEADER = 64
VERDICT_S = 1.0
ENDING_S = 5.0  # for a thread that has heard of a loss to say so, on a machine that is busy
SPEAK_TIMEOUT_S = 5.0
OTHERS_CANNOT_SHARE = "another rank cannot share its memory"


class PeerFailedError(RankLostError):
    """Another rank has failed and says why; this one ends without a word."""


@dataclass(frozen=True, kw_only=True)
class Place:
    """Where a process stands among the ranks, as torchrun's environment says.

    Args:
        rank: over all nodes.
        world_size: number of ranks over all nodes.
        local_rank: on this node; its GPU.
        local_world_size: ranks on this node.
        master_addr: rank 0's node.
    """

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    local_world_size: int = 1
    master_addr: str = "127.0.0.1"


class Group:
    """All ranks of a run; the `Collective` of the sharded model.

    Args:
        place: of this process. With more than one rank, this constructor meets the others and
            returns on all of them.
        store: where they meet; None is what the launcher set up.
        shards: parts that a model is divided into; None is one for each rank. More than that
            leaves this process with the part of its rank and nobody to sum with: for measuring.
    """

    def __init__(self, place: Place, store: Store | None = None, shards: int | None = None) -> None:
        self.place = place
        self.rank = place.rank
        self.world_size = place.world_size
        self.shards = shards or place.world_size
        self._lifeline: Lifeline | None = None
        self._sums: dict[str, dist.ProcessGroup | None] = {}
        self._node_memory: NodeMemory | None = None
        self._shared_memory: list[Any] = []  # kept mapped
        self._n_topics = 0
        started = time.monotonic()
        if place.world_size > 1:
            with self._exchanging():
                self._meet(store or next(rendezvous("env://", timeout=START_TIMEOUT))[0])
        self.meet_s = time.monotonic() - started

    @property
    def is_leader(self) -> bool:
        """Whether this is rank 0, which decides."""
        return self.rank == 0

    def _meet(self, store: Store) -> None:
        self._lifeline = self._open_lifeline(store)
        dist.init_process_group(
            "gloo", store=store, rank=self.rank, world_size=self.world_size, timeout=PATIENCE
        )
        self._sums["cpu"] = dist.group.WORLD
        if self.place.local_world_size == self.world_size and NodeMemory.is_supported():
            self._node_memory = NodeMemory(self.rank, self.world_size, store)
        if torch.cuda.is_available() and self.place.local_rank < torch.cuda.device_count():
            torch.cuda.set_device(self.place.local_rank)
            self._sums["cuda"] = dist.new_group(backend="nccl")

    def _open_lifeline(self, store: Store) -> Lifeline:
        one_node = self.place.local_world_size == self.world_size
        if self.is_leader:
            listener = socket.create_server(("127.0.0.1" if one_node else "", 0), backlog=1024)
            secret = secrets.token_bytes(16)
            port = listener.getsockname()[1]
            store.set("mistral_chat/lifeline", f"{port} {secret.hex()}")
            return Lifeline.lead(listener, self.world_size, secret)
        port, secret_hex = store.get("mistral_chat/lifeline").decode().split()
        host = "127.0.0.1" if one_node else self.place.master_addr
        return Lifeline.follow((host, int(port)), self.rank, bytes.fromhex(secret_hex))

    def set_on_lost(self, on_lost: OnLost) -> None:
        """Have `on_lost` called, from a thread, when another rank ends; it must end the process."""
        if self._lifeline:
            self._lifeline.on_lost = on_lost

    @contextlib.contextmanager
    def _exchanging(self) -> Iterator[None]:
        """What gloo says of a rank that is gone is for nobody to read.

        Usually the lifeline hears of the loss as well, says which rank it was and ends the
        process; whichever of the two comes first, that is what people see.

        Raises:
            RankLostError: on rank 0, and wherever ranks have not met: what failed.
            PeerFailedError: on the others, after rank 0 was told.
        """
        try:
            yield
        except (torch.OutOfMemoryError, torch.AcceleratorError):  # this rank's own
            raise
        except (RuntimeError, OSError) as error:
            first = (str(error) or type(error).__name__).splitlines()[0]
            what = f"an exchange with the other ranks failed ({first})"
            if self._lifeline is None:
                raise RankLostError(what) from error
            if self._lifeline.await_an_end(SPEAK_TIMEOUT_S):
                time.sleep(ENDING_S)  # it is about to end this process
            if self.is_leader:
                raise RankLostError(what) from error
            self._lifeline.fail(what)
            raise PeerFailedError(what) from error

    # What the model asks for.

    def all_reduce(self, partial: Tensor) -> Tensor:
        """Sum over ranks, in place."""
        if self.world_size == 1:
            return partial
        if self._node_memory and partial.device.type == "cpu":
            self._node_memory.all_reduce(partial)
        else:
            with self._exchanging():
                dist.all_reduce(partial, group=self._sums[partial.device.type])
        return partial

    def reduce_add_norm(
        self, partial: Tensor, residual: Tensor, weight: Tensor, eps: float
    ) -> tuple[Tensor, Tensor]:
        """`reference.add_norm` of the sum of `partial` over ranks."""
        return ops.add_norm(self.all_reduce(partial), residual, weight, eps)

    def gather_columns(self, part: Tensor, sizes: Sequence[int]) -> Tensor | None:
        """Put the ranks' columns side by side on rank 0.

        Args:
            part: (n, sizes[rank]) of this rank.
            sizes: columns of every rank.

        Returns:
            (n, sum of sizes) on rank 0, None on the others.
        """
        if self.world_size == 1:
            return part
        widest = max(sizes)
        padded = part.new_zeros(len(part), widest)  # a gather wants equal shapes
        padded[:, : part.shape[1]] = part
        if self._node_memory and part.device.type == "cpu":
            parts = self._node_memory.gather(padded)
        else:
            parts = [torch.empty_like(padded) for _ in sizes] if self.is_leader else None
            with self._exchanging():
                dist.gather(padded, parts, dst=0, group=self._sums[part.device.type])
        if parts is None:
            return None
        return torch.cat([p[:, :size] for p, size in zip(parts, sizes, strict=True)], dim=1)

    def hand_over(self, tokens: Tensor) -> None:
        """Give rank 0's tensor to all, in place."""
        if self.world_size > 1:
            with self._exchanging():
                dist.broadcast(tokens, src=0, group=self._sums[tokens.device.type])

    def why_no_peer_access(self) -> str | None:
        """Why the GPUs cannot write each other's memory; None when they can. The same on all ranks.

        Every rank must call it.
        """
        if self.place.local_world_size != self.world_size:
            return "ranks on several nodes"
        here = self.place.local_rank
        others = [gpu for gpu in range(self.world_size) if gpu != here]
        all_can = all(torch.cuda.can_device_access_peer(here, gpu) for gpu in others)
        return None if self.minimum(int(all_can)) else "GPUs without peer access"

    def share_memory(self, n_bytes: int, device: torch.device) -> Tensor | str:
        """Make zeroed GPU memory that all ranks of this node can write.

        Every rank must call it; it stays until the process ends.

        Returns:
            (world_size,) int64 on the device: where each rank's begins in this address space; or
            why there is none, on all ranks, as in a container that forbids handing it on.
        """
        from torch.distributed import _symmetric_memory as symmetric_memory

        why_not = ""
        try:
            memory = symmetric_memory.empty(n_bytes // 8, dtype=torch.int64, device=device)
        except RuntimeError as error:
            why_not = str(error).splitlines()[0]
        if not self.minimum(int(not why_not)):  # the others would wait for it in `rendezvous`
            return why_not or OTHERS_CANNOT_SHARE
        world = dist.group.WORLD
        assert world is not None
        found: Tensor | str
        try:
            handle = symmetric_memory.rendezvous(memory, world)
            memory.zero_()
            torch.cuda.synchronize(device)
            self._shared_memory.append((memory, handle))  # stays mapped
            found = torch.tensor(handle.buffer_ptrs, dtype=torch.int64, device=device)
        except RuntimeError as error:
            found = str(error).splitlines()[0]
        # Nobody writes before all have cleared theirs, nor where one cannot.
        if self.minimum(int(isinstance(found, Tensor))):
            return found
        return found if isinstance(found, str) else OTHERS_CANNOT_SHARE

    # What rank 0 tells, and what ranks agree on.

    def send(self, step: Step | None) -> None:
        """Rank 0: tell the others what to run; None ends their loop."""
        if self.world_size == 1:
            return
        packed = step.pack() if step else []
        header = torch.zeros(HEADER, dtype=torch.int64)
        inline = packed[: HEADER - 1]
        header[: len(inline) + 1] = torch.tensor([len(packed), *inline])
        with self._exchanging():
            dist.broadcast(header, src=0)
            if len(packed) > len(inline):
                dist.broadcast(torch.tensor(packed[len(inline) :]), src=0)

    def receive(self) -> Step | None:
        """Other ranks: wait, however long it takes, for what to run; None is the end."""
        header = torch.zeros(HEADER, dtype=torch.int64)
        with self._exchanging():
            dist.broadcast(header, src=0)
            length, *packed = header.tolist()
            if length > len(packed):
                rest = torch.zeros(length - len(packed), dtype=torch.int64)
                dist.broadcast(rest, src=0)
                packed += rest.tolist()
        return Step.unpack(packed[:length]) if length else None

    def share(self, value: Any) -> Any:
        """Rank 0's value, on every rank (pickled)."""
        if self.world_size == 1:
            return value
        box = [value]
        with self._exchanging():
            dist.broadcast_object_list(box, src=0)
        return box[0]

    def minimum(self, value: int) -> int:
        """The least of the ranks' values."""
        if self.world_size == 1:
            return value
        least = torch.tensor([value], dtype=torch.int64)
        with self._exchanging():
            dist.all_reduce(least, op=dist.ReduceOp.MIN)
        return int(least)

    @contextlib.contextmanager
    def together(self) -> Iterator[None]:
        """Run a block that may fail on some ranks: it then fails on all, and one says why.

        Raises:
            MistralChatError: the block's own, on the lowest rank that failed.
            PeerFailedError: on every other rank.
        """
        failure: MistralChatError | None = None
        try:
            yield
        except MistralChatError as error:
            failure = error
        if self.world_size == 1:
            if failure:
                raise failure
            return
        first_failed = self.minimum(self.world_size if failure is None else self.rank)
        if first_failed == self.world_size:
            return
        self.expect_end()
        if failure is not None and first_failed == self.rank:
            raise failure
        if self._lifeline:  # a launcher ends all ranks when one ends: let the one speak first
            self._lifeline.await_an_end(SPEAK_TIMEOUT_S)
        raise PeerFailedError(f"rank {first_failed} has failed")

    def new_topic(self) -> int:
        """A number for lines that are told: all ranks that begin topics together get the same."""
        self._n_topics += 1
        return self._n_topics

    def tell(self, text: str) -> None:
        """Let rank 0 know something in one line, or as rank 0 all others; from any thread."""
        if self._lifeline:
            self._lifeline.tell(text)

    def told(self) -> dict[int, str]:
        """The last line that each other rank told: on rank 0 of all others, else rank 0's."""
        return dict(self._lifeline.told) if self._lifeline else {}

    def fail(self, message: str) -> None:
        """Tell rank 0 why this rank is about to end."""
        if self._lifeline:
            self._lifeline.fail(message)

    def await_verdict(self) -> None:
        """After a failed collective: where a lost rank is why, the lifeline says so and ends us."""
        if self._lifeline:
            time.sleep(VERDICT_S)

    def expect_end(self) -> None:
        """From now on, ranks that end are no failure."""
        if self._lifeline:
            self._lifeline.expect_end()

    def close(self) -> None:
        """Part from the other ranks in peace."""
        if self._lifeline:
            self._lifeline.close()
            self._lifeline = None
            self._sums.clear()  # a group that outlives its destruction keeps gloo's threads
            dist.destroy_process_group()
