"""Our own launcher of ranks on one node: starts them, waits for all, ends all when one fails.

It replaces torchrun, which takes two seconds to import, leaves folders behind and cannot restore a
terminal. Its ranks are in its own process group, so that a shell stops and continues all of them.
Knows nothing of torch, models or terminals.
"""

import contextlib
import os
import secrets
import select
import signal
import subprocess
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from types import FrameType

from mistral_chat.engine import rank as rank_entry
from mistral_chat.errors import DeviceError

__all__ = ["Ended", "cores_each", "environment_of_ranks", "how_it_ended", "run_ranks"]

# Time for a rank to report why it ends before it is told to end, and to end after that.
SPEAK_S = 3.0
END_S = 3.0
PART_S = 30.0  # for the other ranks to end by themselves after rank 0
CANCEL_S = 5.0  # for rank 0 to end by itself after Ctrl-C
TOLD = (signal.SIGTERM, signal.SIGHUP, signal.SIGINT)


@dataclass(frozen=True, kw_only=True)
class Ended:
    """How a run of ranks ended.

    Args:
        code: exit code for the launcher.
        message: why, if no rank has reported it; else empty.
        orderly: rank 0 ended by itself, so it has restored the terminal.
    """

    code: int
    message: str = ""
    orderly: bool = True


def run_ranks(n_ranks: int, argv: Sequence[str]) -> Ended:
    """Run the command line on this node's ranks and wait for all of them.

    Rank 0 has this process's stdin, the others have none.

    Raises:
        DeviceError: a rank could not be started.
    """
    with _noticing_signals() as wakeups:
        ranks: list[subprocess.Popen[bytes]] = []
        try:
            common = environment_of_ranks(n_ranks)
            for rank in range(n_ranks):
                ranks.append(_start(rank, common, argv))
        except OSError as error:
            _kill(ranks)
            raise DeviceError(
                f"rank {len(ranks)} of {n_ranks} could not be started ({error.strerror})"
            ) from error
        return _Run(ranks).until_all_have_ended(wakeups)


