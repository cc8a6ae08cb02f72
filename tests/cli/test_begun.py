"""The beginning of a command: when it was, its first line, Ctrl-C before there is an answer."""

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pexpect
import pytest

from mistral_chat.chat.tokenizer import Tokenizer
from mistral_chat.cli import main
from mistral_chat.cli.begun import HANDED_ON, OWN_START_S, Begun, name_of
from mistral_chat.cli.bench import tables as bench_tables
from mistral_chat.errors import MistralChatError
from mistral_chat.model.folder import ModelFolder
from mistral_chat.model.sharding import Shard
from mistral_chat.model.transformer import Transformer
from tests.conftest import ROOT, TINY, command_env, folder_of, reading_of
from tests.terminal import chat_terminal

LAUNCHED = {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}
SAYS_WHEN = "from mistral_chat.cli.begun import Begun; print(Begun.now().at)"


def _begun_by(*command: str) -> float:
    done = subprocess.run(command, capture_output=True, check=True, cwd=ROOT, env=command_env())
    return float(done.stdout)


def test_command_begins_when_its_process_does() -> None:
    """Not when its first line of Python is run; the system counts in hundredths of a second."""
    before = time.monotonic()
    # A busy machine may take longer to start Python than a command of one's own ever does.
    says_when = f"from mistral_chat.cli import begun; begun.OWN_START_S = 60\n{SAYS_WHEN}"
    python = [sys.executable, "-c", says_when]
    slow = [sys.executable, "-c", f"import time; time.sleep(0.3)\n{says_when}"]
    for command in (python, slow):
        begun = _begun_by(*command)
        # To hundredths, and between two clocks that a busy machine reads apart.
        assert before - 0.2 <= begun <= time.monotonic()
        before = time.monotonic()
    quick = _begun_by(*slow)
    assert quick < time.monotonic() - 0.3


def test_command_that_took_the_place_of_another_begins_then() -> None:
    wait = OWN_START_S + 0.2
    before = time.monotonic()
    begun = _begun_by("bash", "-c", f'sleep {wait}; exec "$0" -c "$1"', sys.executable, SAYS_WHEN)
    assert begun >= before + wait


def test_beginning_is_handed_on_to_ranks_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in LAUNCHED.items():
        monkeypatch.setenv(name, value)
    begun = Begun(at=12.25)
    with begun.handed_on():
        assert os.environ[HANDED_ON] == "12.25"
        assert Begun.now() == Begun(at=12.25, by_us=True)
        assert HANDED_ON not in os.environ  # what a rank starts is no rank of this command
        os.environ[HANDED_ON] = "12.25"
    assert HANDED_ON not in os.environ
    monkeypatch.delenv("RANK")
    monkeypatch.setenv(HANDED_ON, "12.25")
    assert not Begun.now().by_us
    assert HANDED_ON not in os.environ


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("models/Mistral-Large", "Mistral-Large"),
        ("hub/models--mistralai--Mistral-7B-v0.3/snapshots/0123abcd", "mistralai/Mistral-7B-v0.3"),
        (".", ROOT.name),
        (None, "dummy weights"),
    ],
)
def test_model_is_called_by_its_name(
    monkeypatch: pytest.MonkeyPatch, path: str | None, name: str
) -> None:
    monkeypatch.chdir(ROOT)
    assert name_of(None if path is None else Path(path)) == name


@pytest.fixture
def without_torch(tmp_path: Path) -> dict[str, str]:
    for name in ("torch", "mistral_common", "rich"):
        (tmp_path / f"{name}.py").write_text(f"raise SystemExit('{name} was imported')\n")
    return {"PYTHONPATH": str(tmp_path), "TERM": "xterm"}


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["--device", "cpu"], "starting tiny on cpu ..."),
        (["--device", "cpu", "--nproc_per_node", "2"], "starting 2 ranks of tiny on cpu ..."),
        (["--nproc_per_node", "1"], "starting tiny ..."),
        (["--device", "cpu", "--quiet"], None),
    ],
)
def test_first_line_says_what_starts_before_anything_slow(
    tiny_folder: Path, without_torch: dict[str, str], words: list[str], line: str | None
) -> None:
    command = [sys.executable, "-m", "mistral_chat", str(tiny_folder), "Hello", *words]
    out, _ = pexpect.run(
        " ".join(command), env=command_env(**without_torch), cwd=str(ROOT), withexitstatus=True
    )
    first = out.decode().splitlines()[0]
    if line is None:
        assert "starting" not in out.decode()
    else:
        assert first == f"\x1b[2mmistral-chat: {line}\x1b[0m"
    piped = subprocess.run(
        command, capture_output=True, stdin=subprocess.DEVNULL, cwd=ROOT,
        env=command_env(**without_torch), check=False,
    )  # fmt: skip
    assert b"starting" not in piped.stderr


