"""What ranks agree on before they meet where there is no way out, and broken exchanges."""

import pickle
import queue
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from mistral_chat.engine.ranks import group as group_module
from mistral_chat.engine.ranks import shared_memory
from mistral_chat.engine.ranks.group import Group, Place
from mistral_chat.engine.ranks.lifeline import Lifeline
from mistral_chat.errors import CheckpointError, OtherRankFailedError, RankLostError


@pytest.mark.parametrize("failing", ["this", "another"])
def test_rank_without_memory_to_share_is_waited_for_by_nobody(
    monkeypatch: pytest.MonkeyPatch, failing: str
) -> None:
    class Memory:
        def __init__(self, n_bytes: int, device: torch.device) -> None:  # noqa: ARG002
            if failing == "this":
                raise RuntimeError("no memory of that kind\nstack")

        def meet(self, *_: object) -> None:
            pytest.fail("the others would wait here")

    monkeypatch.setattr(shared_memory, "SharedMemory", Memory)
    agreed = []

    def minimum(value: int) -> int:
        agreed.append(value)
        return 0

    group = Group(Place())
    monkeypatch.setattr(group, "minimum", minimum)
    why_not = shared_memory.share_memory(group, 64, torch.device("cpu"))
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


class Broken:
    """Process groups whose connections have gone."""

    def __init__(self, error: Exception = BROKEN) -> None:
        self._error = error

    def broadcast(self, tensor: torch.Tensor) -> None:  # noqa: ARG002
        raise self._error


@contextmanager
def lifelines() -> Iterator[tuple[Lifeline, Lifeline]]:
    """Rank 0's end and rank 1's."""
    leads, follows = socket.socketpair()
    ends = Lifeline({1: leads}), Lifeline({0: follows})
    for end in ends:
        end.on_lost = lambda message: None  # a command's would end the process
    yield ends
    for end in ends:
        end.expect_end()
    for end in ends:
        end.close()


def group_of_two(
    rank: int, lifeline: Lifeline | None = None, groups: object | None = None
) -> Group:
    group = Group(Place(rank=rank))
    group.world_size = 2
    group.lifeline = lifeline or Lifeline({})
    group._process_groups = groups or Broken()  # type: ignore[assignment]
    return group


@pytest.fixture
def broken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(group_module, "SPEAK_TIMEOUT_S", 0.1)


@pytest.mark.usefixtures("broken")
def test_broken_exchange_on_rank_0_is_one_line_where_nobody_is_known_to_be_lost() -> None:
    with lifelines() as (lifeline, _), pytest.raises(RankLostError, match=SAID) as raised:
        group_of_two(0, lifeline).share("x")
    assert not isinstance(raised.value, OtherRankFailedError)


@pytest.mark.usefixtures("broken")
def test_broken_exchange_on_another_rank_is_told_to_rank_0() -> None:
    heard: queue.SimpleQueue[str] = queue.SimpleQueue()
    with lifelines() as (leads, follows):
        leads.on_lost = heard.put
        with pytest.raises(OtherRankFailedError):
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
        group_of_two(1).share(None)


def test_own_lack_of_memory_is_no_broken_exchange() -> None:
    short = Broken(torch.OutOfMemoryError("out of memory"))
    with pytest.raises(torch.OutOfMemoryError):
        group_of_two(1, groups=short).share(None)


class Says:
    """Process groups in which rank 0 says what it likes, as integers and as bytes."""

    def __init__(self, *tensors: torch.Tensor) -> None:
        self._tensors = list(tensors)

    def broadcast(self, tensor: torch.Tensor) -> None:
        said = self._tensors.pop(0)
        tensor.view(-1)[: len(said)] = said


def integers(*values: int) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int64)


class Booby:
    """Whoever unpickles this makes a file."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def __reduce__(self) -> tuple[object, ...]:
        return Path.touch, (self._path,)


@pytest.mark.usefixtures("broken")
@pytest.mark.parametrize("what", ["pickled", "JSON cut off", "deep", "nothing", "endless"])
def test_what_is_shared_is_json_or_an_error(tmp_path: Path, what: str) -> None:
    said = {
        "pickled": pickle.dumps(Booby(tmp_path / "ran")),
        "JSON cut off": b'{"a": [1, 2',
        "deep": b"[" * 200_000,
    }.get(what, b"")
    size = {"nothing": 0, "endless": 1 << 60}.get(what, len(said))
    data = torch.frombuffer(bytearray(said or b"0"), dtype=torch.uint8)
    with pytest.raises(RankLostError, match="an exchange with the other ranks failed"):
        group_of_two(1, groups=Says(integers(size), data)).share(None)
    assert not (tmp_path / "ran").exists()


@pytest.mark.usefixtures("broken")
@pytest.mark.parametrize(
    "said",
    [
        (-1,),
        (1 << 40,),
        (3, 3, 0, 0),
        (3, -1, 0, 0),
        (3, 1, -1, 0),
        (3, 1, 0, 1),
        (2, 1, 0),
        (7, 1, 0, 1, 0, 0, 2, 5),
        (7, 1, 0, 1, 0, 0, -1, 5),
        (7, 1, 0, 1, 0, -1, 1, 5),
        (7, 1, 0, 1, -2, 0, 1, 5),
        (7, 1, 0, 1, 0, 0, 1, -5),
        (8, 1, 0, 1, 0, 0, 1, 5, 6),
        (7, 1, 0, 1 << 62, 0, 0, 1, 5),
    ],
)
def test_malformed_step_is_an_error(said: tuple[int, ...]) -> None:
    with pytest.raises(RankLostError, match="step"):
        group_of_two(1, groups=Says(integers(*said))).receive()


def test_rank_that_fails_silently_waits_for_the_one_that_speaks() -> None:
    """A launcher ends all ranks when one ends: the reason would be lost."""

    class Lowest:
        def minimum(self, tensor: torch.Tensor) -> None:
            tensor[0] = 0  # rank 0 has failed, too

    with lifelines() as (leads, follows):
        group = group_of_two(1, follows, Lowest())
        ended = threading.Event()

        def fail() -> None:
            with pytest.raises(OtherRankFailedError), group.together():
                raise CheckpointError("this rank's own reason")
            ended.set()

        thread = threading.Thread(target=fail)
        thread.start()
        assert not ended.wait(0.5)
        leads._connections[1].shutdown(socket.SHUT_RDWR)  # rank 0 has spoken and ended
        assert ended.wait(60)
        thread.join()
