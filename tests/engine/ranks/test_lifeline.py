"""Losing one rank ends all, quietly or with its reason; parting in peace ends nobody."""

import contextlib
import queue
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from mistral_chat.engine.ranks.lifeline import Lifeline
from tests.conftest import ROOT

SOON_S = 60.0  # it takes milliseconds unless the machine is busy
QUIET_S = 0.3


def tcp_pair() -> tuple[socket.socket, socket.socket]:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        connected = socket.create_connection(listener.getsockname())
        return listener.accept()[0], connected


class Ends:
    """The ends of a group's lifelines in this process, and what each was told."""

    def __init__(self) -> None:
        self.ends: list[Lifeline] = []
        self.told: list[queue.SimpleQueue[str]] = []

    def meet(self, world_size: int) -> None:
        pairs = {rank: tcp_pair() for rank in range(1, world_size)}
        self.add(Lifeline({rank: leads for rank, (leads, _) in pairs.items()}))
        for _, follows in pairs.values():
            self.add(Lifeline({0: follows}))

    def add(self, end: Lifeline) -> None:
        heard: queue.SimpleQueue[str] = queue.SimpleQueue()
        end.on_lost = heard.put
        self.ends.append(end)
        self.told.append(heard)

    def sockets(self, rank: int) -> list[socket.socket]:
        return list(self.ends[rank]._connections.values())

    def die(self, rank: int, *, reset: bool = False) -> None:
        """What the kernel does when a process ends; `reset` when it left data unread."""
        for connection in self.sockets(rank):
            if connection.fileno() < 0:
                continue  # has parted
            if reset:
                connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                connection.close()
            else:
                connection.shutdown(socket.SHUT_RDWR)

    def hears(self, rank: int) -> str:
        return self.told[rank].get(timeout=SOON_S)

    def hears_nothing(self, rank: int) -> bool:
        try:
            self.told[rank].get(timeout=QUIET_S)
        except queue.Empty:
            return True
        return False


@pytest.fixture
def ends() -> Iterator[Ends]:
    before = set(threading.enumerate())
    made = Ends()
    yield made
    for end in made.ends:
        end.expect_end()
    for rank in range(len(made.ends)):
        with contextlib.suppress(OSError):  # the other end has gone already
            made.die(rank)
    for thread in set(threading.enumerate()) - before:
        thread.join(timeout=0.1)  # one whose socket was reset under it never ends
    for rank in range(len(made.ends)):
        for connection in made.sockets(rank):
            connection.close()


@pytest.mark.parametrize("reset", [False, True])
@pytest.mark.parametrize("lost", [1, 2, 3])
def test_leader_learns_which_rank_is_lost(ends: Ends, lost: int, reset: bool) -> None:
    ends.meet(4)
    ends.die(lost, reset=reset)
    assert ends.hears(0).startswith(f"rank {lost} ended unexpectedly")
    for other in {1, 2, 3} - {lost}:
        assert ends.hears_nothing(other)  # the leader's own end is what ends them


@pytest.mark.parametrize("reset", [False, True])
def test_every_rank_learns_that_the_leader_is_lost(ends: Ends, reset: bool) -> None:
    ends.meet(3)
    ends.die(0, reset=reset)
    # without a word: the leader, or its launcher, is who speaks
    assert [ends.hears(1), ends.hears(2)] == ["", ""]


@pytest.mark.parametrize("reason", ["out of memory", "schlägt fehl: 日本語 🚂", "x" * 300_000])
def test_leader_gets_the_reason_of_a_rank_that_fails(ends: Ends, reason: str) -> None:
    ends.meet(3)
    ends.ends[2].fail(reason)
    ends.die(2)
    assert ends.hears(0) == f"rank 2: {reason}"


def test_rank_that_failed_is_not_ended_by_the_leaders_end(ends: Ends) -> None:
    ends.meet(2)
    ends.ends[1].fail("why")
    ends.die(0)
    assert ends.hears_nothing(1)


@pytest.mark.parametrize("order", [(0, 1, 2), (1, 2, 0)])
def test_parting_in_peace_tells_nobody(ends: Ends, order: tuple[int, ...]) -> None:
    ends.meet(3)
    for rank in order:
        ends.ends[rank].close()
    assert all(ends.hears_nothing(rank) for rank in range(3))


def test_parting_waits_for_the_others_to_part(ends: Ends) -> None:
    ends.meet(3)
    ends.ends[0].close()
    # both ends of each connection are closed, so that neither process ends under the other's feet
    assert all(c.fileno() < 0 for rank in range(3) for c in ends.sockets(rank))


