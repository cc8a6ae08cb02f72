"""A socket between rank 0 and every other rank, so that all end within moments of any.

A collective cannot do this: a rank that waits in one learns of a dead peer after minutes, and a
rank that waits for a person to type is in none. When a process ends, however it ends, the kernel
closes its socket and the other end wakes up. Knows nothing of models or of process groups.
"""

import contextlib
import os
import selectors
import socket
import sys
import threading
from collections.abc import Callable

__all__ = ["Lifeline", "OnLost"]

CONNECT_TIMEOUT_S = 300.0
CLOSE_TIMEOUT_S = 5.0
_BYE = b"\0"  # neither is ever part of an error's text
_TOLD, _END = b"\1", b"\n"

OnLost = Callable[[str], None]


def _end_process(message: str) -> None:
    """What happens when a rank is lost and nobody asked for anything else."""
    if message:
        print(f"mistral-chat: error: {message}", file=sys.stderr, flush=True)
    os._exit(1)


def _keep_alive(connection: socket.socket) -> None:
    """Have the kernel notice a machine that went away without a word, in about 8 s."""
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in (("TCP_KEEPIDLE", 4), ("TCP_KEEPINTVL", 2), ("TCP_KEEPCNT", 2)):
        if hasattr(socket, name):  # not on every system
            connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)


class Lifeline:
    """Watches the other end from a thread; rank 0 watches all, each other rank watches rank 0.

    Args:
        connections: rank -> open socket to it.

    `on_lost` is called from the thread, with what happened (empty where another rank says it),
    and must end the process.
    """

    def __init__(self, connections: dict[int, socket.socket]) -> None:
        self.on_lost: OnLost = _end_process
        self.told: dict[int, str] = {}  # the last that each rank said of itself
        self._closing = False
        self._sending = threading.Lock()
        self._connections = connections
        self._selector = selectors.DefaultSelector()
        for rank, connection in connections.items():
            connection.settimeout(None)
            _keep_alive(connection)
            self._selector.register(connection, selectors.EVENT_READ, rank)
        self._some_end = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="lifeline", daemon=True)
        self._thread.start()

    @classmethod
    def lead(cls, listener: socket.socket, world_size: int, secret: bytes) -> "Lifeline":
        """Rank 0: wait until every other rank has connected and said the secret and its rank.

        Raises:
            OSError: (TimeoutError) not all came.
        """
        connections: dict[int, socket.socket] = {}
        listener.settimeout(CONNECT_TIMEOUT_S)
        with listener:
            while len(connections) < world_size - 1:
                connection, _ = listener.accept()
                connection.settimeout(10)
                hello = b""
                with contextlib.suppress(OSError):
                    hello = connection.recv(len(secret) + 4, socket.MSG_WAITALL)
                if len(hello) != len(secret) + 4 or hello[:-4] != secret:
                    connection.close()  # not one of ours
                    continue
                connections[int.from_bytes(hello[-4:], "little")] = connection
        return cls(connections)

    @classmethod
    def follow(cls, address: tuple[str, int], rank: int, secret: bytes) -> "Lifeline":
        """Any other rank: connect to rank 0.

        Raises:
            OSError: nobody answers there.
        """
        connection = socket.create_connection(address, timeout=CONNECT_TIMEOUT_S)
        connection.sendall(secret + rank.to_bytes(4, "little"))
        return cls({0: connection})

    def expect_end(self) -> None:
        """From now on the other end may go without that being a failure."""
        self._closing = True

    def tell(self, text: str) -> None:
        """Have the other end, of rank 0 all others, find this line in `told`."""
        self._send(_TOLD + text.encode() + _END)

    def fail(self, message: str) -> None:
        """Tell rank 0 why this rank is about to end."""
        self._closing = True
        self._send(message.encode(errors="replace"))  # a path need not be text

    def _send(self, data: bytes) -> None:
        for connection in self._connections.values():
            with contextlib.suppress(OSError), self._sending:
                connection.sendall(data)

    def close(self) -> None:
        """Part in peace: the other end does not take this for a loss."""
        self._closing = True
        for connection in self._connections.values():
            with contextlib.suppress(OSError):
                with self._sending:
                    connection.sendall(_BYE)
                connection.shutdown(socket.SHUT_WR)
        self._thread.join(CLOSE_TIMEOUT_S)  # until the others have parted too

    def await_an_end(self, timeout_s: float) -> bool:
        """Wait until another end has gone; False where time was up before."""
        return self._some_end.wait(timeout_s)

    def _watch(self) -> None:
        said: dict[int, bytes] = dict.fromkeys(self._connections, b"")
        with self._selector as selector:
            while selector.get_map():
                for key, _ in selector.select():
                    rank = key.data
                    try:
                        data = self._connections[rank].recv(65536)
                    except OSError:
                        data = b""
                    said[rank] = self._without_told(rank, said[rank] + data)
                    if data:
                        continue
                    selector.unregister(key.fileobj)
                    self._connections[rank].close()
                    self._some_end.set()
                    if not self._closing and not said[rank].endswith(_BYE):
                        self._lost(rank, said[rank].decode(errors="replace"))

    def _without_told(self, rank: int, said: bytes) -> bytes:
        """Note what a rank says of itself; give what else it said."""
        while (begin := said.find(_TOLD)) >= 0 and (end := said.find(_END, begin)) >= 0:
            self.told[rank] = said[begin + 1 : end].decode()
            said = said[:begin] + said[end + 1 :]
        return said

    def _lost(self, rank: int, reason: str) -> None:
        if rank == 0:
            self.on_lost("")  # rank 0 speaks for itself, or its launcher does
        elif reason:
            self.on_lost(f"rank {rank}: {reason}")
        else:
            self.on_lost(
                f"rank {rank} ended unexpectedly (killed, or out of memory); all ranks end"
            )
