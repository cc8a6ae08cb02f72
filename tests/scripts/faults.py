"""Signals to a rank or the launcher, in every phase of a run at a terminal; a table of what came.

    python -m tests.scripts.faults [WORD...]    runs the cases whose names have all words

Right is: within ten seconds every process is gone, one line says what happened, the terminal is as
it was, no files are left, and what a chat has acknowledged is kept. What is stopped goes on once
it is continued. Phases are held by `held/sitecustomize.py`, so that no case is a matter of luck.
"""

import contextlib
import fcntl
import itertools
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import termios
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import psutil

from tests.conftest import (
    ROOMY_SEQ_LEN,
    ROOT,
    TINY,
    command_env,
    is_alive,
    make_folder,
    torchrun_words,
)
from tests.warm import Command, warm

WITHIN_S = 10.0
PATIENCE_S = 90.0
PHASES = ("import", "rendezvous", "loading", "prompt", "prefill", "decode", "call")
KILL, TERM, HUP, INT, STOP = (
    signal.SIGKILL,
    signal.SIGTERM,
    signal.SIGHUP,
    signal.SIGINT,
    signal.SIGSTOP,
)
TOOLS = '''
import time
from pathlib import Path

def wait() -> str:
    """Wait."""
    Path({marker!r}).write_text("")
    time.sleep(120)
    return "waited"
'''


@dataclass(frozen=True)
class Case:
    """One fault: `launcher` is own, torchrun or alone; `victim` launcher, 0 or 1."""

    launcher: str
    mode: str
    phase: str
    victim: str
    number: signal.Signals

    def __str__(self) -> str:
        who = self.victim if self.victim == "launcher" else f"rank {self.victim}"
        return f"{self.launcher}, {self.mode}, {self.phase}: {self.number.name} to {who}"

    @property
    def n_ranks(self) -> int:
        return 1 if self.launcher == "alone" else 2


def all_cases() -> list[Case]:
    """Every launcher, mode, phase, victim and signal that make sense together."""
    cases = []
    for launcher, mode, phase in itertools.product(
        ("own", "torchrun", "alone"), ("answer", "chat"), PHASES
    ):
        if (mode, phase) == ("answer", "prompt") or (launcher, phase) == ("alone", "rendezvous"):
            continue
        victims = ("0",) if launcher == "alone" else ("launcher", "0", "1")
        for victim, number in itertools.product(victims, (KILL, TERM, HUP, INT, STOP)):
            if launcher == "alone" and number == KILL:
                continue  # there is nobody left to do anything
            cases.append(Case(launcher, mode, phase, victim, number))
    return cases


SAMPLE = (
    Case("own", "answer", "import", "launcher", KILL),
    Case("own", "answer", "rendezvous", "1", KILL),
    Case("own", "answer", "loading", "0", HUP),
    Case("own", "chat", "prompt", "launcher", KILL),
    Case("own", "chat", "prompt", "0", KILL),
    Case("own", "chat", "decode", "1", KILL),
    Case("own", "answer", "prefill", "launcher", TERM),
    Case("torchrun", "chat", "decode", "launcher", KILL),
    Case("torchrun", "chat", "prompt", "0", KILL),
    Case("alone", "answer", "decode", "0", TERM),
    Case("alone", "chat", "prompt", "0", HUP),
)