def test_rank_that_parted_does_not_hide_one_that_is_lost(ends: Ends) -> None:
    ends.meet(3)
    ends.ends[1].close()
    assert ends.hears_nothing(0)
    ends.die(2)
    assert ends.hears(0).startswith("rank 2 ended unexpectedly")


@pytest.mark.parametrize("rank", [0, 1])
def test_expected_end_is_no_loss(ends: Ends, rank: int) -> None:
    ends.meet(2)
    ends.ends[rank].expect_end()
    ends.die(1 - rank)
    assert ends.hears_nothing(rank)


@pytest.mark.parametrize("said", [b"GET / HTTP/1.1\r\n\r\n", b"\xff" * 5, b"\x09" + bytes(4)])
def test_what_no_rank_says_is_the_loss_of_that_rank(ends: Ends, said: bytes) -> None:
    ends.meet(2)
    ends.sockets(1)[0].sendall(said)
    assert ends.hears(0).startswith("rank 1 ended unexpectedly")


def test_closing_after_a_failure_ends_the_others(ends: Ends) -> None:
    ends.meet(3)
    ends.ends[0].has_failed = True
    ends.ends[0].close()
    assert [ends.hears(1), ends.hears(2)] == ["", ""]


def test_end_of_another_can_be_waited_for(ends: Ends) -> None:
    ends.meet(3)
    ends.ends[0].expect_end()
    started = time.monotonic()
    ends.ends[0].await_an_end(QUIET_S)
    assert time.monotonic() - started >= QUIET_S
    ends.die(2)
    started = time.monotonic()
    ends.ends[0].await_an_end(3 * SOON_S)
    assert time.monotonic() - started < SOON_S


Start = Callable[..., "subprocess.Popen[str]"]


@pytest.fixture
def start() -> Iterator[Start]:
    """Start an end of a lifeline in a process of its own."""
    started: list[subprocess.Popen[str]] = []

    def start_one(*words: Any) -> subprocess.Popen[str]:
        process = subprocess.Popen(
            [sys.executable, "-m", "tests.scripts.lifeline", *map(str, words)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            cwd=ROOT,
        )
        started.append(process)
        return process

    yield start_one
    for process in started:
        process.kill()
        process.communicate()


def meet(start: Start, world_size: int) -> list["subprocess.Popen[str]"]:
    leader = start("lead", world_size)
    assert leader.stdout
    port = leader.stdout.readline().strip()
    ranks = [leader, *(start("follow", port, rank) for rank in range(1, world_size))]
    for rank in ranks:
        assert rank.stdout
        assert rank.stdout.readline() == "ready\n"
    return ranks


def say(process: "subprocess.Popen[str]", line: str) -> None:
    assert process.stdin
    process.stdin.write(f"{line}\n")
    process.stdin.flush()


def left(process: "subprocess.Popen[str]") -> tuple[int, str]:
    """Exit code and what stderr holds."""
    _, err = process.communicate(timeout=SOON_S)
    return process.returncode, err


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM])
def test_killed_rank_ends_all_processes_and_one_says_so(start: Start, how: signal.Signals) -> None:
    ranks = meet(start, 3)
    ranks[2].send_signal(how)
    code, err = left(ranks[0])
    assert code == 1
    assert err.startswith("mistral-chat: error: rank 2 ended unexpectedly")
    assert err.count("\n") == 1
    assert left(ranks[1]) == (1, "")


def test_killed_leader_ends_all_processes_without_a_word(start: Start) -> None:
    ranks = meet(start, 3)
    ranks[0].kill()
    assert [left(rank) for rank in ranks[1:]] == [(1, ""), (1, "")]


def test_failed_rank_ends_all_processes_with_its_reason(start: Start) -> None:
    ranks = meet(start, 3)
    say(ranks[1], "fail the weights are made of cheese")
    assert left(ranks[1])[0] == 0
    wanted = "mistral-chat: error: rank 1: the weights are made of cheese\n"
    assert left(ranks[0]) == (1, wanted)
    assert left(ranks[2]) == (1, "")


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 0, 1)])
def test_closed_processes_all_end_well(start: Start, order: tuple[int, ...]) -> None:
    ranks = meet(start, 3)
    for n in order:
        say(ranks[n], "close")
        assert ranks[n].wait(timeout=SOON_S) == 0
    assert [left(rank) for rank in ranks] == [(0, "")] * 3
