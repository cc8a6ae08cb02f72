"""How the ranks of a run find and authenticate each other.

On one node they meet at an abstract Unix socket, named after the user and the run; each end asks
the kernel for the user of the other, so that no secret is needed and another user's process cannot
be a rank. Across nodes rank 0 publishes a port in the launcher's store, and both ends prove that
they know the run's secret before anything else. A stranger's connection is closed, and a silent
one does not delay the others. Knows nothing of what ranks do afterwards.
"""

import contextlib
import hmac
import os
import secrets
import socket
import struct
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta

from torch.distributed import Store  # type: ignore[attr-defined]
from torch.distributed.rendezvous import rendezvous

from mistral_chat.engine.ranks.node_memory import NodeMemory
from mistral_chat.engine.ranks.place import Place
from mistral_chat.engine.ranks.reception import IsFree, StrangerError, Talk, gather
from mistral_chat.errors import RankLostError, one_line, shown

__all__ = ["Meeting", "meet"]

CONNECT_TIMEOUT_S = 300.0
RETRY_S = 0.02
BACKLOG = 1024
STORE_KEY = "mistral_chat/lifeline"
_MAGIC = b"mistral1"
_HELLO = struct.Struct("<8sII")  # magic, rank, world size
_NONCE_BYTES = _PROOF_BYTES = 32
_WELCOME = b"+"
_UCRED = struct.Struct("3i")


@dataclass(frozen=True, kw_only=True)
class Meeting:
    """What a rank gets from meeting the others.

    Args:
        connections: rank -> socket to it: on rank 0 to all others, on each other rank to rank 0.
        memory: file descriptor of the node's shared memory, which the caller closes; None without.
    """

    connections: dict[int, socket.socket]
    memory: int | None = None


def meet(place: Place, look: Callable[[], None] = lambda: None) -> Meeting:
    """Wait until all ranks have met.

    Args:
        place: of this process.
        look: called several times a second; raises to end the wait, as when a process has ended.

    Raises:
        RankLostError: a rank is missing, or what answers is not this run's rank 0.
    """
    if place.world_size == 1:
        return Meeting(connections={})
    try:
        if place.rank != 0:
            return (_follow_here if place.is_on_one_node else _follow_afar)(place, look)
        return (_lead_here if place.is_on_one_node else _lead_afar)(place, look)
    except (OSError, RuntimeError) as error:  # RuntimeError: from the launcher's store
        why = str(error).splitlines()[0]
        raise RankLostError(one_line(f"rank {place.rank} met no other ({why})")) from error


def _check_hello(hello: bytes, place: Place) -> int:
    magic, rank, world_size = _HELLO.unpack(hello)
    if magic != _MAGIC or world_size != place.world_size or not 0 < rank < world_size:
        raise StrangerError
    return int(rank)


# On one node.


def _name_here(place: Place) -> bytes:
    """Name in the abstract namespace: not a file, and gone when the socket is closed."""
    return f"\0mistral-chat/{os.geteuid()}/{place.run}".encode()


def _uid_of(connection: socket.socket) -> int:
    """User of the process at the other end, as of when it connected or listened."""
    ucred = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _UCRED.size)
    return int(_UCRED.unpack(ucred)[1])


def _listen_here(place: Place) -> socket.socket:
    listener = socket.socket(socket.AF_UNIX)
    try:
        listener.bind(_name_here(place))
        listener.listen(BACKLOG)
    except OSError as error:
        listener.close()
        raise RankLostError(
            f"another process has the place where this run's ranks meet ({error.strerror}): start "
            f"again; should that not help, somebody on this machine is in the way on purpose"
        ) from error
    return listener


def _lead_here(place: Place, look: Callable[[], None]) -> Meeting:
    memory = NodeMemory.create(place.world_size) if NodeMemory.is_supported() else None

    def greet(connection: socket.socket, is_free: IsFree) -> Talk:
        return _receive_here(connection, place, is_free, memory)

    try:
        with _listen_here(place) as listener:
            return Meeting(
                connections=gather(listener, place.world_size, greet, look), memory=memory
            )
    except BaseException:
        if memory is not None:
            os.close(memory)
        raise


def _receive_here(
    connection: socket.socket, place: Place, is_free: IsFree, memory: int | None
) -> Talk:
    """Rank 0: check who calls, and pass on the shared memory."""
    if _uid_of(connection) != os.geteuid():
        raise StrangerError
    rank = _check_hello((yield _HELLO.size), place)
    if not is_free(rank):
        raise StrangerError
    socket.send_fds(connection, [_WELCOME], [] if memory is None else [memory])
    return rank


