"""The ranks of a run, and everything that passes between them.

Waiting for rank 0's next step happens in gloo, which may wait for a month and does not spin; sums
of activations use NCCL on GPUs and, on CPU, memory that the ranks of one node share, or gloo across
nodes. Nothing that comes from another rank is unpickled. Knows nothing of sequences.
"""

import contextlib
import json
import os
import secrets
import time
import weakref
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from mistral_chat.engine.collectives import Collectives
from mistral_chat.engine.lifeline import Lifeline, OnLost
from mistral_chat.engine.meeting import meet
from mistral_chat.engine.node_memory import NodeMemory
from mistral_chat.engine.notes import Notes
from mistral_chat.engine.place import Place
from mistral_chat.engine.shared_memory import SharedMemory
from mistral_chat.engine.step import Step
from mistral_chat.errors import MistralChatError, RankLostError

__all__ = ["Group", "PeerFailedError", "Place"]

HEADER = 64
MOST_INTEGERS = 1 << 26  # of a step; more is not one
MOST_SHARED_BYTES = 1 << 30
VERDICT_S = 1.0
ENDING_S = 5.0  # for a thread that has heard of a loss to say so, on a machine that is busy
SPEAK_TIMEOUT_S = 5.0
OTHERS_CANNOT_SHARE = "another rank cannot share its memory"


class PeerFailedError(RankLostError):
    """Another rank has failed and says why; this one ends without a word."""


class Closable(Protocol):
    """What holds device memory, graphs or communicators of a group."""

    def close(self) -> None:
        """Let go of them."""


