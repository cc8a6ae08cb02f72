"""The ranks of a run: how they meet, what rank 0 tells them, and how they part.

Waiting for rank 0's next step happens in gloo, which may wait for a month and does not spin.
Nothing that comes from another rank is unpickled. Knows nothing of models or sequences.
"""

import contextlib
import json
import os
import secrets
import time
import weakref
from collections.abc import Callable, Iterator
from typing import Any, Protocol

import torch

from mistral_chat.engine.ranks.lifeline import Lifeline
from mistral_chat.engine.ranks.meeting import meet
from mistral_chat.engine.ranks.node_memory import NodeMemory
from mistral_chat.engine.ranks.notes import Notes
from mistral_chat.engine.ranks.place import Place
from mistral_chat.engine.ranks.process_groups import ProcessGroups
from mistral_chat.engine.step import Step
from mistral_chat.errors import MistralChatError, OtherRankFailedError, RankLostError

__all__ = ["Group", "Place"]

HEADER = 64
MOST_INTEGERS = 1 << 26  # of a step; more is not one
MOST_SHARED_BYTES = 1 << 30
ENDING_S = 5.0  # for the lifeline's thread to report a loss, on a busy machine
SPEAK_TIMEOUT_S = 5.0


class Closable(Protocol):
    """Something that holds device memory, graphs or communicators of a group."""

    def close(self) -> None:
        """Release it."""


