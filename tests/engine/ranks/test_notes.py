"""Ranks tell each other how to connect: what one sets all find, and whoever is lost wakes all."""

import socket
import threading
from collections.abc import Callable, Iterator
from datetime import timedelta

import psutil
import pytest
import torch

from mistral_chat.engine.ranks.lifeline import Lifeline
from mistral_chat.engine.ranks.notes import Notes, NotesStore
from mistral_chat.engine.ranks.place import Place
from mistral_chat.engine.ranks.process_groups import ProcessGroups, StrangerError
from mistral_chat.engine.ranks.shared_memory import _MeetingStore

LONG_S = 60.0


class Ranks:
    """Notes of several ranks in this process, over real sockets."""

    def __init__(self, world_size: int) -> None:
        self.notes = [Notes(rank) for rank in range(world_size)]
        pairs = {rank: socket.socketpair() for rank in range(1, world_size)}
        ends = [{rank: pair[0] for rank, pair in pairs.items()}]
        ends += [{0: pair[1]} for pair in pairs.values()]
        self.lost = threading.Event()
        self.lifelines = []
        for notes, connections in zip(self.notes, ends, strict=True):
            self.lifelines.append(Lifeline(connections, notes.hear))
            self.lifelines[-1].on_lost = lambda message: self.lost.set()
            notes.open(self.lifelines[-1])

    def run(self, act: Callable[[int], object]) -> list[object]:
        """Have every rank do something at the same time; what came of it, errors too."""
        results: list[object] = [None] * len(self.notes)

        def act_as(rank: int) -> None:
            try:
                results[rank] = act(rank)
            except Exception as error:
                results[rank] = error

        threads = [threading.Thread(target=act_as, args=[n]) for n in range(len(self.notes))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(LONG_S)
        return results

    def close(self) -> None:
        for lifeline in self.lifelines:
            lifeline.expect_end()
        for lifeline in self.lifelines:
            lifeline.close()


@pytest.fixture
def make_ranks() -> Iterator[Callable[[int], Ranks]]:
    made: list[Ranks] = []

    def make(world_size: int) -> Ranks:
        made.append(Ranks(world_size))
        return made[-1]

    yield make
    for ranks in made:
        ranks.close()


Make = Callable[[int], Ranks]


@pytest.mark.parametrize("by", [0, 1, 2])
def test_what_one_rank_sets_all_find(make_ranks: Make, by: int) -> None:
    ranks = make_ranks(3)
    value = bytes(range(256)) * 300

    def act(rank: int) -> bytes:
        if rank == by:
            ranks.notes[rank].set("kéy", value)
        return ranks.notes[rank].get("kéy")

    assert ranks.run(act) == [value] * 3


def test_sums_miss_nothing_and_every_sum_is_given_once(make_ranks: Make) -> None:
    ranks = make_ranks(3)

    def act(rank: int) -> list[int]:
        return [NotesStore(ranks.notes[rank], "n/").add("count", 1) for _ in range(50)]

    given = ranks.run(act)
    assert sorted(n for one in given for n in one) == list(range(1, 151))  # type: ignore[attr-defined]


@pytest.mark.parametrize("rank", [0, 1])
def test_whoever_waits_hears_that_a_rank_has_gone(make_ranks: Make, rank: int) -> None:
    ranks = make_ranks(2)
    ranks.lifelines[1 - rank].has_failed = True
    ranks.lifelines[1 - rank].close()
    with pytest.raises(RuntimeError, match="a rank has gone"):
        ranks.notes[rank].get("never")


def test_waiting_has_an_end(make_ranks: Make) -> None:
    store = NotesStore(make_ranks(2).notes[1], "")
    assert not store.check(["never"])
    with pytest.raises(RuntimeError, match="no rank gave 'never'"):
        store.wait(["never"], timedelta(seconds=0.2))


@pytest.mark.parametrize(
    "note",
    [b"", b"\0" * 20, b"\7" + bytes(20), b"\2" + bytes(20), b"\0\2" + bytes(19) + b"\xff\xff"],
)
def test_note_of_nobody_is_the_loss_of_its_rank(make_ranks: Make, note: bytes) -> None:
    ranks = make_ranks(2)
    ranks.lifelines[1].note(note)
    assert ranks.lost.wait(LONG_S)


def test_nothing_is_kept_once_closed(make_ranks: Make) -> None:
    notes = make_ranks(2).notes[0]
    notes.set("a", b"b")
    notes.close()
    assert not notes.has("a")
    with pytest.raises(RuntimeError, match="a rank has gone"):
        notes.get("a")


def test_exchanges_of_torchs_shared_memory_begin_at_0_in_every_meeting(make_ranks: Make) -> None:
    """They count up in a process: one that opens its second model has got further."""
    ranks = make_ranks(2)
    begins = (17, 0)

    def act(rank: int) -> list[bytes]:
        store = _MeetingStore(ranks.notes[rank], "one/")
        seen = []
        for n in range(begins[rank], begins[rank] + 3):
            store.set(f"CUDASymmetricMemory/{n}/{rank}", b"%d of %d" % (n - begins[rank], rank))
            seen.append(store.get(f"CUDASymmetricMemory/{n}/{1 - rank}"))
        store.add(f"CUDASymmetricMemory/{begins[rank] + 3}/num_members", 1)
        store.set(f"CUDASymmetricMemory/{begins[rank] + 3}/last_member", b"1")
        store.wait([f"CUDASymmetricMemory/{begins[rank] + 3}/last_member"])
        return seen

    assert ranks.run(act) == [[b"%d of %d" % (n, 1 - rank) for n in range(3)] for rank in range(2)]


@pytest.mark.parametrize("stranger", [None, 0, 1, 2])
def test_ranks_prove_to_each_other_in_gloo_too(make_ranks: Make, stranger: int | None) -> None:
    """Because gloo takes whoever connects first for the rank that it waits for."""
    ranks = make_ranks(3)

    def act(rank: int) -> list[int]:
        place = Place(rank=rank, world_size=3, local_world_size=3, local_rank=rank)
        key = b"another" if rank == stranger else b"key"
        groups = ProcessGroups(place, ranks.notes[rank], key, None)
        total = torch.tensor([rank])
        groups.all_reduce(total)
        groups.close(abort=False)
        return list(total)

    results = ranks.run(act)
    if stranger is None:
        assert results == [[3]] * 3
    else:
        assert all(isinstance(result, StrangerError) for result in results)


def test_gloo_listens_on_this_machine_alone(make_ranks: Make) -> None:
    ranks = make_ranks(2)
    here = {}

    def act(rank: int) -> None:
        place = Place(rank=rank, world_size=2, local_world_size=2, local_rank=rank)
        here[rank] = ProcessGroups(place, ranks.notes[rank], b"key", None)

    ranks.run(act)
    own = psutil.Process().net_connections(kind="tcp")
    listening = {c.laddr.ip for c in own if c.status == psutil.CONN_LISTEN}
    assert listening == {"127.0.0.1"}
    for one in here.values():
        one.close(abort=False)
