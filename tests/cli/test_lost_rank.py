"""A rank is killed: all ranks are gone within 10 s, one line says so, the terminal is as it was."""

import subprocess
import sys
import time
from pathlib import Path

import pexpect
import psutil
import pytest

from tests.conftest import ROOT, command_env
from tests.terminal import chat_terminal

WITHIN_S = 10.0


def _ranks(launcher: int) -> dict[int, psutil.Process]:
    """The ranks that a launcher started, by their number."""
    found = {}
    for child in psutil.Process(launcher).children(recursive=True):
        environment = child.environ()
        if "RANK" in environment:
            found[int(environment["RANK"])] = child
    return found


def _gone(processes: list[psutil.Process], since: float) -> bool:
    _, alive = psutil.wait_procs(processes, timeout=max(0.1, since + WITHIN_S - time.monotonic()))
    return not alive


@pytest.mark.parametrize("launched", ["own", "torchrun"])
@pytest.mark.parametrize("killed", [0, 1])
def test_killed_rank_in_an_answer_ends_all(roomy_folder: Path, launched: str, killed: int) -> None:
    words = [str(roomy_folder), "--prompt", "Hello", "--max_tokens", "8000", "--temperature", "0"]
    launcher = ["-m", "torch.distributed.run", "--nproc-per-node", "2", "-m", "mistral_chat"]
    command = launcher if launched == "torchrun" else ["-m", "mistral_chat"]
    if launched == "own":
        words += ["--nproc_per_node", "2"]
    with subprocess.Popen(
        [sys.executable, *command, *words],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=command_env(),
        cwd=ROOT,
    ) as process:
        assert process.stdout is not None
        assert process.stdout.read(3)  # the answer has begun
        ranks = _ranks(process.pid)
        assert sorted(ranks) == [0, 1]
        ranks[killed].kill()
        since = time.monotonic()
        _, err = process.communicate(timeout=WITHIN_S)
        assert _gone(list(ranks.values()), since)
    assert process.returncode == 1
    said = [x for x in err.decode().splitlines() if x.startswith("mistral-chat: error:")]
    if launched == "torchrun" and killed == 0:
        assert said == []  # torchrun's own report names it; there is nobody else to speak
    else:
        assert len(said) == 1
        assert f"rank {killed}" in said[0]


def test_killed_rank_at_the_prompt_restores_the_terminal(tiny_folder: Path, tmp_path: Path) -> None:
    script = (
        'before=$(stty -a); "$0" -m mistral_chat "$@"; echo "code $?";'
        ' [ "$before" = "$(stty -a)" ] && echo "as before" || echo "changed"'
    )
    child = pexpect.spawn(
        "bash",
        ["-c", script, sys.executable, str(tiny_folder), "--instruct", "--nproc_per_node", "2"],
        encoding="utf-8",
        codec_errors="replace",
        timeout=300,
        cwd=str(ROOT),
        env=command_env(TERM="xterm", XDG_DATA_HOME=str(tmp_path)),  # type: ignore[arg-type]
    )
    child.expect("\x1b\\[\\?2004h")
    assert child.pid is not None
    ranks = _ranks(child.pid)
    ranks[1].kill()
    since = time.monotonic()
    child.expect("mistral-chat: error: rank 1 ended unexpectedly")
    child.expect("code 1")
    assert _gone(list(ranks.values()), since)
    child.expect("as before")
    child.close(force=True)


def test_last_words_at_the_prompt_stand_alone(tiny_folder: Path, tmp_path: Path) -> None:
    words = [tiny_folder, "--instruct", "--nproc_per_node", "2", "--max_tokens", "3"]
    # Only a terminal that says where its cursor is gets the bar at the bottom.
    env = {"PROMPT_TOOLKIT_NO_CPR": ""}
    with chat_terminal(tmp_path, *words, size=(80, 20), env=env) as terminal:
        n_told = 0

        def look(text: str) -> bool:
            nonlocal n_told
            while n_told < terminal.raw.count(b"\x1b[6n"):
                n_told += 1
                terminal.child.send(f"\x1b[{terminal.screen.cursor.y + 1};1R")
            return "· 2 ranks ·" in text

        terminal.wait_for(look)
        terminal.send("hello\r")
        terminal.wait_for("stopped at")
        terminal.wait_for(lambda text: look(text) and " used, " in text)
        terminal.send("half a draft")
        terminal.wait_for("> half a draft")
        _ranks(terminal.child.pid)[1].kill()
        while terminal.read(1):
            pass
        rows = terminal.rows
        at = rows.index("> half a draft")
        assert rows[at + 1].startswith("mistral-chat: error: rank 1 ended unexpectedly")
        (path,) = (tmp_path / "mistral-chat" / "sessions").iterdir()
        said = "".join(rows[at + 1 :]).replace(" ", "")  # the terminal breaks it anywhere
        assert "togoonwiththischat:" in said
        assert said.endswith(f"--nproc_per_node2--max_tokens3--resume{path.stem}")
        assert "2 ranks ·" not in "\n".join(rows[at:])