def cores_each(n_ranks: int) -> int:
    """Cores for each of several ranks on this node, at least one."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return max(1, (cores or 1) // n_ranks)


def how_it_ended(process: subprocess.Popen[bytes]) -> str:
    """How a process ended, as a phrase to follow its name."""
    return _in_words(process.returncode)


def _in_words(code: int) -> str:
    number = -code if code < 0 else code - 128 if code - 128 in TOLD else 0
    if not number:
        return f"ended with code {code}"
    named = [known.name for known in signal.Signals if known == number]
    return f"was ended by {named[0] if named else f'signal {number}'}"


def environment_of_ranks(n_ranks: int) -> dict[str, str]:
    """Environment variables of all ranks of a new run on this node.

    The ranks meet by the run's name, so nothing listens on the port.
    """
    return os.environ | {
        "WORLD_SIZE": str(n_ranks),
        "LOCAL_WORLD_SIZE": str(n_ranks),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": "0",
        "TORCHELASTIC_RUN_ID": secrets.token_hex(16),
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", str(cores_each(n_ranks))),
    }


def _start(rank: int, common: dict[str, str], argv: Sequence[str]) -> subprocess.Popen[bytes]:
    interrupted = signal.getsignal(signal.SIGINT)
    if rank:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # inherited: only rank 0 handles Ctrl-C
    try:
        return subprocess.Popen(
            rank_entry.command("launcher", "mistral_chat.cli.main", *argv),
            env=common | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdin=subprocess.DEVNULL if rank else None,
        )
    finally:
        signal.signal(signal.SIGINT, interrupted)


def _kill(ranks: Sequence[subprocess.Popen[bytes]]) -> None:
    for rank in ranks:
        rank.kill()
        rank.wait()


class _Wakeups:
    """Waits for signals, with a timeout."""

    def __init__(self, reader: int) -> None:
        self._reader = reader

    def wait(self, timeout_s: float | None) -> set[int]:
        """Signals since the last call; none after `timeout_s`, and None waits forever."""
        if not select.select([self._reader], [], [], timeout_s)[0]:
            return set()
        return set(os.read(self._reader, 4096))


@contextlib.contextmanager
def _noticing_signals() -> Iterator[_Wakeups]:
    """Let signals, SIGCHLD among them, do nothing but wake this process."""

    def do_nothing(signum: int, frame: FrameType | None) -> None:  # noqa: ARG001
        return

    reader, writer = os.pipe()
    for end in (reader, writer):
        os.set_blocking(end, False)
    # Ignored signals stay ignored, as under nohup.
    numbers = [n for n in TOLD if signal.getsignal(n) != signal.SIG_IGN]
    before = {n: signal.signal(n, do_nothing) for n in (*numbers, signal.SIGCHLD)}
    wakeup_before = signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    try:
        yield _Wakeups(reader)
    finally:
        signal.set_wakeup_fd(wakeup_before)
        for number, handler in before.items():
            signal.signal(number, handler)
        os.close(reader)
        os.close(writer)


class _Run:
    """Watches started ranks until the last has ended.

    Ranks other than 0 get no signal to end: their lifeline tells them that rank 0 has ended, or
    they are killed, since they have nothing to restore.

    Args:
        ranks: rank 0 first.
    """

    def __init__(self, ranks: Sequence[subprocess.Popen[bytes]]) -> None:
        self._ranks = ranks
        self._ended: list[int] = []  # in the order in which they ended
        self._told: int | None = None  # the first signal to this process
        self._forced: set[int] = set()  # terminated or killed by this process
        self._end_at: float | None = None  # when to terminate rank 0 and kill the others
        self._kill_at: float | None = None

    def until_all_have_ended(self, wakeups: _Wakeups) -> Ended:
        """Wait, forward signals, and end ranks that are overdue."""
        while len(self._ended) < len(self._ranks):
            due = [at for at in (self._end_at, self._kill_at) if at is not None]
            patience_s = max(0.0, min(due) - time.monotonic()) if due else None
            received = wakeups.wait(patience_s)
            now = time.monotonic()
            for number in TOLD:
                if number in received and self._told is None:
                    self._hear(number, now)
            self._notice_ends(now)
            self._end_what_is_left(now)
        return self._result()

    def _hear(self, number: int, now: float) -> None:
        """Handle a signal: rank 0 must end, and the others with it."""
        self._told = number
        if number == signal.SIGINT:
            # Rank 0 got it from the terminal, too. Forwarding it would be a second Ctrl-C, which
            # cuts the answer off.
            self._end_by(now + CANCEL_S)
        else:
            self._ranks[0].send_signal(number)
            self._end_by(now + SPEAK_S)

    def _notice_ends(self, now: float) -> None:
        for number, rank in enumerate(self._ranks):
            if number in self._ended or rank.poll() is None:
                continue
            self._ended.append(number)
            if rank.returncode != 0:
                self._end_by(now + SPEAK_S)
            elif number == 0:
                self._end_by(now + PART_S)

    def _end_by(self, at: float) -> None:
        if self._kill_at is None:
            self._end_at = min(at, self._end_at or at)

    def _end_what_is_left(self, now: float) -> None:
        if self._end_at is not None and now >= self._end_at:
            self._end_at = None
            if 0 in self._ended:
                self._kill_at = now
            else:
                self._forced.add(0)
                self._ranks[0].terminate()
                self._kill_at = now + END_S
        if self._kill_at is not None and now >= self._kill_at:
            self._kill_at = None
            for number, rank in enumerate(self._ranks):
                if number not in self._ended:
                    self._forced.add(number)
                    rank.kill()

    def _result(self) -> Ended:
        lead = self._ranks[0].returncode
        orderly = lead >= 0
        if self._told is not None:
            by_itself = orderly and 0 not in self._forced
            return Ended(code=lead if by_itself else 128 + self._told, orderly=orderly)
        if lead > 0 and 0 not in self._forced and lead - 128 not in TOLD[:2]:
            return Ended(code=lead)  # it has reported why
        failed = [n for n in self._ended if self._ranks[n].returncode != 0]
        if not failed:
            return Ended(code=0)
        by_themselves = [n for n in failed if n not in self._forced]
        if not by_themselves:
            named = ", ".join(map(str, sorted(failed)))
            said = f"rank {named} did not end within {PART_S:.0f} s of rank 0 and was killed"
            return Ended(code=1, message=said)
        first = 0 if 0 in by_themselves else by_themselves[0]
        code = self._ranks[first].returncode
        if code < 0 or code - 128 in TOLD[:2]:
            said = f"rank {first} {_in_words(code)}; all ranks end"
            return Ended(code=max(code, 1), message=said, orderly=orderly)
        return Ended(code=code, orderly=orderly)
