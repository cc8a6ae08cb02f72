"""Folders with faults drawn from a seed: an answer or one short line each; inspect agrees."""

import threading
from pathlib import Path

import pytest

from tests.model.fuzz_folders import bounded, fuzz, make_bases, make_case, run_case

N = 300


def test_every_folder_is_an_answer_or_one_short_line(tmp_path: Path) -> None:
    outcomes, wrong = fuzz(0, N, tmp_path, inspect_each=5)
    assert wrong == []
    assert outcomes.total() == N
    assert min(outcomes["answer"], outcomes["refused"]) > N // 20  # it draws both


def test_sound_folders_answer(tmp_path: Path) -> None:
    stray: list[str] = []
    for base in make_bases(tmp_path / "bases"):
        case = make_case(0, [base], tmp_path / f"case {base.name}")
        for path in case.folder.iterdir():
            path.unlink()
        for path in base.iterdir():
            (case.folder / path.name).symlink_to(path)
        with bounded(stray):
            assert run_case(case) == (True, None)
    assert stray == []


def test_a_case_is_its_number(tmp_path: Path) -> None:
    bases = make_bases(tmp_path / "bases")
    for number in range(20):
        made = [make_case(number, bases, tmp_path / f"{number} {n}") for n in (1, 2)]
        assert made[0].faults == made[1].faults
        for path in made[0].folder.iterdir():
            twin = made[1].folder / path.name
            if path.is_file() and path.stat().st_size < 1 << 30:
                assert path.read_bytes() == twin.read_bytes()


def test_what_hangs_is_broken_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tests.model.fuzz_folders.LIMIT_S", 1)
    with pytest.raises(TimeoutError), bounded([]):
        threading.Event().wait()
