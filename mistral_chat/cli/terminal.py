"""The terminal while an answer streams: Ctrl-C read as a byte, and everything put back at the end.

Under torchrun a worker cannot take SIGINT: it goes to the launcher, which ends all ranks. So the
terminal is told not to make a signal of Ctrl-C, and its byte is looked for between two pieces of
text. Knows nothing of prompts or answers.
"""

import codecs
import os
import select
import sys
import termios
from types import TracebackType
from typing import IO, Any, Self

__all__ = ["CTRL_C", "QuietTerminal", "is_fancy", "is_terminal"]

CTRL_C = 0x03


def is_terminal(stream: IO[Any] | None) -> bool:
    """Whether a stream is open and a terminal."""
    try:
        return stream is not None and stream.isatty()
    except ValueError:  # closed
        return False


def is_fancy(stream: IO[Any] | None) -> bool:
    """Whether colour, progress and the like may go to a stream."""
    plain = os.environ.get("NO_COLOR") or os.environ.get("TERM", "dumb") == "dumb"
    return is_terminal(stream) and not plain


class QuietTerminal:
    """Stdin's terminal without signals, echo or lines, from entering to leaving.

    prompt_toolkit changes the terminal for its prompt and puts back what it found, so this holds
    for a whole chat, prompts included, and no moment is left in which Ctrl-C is a signal.

    Args:
        signals: leave Ctrl-C a signal until `hold_signals`, such as while a model loads.
    """

    def __init__(self, *, signals: bool = False) -> None:
        self._signals = signals
        self._fd = sys.stdin.fileno()
        self._before: list[Any] | None = None
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="ignore")

    def __enter__(self) -> Self:
        self._before = termios.tcgetattr(self._fd)
        quiet = termios.tcgetattr(self._fd)
        quiet[3] &= ~(termios.ICANON | termios.ECHO | termios.IEXTEN)
        if not self._signals:
            quiet[3] &= ~termios.ISIG
        quiet[6][termios.VMIN], quiet[6][termios.VTIME] = 0, 0
        termios.tcsetattr(self._fd, termios.TCSADRAIN, quiet)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.restore()

    def hold_signals(self) -> None:
        """Have Ctrl-C be a byte from now on."""
        quiet = termios.tcgetattr(self._fd)
        quiet[3] &= ~termios.ISIG
        termios.tcsetattr(self._fd, termios.TCSADRAIN, quiet)

    def restore(self) -> None:
        """Put the terminal back as it was; safe to call from any thread, and twice."""
        before, self._before = self._before, None
        if before is not None:
            termios.tcsetattr(self._fd, termios.TCSANOW, before)

    def poll(self) -> tuple[bool, str]:
        """What was typed since the last call, without waiting.

        Returns:
            whether Ctrl-C was among it, and all the rest, keys such as arrows included.
        """
        data = b""
        while select.select([self._fd], [], [], 0)[0]:
            part = os.read(self._fd, 4096)
            if not part:
                break
            data += part
        return CTRL_C in data, self._decoder.decode(data.replace(bytes([CTRL_C]), b""))