class Group:
    """All ranks of a run.

    Args:
        place: of this process. With more than one rank, this constructor meets the others and
            returns on all of them.
        look: called several times a second while others are waited for, to raise where that is of
            no use any more.
        shards: parts that a model is divided into; None is one for each rank. More than that
            leaves this process with the part of its rank and nobody to sum with: for measuring.
    """

    def __init__(
        self,
        place: Place,
        *,
        look: Callable[[], None] = lambda: None,
        shards: int | None = None,
    ) -> None:
        self.place = place
        self.rank = place.rank
        self.world_size = place.world_size
        self.shards = shards or place.world_size
        self._lifeline = Lifeline({})
        self._notes = Notes(place.rank)
        self._collectives: Collectives | None = None
        self._node_memory: NodeMemory | None = None
        self._shared_memory: list[SharedMemory] = []
        self._users: weakref.WeakSet[Closable] = weakref.WeakSet()
        self._n_topics = 0
        self._has_failed = False
        started = time.monotonic()
        if place.world_size > 1:
            try:
                with self._translating():
                    self._meet(look)
            except BaseException:
                self._has_failed = True
                self.close()
                raise
        self.meet_s = time.monotonic() - started

    @property
    def is_leader(self) -> bool:
        """Whether this is rank 0, which decides."""
        return self.rank == 0

    def _meet(self, look: Callable[[], None]) -> None:
        meeting = meet(self.place, look)
        others = sorted(meeting.connections)
        self._lifeline = Lifeline(meeting.connections, self._notes.hear)
        self._notes.open(self._lifeline, others)
        try:
            if meeting.memory is not None:
                self._node_memory = NodeMemory(self.rank, self.world_size, meeting.memory)
        finally:
            if meeting.memory is not None:
                os.close(meeting.memory)
        if self.is_leader:
            self._notes.set("key", secrets.token_bytes(32))
        self._collectives = Collectives(self.place, self._notes, self._notes.get("key"))

    def set_on_lost(self, on_lost: OnLost) -> None:
        """Have `on_lost` called, from a thread, when another rank ends; it must end the process."""
        self._lifeline.on_lost = on_lost

    def close_with_me(self, user: Closable) -> None:
        """Have `user` closed before the group is; it may go earlier."""
        self._users.add(user)

    @contextlib.contextmanager
    def _exchanging(self) -> Iterator[Collectives]:
        """Give the collectives, and translate their errors."""
        assert self._collectives is not None
        with self._translating():
            yield self._collectives

    @contextlib.contextmanager
    def _translating(self) -> Iterator[None]:
        """Translate what torch and the kernel say of a rank that is gone.

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
            self._has_failed = True
            first = (str(error) or type(error).__name__).splitlines()[0]
            what = f"an exchange with the other ranks failed ({first})"
            if not self._lifeline.has_others:
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
            with self._exchanging() as collectives:
                collectives.all_reduce(partial)
        return partial

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
            with self._exchanging() as collectives:
                parts = collectives.gather(padded)
        if parts is None:
            return None
        return torch.cat([p[:, :size] for p, size in zip(parts, sizes, strict=True)], dim=1)

    def hand_over(self, tokens: Tensor) -> None:
        """Give rank 0's tensor to all, in place."""
        if self.world_size > 1:
            with self._exchanging() as collectives:
                collectives.broadcast(tokens)

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

        Every rank must call it; it stays until the group is closed.

        Returns:
            (world_size,) int64 on the device: where each rank's begins in this address space; or
            why there is none, on all ranks, as in a container that forbids handing it on.
        """
        why_not = ""
        memory: SharedMemory | None = None
        try:
            memory = SharedMemory(n_bytes, device)
        except RuntimeError as error:
            why_not = str(error).splitlines()[0]
        number = self.new_topic()
        if not self.minimum(int(not why_not)):  # the others would wait for it in `meet`
            return why_not or OTHERS_CANNOT_SHARE
        assert memory is not None
        found: Tensor | str
        try:
            found = memory.meet(self._notes, self.rank, self.world_size, number)
        except RuntimeError as error:
            found = str(error).splitlines()[0]
        # Nobody writes before all have cleared theirs, nor where one cannot.
        if self.minimum(int(isinstance(found, Tensor))):
            self._shared_memory.append(memory)
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
        with self._exchanging() as collectives:
            collectives.broadcast(header)
            if len(packed) > len(inline):
                collectives.broadcast(torch.tensor(packed[len(inline) :]))

    def receive(self) -> Step | None:
        """Other ranks: wait, however long it takes, for what to run; None is the end."""
        header = torch.zeros(HEADER, dtype=torch.int64)
        with self._exchanging() as collectives:
            collectives.broadcast(header)
            length, *packed = header.tolist()
            if not 0 <= length <= MOST_INTEGERS:
                raise RuntimeError(f"a step of {length:,} integers")
            if length > len(packed):
                rest = torch.zeros(length - len(packed), dtype=torch.int64)
                collectives.broadcast(rest)
                packed += rest.tolist()
            try:
                return Step.unpack(packed[:length]) if length else None
            except ValueError as error:
                raise RuntimeError(f"no step: {error}") from error

    def share(self, value: Any) -> Any:
        """Rank 0's value, on every rank; it travels as JSON.

        Args:
            value: of None, numbers, texts, lists, and dicts with texts as keys; of rank 0 alone.
        """
        if self.world_size == 1:
            return value
        said = json.dumps(value).encode() if self.is_leader else b""
        size = torch.tensor([len(said)])
        with self._exchanging() as collectives:
            collectives.broadcast(size)
            if not 0 < int(size) <= MOST_SHARED_BYTES:
                raise RuntimeError(f"a value of {int(size):,} bytes")
            data = torch.zeros(int(size), dtype=torch.uint8)
            if self.is_leader:
                data[:] = torch.frombuffer(bytearray(said), dtype=torch.uint8)
            collectives.broadcast(data)
            try:
                return json.loads(data.numpy().tobytes())
            except (ValueError, RecursionError) as error:
                raise RuntimeError(f"no value that a rank shares: {error}") from error

    def minimum(self, value: int) -> int:
        """The least of the ranks' values."""
        if self.world_size == 1:
            return value
        least = torch.tensor([value], dtype=torch.int64)
        with self._exchanging() as collectives:
            collectives.all_reduce(least, minimum=True)
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
        # A launcher ends all ranks when one ends: let the one speak first.
        self._lifeline.await_an_end(SPEAK_TIMEOUT_S)
        raise PeerFailedError(f"rank {first_failed} has failed")

    def new_topic(self) -> int:
        """A number for lines that are told: all ranks that begin topics together get the same."""
        self._n_topics += 1
        return self._n_topics

    def tell(self, text: str) -> None:
        """Let rank 0 know something in one line, or as rank 0 all others; from any thread."""
        self._lifeline.tell(text)

    def told(self) -> dict[int, str]:
        """The last line that each other rank told: on rank 0 of all others, else rank 0's."""
        return dict(self._lifeline.told)

    def fail(self, message: str) -> None:
        """Tell rank 0 why this rank is about to end."""
        self._lifeline.fail(message)

    def await_verdict(self) -> None:
        """After a failed collective: where a lost rank is why, the lifeline says so and ends us."""
        if self._lifeline.has_others:
            time.sleep(VERDICT_S)

    def expect_end(self) -> None:
        """From now on, ranks that end are no failure."""
        self._has_failed = True
        self._lifeline.expect_end()

    def close(self) -> None:
        """Part from the other ranks, and let go of all that this one held for them.

        Where no rank has failed this is in peace: the others do the same.
        """
        for user in [*self._users]:
            user.close()
        in_peace = not self._has_failed
        self._lifeline.close(in_peace=in_peace)
        self._notes.close()
        if self._collectives is not None:
            self._collectives.close(in_peace=in_peace)
            self._collectives = None
        for memory in self._shared_memory:
            memory.close()
        self._shared_memory.clear()
        self._node_memory = None
