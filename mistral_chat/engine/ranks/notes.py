"""A key-value store over the lifeline, in which torch's process groups exchange addresses.

It opens no port, and a wait for a rank that has ended is interrupted. torch's own stores will not
do: TCPStore accepts any client; FileStore opens its path again when it is destroyed, perhaps at
exit, and writes into whatever is there by then. Knows nothing of what the keys mean.
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
_HEAD = struct.Struct("<BIqq")  # kind, bytes of the key, a number, number of the sender's request
_SET, _ADD, _SUM = range(3)


class Notes:
    """Keys and values that every rank holds; rank 0 forwards each change to the others.

    Args:
        rank: this one.
    """

    def __init__(self, rank: int) -> None:
        self._rank = rank
        self._lifeline = Lifeline({})
        self._values: dict[str, bytes] = {}
        self._sums: dict[int, int] = {}  # request of ours -> the sum that rank 0 answered
        self._n_asked = 0
        self._changed = threading.Condition()

    def open(self, lifeline: Lifeline) -> None:
        """Start sending over this rank's lifeline, whose `on_note` must be `hear`."""
        with self._changed:
            self._lifeline = lifeline

    def close(self) -> None:
        """Forget all values, and interrupt every wait."""
        with self._changed:
            self._values.clear()
            self._lifeline = Lifeline({})
            self._changed.notify_all()

    def set(self, key: str, value: bytes) -> None:
        """Set a value on all ranks, on this one at once."""
        with self._changed:
            self._values[key] = value
            self._changed.notify_all()
        self._send(_SET, key, value)

    def add(self, key: str, number: int) -> int:
        """Add to the number under `key`, which begins at 0, and return the sum."""
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
        """Wait for a value.

        Raises:
            RuntimeError: another rank has ended, or the time is up.
        """
        with self._changed:
            self._await(lambda: key in self._values, timeout_s, key)
            return self._values[key]

    def has(self, key: str) -> bool:
        """Whether a key has a value."""
        with self._changed:
            return key in self._values

    def hear(self, rank: int, note: bytes) -> None:
        """Apply a note of another rank; called from the lifeline's thread.

        Raises:
            ValueError: no note of ours.
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
            self._send(_SET, key, value)  # under the lock, so that sums arrive in order
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
        """Wait until a condition holds; `_changed` is held."""
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
    """`Notes` as a torch `Store`; torch calls the methods from C++ and holds the GIL.

    Args:
        notes: of this rank.
        prefix: of every key.
    """

    def __init__(self, notes: Notes, prefix: str) -> None:
        super().__init__()
        self._notes = notes
        self._prefix = prefix

    def name(self, key: str) -> str:
        """The key in `Notes`."""
        return self._prefix + key

    def clone(self) -> "NotesStore":
        """This store, which may be used from any thread."""
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
        """Whether every key has a value."""
        return all(self._notes.has(self.name(key)) for key in keys)

    def wait(self, keys: Sequence[str], timeout: timedelta | None = None) -> None:
        """Wait until every key has a value."""
        timeout_s = TIMEOUT_S if timeout is None else min(timeout.total_seconds(), TIMEOUT_S)
        for key in keys:
            self._notes.get(self.name(key), timeout_s)
