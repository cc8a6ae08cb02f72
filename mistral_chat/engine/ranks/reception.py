"""Rank 0 accepts connections until every rank is there.

It talks to all callers at once: a stranger's connection is closed, and a silent one does not delay
the others. Knows nothing of the protocol, which a generator speaks.
"""

import selectors
import socket
import time
from collections.abc import Callable, Generator, Sequence

from mistral_chat.errors import RankLostError

__all__ = ["Greet", "IsFree", "StrangerError", "Talk", "gather"]

CONNECT_TIMEOUT_S = 300.0
HELLO_TIMEOUT_S = 30.0
LOOK_S = 0.1
MOST_PENDING = 256  # callers that have not yet said who they are

Talk = Generator[int, bytes, int]  # yields how many bytes it wants next; returns the rank
IsFree = Callable[[int], bool]  # whether a rank has no connection yet
Greet = Callable[[socket.socket, IsFree], Talk]


class StrangerError(Exception):
    """Not one of this run's ranks."""


def gather(
    listener: socket.socket, world_size: int, greet: Greet, look: Callable[[], None]
) -> dict[int, socket.socket]:
    """Accept connections until every other rank is there.

    Args:
        listener: the listening socket.
        world_size: ranks, rank 0 included.
        greet: authenticates one connection.
        look: called several times a second; raises to end the wait.

    Returns:
        rank -> socket.

    Raises:
        RankLostError: a rank is missing.
    """
    ranks: dict[int, socket.socket] = {}
    pending: list[_Caller] = []  # oldest first
    deadline = time.monotonic() + CONNECT_TIMEOUT_S
    listener.setblocking(False)
    try:
        with selectors.DefaultSelector() as selector:
            selector.register(listener, selectors.EVENT_READ)
            while len(ranks) < world_size - 1:
                for key, _ in selector.select(LOOK_S):
                    if key.fileobj is listener:
                        caller = _Caller.accept(listener, greet, lambda rank: rank not in ranks)
                        if caller is not None:
                            selector.register(caller.connection, selectors.EVENT_READ, caller)
                            pending.append(caller)
                    else:
                        key.data.hear()
                        if key.data.rank is not None:
                            ranks[key.data.rank] = key.data.connection
                for caller in [c for c in pending if c.is_done] + _too_late(pending):
                    selector.unregister(caller.connection)
                    pending.remove(caller)
                    if caller.rank is None:
                        caller.connection.close()
                look()
                if time.monotonic() > deadline:
                    lacking = sorted({*range(1, world_size)} - ranks.keys())
                    raise RankLostError(
                        f"of {world_size} ranks {', '.join(map(str, lacking))} did not come "
                        f"within {CONNECT_TIMEOUT_S:.0f} s: they have not started, or what they "
                        f"said was not this run's; see what they print"
                    )
    except BaseException:
        for connection in ranks.values():
            connection.close()
        raise
    finally:
        for caller in pending:
            caller.connection.close()
    return ranks


class _Caller:
    """A connection that is not authenticated yet.

    Args:
        connection: non-blocking.
        talk: the protocol.
    """

    def __init__(self, connection: socket.socket, talk: Talk) -> None:
        self.connection = connection
        self.rank: int | None = None
        self.is_done = False
        self.since = time.monotonic()
        self._talk = talk
        self._wanted = next(talk)
        self._heard = b""

    @classmethod
    def accept(cls, listener: socket.socket, greet: Greet, is_free: IsFree) -> "_Caller | None":
        """Accept the next one; None if it has gone already or is refused at once."""
        try:
            connection, _ = listener.accept()
        except OSError:
            return None
        connection.setblocking(False)
        try:
            return cls(connection, greet(connection, is_free))
        except (StrangerError, OSError):
            connection.close()
            return None

    def hear(self) -> None:
        """Take what has arrived; sets `is_done` once it is known whether this is a rank."""
        try:
            data = self.connection.recv(self._wanted - len(self._heard))
            if not data:
                raise StrangerError
            self._heard += data
            while len(self._heard) == self._wanted:
                heard, self._heard = self._heard, b""
                self._wanted = self._talk.send(heard)
        except BlockingIOError:
            pass
        except StopIteration as end:
            self.rank = end.value
            self.is_done = True
        except (StrangerError, OSError):
            self.is_done = True


def _too_late(pending: Sequence[_Caller]) -> list[_Caller]:
    """Callers that have been silent for too long, and the oldest of too many."""
    waiting = [caller for caller in pending if not caller.is_done]
    late = time.monotonic() - HELLO_TIMEOUT_S
    n_too_many = len(waiting) - MOST_PENDING
    return [c for n, c in enumerate(waiting) if n < n_too_many or c.since < late]
