"""What torch's groups tell each other while they form: a store over the lifeline.

Nothing listens for it, it reaches as far as the lifeline does, and whoever waits in it for a rank
that has gone is woken up. torch's own do not do: TCPStore takes anybody who connects; FileStore
opens its path once more when it is destroyed, perhaps as the program ends, and writes into whatever
is there by then. Knows nothing of what the keys mean.
"""

import struct
import threading
import time
from collections.abc import Callable, Sequence
from datetime import timedelta

from torch.distributed import Store  # type: ignore[attr-defined]

from mistral_chat.engine.ranks.lifeline import Lifeline

__all__ = ["Notes", "NotesStore"]

TIMEOUT_S = 600.0
LOOK_S = 0.1
_HEAD = struct.Struct("<BIqq")  # what, bytes of the key, a number, which of the sender's additions
_SET, _ADD, _SUM = range(3)


class Notes:
    """Keys and values that every rank has: rank 0 hears of each and passes it on.

    Args:
        rank: this one.
    """

    def __init__(self, rank: int) -> None:
        self._rank = rank
        self._lifeline = Lifeline({})
        self._values: dict[str, bytes] = {}
        self._sums: dict[int, int] = {}  # what rank 0 says that came of our additions
        self._n_asked = 0
        self._changed = threading.Condition()

    def open(self, lifeline: Lifeline) -> None:
        """Have notes travel over this rank's lifeline, whose `on_note` is `hear`."""
        with self._changed:
            self._lifeline = lifeline

    def close(self) -> None:
        """Forget everything; whoever still waits is told that the others have gone."""
        with self._changed:
            self._values.clear()
            self._lifeline = Lifeline({})
            self._changed.notify_all()

    def set(self, key: str, value: bytes) -> None:
        """Have every rank find `value` under `key`, this one at once."""
        with self._changed:
            self._values[key] = value
            self._changed.notify_all()
        self._send(_SET, key, value)

    def add(self, key: str, number: int) -> int:
        """Add to the number under `key`, which is 0 before; the sum."""
        if self._rank == 0:
            return self._add(key, number)
        with self._changed:
            self._n_asked += 1
            asked = self._n_asked
        self._send(_ADD, key, number=number, asked=asked)
        with self._changed:
            self._await(lambda: asked in self._sums, TIMEOUT_S, key)
            return self._sums.pop(asked)

    def get(self, key: str, timeout_s: float = TIMEOUT_S) -> bytes:
        """The value under a key, once there is one.

        Raises:
            RuntimeError: another rank has gone, or time is up.
        """
        with self._changed:
            self._await(lambda: key in self._values, timeout_s, key)
            return self._values[key]

    def has(self, key: str) -> bool:
        """Whether there is a value under a key."""
        with self._changed:
            return key in self._values

    def hear(self, rank: int, note: bytes) -> None:
        """Take a note, from the lifeline's thread.

        Raises:
            ValueError: not one of ours.
        """
        if len(note) < _HEAD.size:
            raise ValueError("a note without its head")
        what, size, number, asked = _HEAD.unpack_from(note)
        key = note[_HEAD.size : _HEAD.size + size].decode()
        value = note[_HEAD.size + size :]
        if what == _SET:
            with self._changed:
                self._values[key] = value
                self._changed.notify_all()
            if self._rank == 0:
                self._send(_SET, key, value, but=rank)
        elif what == _ADD and self._rank == 0:
            self._lifeline.note(_pack(_SUM, key, number=self._add(key, number), asked=asked), rank)
        elif what == _SUM and rank == 0:
            with self._changed:
                self._sums[asked] = number
                self._changed.notify_all()
        else:
            raise ValueError("a note of an unknown kind")

    def _add(self, key: str, number: int) -> int:
        with self._changed:
            total = int(self._values.get(key, b"0")) + number
            self._values[key] = value = b"%d" % total
            self._changed.notify_all()
            self._send(_SET, key, value)  # inside, so that sums arrive in their order
        return total

    def _send(
        self,
        what: int,
        key: str,
        value: bytes = b"",
        *,
        number: int = 0,
        asked: int = 0,
        but: int | None = None,
    ) -> None:
        note = _pack(what, key, value, number=number, asked=asked)
        for other in self._lifeline.others:
            if other != but:
                self._lifeline.note(note, other)

    def _await(self, is_so: Callable[[], bool], timeout_s: float, key: str) -> None:
        """Wait with `_changed` held."""
        deadline = time.monotonic() + timeout_s
        while not is_so():
            if not self._lifeline.others or self._lifeline.has_lost:
                raise RuntimeError(f"a rank has gone while another waited for {key!r}")
            if time.monotonic() > deadline:
                raise RuntimeError(f"no rank gave {key!r} within {timeout_s:.0f} s")
            self._changed.wait(LOOK_S)


def _pack(what: int, key: str, value: bytes = b"", *, number: int = 0, asked: int = 0) -> bytes:
    name = key.encode()
    return _HEAD.pack(what, len(name), number, asked) + name + value


class NotesStore(Store):
    """`Notes` as torch asks for them; torch calls these from C++, with Python's lock.

    Args:
        notes: of this rank.
        prefix: of every key.
    """

    def __init__(self, notes: Notes, prefix: str) -> None:
        super().__init__()
        self._notes = notes
        self._prefix = prefix

    def name(self, key: str) -> str:
        """A key as all ranks know it."""
        return self._prefix + key

    def clone(self) -> "NotesStore":
        """Itself: it may be used from any thread."""
        return self

    def set(self, key: str, value: bytes | str) -> None:
        """`Notes.set`."""
        self._notes.set(self.name(key), value.encode() if isinstance(value, str) else value)

    def get(self, key: str) -> bytes:
        """`Notes.get`."""
        return self._notes.get(self.name(key))

    def add(self, key: str, value: int) -> int:
        """`Notes.add`."""
        return self._notes.add(self.name(key), value)

    def check(self, keys: Sequence[str]) -> bool:
        """Whether there is a value under every key."""
        return all(self._notes.has(self.name(key)) for key in keys)

    def wait(self, keys: Sequence[str], timeout: timedelta | None = None) -> None:
        """Until there is a value under every key."""
        timeout_s = TIMEOUT_S if timeout is None else min(timeout.total_seconds(), TIMEOUT_S)
        for key in keys:
            self._notes.get(self.name(key), timeout_s)
