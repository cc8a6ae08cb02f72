"""What a terminal was like, and putting that back whichever way a process ends.

The process that changed a terminal does it where it can. Where it was killed, one that is left
does: our launcher, or under torchrun rank 1. Knows nothing of prompts or answers.
"""

import contextlib
import sys
import termios
from typing import Any

from mistral_chat.cli.console.terminal import CHANGED, in_foreground, is_fancy, is_terminal

__all__ = ["TerminalState"]

# Shown cursor, lines that wrap, plain letters; and after a prompt no marks around pastes, and
# nothing left of the bar below it.
SHOWN = "\x1b[?25h\x1b[?7h\x1b[0m"
LINES = termios.ICANON | termios.ECHO | termios.IEXTEN  # which rank 0 turns off together
AFTER_A_PROMPT = "\x1b[?2004l\r\n\x1b[J"


class TerminalState:
    """Stdin's terminal as it is now, where it is one."""

    def __init__(self) -> None:
        self._before: list[Any] | None = None
        if is_terminal(sys.stdin):
            with contextlib.suppress(termios.error):
                self._before = termios.tcgetattr(sys.stdin)
                if not self._before[3] & LINES:  # under torchrun rank 0 may have been first
                    self._before[3] |= CHANGED
                    self._before[6][termios.VMIN], self._before[6][termios.VTIME] = 1, 0

    def is_changed(self) -> bool:
        """Whether a rank's changes stand, or stand again: a prompt may have been about to begin."""
        return in_foreground() and self._changed() is not None

    def _changed(self) -> list[Any] | None:
        """What the terminal is like, where it is as a rank made it."""
        if self._before is None:
            return None
        try:
            now = termios.tcgetattr(sys.stdin)
        except termios.error:  # it has gone
            return None
        return now if self._before[3] & LINES and not now[3] & LINES else None

    def put_back(self) -> None:
        """Undo what a rank did and cannot undo itself; what others did stays.

        Safe to call from any thread, and twice.
        """
        if not in_foreground():  # a shell has it, and perhaps a prompt of its own
            return
        was_at_prompt = False
        now = self._changed()
        if self._before is not None and now is not None:
            was_at_prompt = now[0] != self._before[0]  # which a prompt alone changes
            with contextlib.suppress(termios.error):  # it has gone
                termios.tcsetattr(sys.stdin, termios.TCSANOW, self._before)
        if is_fancy(sys.stderr):
            with contextlib.suppress(OSError, ValueError):
                sys.stderr.write(SHOWN + (AFTER_A_PROMPT if was_at_prompt else ""))
                sys.stderr.flush()
