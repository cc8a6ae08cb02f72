"""A command in a pseudo-terminal, and what a person would see on its screen and above it.

pyte plays the terminal: it cuts lines where a window narrows, and keeps what scrolls away.
"""

import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pexpect
import pyte

from tests.conftest import ROOT, command_env, torchrun_words
from tests.warm import Spawned

__all__ = ["Terminal", "chat_terminal", "rows_of", "typed_at"]

# A prompt has pastes marked while it lasts.
TAKES_HOLD, LET_GO = b"\x1b[?2004h", b"\x1b[?2004l"


def rows_of(screen: pyte.HistoryScreen) -> list[str]:
    """All rows, those that scrolled away first; a wide letter's second cell holds nothing."""

    def row(cells: Any) -> str:
        n_cells = min(screen.columns, max(cells, default=-1) + 1)  # the rest was never written to
        return "".join([cells[x].data for x in range(n_cells)]).rstrip()

    shown = (screen.buffer[y] for y in range(screen.lines))
    return [row(cells) for cells in (*screen.history.top, *shown)]


class Terminal:
    """One command and its window.

    Args:
        module: that `python -m` would be given.
        words: of its command line.
        size: columns and rows.
        env: of the command.
    """

    def __init__(
        self, module: str, words: Sequence[str], size: tuple[int, int], env: dict[str, str]
    ) -> None:
        columns, rows = size
        self.screen = pyte.HistoryScreen(columns, rows, history=100_000)
        self.stream = pyte.ByteStream(self.screen)
        self.raw = b""
        self._n_let_go = 0  # prompts that had ended when something was last typed
        self.child: pexpect.spawn[bytes] = Spawned(
            sys.executable,
            ["-m", module, *words],
            dimensions=(rows, columns),
            cwd=str(ROOT),
            env=env,  # type: ignore[arg-type]
            timeout=120,
        )
        self.child.delaybeforesend = None

    @property
    def rows(self) -> list[str]:
        """All rows, those that scrolled away first, without the empty ones at the end."""
        rows = rows_of(self.screen)
        while rows and not rows[-1]:
            rows.pop()
        return rows

    @property
    def text(self) -> str:
        """All rows."""
        return "\n".join(self.rows)

    def read(self, timeout_s: float = 0.05) -> bool:
        """Take what the command writes now; False when it has ended."""
        try:
            data = self.child.read_nonblocking(65536, timeout_s)
        except pexpect.TIMEOUT:
            return True
        except pexpect.EOF:
            return False
        self.raw += data
        self.stream.feed(data)
        return True

    def wait_for(self, seen: str | Callable[[str], bool], timeout_s: float = 120) -> None:
        """Until a text is on the screen or above it."""
        holds = seen if callable(seen) else lambda text: seen in text
        end = time.monotonic() + timeout_s
        alive = True
        text = self.text
        while not holds(text):
            assert alive, f"ended before {seen!r}:\n{text}"
            assert time.monotonic() < end, f"no {seen!r} in {timeout_s} s:\n{text}"
            n_read = len(self.raw)
            alive = self.read()
            if len(self.raw) > n_read:  # playing the terminal and reading it takes its time
                text = self.text

    def wait_for_prompt(self) -> None:
        """Until the chat can be typed at: it has asked for pastes to be marked since last time."""
        end = time.monotonic() + 120
        while self.raw.rfind(TAKES_HOLD) <= self.raw.rfind(LET_GO):
            assert time.monotonic() < end, f"no prompt:\n{self.text}"
            assert self.read(), f"ended before a prompt:\n{self.text}"

    def send(self, text: str) -> None:
        """Type something."""
        self._n_let_go = self.raw.count(LET_GO)
        self.child.send(text)

    def wait_for_answer(self) -> None:
        """Until the prompt at which something was sent has let go of the terminal."""
        end = time.monotonic() + 120
        while self.raw.count(LET_GO) == self._n_let_go:  # the next prompt may be there, too
            assert time.monotonic() < end, f"still at the prompt:\n{self.text}"
            assert self.read(), f"ended at the prompt:\n{self.text}"

    def ask(self, text: str) -> None:
        """Type a line at the prompt."""
        self.wait_for_prompt()
        self.send(text + "\r")
        self.wait_for_answer()

    def ask_and_wait(self, text: str) -> None:
        """Type a line at the prompt, and wait for the next prompt."""
        self.ask(text)
        self.wait_for_prompt()

    def resize(self, columns: int, rows: int) -> None:
        """Give the window another size."""
        self.screen.resize(rows, columns)
        self.child.setwinsize(rows, columns)

    def leave(self) -> int | None:
        """Press Ctrl-D at the prompt; the command's code."""
        self.wait_for_prompt()
        self.child.sendeof()
        while self.read(1):
            pass
        self.child.close()
        return self.child.exitstatus


@contextmanager
def chat_terminal(
    data_home: Path,
    *words: str | Path,
    size: tuple[int, int] = (80, 24),
    script: Path | None = None,
    gap_s: float = 0.0,
    env: dict[str, str] | None = None,
) -> Iterator[Terminal]:
    """The chat in a window; it has ended when the block is left.

    Args:
        data_home: where it keeps chats.
        words: of the command line.
        size: columns and rows.
        script: a JSON list of answers that the model is made to give; None leaves it to itself.
        gap_s: seconds before each token of those.
        env: more variables.
    """
    command = ["mistral_chat"]
    if script is not None:
        command = ["tests.scripts.scripted", str(script), str(gap_s)]
    changes = {"TERM": "xterm-256color", "PROMPT_TOOLKIT_NO_CPR": "1"}
    changes |= {"XDG_DATA_HOME": str(data_home), **(env or {})}
    module, *first = command
    terminal = Terminal(module, [*first, *map(str, words)], size, command_env(**changes))
    try:
        yield terminal
    finally:
        terminal.child.close(force=True)


@contextmanager
def typed_at(
    data_home: Path, *module_and_words: str | Path, torchrun: int = 0
) -> Iterator["pexpect.spawn[str]"]:
    """A module under a plain terminal of 100 columns, for looking for texts in what it writes.

    Args:
        data_home: where it keeps chats.
        module_and_words: what `python -m` is given.
        torchrun: ranks to start it on; 0 starts it alone.
    """
    launcher = torchrun_words(torchrun) if torchrun else []
    child = Spawned(
        sys.executable,
        ["-m", *launcher, *map(str, module_and_words)],
        encoding="utf-8",
        codec_errors="replace",
        timeout=120,
        dimensions=(40, 100),
        cwd=str(ROOT),
        env=command_env(TERM="xterm", PROMPT_TOOLKIT_NO_CPR="1", XDG_DATA_HOME=str(data_home)),  # type: ignore[arg-type]
    )
    child.delaybeforesend = None
    try:
        yield child
    finally:
        child.close(force=True)
