"""Ranks that stall, stop, fail or die while weights are read: all are told of it, or all end."""

import json
import os
import re
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from mistral_chat.config import EngineConfig
from mistral_chat.engine import loading as watching
from mistral_chat.engine.ranks.group import Group, Place
from mistral_chat.engine.start_up import load_runner, reading_threads
from mistral_chat.errors import PromptError
from mistral_chat.model import loading
from tests.conftest import command_env
from tests.ranks import places_of
from tests.warm import Command, warm

STALL_S = 1.5
LONG_S = 300.0  # that a rank would take which is left to itself
SOON_S = 60.0  # for all to end after one


class Ranks:
    """Two ranks of one command in processes of their own.

    Args:
        folder: the model's.
        marks: where ranks note that they read.
        plan: for each rank what happens to its reading.
    """

    def __init__(self, folder: Path, marks: Path, plan: dict[int, dict[str, Any]]) -> None:
        self._marks = marks
        said = json.dumps({"marks": str(marks), "stall_s": STALL_S, "ranks": plan})
        words = [str(folder), "--prompt", "x", "--max_tokens", "2", "--device", "cpu"]
        self.processes: list[Command] = []
        for rank, place in enumerate(places_of(2)):
            with ExitStack() as files:
                streams = [
                    files.enter_context((marks / f"{name}-{rank}").open("w+b")).fileno()
                    for name in ("in", "out", "err")
                ]
                started = warm().start(
                    "tests.scripts.disturbed", [said, *words], command_env(**place), streams
                )
                self.processes.append(started)

    def await_reading(self, rank: int) -> int:
        """Wait until a rank reads, and give its process's id."""
        mark = self._marks / str(rank)
        self._await(mark.exists)
        return int(mark.read_text())

    def await_said(self, pattern: str) -> None:
        self._await(lambda: re.search(pattern, self.err) is not None)

    def _await(self, is_so: Callable[[], bool]) -> None:
        deadline = time.monotonic() + 60
        alive = True
        while not is_so():
            assert alive, self.err
            assert time.monotonic() < deadline, self.err
            time.sleep(0.05)
            alive = any(process.is_alive() for process in self.processes)

    def codes(self, timeout_s: float) -> list[int]:
        deadline = time.monotonic() + timeout_s
        return [p.wait(max(0.1, deadline - time.monotonic())) for p in self.processes]

    @property
    def err(self) -> str:
        """What all ranks have written to stderr, but that the answer was as short as asked for."""
        written = "".join((self._marks / f"err-{rank}").read_text() for rank in range(2))
        return written.replace("mistral-chat: stopped at --max_tokens 2\n", "")

    @property
    def out(self) -> str:
        return "".join((self._marks / f"out-{rank}").read_text() for rank in range(2))


Start = Callable[..., Ranks]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    """Start two ranks; what is left of them ends with the test."""
    started: list[Ranks] = []

    def start_ranks(folder: Path, **plan: dict[str, Any]) -> Ranks:
        marks = tmp_path / "marks"
        marks.mkdir()
        by_rank = {int(name.removeprefix("rank_")): how for name, how in plan.items()}
        started.append(Ranks(folder, marks, by_rank))
        return started[-1]

    yield start_ranks
    for process in (process for ranks in started for process in ranks.processes):
        process.kill()


def test_rank_whose_disk_hangs_is_named_and_goes_on(start: Start, tiny_folder: Path) -> None:
    ranks = start(tiny_folder, rank_1={"hang_s": 3 * STALL_S})
    assert ranks.codes(90) == [0, 0], ranks.err
    stalled, goes_on = ranks.err.splitlines()
    assert re.fullmatch(
        r"mistral-chat: rank 1 has read nothing for \d s: it waits for "
        r"consolidated\.safetensors at byte [\d,]+ \([a-z_.0-9]+\)",
        stalled,
    )
    assert goes_on == "mistral-chat: rank 1 goes on"
    assert ranks.out


@pytest.mark.parametrize("fails", [False, True])
def test_named_rank_goes_on_even_where_its_last_line_comes_too_late(
    monkeypatch: pytest.MonkeyPatch, fails: bool
) -> None:
    monkeypatch.setattr(watching, "STALL_S", 0.2)
    monkeypatch.setattr(watching, "TELL_S", 0.02)
    last_line = json.dumps([1, 1, 5, 10, False, "a tensor"])  # half of it read, and then no word
    group: Any = SimpleNamespace(
        world_size=2,
        is_leader=True,
        place=Place(world_size=2, local_world_size=2),
        lifeline=SimpleNamespace(new_topic=lambda: 1, told={1: last_line}),
    )
    reading: Any = SimpleNamespace(
        read=10, total=10, failed=False, waits_for=lambda: None, abandon=lambda: None
    )
    told: list[watching.Loading] = []
    named = threading.Event()

    def hear(loading: watching.Loading) -> None:
        told.append(loading)
        if loading.notice:
            named.set()

    with suppress(PromptError), watching.Watch(reading, group, hear):
        assert named.wait(60)
        if fails:
            raise PromptError("of a rank")
    notices = [loading.notice for loading in told if loading.notice]
    assert len(notices) == (1 if fails else 2)
    if not fails:
        assert notices[-1] == "rank 1 goes on"
        assert told[-1].read == told[-1].total == 20


