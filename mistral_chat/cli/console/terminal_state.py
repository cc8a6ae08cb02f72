"""Remember a terminal's state and restore it, however a process ends.

Normally the process that changed the terminal restores it. If it was killed, a surviving one does:
our launcher, or rank 1 under torchrun. Knows nothing of prompts or answers.
"""

import contextlib
import sys
import termios
from typing import Any

from mistral_chat.cli.console.terminal import CHANGED, in_foreground, is_fancy, is_terminal

__all__ = ["TerminalState"]

# Show the cursor, wrap lines, reset styles; after a prompt also stop marking pastes and erase the
# bar below it.
SHOWN = "\x1b[?25h\x1b[?7h\x1b[0m"
LINES = termios.ICANON | termios.ECHO | termios.IEXTEN  # rank 0 switches these off together
AFTER_A_PROMPT = "\x1b[?2004l\r\n\x1b[J"


class TerminalState:
    """The state of stdin's terminal when this object is made, if stdin is a terminal."""

    def __init__(self) -> None:
        self._before: list[Any] | None = None
        if is_terminal(sys.stdin):
            with contextlib.suppress(termios.error):
                self._before = termios.tcgetattr(sys.stdin)
                if not self._before[3] & LINES:  # under torchrun rank 0 may have changed it already
                    self._before[3] |= CHANGED
                    self._before[6][termios.VMIN], self._before[6][termios.VTIME] = 1, 0

    def is_changed(self) -> bool:
        """Return whether a rank's changes are in effect; a starting prompt may apply them again."""
        return in_foreground() and self._changed() is not None

    def _changed(self) -> list[Any] | None:
        """Return the terminal's current state if a rank has changed it, else None."""
        if self._before is None:
            return None
        try:
            now = termios.tcgetattr(sys.stdin)
        except termios.error:  # the terminal has gone
            return None
        return now if self._before[3] & LINES and not now[3] & LINES else None

    def put_back(self) -> None:
        """Undo the changes of a rank that can no longer do so; leave the changes of others.

        Can be called from any thread, and twice.
        """
        if not in_foreground():  # a shell has it, perhaps with a prompt
            return
        was_at_prompt = False
        now = self._changed()
        if self._before is not None and now is not None:
            was_at_prompt = now[0] != self._before[0]  # only a prompt changes this
            with contextlib.suppress(termios.error):  # the terminal has gone
                termios.tcsetattr(sys.stdin, termios.TCSANOW, self._before)
        if is_fancy(sys.stderr):
            with contextlib.suppress(OSError, ValueError):
                sys.stderr.write(SHOWN + (AFTER_A_PROMPT if was_at_prompt else ""))
                sys.stderr.flush()
