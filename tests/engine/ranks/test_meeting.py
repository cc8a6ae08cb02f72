"""Ranks meet whatever strangers do: they come first, say nothing or rubbish, or claim to be one."""

import contextlib
import os
import queue
import secrets
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
from torch.distributed import HashStore, TCPStore  # type: ignore[attr-defined]

from mistral_chat.engine.ranks import launch, meeting, reception
from mistral_chat.engine.ranks.meeting import Meeting, meet
from mistral_chat.engine.ranks.node_memory import NodeMemory
from mistral_chat.engine.ranks.place import Place
from mistral_chat.errors import MistralChatError, RankLostError
from tests.conftest import ROOT, command_env

NOBODY = 65534
LONG_S = 60.0
as_root = pytest.mark.skipif(os.geteuid() != 0, reason="takes root to be another user")
HERE, AFAR = "one node", "several nodes"


class Run:
    """A run's ranks, each in a thread of this process.

    Args:
        where: whether they are on one node.
        world_size: of them.
    """

    def __init__(self, where: str, world_size: int) -> None:
        self._place = Place(
            world_size=world_size,
            local_world_size=world_size if where == HERE else 1,
            run=secrets.token_hex(8),
            secret=secrets.token_bytes(16),
        )
        self.name = meeting._name_here(self._place)
        self.store = HashStore()
        self.met: queue.SimpleQueue[tuple[int, Meeting | MistralChatError]] = queue.SimpleQueue()
        self._threads: list[threading.Thread] = []
        self._open: list[Meeting] = []

    def place(self, rank: int, **changes: Any) -> Place:
        return replace(self._place, rank=rank, **changes)

    def start(self, *ranks: int, **changes: Any) -> None:
        for rank in ranks:
            self._threads.append(threading.Thread(target=self._meet, args=[rank, changes]))
            self._threads[-1].start()

    def _meet(self, rank: int, changes: dict[str, Any]) -> None:
        try:
            self.met.put((rank, meet(self.place(rank, **changes))))
        except MistralChatError as error:
            self.met.put((rank, error))

    def results(self, n: int) -> dict[int, Any]:
        """What became of the next `n` ranks."""
        got = dict(self.met.get(timeout=LONG_S) for _ in range(n))
        self._open += [one for one in got.values() if isinstance(one, Meeting)]
        return got

    def connect(self) -> socket.socket:
        """A stranger's connection to rank 0, once it listens."""
        deadline = time.monotonic() + LONG_S
        while True:
            try:
                if self._place.is_on_one_node:
                    stranger = socket.socket(socket.AF_UNIX)
                    stranger.connect(self.name)
                    return stranger
                port = int(self.store.get(meeting.STORE_KEY))
                return socket.create_connection(("127.0.0.1", port))
            except ConnectionRefusedError:
                stranger.close()
                assert time.monotonic() < deadline
                time.sleep(0.01)

    def close(self) -> None:
        for thread in self._threads:
            thread.join(LONG_S)
        while not self.met.empty():
            self.results(1)
        for one in self._open:
            for connection in one.connections.values():
                connection.close()
            if one.memory is not None:
                os.close(one.memory)


@pytest.fixture
def start_run(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str, int], Run]]:
    runs: list[Run] = []

    def start(where: str, world_size: int) -> Run:
        runs.append(Run(where, world_size))
        monkeypatch.setattr(meeting, "_launchers_store", lambda: runs[-1].store)
        return runs[-1]

    yield start
    for run in runs:
        run.close()


Start = Callable[[str, int], Run]
by_where = pytest.mark.parametrize("where", [HERE, AFAR])


def hello(rank: int, world_size: int = 3, magic: bytes = b"mistral1") -> bytes:
    """With a nonce, which only ranks of several nodes take."""
    return meeting._HELLO.pack(magic, rank, world_size) + bytes(32)


STRANGERS = {
    "says nothing": b"",
    "speaks HTTP": b"GET / HTTP/1.1\r\nHost: a\r\n\r\n" * 9,
    "stops in between": hello(1)[:9],
    "says it is rank 0": hello(0),
    "says a rank that is not": hello(3),
    "is of another size": hello(1, world_size=4),
    "speaks another language": hello(1, magic=b"vllm-run"),
    "proves nothing": hello(1) + bytes(32),
}


@by_where
def test_ranks_meet_in_any_order(start_run: Start, where: str) -> None:
    run = start_run(where, 4)
    run.start(2, 3)
    time.sleep(0.1)
    run.start(0, 1)
    got = run.results(4)
    assert {rank: sorted(one.connections) for rank, one in got.items()} == {
        0: [1, 2, 3], 1: [0], 2: [0], 3: [0],
    }  # fmt: skip
    for rank in (1, 2, 3):  # each is connected with whom it thinks
        got[0].connections[rank].sendall(bytes([rank]))
        assert got[rank].connections[0].recv(1) == bytes([rank])


