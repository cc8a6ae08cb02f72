"""The terminal during an answer: read Ctrl-C as a byte, and restore everything at the end.

Under torchrun a worker cannot use SIGINT: the launcher receives it and ends all ranks. So the
terminal must not turn Ctrl-C into a signal, and its byte is polled for between pieces of text.
Knows nothing of prompts or answers.
"""

import codecs
import os
import select
import signal
import sys
import termios
import threading
from types import FrameType, TracebackType
from typing import IO, Any, ClassVar, Self

__all__ = [
    "CHANGED",
    "CTRL_C",
    "QuietTerminal",
    "in_foreground",
    "is_fancy",
    "is_terminal",
    "suspend",
]

CTRL_C, CTRL_Z = 0x03, 0x1A
CHANGED = termios.ISIG | termios.ICANON | termios.ECHO | termios.IEXTEN


def is_terminal(stream: IO[Any] | None) -> bool:
    """Return whether a stream is open and a terminal."""
    try:
        return stream is not None and stream.isatty()
    except ValueError:  # closed
        return False


def is_fancy(stream: IO[Any] | None) -> bool:
    """Return whether a stream may show colour, progress bars and the like."""
    plain = os.environ.get("NO_COLOR") or os.environ.get("TERM", "dumb") == "dumb"
    return is_terminal(stream) and not plain


def in_foreground() -> bool:
    """Return whether this process may change its terminal, as one in its own session always may."""
    try:
        return sys.stdin is None or os.tcgetpgrp(sys.stdin.fileno()) == os.getpgrp()
    except (OSError, ValueError):  # not our controlling terminal, as in torchrun's workers
        return True


def suspend() -> None:
    """Do what Ctrl-Z does: stop this process group, with all ranks of our launcher.

    Do nothing if no shell could continue it, as under torchrun.
    """
    terminal = QuietTerminal.in_use
    if terminal is None or not _has_a_shell():
        return
    terminal.restore()
    continued = threading.Event()

    def on_continue(signum: int, frame: FrameType | None) -> None:  # noqa: ARG001
        continued.set()

    before = signal.signal(signal.SIGCONT, on_continue)
    os.kill(0, signal.SIGTSTP)
    continued.wait()
    signal.signal(signal.SIGCONT, before)
    terminal.__enter__()
    QuietTerminal.n_suspended += 1


def _has_a_shell() -> bool:
    """Return whether the process group's parent is a shell in the same session."""
    import psutil  # slow to import, and rarely needed

    try:
        parent = psutil.Process(os.getpgrp()).ppid()
        return parent != 0 and os.getsid(parent) == os.getsid(0)
    except (OSError, psutil.Error):
        return False


class QuietTerminal:
    """Switch off signals, echo and line mode of stdin's terminal within a `with` block.

    prompt_toolkit restores the state that it found, so one block covers a whole chat, prompts
    included, and Ctrl-C is never a signal in between.

    Args:
        signals: whether Ctrl-C stays a signal until `hold_signals`, such as while a model loads.
    """

    in_use: ClassVar["QuietTerminal | None"] = None
    n_suspended: ClassVar[int] = 0  # how often a shell took over the terminal

    def __init__(self, *, signals: bool = False) -> None:
        self._signals = signals
        self._fd = sys.stdin.fileno()
        self._before: list[Any] | None = None
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="ignore")

    def __enter__(self) -> Self:
        self._before = termios.tcgetattr(self._fd)
        quiet = termios.tcgetattr(self._fd)
        quiet[3] &= ~(CHANGED & ~termios.ISIG if self._signals else CHANGED)
        quiet[6][termios.VMIN], quiet[6][termios.VTIME] = 0, 0
        termios.tcsetattr(self._fd, termios.TCSADRAIN, quiet)
        QuietTerminal.in_use = self
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.restore()

    def hold_signals(self) -> None:
        """From now on receive Ctrl-C as a byte."""
        self._signals = False
        quiet = termios.tcgetattr(self._fd)
        quiet[3] &= ~termios.ISIG
        termios.tcsetattr(self._fd, termios.TCSADRAIN, quiet)

    def restore(self) -> None:
        """Restore the terminal; can be called from any thread, and twice."""
        QuietTerminal.in_use = None
        before, self._before = self._before, None
        if before is not None:
            termios.tcsetattr(self._fd, termios.TCSANOW, before)

    def poll(self) -> tuple[bool, str]:
        """Return what was typed since the last call, without waiting; handle Ctrl-Z.

        Returns:
            whether Ctrl-C was typed, and all other input, including keys such as arrows.
        """
        data = b""
        while select.select([self._fd], [], [], 0)[0]:
            part = os.read(self._fd, 4096)
            if not part:
                break
            data += part
        if CTRL_Z in data:
            suspend()
        typed = data.translate(None, bytes([CTRL_C, CTRL_Z]))
        return CTRL_C in data, self._decoder.decode(typed)