def _follow_here(place: Place, look: Callable[[], None]) -> Meeting:
    connection = _connect(lambda: _connect_here(place), look)
    try:
        if (uid := _uid_of(connection)) != os.geteuid():
            raise RankLostError(
                f"a process of another user (uid {uid}) listens where this run's rank 0 should: "
                f"start again"
            )
        connection.sendall(_HELLO.pack(_MAGIC, place.rank, place.world_size))
        connection.settimeout(CONNECT_TIMEOUT_S)
        welcome, fds, _, _ = socket.recv_fds(connection, 1, 1, socket.MSG_CMSG_CLOEXEC)
        if welcome != _WELCOME:
            raise RankLostError(_refused(place))
    except BaseException:
        connection.close()
        raise
    return Meeting(connections={0: connection}, memory=fds[0] if fds else None)


def _connect_here(place: Place) -> socket.socket:
    connection = socket.socket(socket.AF_UNIX)
    connection.settimeout(CONNECT_TIMEOUT_S)
    try:
        connection.connect(_name_here(place))
    except BaseException:
        connection.close()
        raise
    return connection


def _connect(dial: Callable[[], socket.socket], look: Callable[[], None]) -> socket.socket:
    """Retry until rank 0 listens: ranks start in any order."""
    deadline = time.monotonic() + CONNECT_TIMEOUT_S
    while True:
        with contextlib.suppress(ConnectionRefusedError, BlockingIOError):
            return dial()
        look()
        if time.monotonic() > deadline:
            raise RankLostError(
                f"rank 0 did not listen within {CONNECT_TIMEOUT_S:.0f} s: it has not started, or "
                f"ended before; see what it prints"
            )
        time.sleep(RETRY_S)


def _refused(place: Place) -> str:
    return (
        f"rank 0 refused this process as rank {place.rank} of {place.world_size}, or has ended: "
        f"that rank is there already, or the launcher told them different numbers"
    )


# Across nodes.


def _lead_afar(place: Place, look: Callable[[], None]) -> Meeting:
    def greet(connection: socket.socket, is_free: IsFree) -> Talk:
        return _receive_afar(connection, place, is_free)

    with socket.create_server(("", 0), backlog=BACKLOG) as listener:
        store = _launchers_store()  # may live in this process: keep it until all ranks came
        store.set(STORE_KEY, str(listener.getsockname()[1]))
        return Meeting(connections=gather(listener, place.world_size, greet, look))


def _launchers_store() -> Store:
    """The store of torchrun, or of any launcher that sets its variables."""
    store: Store = next(rendezvous("env://", timeout=timedelta(seconds=CONNECT_TIMEOUT_S)))[0]
    return store


def _prove(place: Place, who: int, caller: int, nonces: bytes) -> bytes:
    """HMAC of both nonces, which only a process with the run's secret can compute."""
    said = struct.pack("<III", who, caller, place.world_size) + nonces
    return hmac.digest(place.secret, said, "sha256")


def _receive_afar(connection: socket.socket, place: Place, is_free: IsFree) -> Talk:
    """Rank 0: check who calls; both ends prove that they know the secret."""
    said = yield _HELLO.size + _NONCE_BYTES
    rank = _check_hello(said[: _HELLO.size], place)
    ours = secrets.token_bytes(_NONCE_BYTES)
    nonces = said[_HELLO.size :] + ours
    connection.sendall(ours + _prove(place, 0, rank, nonces))
    proof = yield _PROOF_BYTES
    if not hmac.compare_digest(proof, _prove(place, rank, rank, nonces)) or not is_free(rank):
        raise StrangerError
    connection.sendall(_WELCOME)
    return rank


def _follow_afar(place: Place, look: Callable[[], None]) -> Meeting:
    store = _launchers_store()
    port = store.get(STORE_KEY).decode(errors="replace")
    if not port.isdecimal() or not 0 < int(port[:6]) < 1 << 16:
        raise RankLostError(f"the launcher's store names {shown(port)} as rank 0's port")
    address = (place.master_addr, int(port))
    connection = _connect(lambda: socket.create_connection(address, CONNECT_TIMEOUT_S), look)
    try:
        ours = secrets.token_bytes(_NONCE_BYTES)
        connection.sendall(_HELLO.pack(_MAGIC, place.rank, place.world_size) + ours)
        said = _receive(connection, _NONCE_BYTES + _PROOF_BYTES)
        theirs, proof = said[:_NONCE_BYTES], said[_NONCE_BYTES:]
        if not hmac.compare_digest(proof, _prove(place, 0, place.rank, ours + theirs)):
            raise RankLostError(
                f"what answers as rank 0 on {place.master_addr} does not know this run's secret: "
                f"MISTRAL_CHAT_SECRET must be the same on all nodes, or unset on all"
            )
        connection.sendall(_prove(place, place.rank, place.rank, ours + theirs))
        if _receive(connection, len(_WELCOME)) != _WELCOME:
            raise RankLostError(_refused(place))
    except BaseException:
        connection.close()
        raise
    return Meeting(connections={0: connection})


def _receive(connection: socket.socket, n_bytes: int) -> bytes:
    """Receive `n_bytes`, or fewer if the other end closes."""
    connection.settimeout(CONNECT_TIMEOUT_S)
    heard = b""
    while len(heard) < n_bytes and (data := connection.recv(n_bytes - len(heard))):
        heard += data
    return heard