def test_file_at_a_terminal_begins_a_chat(tiny_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("The notes.\n")
    words = ["--instruct", "--file", str(tmp_path / "notes.txt"), "--max_tokens", "2"]
    with chat_terminal(tmp_path, tiny_folder, *words, "--device", "cpu") as terminal:
        terminal.wait_for_prompt()
        assert terminal.rows[0] == "mistral-chat: starting tiny on cpu ..."
        text = "".join(terminal.text.split())  # a path wider than the window is broken by it
        assert "notes.txtcomesbeforethenextmessage" in text
        terminal.ask_and_wait("What do they say?")
        assert terminal.leave() == 0
    (kept,) = tmp_path.glob("mistral-chat/sessions/*.jsonl")
    assert "The notes.\\n\\nWhat do they say?" in kept.read_text()


# Ctrl-C before there is an answer.


class _OwnError(MistralChatError):
    pass


@pytest.mark.parametrize("error", [RuntimeError, ImportError, _OwnError, BrokenPipeError])
def test_interrupt_is_130_whatever_it_breaks(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], error: type[Exception]
) -> None:
    def interrupted(*_: object) -> int:
        try:
            signal.raise_signal(signal.SIGINT)
        except KeyboardInterrupt:
            raise error("such as a module that was being imported") from None
        return 0

    monkeypatch.setattr(sys, "stdout", sys.__stdout__)
    monkeypatch.setattr(sys, "stderr", sys.__stderr__)
    monkeypatch.setattr(main, "_command", interrupted)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        assert main.main(["MODEL"]) == 130
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    finally:
        signal.signal(signal.SIGINT, before)
    assert capsys.readouterr().err == ""


def test_interrupt_that_gets_lost_while_loading_ends_the_command_all_the_same(
    monkeypatch: pytest.MonkeyPatch, tiny_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make = Tokenizer.from_folder

    def losing(folder: ModelFolder) -> Tokenizer:
        with contextlib.suppress(KeyboardInterrupt):  # as a finalizer or an extension module does
            signal.raise_signal(signal.SIGINT)
        return make(folder)

    monkeypatch.setattr(Tokenizer, "from_folder", losing)
    monkeypatch.setattr(sys, "stdin", None)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        words = [str(tiny_folder), "--prompt", "x", "--device", "cpu", "--quiet"]
        assert main.main(words) == 130
    finally:
        signal.signal(signal.SIGINT, before)
    assert capsys.readouterr() == ("", "")


def test_error_without_an_interrupt_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: object) -> int:
        raise RuntimeError("ours")

    monkeypatch.setattr(sys, "stdout", sys.__stdout__)
    monkeypatch.setattr(sys, "stderr", sys.__stderr__)
    monkeypatch.setattr(main, "_command", fails)
    with pytest.raises(RuntimeError, match="ours"):
        main.main(["MODEL"])


@pytest.mark.parametrize("n_started", [0, 1, 2])
def test_reading_that_is_interrupted_as_it_starts_can_be_abandoned(
    monkeypatch: pytest.MonkeyPatch, tiny_folder: Path, n_started: int
) -> None:
    reading = reading_of(Transformer(TINY, Shard(TINY)), folder_of(tiny_folder).headers, 3)
    start = threading.Thread.start
    left = [n_started]

    def interrupted(thread: threading.Thread) -> None:
        if not left[0]:
            raise KeyboardInterrupt
        left[0] -= 1
        start(thread)

    monkeypatch.setattr(threading.Thread, "start", interrupted)
    with pytest.raises(KeyboardInterrupt):
        reading.start()
    reading.abandon()
    assert not any(thread.is_alive() for thread in reading.threads)


def test_interrupt_while_loading_is_130_and_no_word(tiny_folder: Path, tmp_path: Path) -> None:
    words = ["--instruct", "--device", "cpu"]
    with chat_terminal(tmp_path, tiny_folder, *words) as terminal:
        terminal.wait_for("starting tiny on cpu ...")
        terminal.child.sendintr()
        while terminal.read(1):
            pass
        terminal.child.close()
        assert terminal.child.exitstatus == 130
        assert terminal.text.replace("^C", "").strip() == "mistral-chat: starting tiny on cpu ..."


# Which build a benchmark names.


def _commit_by(root: Path) -> str:
    says = "from mistral_chat.cli.bench import run; print(run._commit())"
    command = [sys.executable, "-c", says]
    env = command_env(PYTHONPATH=str(root), PYTHONSAFEPATH="1", PYTHONDONTWRITEBYTECODE="1")
    done = subprocess.run(command, capture_output=True, check=True, env=env, cwd="/")
    return done.stdout.decode().strip()


def test_bench_names_the_commit_of_its_own_checkout_alone(tmp_path: Path) -> None:
    """Not that of a repository in which it is merely installed."""

    def git(*words: str) -> str:
        who = ["-c", "user.name=x", "-c", "user.email=x@example.org"]
        command = ["git", "-C", str(tmp_path), *who, *words]
        done = subprocess.run(command, capture_output=True, check=True)
        return done.stdout.decode().strip()

    git("init", "-q")
    git("commit", "-q", "--allow-empty", "-m", "x")
    leave_out = shutil.ignore_patterns("__pycache__")
    for root in (tmp_path, tmp_path / "venv" / "site-packages"):
        shutil.copytree(ROOT / "mistral_chat", root / "mistral_chat", ignore=leave_out)
    assert _commit_by(tmp_path) == git("rev-parse", "--short", "HEAD")
    assert _commit_by(tmp_path / "venv" / "site-packages") == "None"


@pytest.mark.parametrize(("commit", "said"), [("abc1234", "commit abc1234"), (None, "version 9")])
def test_build_is_a_commit_or_a_version(commit: str | None, said: str) -> None:
    result: dict[str, Any] = {"commit": commit, "version": "9"}
    assert bench_tables.build_of(result) == said
