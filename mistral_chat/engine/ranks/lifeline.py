"""A socket between rank 0 and every other rank, so that all ranks end soon after any of them.

Collectives cannot do this: a rank that waits in one may notice only after minutes that another has
died, and a rank that waits for a person to type is in none. When a process ends, the kernel closes
its socket and the other end wakes up. Knows nothing of models, process groups or how ranks meet.
"""

import contextlib
import os
import selectors
import socket
import struct
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping

__all__ = ["Lifeline", "OnLost", "OnNote"]

CLOSE_TIMEOUT_S = 5.0
VERDICT_S = 1.0
_HEAD = struct.Struct("<BI")  # what it is, bytes that follow
_BYE, _TOLD, _FAILED, _NOTE = range(4)
_MOST_BYTES = 1 << 24

OnLost = Callable[[str], None]
OnNote = Callable[[int, bytes], None]


class _NotOursError(Exception):
    """The other end sent something that no rank of ours sends."""


def _end_process(message: str) -> None:
    """The default of `on_lost`."""
    if message:
        print(f"mistral-chat: error: {message}", file=sys.stderr, flush=True)
    os._exit(1)


def _keep_alive(connection: socket.socket) -> None:
    """Have the kernel notice within about 8 s that the other machine is gone."""
    if connection.family == socket.AF_UNIX:
        return
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in (("TCP_KEEPIDLE", 4), ("TCP_KEEPINTVL", 2), ("TCP_KEEPCNT", 2)):
        if hasattr(socket, name):  # not on every system
            connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)


class _Heard:
    """Bytes received from one rank, and what has been learnt of it."""

    def __init__(self) -> None:
        self.data = bytearray()
        self.parted = False
        self.reason = ""

    def messages(self) -> Iterator[tuple[int, bytes]]:
        """Remove the complete messages: the kind and the bytes of each."""
        while len(self.data) >= _HEAD.size:
            kind, size = _HEAD.unpack_from(self.data)
            if size > _MOST_BYTES:
                raise _NotOursError
            if len(self.data) < _HEAD.size + size:
                return
            said = bytes(self.data[_HEAD.size : _HEAD.size + size])
            del self.data[: _HEAD.size + size]
            yield kind, said


class Lifeline:
    """Watches the other end from a thread; rank 0 watches all, each other rank watches rank 0.

    A single rank has one without connections, which does nothing.

    Args:
        connections: rank -> open socket to it.
        on_note: called from the thread with each note's sender and bytes; raises ValueError for
            what no rank of ours sends.

    `on_lost` is called from the thread and must end the process. It gets what happened, or an
    empty text where another process reports it.
    """

    def __init__(
        self,
        connections: Mapping[int, socket.socket],
        on_note: OnNote = lambda rank, note: None,
    ) -> None:
        self.on_lost: OnLost = _end_process
        self.told: dict[int, str] = {}  # the last line of each rank at the other end
        self.others = tuple(connections)
        self.has_failed = False  # some rank has, so that `close` waits for none
        self._on_note = on_note
        self._closing = False
        self._n_topics = 0
        self._connections = dict(connections)
        self._sending = {rank: threading.Lock() for rank in connections}
        for connection in connections.values():
            connection.settimeout(None)
            _keep_alive(connection)
        self._some_end = threading.Event()
        if connections:
            selector = selectors.DefaultSelector()
            for rank, connection in connections.items():
                selector.register(connection, selectors.EVENT_READ, rank)
            self._thread = threading.Thread(
                target=self._watch, args=(selector,), name="lifeline", daemon=True
            )
            self._thread.start()

    @property
    def has_lost(self) -> bool:
        """Whether another end has closed, in order or not."""
        return self._some_end.is_set()

    def expect_end(self) -> None:
        """After a failure that is known: let the other end go without another word."""
        self._closing = self.has_failed = True

    def new_topic(self) -> int:
        """A number to tell by what a line is about; ranks that ask together get the same."""
        self._n_topics += 1
        return self._n_topics

    def tell(self, text: str) -> None:
        """Set this rank's line in `told` at the other end: at rank 0, or from rank 0 at all."""
        self._send(_TOLD, text.encode())

    def await_verdict(self) -> None:
        """After a failed collective, give the thread time to report a lost rank and end us."""
        if self.others:
            time.sleep(VERDICT_S)

    def fail(self, message: str) -> None:
        """Tell rank 0 why this rank will end."""
        self.expect_end()
        self._send(_FAILED, message.encode(errors="replace"))  # a path need not be text

    def note(self, note: bytes, rank: int | None = None) -> None:
        """Have `on_note` called on a rank, or for None at every other end."""
        self._send(_NOTE, note, rank)

    def _send(self, kind: int, said: bytes, rank: int | None = None) -> None:
        for other in self._connections if rank is None else (rank,):
            with contextlib.suppress(OSError), self._sending[other]:
                self._connections[other].sendall(_HEAD.pack(kind, len(said)) + said)

    def close(self) -> None:
        """Say goodbye to the other ends and wait until they have, too; after a failure hang up."""
        self._closing = True
        if not self.has_failed:
            self._send(_BYE, b"")
        for connection in self._connections.values():
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR if self.has_failed else socket.SHUT_WR)
        if self.others:
            self._thread.join(CLOSE_TIMEOUT_S)

    def await_an_end(self, timeout_s: float) -> bool:
        """Wait until another end has closed; False after a timeout."""
        return self._some_end.wait(timeout_s)

    def _watch(self, selector: selectors.BaseSelector) -> None:
        heard = {rank: _Heard() for rank in self._connections}
        with selector:
            while selector.get_map():
                for key, _ in selector.select():
                    rank = key.data
                    try:
                        data = self._connections[rank].recv(65536)
                        heard[rank].data += data
                        self._hear(rank, heard[rank])
                    except (OSError, _NotOursError):
                        data = b""
                    if data:
                        continue
                    selector.unregister(key.fileobj)
                    self._connections[rank].close()
                    self._some_end.set()
                    if not self._closing and not heard[rank].parted:
                        self._lost(rank, heard[rank].reason)

    def _hear(self, rank: int, heard: _Heard) -> None:
        for kind, said in heard.messages():
            if kind == _NOTE:
                try:
                    self._on_note(rank, said)
                except ValueError as error:
                    raise _NotOursError from error
            elif kind == _TOLD:
                self.told[rank] = said.decode(errors="replace")
            elif kind == _FAILED:
                heard.reason = said.decode(errors="replace")
            elif kind == _BYE:
                heard.parted = True
            else:
                raise _NotOursError

    def _lost(self, rank: int, reason: str) -> None:
        if rank == 0:
            self.on_lost("")  # rank 0 speaks for itself, or its launcher does
        elif reason:
            self.on_lost(f"rank {rank}: {reason}")
        else:
            self.on_lost(
                f"rank {rank} ended unexpectedly (killed, or out of memory); all ranks end"
            )
