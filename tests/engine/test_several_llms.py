"""A program may open as many LLMs with ranks as it likes, and nothing of a closed one stays."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from mistral_chat import LLM
from tests.conftest import ROOT, command_env
from tests.scripts.llms import GREEDY
from tests.warm import warm

ALLOCATOR_KB = 8_000
N_IN_A_ROW = 3  # 20 have been tried (tests/gpu has them): each takes seconds on a busy machine


def run_llms(
    device: str, n_in_a_row: int, folder: Path, broken: Path, timeout_s: float = 400
) -> list[dict[str, Any]]:
    """What `tests/scripts/llms.py` said, which must end well."""
    words = [device, str(n_in_a_row), str(folder), str(broken)]
    if device == "cuda":  # it takes no fork
        command = [sys.executable, "-m", "tests.scripts.llms", *words]
        done = subprocess.run(
            command,
            capture_output=True,
            timeout=timeout_s,
            env=command_env(),
            cwd=ROOT,
            check=False,
        )
        code, out, err = done.returncode, done.stdout, done.stderr
    else:
        code, out, err = warm().run("tests.scripts.llms", words, command_env(), b"", timeout_s)
    assert code == 0, err.decode()[-3000:]
    return [json.loads(line) for line in out.splitlines()]


def check_llms(
    said: list[dict[str, Any]],
    n_in_a_row: int,
    wanted: list[int],
    *,
    settled: int = 1,
) -> None:
    """Every LLM gave the right tokens, and the last left no more behind than an early one.

    Args:
        said: what `run_llms` gave.
        n_in_a_row: how many LLMs were opened and closed first.
        wanted: the tokens of each.
        settled: after which of them the process has all that it keeps for ever.
    """
    row, rest = said[:n_in_a_row], {one["step"]: one for one in said[n_in_a_row:]}
    assert [one["said"] for one in row] == [wanted] * n_in_a_row
    assert rest["failed"]["error"] == "CheckpointError"
    for turn in range(3):
        assert rest[f"two at once, {turn}"]["said"] == [wanted] * 2
    assert rest["the one left"]["said"] == [wanted]
    assert rest["closed"]["error"] == "UsageError"
    early, last = row[settled]["held"], rest["at the end"]["held"]
    assert [one["held"]["threads"] for one in row] == [row[0]["held"]["threads"]] * n_in_a_row
    assert last["threads"] == early["threads"]
    assert last["files"] == early["files"]
    assert last["tasks"] <= early["tasks"]
    assert [one["held"]["shared"] for one in row] + [last["shared"]] == [0] * (n_in_a_row + 1)
    # Arenas that could not be trimmed; a group's sums alone take 4 MiB, and a model more.
    resident_kb = [one["held"]["resident_kb"] for one in row]
    assert resident_kb[-1] <= resident_kb[settled] + ALLOCATOR_KB, resident_kb


def test_llms_with_ranks_one_after_another_and_at_once(
    tiny_folder: Path, broken_folder: Path
) -> None:
    (broken_folder / "consolidated.safetensors").unlink()
    with LLM(tiny_folder, device="cpu", dtype="float32", max_seq_len=128) as alone:
        wanted = list(alone.generate("Hello", GREEDY)[0].token_ids)
    check_llms(run_llms("cpu", N_IN_A_ROW, tiny_folder, broken_folder), N_IN_A_ROW, wanted)
