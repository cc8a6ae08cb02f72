"""Progress of loading on all ranks: how far each node is, and which rank has stalled.

Every rank reports its own reading to rank 0, which adds up per node. A rank that reads nothing for
a while is named with what it waits for; it is not ended, since a network disk may come back. When
a read fails, rank 0 stops the reading of all other ranks at once. Knows nothing of files' contents.
"""

import json
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from types import TracebackType

from mistral_chat.engine.ranks.group import Group
from mistral_chat.model.loading import Reading

__all__ = ["Loading", "OnLoading", "Watch"]

TELL_S = 0.25
STALL_S = 30.0


@dataclass(frozen=True, slots=True)
class Loading:
    """How far one node is.

    Args:
        node: its number, from 0.
        n_nodes: how many there are.
        read: bytes that its ranks have read.
        total: bytes that they will read; grows until all ranks have begun.
        seconds: since reading began.
        notice: what to tell the user: that a rank stalls, or goes on.
    """

    node: int
    n_nodes: int
    read: int
    total: int
    seconds: float
    notice: str | None = None


OnLoading = Callable[[Loading], None]


@dataclass(slots=True)
class _Rank:
    """What rank 0 knows of one rank.

    Args:
        read: bytes.
        total: bytes; 0 before it has begun.
        waits_for: what its longest pending read is for.
        moved: when it last read something.
        spoke: when it last reported.
        is_named: it was reported as stalled.
    """

    read: int = 0
    total: int = 0
    waits_for: str | None = None
    moved: float = 0.0
    spoke: float = 0.0
    is_named: bool = False


class Watch:
    """A context that reports the progress of reading, on rank 0 to `on_loading`.

    All ranks enter it together. An error in the block abandons the reading.

    Args:
        reading: of this rank.
        group: the ranks.
        on_loading: called from a thread, several times a second for each node.
    """

    def __init__(self, reading: Reading, group: Group, on_loading: OnLoading) -> None:
        self._reading = reading
        self._group = group
        self._on_loading = on_loading
        self._ended = threading.Event()
        self._all_have_read = False
        self._thread = threading.Thread(target=self._run, name="watch-loading", daemon=True)
        self._topic = group.lifeline.new_topic()  # lines of an earlier reading are still there
        self._begun = self._looked = time.monotonic()
        self._ranks = [_Rank(moved=self._begun, spoke=self._begun) for _ in range(group.world_size)]
        self._heard: dict[int, str] = {}
        self._count = 0

    def __enter__(self) -> "Watch":
        try:
            self._thread.start()
        except BaseException:  # such as Ctrl-C: `__exit__` will not be called
            self._ended.set()
            self._reading.abandon()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._all_have_read = error is None  # ranks leave the block together
        self._ended.set()
        self._thread.join()
        if error is not None:
            self._reading.abandon()

    def _run(self) -> None:
        while True:
            ended = self._ended.wait(TELL_S)
            if self._group.is_leader:
                self._look()
            else:
                self._group.lifeline.tell(self._own_line())
                if self._group.lifeline.told.get(0) == self._stop_line():
                    self._reading.stop()
            if ended:
                return

    def _own_line(self) -> str:
        reading = self._reading
        self._count += 1  # makes each line new: it shows that this rank is alive
        state = [reading.read, reading.total, reading.failed, reading.waits_for()]
        return json.dumps([self._topic, self._count, *state])

    def _stop_line(self) -> str:
        """The line of rank 0 after a read has failed."""
        return json.dumps([self._topic, "stop"])

    def _look(self) -> None:
        """Rank 0: read the others' lines, find stalled ranks, and report each node's progress."""
        now = time.monotonic()
        place = self._group.place
        if (away := now - self._looked) > STALL_S / 2:  # this process was stopped, not the others
            for known in self._ranks:
                known.moved, known.spoke = known.moved + away, known.spoke + away
        self._looked = now
        for rank, line in {**self._group.lifeline.told, 0: self._own_line()}.items():
            if self._heard.get(rank) == line:
                continue
            self._heard[rank] = line
            topic, _, read, total, failed, waits_for = json.loads(line)
            if topic != self._topic:
                continue
            if failed:
                self._group.lifeline.tell(self._stop_line())
                self._reading.stop()
            known = self._ranks[rank]
            if read != known.read or total != known.total:
                known.moved = now
            known.read, known.total, known.waits_for, known.spoke = read, total, waits_for, now
        if self._all_have_read:  # their last lines may not have arrived
            for known in self._ranks:
                known.read, known.moved, known.spoke = known.total, now, now
        notices = [self._notice(rank, now) for rank in range(len(self._ranks))]
        n_nodes = -(-place.world_size // place.local_world_size)
        for node in range(n_nodes):
            first = node * place.local_world_size
            here = self._ranks[first : first + place.local_world_size]
            read, total = (sum(getattr(rank, of) for rank in here) for of in ("read", "total"))
            said = "; ".join(filter(None, notices[first : first + len(here)])) or None
            self._on_loading(Loading(node, n_nodes, read, total, now - self._begun, said))

    def _notice(self, rank: int, now: float) -> str | None:
        """A notice each time that a rank stalls or goes on; else None."""
        known = self._ranks[rank]
        is_done = 0 < known.total == known.read
        stalled = now - (known.spoke if is_done else known.moved) > STALL_S
        if stalled == known.is_named:
            return None
        known.is_named = stalled
        if not stalled:
            return f"rank {rank} goes on"
        if now - known.spoke > STALL_S / 2:
            return (
                f"rank {rank} has said nothing for {now - known.spoke:.0f} s: its process is "
                f"stopped, or its machine has no time for it"
            )
        return (
            f"rank {rank} has read nothing for {now - known.moved:.0f} s: it waits for "
            f"{known.waits_for or 'its memory'}"
        )