class Group:
    """All ranks of a run.

    Args:
        place: of this process. With more than one rank, this constructor meets the others and
            returns on all of them.
        look: called several times a second while this rank waits for the others; it raises to end
            the wait.
    """

    def __init__(self, place: Place, *, look: Callable[[], None] = lambda: None) -> None:
        self.place = place
        self.rank = place.rank
        self.world_size = place.world_size
        self.lifeline = Lifeline({})
        self.notes = Notes(place.rank)
        self._process_groups: ProcessGroups | None = None
        self._held: list[Closable] = []
        self._users: weakref.WeakSet[Closable] = weakref.WeakSet()
        started = time.monotonic()
        if place.world_size > 1:
            try:
                with self._translating():
                    self._meet(look)
            except BaseException:
                self.lifeline.has_failed = True
                self.close()
                raise
        self.meet_s = time.monotonic() - started

    @property
    def is_leader(self) -> bool:
        """Whether this is rank 0, which decides."""
        return self.rank == 0

    def _meet(self, look: Callable[[], None]) -> None:
        meeting = meet(self.place, look)
        self.lifeline = Lifeline(meeting.connections, self.notes.hear)
        self.notes.open(self.lifeline)
        node_memory: NodeMemory | None = None
        try:
            if meeting.memory is not None:
                node_memory = NodeMemory(self.rank, self.world_size, meeting.memory)
        finally:
            if meeting.memory is not None:
                os.close(meeting.memory)
        if self.is_leader:
            self.notes.set("key", secrets.token_bytes(32))
        key = self.notes.get("key")
        self._process_groups = ProcessGroups(self.place, self.notes, key, node_memory)

    def close_with_me(self, user: Closable) -> None:
        """Close `user` before this group is closed, unless it has been deleted by then."""
        self._users.add(user)

    def hold(self, memory: Closable) -> None:
        """Keep memory that other ranks' kernels write to, and close it after all have parted."""
        self._held.append(memory)

    @contextlib.contextmanager
    def collectives(self) -> Iterator[ProcessGroups]:
        """Give the groups that ranks all-reduce, gather and broadcast through, errors translated.

        With more than one rank only.

        Raises:
            RankLostError: on rank 0: what failed.
            OtherRankFailedError: on the others, after rank 0 was told.
        """
        assert self._process_groups is not None
        with self._translating():
            yield self._process_groups

    @contextlib.contextmanager
    def _translating(self) -> Iterator[None]:
        """Translate torch's and the system's errors about a lost rank into RankLostError.

        The lifeline usually notices the loss, too, and ends the process with the name of the lost
        rank, which is the better message: it is given some seconds for that.

        Raises:
            RankLostError: what failed, on rank 0 or where ranks have not met yet.
            OtherRankFailedError: on the others, after rank 0 was told.
        """
        try:
            yield
        except (torch.OutOfMemoryError, torch.AcceleratorError):  # this rank's own
            raise
        except (RuntimeError, OSError) as error:
            self.lifeline.has_failed = True
            first = (str(error) or type(error).__name__).splitlines()[0]
            what = f"an exchange with the other ranks failed ({first})"
            if not self.lifeline.others:
                raise RankLostError(what) from error
            if self.lifeline.await_an_end(SPEAK_TIMEOUT_S):
                time.sleep(ENDING_S)  # it is about to end this process
            if self.is_leader:
                raise RankLostError(what) from error
            self.lifeline.fail(what)
            raise OtherRankFailedError(what) from error

    def send(self, step: Step | None) -> None:
        """Broadcast from rank 0 what all are to run; None ends the other ranks' loop."""
        if self.world_size == 1:
            return
        packed = step.pack() if step else []
        header = torch.zeros(HEADER, dtype=torch.int64)
        inline = packed[: HEADER - 1]
        header[: len(inline) + 1] = torch.tensor([len(packed), *inline])
        with self.collectives() as groups:
            groups.broadcast(header)
            if len(packed) > len(inline):
                groups.broadcast(torch.tensor(packed[len(inline) :]))

    def receive(self) -> Step | None:
        """Wait, for as long as it takes, for what rank 0 sends; None ends the loop."""
        header = torch.zeros(HEADER, dtype=torch.int64)
        with self.collectives() as groups:
            groups.broadcast(header)
            length, *packed = header.tolist()
            if not 0 <= length <= MOST_INTEGERS:
                raise RuntimeError(f"a step of {length:,} integers")
            if length > len(packed):
                rest = torch.zeros(length - len(packed), dtype=torch.int64)
                groups.broadcast(rest)
                packed += rest.tolist()
            try:
                return Step.unpack(packed[:length]) if length else None
            except ValueError as error:
                raise RuntimeError(f"no step: {error}") from error

    def share(self, value: Any) -> Any:
        """Broadcast rank 0's value as JSON.

        Args:
            value: anything that JSON has; only rank 0's counts.
        """
        if self.world_size == 1:
            return value
        said = json.dumps(value).encode() if self.is_leader else b""
        size = torch.tensor([len(said)])
        with self.collectives() as groups:
            groups.broadcast(size)
            if not 0 < int(size) <= MOST_SHARED_BYTES:
                raise RuntimeError(f"a value of {int(size):,} bytes")
            data = torch.zeros(int(size), dtype=torch.uint8)
            if self.is_leader:
                data[:] = torch.frombuffer(bytearray(said), dtype=torch.uint8)
            groups.broadcast(data)
            try:
                return json.loads(data.numpy().tobytes())
            except (ValueError, RecursionError) as error:
                raise RuntimeError(f"no value that a rank shares: {error}") from error

    def minimum(self, value: int) -> int:
        """Find the least of the ranks' values."""
        if self.world_size == 1:
            return value
        least = torch.tensor([value], dtype=torch.int64)
        with self.collectives() as groups:
            groups.minimum(least)
        return int(least)

    @contextlib.contextmanager
    def together(self) -> Iterator[None]:
        """Fail on all ranks or on none: where a block fails on some, one of them says why.

        Raises:
            MistralChatError: the block's own, on the lowest rank that failed.
            OtherRankFailedError: on every other rank.
        """
        failure: MistralChatError | None = None
        try:
            yield
        except MistralChatError as error:
            failure = error
        first_failed = self.minimum(self.world_size if failure is None else self.rank)
        if first_failed == self.world_size:
            return
        self.lifeline.expect_end()
        if failure is not None and first_failed == self.rank:
            raise failure
        # A launcher ends all ranks when one ends: let that one report first.
        self.lifeline.await_an_end(SPEAK_TIMEOUT_S)
        raise OtherRankFailedError(f"rank {first_failed} has failed")

    def close(self) -> None:
        """Part from the other ranks, who do the same, and release what was held for them.

        After a failure nobody is waited for.
        """
        for user in [*self._users]:
            user.close()
        self.lifeline.close()
        self.notes.close()
        if self._process_groups is not None:
            self._process_groups.close(abort=self.lifeline.has_failed)
            self._process_groups = None
        for held in self._held:
            held.close()
        self._held.clear()