class Run:
    """The command of a case below a shell in a terminal of its own.

    Args:
        case: what is to happen.
        folder: of the model.
        work: an empty folder.
        fork: its processes are forked (`tests.warm`), and not started anew.
    """

    def __init__(self, case: Case, folder: Path, work: Path, *, fork: bool = False) -> None:
        self.case, self.work = case, work
        self.output = b""
        self.temporary, self.marks, self.data = work / "tmp", work / "marks", work / "data"
        for made in (self.temporary, self.marks, self.data):
            made.mkdir()
        tools = work / "tools.py"
        tools.write_text(TOOLS.format(marker=str(self.marks / "call.0")))
        words = [str(folder), "--instruct", "--temperature", "0", "--max_tokens", "4000"]
        words += ["--device", "cpu"]
        if case.phase == "call":
            words += ["--tools", str(tools), "--yes"]
        if case.mode == "answer":
            words += ["--prompt", "Hello there"]
        command = ["mistral_chat", *words]
        if case.launcher == "own":
            command += ["--nproc_per_node", "2"]
        elif case.launcher == "torchrun":
            command = [*torchrun_words(2), *command]
        env = command_env(
            TERM="xterm",
            PROMPT_TOOLKIT_NO_CPR="1",
            TMPDIR=str(self.temporary),
            XDG_DATA_HOME=str(self.data),
            PYTHONPATH=os.pathsep.join((str(ROOT / "tests/scripts/held"), str(ROOT))),
            HELD_PHASE=case.phase,
            HELD_DIR=str(self.marks),
            HELD_MODEL=str(folder),
            **({"HELD_ALONE": "0"} if case.launcher == "alone" else {}),
        )
        self._master, slave = os.openpty()
        self.before = termios.tcgetattr(slave)

        self.shell = (_forked_shell if fork else _fresh_shell)(command, slave, env)
        self._slave = slave
        self._reading = threading.Thread(target=self._read, daemon=True)
        self._reading.start()
        self.seen: dict[int, psutil.Process] = {}

    def _read(self) -> None:
        with contextlib.suppress(OSError):
            while data := os.read(self._master, 65536):
                self.output += data

    @property
    def text(self) -> str:
        return self.output.decode("utf-8", "replace")

    @property
    def error_lines(self) -> list[str]:
        return [x for x in self.text.splitlines() if "mistral-chat: error:" in x]

    def look(self) -> None:
        """Note every process below the shell."""
        with contextlib.suppress(psutil.Error):
            for each in psutil.Process(self.shell.pid).children(recursive=True):
                self.seen.setdefault(each.pid, each)

    def process(self, victim: str) -> psutil.Process:
        """The launcher or a rank."""
        if victim == "launcher":
            return psutil.Process(self.shell.pid).children()[0]
        return psutil.Process(int(self.marks.with_name(f"rank {victim}").read_text()))

    def wait_for(self, holds: Callable[[], bool], what: str) -> None:
        deadline = time.monotonic() + PATIENCE_S
        while not holds():
            self.look()
            assert time.monotonic() < deadline, f"no {what}: {self.text[-500:]}"
            assert "code " not in self.text, f"ended before {what}: {self.text[-500:]}"
            time.sleep(0.02)

    def come_to_phase(self) -> None:
        """Wait, and type what is needed, until every rank has come to the phase."""
        case = self.case
        late = case.phase in ("prompt", "prefill", "decode", "call")
        if case.mode == "chat" and late:
            self.wait_for(lambda: "\x1b[?2004h" in self.text, "prompt")
            if case.phase != "prompt":
                os.write(self._master, b"remember this\r")
        n_marks = {"prompt": 0, "call": 1}.get(case.phase, case.n_ranks)
        self.wait_for(lambda: len(list(self.marks.iterdir())) >= n_marks, case.phase)
        if case.phase == "rendezvous":
            time.sleep(1)  # rank 0 has begun to wait
        self.look()

    def is_gone(self) -> bool:
        self.look()
        return "code " in self.text and not any(is_alive(pid) for pid in self.seen)

    def close(self) -> None:
        self.look()
        for each in self.seen.values():
            with contextlib.suppress(psutil.Error):
                each.kill()
        self.shell.kill()
        self.shell.wait(PATIENCE_S)
        for handle in (self._slave, self._master):
            os.close(handle)


def _fresh_shell(command: list[str], terminal: int, env: dict[str, str]) -> subprocess.Popen[bytes]:
    def take_terminal() -> None:
        os.setsid()
        fcntl.ioctl(0, termios.TIOCSCTTY, 0)
        for number in (HUP, INT):  # nohup, and shells in the background, have them ignored
            signal.signal(number, signal.SIG_DFL)

    script = '"$@"; echo "code $?"; exec sleep 600'
    return subprocess.Popen(
        ["sh", "-c", script, "sh", sys.executable, "-m", *command],
        stdin=terminal,
        stdout=terminal,
        stderr=terminal,
        env=env,
        cwd=ROOT,
        preexec_fn=take_terminal,
    )


def _forked_shell(command: list[str], terminal: int, env: dict[str, str]) -> Command:
    return warm().start(
        "tests.scripts.shell", command, env, [terminal] * 3, takes_terminal=True
    )  # fmt: skip


def _limit_s() -> float:
    return WITHIN_S * max(1.0, os.getloadavg()[0] / (os.cpu_count() or 1))


def _await_end(run: Run) -> list[str]:
    deadline = time.monotonic() + _limit_s()
    while not run.is_gone():
        if time.monotonic() > deadline:
            left = [f"{p.pid} {' '.join(p.cmdline())[-80:]}" for p in run.seen.values()
                    if is_alive(p.pid)]  # fmt: skip
            return [f"not gone in {_limit_s():.0f} s: {left}"]
        time.sleep(0.02)
    return []


def _goes_on(run: Run, victim: psutil.Process) -> list[str]:
    """What a run is that no signal was to end: alive, and ended by one that is."""
    time.sleep(1)
    if "code " in run.text:
        return [f"ended: {run.text[-300:]!r}"]
    victim.resume()
    run.process("0" if run.case.launcher == "alone" else "launcher").terminate()
    return []


