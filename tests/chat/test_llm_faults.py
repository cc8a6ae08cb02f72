"""An `LLM` of two ranks survives misuse or reports it, and never hangs."""

import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from tests.conftest import ROOT, command_env, is_alive, wait_for_end
from tests.warm import warm


@pytest.mark.timeout(400)  # three LLMs, one after another
def test_llm_of_two_ranks_takes_interrupts_threads_forks_and_signals(roomy_folder: Path) -> None:
    words = [str(roomy_folder)]
    code, out, err = warm().run("tests.scripts.llm_faults", words, command_env(), b"", 380)
    assert out.decode().splitlines() == [
        "interrupted 12",
        "threads",
        "one at a time",
        "forked",
        "closed by a signal",
        "cut",
        "closed",
        "not waited for",
    ], err.decode()
    assert code == 0, err.decode()


def test_ranks_end_with_a_program_that_is_killed_while_they_start(tiny_folder: Path) -> None:
    code = "import sys; from mistral_chat import LLM; LLM(sys.argv[1], nproc_per_node=2)"
    with subprocess.Popen(
        [sys.executable, "-c", code, str(tiny_folder)],
        stdin=subprocess.DEVNULL,
        env=command_env(),
        cwd=ROOT,
    ) as program:
        deadline = time.monotonic() + 90
        while not (started := psutil.Process(program.pid).children()):
            assert time.monotonic() < deadline
            assert is_alive(program.pid)
            time.sleep(0.01)
        program.kill()
    wait_for_end(started[0].pid)
