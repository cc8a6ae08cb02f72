"""What ranks agree on before they meet where there is no way out, and broken exchanges."""

import queue
import socket
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
import torch.distributed as dist
from torch.distributed import _symmetric_memory as symmetric_memory

from mistral_chat.engine import group as group_module
from mistral_chat.engine.group import Group, PeerFailedError, Place
from mistral_chat.engine.lifeline import Lifeline
from mistral_chat.errors import RankLostError


@pytest.mark.parametrize("failing", ["this", "another"])
def test_rank_without_memory_to_share_is_waited_for_by_nobody(
    monkeypatch: pytest.MonkeyPatch, failing: str
) -> None:
    def empty(size: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        if failing == "this":
            raise RuntimeError("no memory of that kind\nstack")
        return torch.empty(size, dtype=dtype, device=device)

    def rendezvous(*_: object) -> None:
        pytest.fail("the others would wait here")

    monkeypatch.setattr(symmetric_memory, "empty", empty)
    monkeypatch.setattr(symmetric_memory, "rendezvous", rendezvous)
    agreed = []

    def minimum(value: int) -> int:
        agreed.append(value)
        return 0

    group = Group(Place())
    monkeypatch.setattr(group, "minimum", minimum)
    why_not = group.share_memory(64, torch.device("cpu"))
    assert agreed == [int(failing == "another")]
    assert (
        why_not
        == {
            "this": "no memory of that kind",
            "another": "another rank cannot share its memory",
        }[failing]
    )


BROKEN = RuntimeError("[pair.cc:534] Connection closed by peer\nstack")
SAID = r"an exchange with the other ranks failed \(\[pair.cc:534\] Connection closed by peer\)"


@contextmanager
def lifelines() -> Iterator[tuple[Lifeline, Lifeline]]:
    """Rank 0's end and rank 1's."""
    listener = socket.create_server(("127.0.0.1", 0))
    follows = Lifeline.follow(listener.getsockname(), 1, b"secret")
    ends = Lifeline.lead(listener, 2, b"secret"), follows
    for end in ends:
        end.on_lost = lambda message: None  # a command's would end the process
    yield ends
    for end in ends:
        end.expect_end()
    for end in ends:
        end.close()


def group_of_two(rank: int, lifeline: Lifeline | None) -> Group:
    group = Group(Place(rank=rank))
    group.world_size = 2
    group._lifeline = lifeline
    return group


@pytest.fixture
def broken(monkeypatch: pytest.MonkeyPatch) -> None:
    def broadcast(*_: object, **__: object) -> None:
        raise BROKEN

    monkeypatch.setattr(dist, "broadcast_object_list", broadcast)
    monkeypatch.setattr(group_module, "SPEAK_TIMEOUT_S", 0.1)


@pytest.mark.usefixtures("broken")
def test_broken_exchange_on_rank_0_is_one_line_where_nobody_is_known_to_be_lost() -> None:
    with lifelines() as (lifeline, _), pytest.raises(RankLostError, match=SAID) as raised:
        group_of_two(0, lifeline).share("x")
    assert not isinstance(raised.value, PeerFailedError)


@pytest.mark.usefixtures("broken")
def test_broken_exchange_on_another_rank_is_told_to_rank_0() -> None:
    heard: queue.SimpleQueue[str] = queue.SimpleQueue()
    with lifelines() as (leads, follows):
        leads.on_lost = heard.put
        with pytest.raises(PeerFailedError):
            group_of_two(1, follows).share(None)
        follows._connections[0].shutdown(socket.SHUT_RDWR)  # its process ends
        said = heard.get(timeout=60)
    assert said == (
        "rank 1: an exchange with the other ranks failed ([pair.cc:534] Connection closed by peer)"
    )


@pytest.mark.usefixtures("broken")
def test_lost_rank_is_named_before_the_broken_exchange_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(group_module, "SPEAK_TIMEOUT_S", 10.0)
    monkeypatch.setattr(group_module, "ENDING_S", 0.2)
    heard: queue.SimpleQueue[str] = queue.SimpleQueue()
    with lifelines() as (leads, follows):
        leads.on_lost = heard.put
        follows._connections[0].shutdown(socket.SHUT_RDWR)
        with pytest.raises(RankLostError):
            group_of_two(0, leads).share("x")
        assert heard.get(timeout=60) == (
            "rank 1 ended unexpectedly (killed, or out of memory); all ranks end"
        )


@pytest.mark.usefixtures("broken")
def test_ranks_that_cannot_meet_are_told_of_it() -> None:
    with pytest.raises(RankLostError, match=SAID):
        group_of_two(1, None).share(None)


def test_own_lack_of_memory_is_no_broken_exchange(monkeypatch: pytest.MonkeyPatch) -> None:
    def broadcast(*_: object, **__: object) -> None:
        raise torch.OutOfMemoryError("out of memory")

    monkeypatch.setattr(dist, "broadcast_object_list", broadcast)
    with pytest.raises(torch.OutOfMemoryError):
        group_of_two(1, None).share(None)