@by_where
def test_strangers_hold_nobody_up(start_run: Start, where: str) -> None:
    run = start_run(where, 3)
    run.start(0)
    with contextlib.ExitStack() as open_now:
        for what, said in STRANGERS.items():
            if where == HERE and what == "proves nothing":
                continue  # the kernel says that it is this user's: it is who it says
            stranger = open_now.enter_context(run.connect())
            with contextlib.suppress(BrokenPipeError, ConnectionResetError):
                stranger.sendall(said)
        run.start(1, 2)
        began = time.monotonic()
        got = run.results(3)
        assert time.monotonic() - began < reception.HELLO_TIMEOUT_S  # of the silent one
    assert all(isinstance(one, Meeting) for one in got.values())


@by_where
def test_silent_stranger_is_closed(
    start_run: Start, where: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reception, "HELLO_TIMEOUT_S", 0.2)
    run = start_run(where, 2)
    run.start(0)
    with run.connect() as stranger:
        stranger.settimeout(LONG_S)
        assert stranger.recv(1) == b""
    run.start(1)
    assert all(isinstance(one, Meeting) for one in run.results(2).values())


@by_where
def test_many_strangers_are_no_more_than_a_limit(
    start_run: Start, where: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reception, "MOST_PENDING", 3)
    run = start_run(where, 2)
    run.start(0)
    with contextlib.ExitStack() as open_now:
        strangers = [open_now.enter_context(run.connect()) for _ in range(8)]
        for stranger in strangers[:5]:  # the oldest go
            stranger.settimeout(LONG_S)
            assert stranger.recv(1) == b""
        run.start(1)
        assert all(isinstance(one, Meeting) for one in run.results(2).values())


@by_where
def test_second_of_a_rank_is_refused(start_run: Start, where: str) -> None:
    run = start_run(where, 3)
    run.start(0, 1, 1)
    got = [run.met.get(timeout=LONG_S) for _ in range(2)]
    run.start(2)
    got += [run.met.get(timeout=LONG_S) for _ in range(2)]
    for one in got:
        run.met.put(one)  # to be closed
    errors = [one for _, one in got if isinstance(one, MistralChatError)]
    assert len(errors) == 1
    assert "rank 0 refused this process as rank 1 of 3" in str(errors[0])


@by_where
def test_rank_0_says_which_ranks_did_not_come(
    start_run: Start, where: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reception, "CONNECT_TIMEOUT_S", 0.5)
    run = start_run(where, 3)
    run.start(0)
    error = run.results(1)[0]
    assert isinstance(error, RankLostError)
    assert "of 3 ranks 1, 2 did not come" in str(error)


@by_where
@pytest.mark.parametrize("rank", [0, 1])
def test_whoever_waits_looks_whether_it_is_of_use(start_run: Start, where: str, rank: int) -> None:
    run = start_run(where, 2)
    if where == AFAR and rank == 1:
        with socket.create_server(("127.0.0.1", 0)) as listener:
            run.store.set(meeting.STORE_KEY, str(listener.getsockname()[1]))

    def look() -> None:
        raise RankLostError("its process has ended")

    with pytest.raises(RankLostError, match="its process has ended"):
        meet(run.place(rank), look)


# On one node.


def test_all_ranks_of_a_node_map_the_same_memory(start_run: Start) -> None:
    if not NodeMemory.is_supported():
        pytest.skip("no memory is shared here")
    run = start_run(HERE, 3)
    run.start(0, 1, 2)
    got = run.results(3)
    assert len({os.fstat(one.memory).st_ino for one in got.values()}) == 1
    with pytest.raises(OSError, match="not permitted"):
        os.ftruncate(got[1].memory, 0)  # which would end the others
    with pytest.raises(ValueError, match="bytes of shared memory"):
        NodeMemory(1, 4, got[1].memory)


def become_nobody(act: Callable[[], bool]) -> int:
    """Have a process of another user do something; its id."""
    if (child := os.fork()) == 0:
        code = 2
        with contextlib.suppress(BaseException):
            os.setgroups([])
            os.setgid(NOBODY)
            os.setuid(NOBODY)
            code = int(not act())
        os._exit(code)
    return child


def succeeded(child: int) -> bool:
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


@as_root
@pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")  # fork beside threads
def test_another_user_is_no_rank_whatever_it_says(start_run: Start) -> None:
    run = start_run(HERE, 2)
    run.start(0)
    run.connect().close()  # it listens now

    def claim_rank_1() -> bool:
        with run.connect() as stranger:
            with contextlib.suppress(BrokenPipeError):
                stranger.sendall(hello(1, 2)[: meeting._HELLO.size])
            stranger.settimeout(LONG_S)
            with contextlib.suppress(ConnectionResetError):
                return socket.recv_fds(stranger, 1, 1)[:2] == (b"", [])
            return True

    assert succeeded(become_nobody(claim_rank_1))
    run.start(1)
    assert all(isinstance(one, Meeting) for one in run.results(2).values())