@pytest.mark.parametrize("delay_s", [0.0, 0.1], ids=["all read", "reading"])
def test_stopped_rank_is_named_and_goes_on(start: Start, tiny_folder: Path, delay_s: float) -> None:
    """Also one that has read all of its own by then, while rank 0 still reads."""
    ranks = start(tiny_folder, rank_0={"delay_s": 0.1}, rank_1={"delay_s": delay_s})
    ranks.await_reading(0)
    process = ranks.await_reading(1)
    time.sleep(1)  # it has told rank 0 of itself, and may have read all
    os.kill(process, signal.SIGSTOP)
    ranks.await_said(r"mistral-chat: rank 1 has said nothing for \d s: its process is stopped")
    os.kill(process, signal.SIGCONT)
    ranks.await_said("mistral-chat: rank 1 goes on")
    assert ranks.codes(90) == [0, 0], ranks.err
    assert len(ranks.err.splitlines()) == 2


def test_rank_0_that_was_stopped_blames_nobody(start: Start, tiny_folder: Path) -> None:
    ranks = start(tiny_folder, rank_0={"delay_s": 0.05}, rank_1={"delay_s": 0.05})
    process = ranks.await_reading(0)
    ranks.await_reading(1)
    os.kill(process, signal.SIGSTOP)
    time.sleep(2 * STALL_S)
    os.kill(process, signal.SIGCONT)
    assert ranks.codes(90) == [0, 0], ranks.err
    assert ranks.err == ""


@pytest.mark.parametrize(
    "other",
    [{"hang_s": LONG_S}, {}, {"hears_after_s": 0.5}],
    ids=["hangs", "waits", "waits and hears late"],
)
@pytest.mark.parametrize("killed", [0, 1])
def test_rank_that_is_killed_ends_all(
    start: Start, tiny_folder: Path, killed: int, other: dict[str, float]
) -> None:
    how = [{"hang_s": LONG_S}, {"hang_s": LONG_S}]
    how[1 - killed] = other
    ranks = start(tiny_folder, rank_0=how[0], rank_1=how[1])
    ranks.await_reading(1 - killed)
    process = ranks.await_reading(killed)
    time.sleep(0 if "hang_s" in other else 1)  # it has read all of its own, and waits
    os.kill(process, signal.SIGKILL)
    codes = ranks.codes(SOON_S)
    assert codes[killed] == -signal.SIGKILL
    assert codes[1 - killed] == 1
    said = [line for line in ranks.err.splitlines() if "nothing for" not in line]
    # Rank 0 cannot speak for itself then; its launcher does.
    assert len(said) == killed
    assert all("rank 1 ended unexpectedly (killed" in line for line in said)


@pytest.mark.parametrize("failing", [0, 1])
@pytest.mark.parametrize("other", [{"hang_s": LONG_S}, {"delay_s": 1.0}], ids=["hangs", "reads"])
def test_read_error_ends_all_with_its_line(
    start: Start, tiny_folder: Path, failing: int, other: dict[str, float]
) -> None:
    how = [other, {"errno": "EIO"}] if failing else [{"errno": "EIO"}, other]
    ranks = start(tiny_folder, rank_0=how[0], rank_1=how[1])
    ranks.await_reading(failing)
    assert ranks.codes(SOON_S) == [1, 1]
    said = [line for line in ranks.err.splitlines() if "nothing for" not in line]
    assert len(said) == 1, ranks.err
    assert re.fullmatch(
        r"mistral-chat: error: \S+/consolidated\.safetensors: reading [a-z_.0-9]+ failed "
        r"\(Input/output error\); check the disk or fetch the file again",
        said[0],
    )


@pytest.mark.parametrize(
    ("how", "said"), [("truncate", "the file ended early: it shrank"), ("unlink", "No such file")]
)
def test_file_that_changes_after_the_check_ends_all_with_one_line(
    start: Start, broken_folder: Path, how: str, said: str
) -> None:
    path = broken_folder / "consolidated.safetensors"
    ranks = start(broken_folder, rank_0={"delay_s": 0.02}, rank_1={how: str(path)})
    assert ranks.codes(60) == [1, 1]
    (line,) = ranks.err.splitlines()
    assert line.startswith(f"mistral-chat: error: {path}: reading ")
    assert said in line


@pytest.mark.parametrize("error", [PromptError("no tokenizer"), KeyboardInterrupt()])
def test_failure_beside_the_reading_ends_it(
    tiny_folder: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException
) -> None:
    whole, stop = os.preadv, loading.Reading.stop
    stopped = threading.Event()
    offsets: list[int] = []

    def read_late(fd: int, buffers: Any, offset: int) -> int:
        offsets.append(offset)
        stopped.wait(60)
        return whole(fd, buffers, offset)

    def stop_and_note(reading: loading.Reading) -> None:
        stop(reading)
        stopped.set()

    def fail() -> None:
        raise error

    monkeypatch.setattr(os, "preadv", read_late)
    monkeypatch.setattr(loading.Reading, "stop", stop_and_note)
    monkeypatch.setattr(loading, "CPU_PIECE_BYTES", 2**14)
    with pytest.raises(type(error)):
        load_runner(EngineConfig(model=tiny_folder, device="cpu"), Group(Place()), meanwhile=fail)
    assert len(offsets) <= reading_threads(torch.device("cpu"), Place())  # one for each
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("read-")]