def inject(case: Case, folder: Path, work: Path, *, fork: bool = False) -> list[str]:
    """Run a case; what was not right, nothing where all was."""
    shared_before = set(os.listdir("/dev/shm"))  # noqa: PTH208
    run = Run(case, folder, work, fork=fork)
    try:
        run.come_to_phase()
        victim = run.process(case.victim)
        victim.send_signal(case.number)
        reaches_0 = case.victim == "0" or (case.launcher, case.victim) == ("torchrun", "launcher")
        if case.number == INT and reaches_0 and case.phase in ("rendezvous", "prefill"):
            # Ctrl-C waits for the end of a step, and for the store that ranks meet at.
            (run.marks / "GO").touch()
        wrong = []
        # Ctrl-C is rank 0's to handle, and at the prompt it clears the line.
        takes_it = case.victim == "1" or case.phase == "prompt"
        goes_on = case.number == STOP or (
            case.number == INT and takes_it and case.victim != "launcher"
            and not (case.launcher == "torchrun" and case.phase in ("import", "rendezvous"))
        )  # fmt: skip
        if goes_on:
            wrong += _goes_on(run, victim)
        wrong += _await_end(run)
        time.sleep(0.1)  # for what was written last to be read
        if termios.tcgetattr(run._slave) != run.before:
            wrong.append("the terminal has changed")
        wrong += _wrong_lines(run, goes_on=goes_on)
        left = [x for x in run.temporary.iterdir() if not (
            case.launcher == "torchrun" and x.name.startswith("torchelastic_"))]  # fmt: skip
        mine = [str(pid) for pid in run.seen]
        left += [x for x in set(os.listdir("/dev/shm")) - shared_before  # noqa: PTH208
                 if "mistral" in x or any(pid in x for pid in mine)]  # fmt: skip
        if left:
            wrong.append(f"files are left: {left}")
        if case.mode == "chat" and case.phase in ("prefill", "decode", "call"):
            kept = "".join(p.read_text() for p in run.data.rglob("*.jsonl"))
            if "remember this" not in kept:
                wrong.append("the message is not kept")
        return wrong
    except AssertionError as error:
        return [str(error)]
    finally:
        run.close()


def _wrong_lines(run: Run, *, goes_on: bool) -> list[str]:
    case, lines = run.case, run.error_lines
    if "Traceback" in run.text and case.launcher != "torchrun":
        return [f"a traceback: {run.text[-600:]!r}"]
    asked_to_end = goes_on or case.number == INT or (
        case.number in (TERM, HUP) and (case.victim == "launcher" or case.launcher == "alone")
    )  # fmt: skip
    # torchrun says much itself, and ends rank 0 before it can speak.
    fewest = 0 if asked_to_end or case.launcher == "torchrun" else 1
    # A rank that is still to meet rank 0 says that it cannot.
    silent = asked_to_end and case.launcher != "torchrun" and case.phase != "rendezvous"
    most = 0 if silent else 1
    return [] if fewest <= len(lines) <= most else [f"{len(lines)} lines: {lines}"]


@contextlib.contextmanager
def model_folder() -> Iterator[Path]:
    """A tiny model with a context for long answers."""
    with tempfile.TemporaryDirectory() as made:
        yield make_folder(Path(made) / "roomy", replace(TINY, max_seq_len=ROOMY_SEQ_LEN))


def main(words: list[str]) -> int:
    chosen = [case for case in all_cases() if all(word in str(case) for word in words)]
    counts: dict[tuple[str, str], list[int]] = {}
    with model_folder() as folder:
        for number, case in enumerate(chosen, 1):
            work = Path(tempfile.mkdtemp())
            started = time.monotonic()
            wrong: list[Any] = inject(case, folder, work)
            shutil.rmtree(work, ignore_errors=True)
            row = counts.setdefault((f"{case.launcher}, {case.mode}", case.phase), [0, 0])
            row[0] += not wrong
            row[1] += 1
            said = "right" if not wrong else f"WRONG: {'; '.join(wrong)}"
            took_s = time.monotonic() - started
            print(f"{number}/{len(chosen)} {case}: {said} ({took_s:.1f} s)", flush=True)
    print("\n" + "".join(f"{name:>12}" for name in ("", *PHASES)))
    for name in dict.fromkeys(name for name, _ in counts):
        cells = [counts.get((name, phase)) for phase in PHASES]
        print(f"{name:<18}" + "".join(f"{f'{c[0]}/{c[1]}' if c else '':>12}" for c in cells))
    n_right = sum(right for right, _ in counts.values())
    print(f"{n_right} of {len(chosen)} right")
    return 0 if n_right == len(chosen) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