@as_root
@pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")
def test_another_user_in_rank_0s_place_is_told_from_it(start_run: Start) -> None:
    run = start_run(HERE, 2)
    reading, writing = os.pipe()

    def listen() -> bool:
        with socket.socket(socket.AF_UNIX) as squatter:
            squatter.bind(run.name)
            squatter.listen()
            os.write(writing, b"!")
            connection, _ = squatter.accept()
            connection.settimeout(LONG_S)
            return connection.recv(100) == b""  # not even a hello

    child = become_nobody(listen)
    assert os.read(reading, 1) == b"!"
    os.close(reading)
    os.close(writing)
    run.start(0)
    got = run.results(1)
    run.start(1)  # after which the other one goes
    got |= run.results(1)
    assert "another process has the place where this run's ranks meet" in str(got[0])
    assert f"another user (uid {NOBODY})" in str(got[1])
    assert all("\n" not in str(one) and len(str(one)) < 300 for one in got.values())
    assert succeeded(child)


# Across nodes.


def test_rank_with_another_secret_is_no_rank(start_run: Start) -> None:
    run = start_run(AFAR, 2)
    run.start(0)
    run.start(1, secret=b"another")
    error = run.results(1)[1]
    assert isinstance(error, RankLostError)
    assert "MISTRAL_CHAT_SECRET must be the same" in str(error)
    run.start(1)
    assert all(isinstance(one, Meeting) for one in run.results(2).values())


@pytest.mark.parametrize("how", ["silent", "rubbish", "sends back what it hears"])
def test_rank_0_without_the_secret_is_none(
    start_run: Start, how: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(meeting, "CONNECT_TIMEOUT_S", 2.0)
    run = start_run(AFAR, 2)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        run.store.set(meeting.STORE_KEY, str(listener.getsockname()[1]))
        run.start(1)
        connection, _ = listener.accept()
        with connection:
            said = connection.recv(1000)
            if how == "rubbish":
                connection.sendall(bytes(64))
            elif how == "sends back what it hears":
                connection.sendall(said[-32:] * 2)
            error = run.results(1)[1]
    assert isinstance(error, RankLostError)
    assert str(error).count("\n") == 0


@pytest.mark.parametrize("port", ["", "0", "65536", "-1", "22 ../x", "9" * 5000, "\udcff"])
def test_port_that_is_none_is_an_error(start_run: Start, port: str) -> None:
    run = start_run(AFAR, 2)
    run.store.set(meeting.STORE_KEY, port.encode(errors="surrogateescape"))
    run.start(1)
    error = run.results(1)[1]
    assert isinstance(error, RankLostError)
    assert len(str(error)) < 300


SCRIPT = """
from mistral_chat.engine.ranks.launch import current_group
group = current_group()
assert group._process_groups.node_memory is None
print(group.share({"a": [1, None]} if group.is_leader else None), group.minimum(5 - group.rank))
group.close()
"""


def test_ranks_of_several_nodes_meet_through_the_launchers_store() -> None:
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)  # as torchrun does
    common = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "1", "LOCAL_RANK": "0"}
    common |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(store.port)}
    common |= {"TORCHELASTIC_USE_AGENT_STORE": "True", "TORCHELASTIC_RESTART_COUNT": "0"}
    started = [
        subprocess.Popen(
            [sys.executable, "-c", SCRIPT],
            stdout=subprocess.PIPE,
            env=command_env(**common, RANK=str(rank)),
            cwd=ROOT,
        )
        for rank in range(2)
    ]
    said = [process.communicate(timeout=150)[0].decode() for process in started]
    assert said == ["{'a': [1, None]} 4\n"] * 2


# What the launcher says.

ENVIRONMENT = {
    "RANK": "1", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "LOCAL_RANK": "1",
    "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500", "TORCHELASTIC_RUN_ID": "a",
}  # fmt: skip


@pytest.mark.parametrize(
    "changed",
    [
        {"MASTER_PORT": "29501"},
        {"TORCHELASTIC_RUN_ID": "b"},
        {"TORCHELASTIC_RESTART_COUNT": "1"},
        {"MASTER_ADDR": "127.0.0.2"},
    ],
)
def test_every_run_has_a_name_of_its_own(changed: dict[str, str]) -> None:
    first = launch.place(ENVIRONMENT)
    assert launch.place(ENVIRONMENT | {"RANK": "0", "LOCAL_RANK": "0"}).run == first.run
    other = launch.place(ENVIRONMENT | changed)
    assert first.run != other.run
    assert first.secret != other.secret


def test_secret_is_what_the_user_says_where_it_does_and_is_never_shown() -> None:
    said = launch.place(ENVIRONMENT | {"MISTRAL_CHAT_SECRET": "xyzzy"})
    assert said.secret == b"xyzzy"
    assert "xyzzy" not in repr(said)
    assert said.run == launch.place(ENVIRONMENT).run
