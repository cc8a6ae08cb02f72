"""Rank 0 takes connections, from whoever calls, until every rank is there.

It talks to all callers at once: a stranger is closed, and one that says nothing keeps nobody
waiting. Knows nothing of what is said; that is a generator's business.
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

Talk = Generator[int, bytes, int]  # gives how many bytes it wants next, at last the rank
IsFree = Callable[[int], bool]  # whether no connection is that rank yet
Greet = Callable[[socket.socket, IsFree], Talk]


class StrangerError(Exception):
    """Not one of this run's ranks."""


def gather(
    listener: socket.socket, world_size: int, greet: Greet, look: Callable[[], None]
) -> dict[int, socket.socket]:
    """Take connections until every other rank is there, talking to all at once.

    Args:
        listener: where they come.
        world_size: ranks, rank 0 included.
        greet: what is said and heard before a connection is a rank's.
        look: called several times a second, to raise where waiting is of no use.

    Raises:
        RankLostError: not all came.
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
    """Somebody who has connected to rank 0 and is not yet known to be a rank.

    Args:
        connection: to it, which never blocks.
        talk: what is to be said and heard.
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
        """The next one, if it has not gone already and may call at all."""
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
        """Take what has come; `is_done` once it is a rank, or is known to be none."""
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
    """Who has not said for too long who it is, and the oldest where they are too many."""
    waiting = [caller for caller in pending if not caller.is_done]
    late = time.monotonic() - HELLO_TIMEOUT_S
    n_too_many = len(waiting) - MOST_PENDING
    return [c for n, c in enumerate(waiting) if n < n_too_many or c.since < late]
