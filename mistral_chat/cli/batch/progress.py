"""Progress of a batch: a live line at a terminal, or else one line at the end.

Knows counts and times, but nothing of lines or models.
"""

import contextlib
import os
import sys
import time

from mistral_chat.cli.codes import FAILED

__all__ = ["Progress"]


SHOW_EVERY_S = 0.2
FALLBACK_COLUMNS = 80
LEAST_CELLS, MOST_CELLS = 8, 30


class Progress:
    """Counts lines and tokens; shows a live line at a terminal, or else one at the end.

    Args:
        total: number of lines in IN.
        done: how many of them an earlier run finished.
        n_errors: how many of those have an error.
        quiet: whether to print only errors.
        can_retry: whether a later run can retry lines with errors.
    """

    def __init__(
        self, total: int, done: int, n_errors: int, *, quiet: bool, can_retry: bool
    ) -> None:
        from mistral_chat.cli.console.terminal import is_fancy

        self._total = total
        self._before = self._done = done
        self._n_errors = n_errors
        self._quiet = quiet
        self._can_retry = can_retry
        self._live = is_fancy(sys.stderr) and not quiet
        self._is_drawn = False
        self._n_tokens = 0
        self._n_answered = 0
        self._started: float | None = None
        self._shown_at = 0.0

    def begin(self) -> None:
        """Start the clock, as the model is loaded."""
        self._started = time.monotonic()

    def add_token(self) -> None:
        """Count a token."""
        self._n_tokens += 1
        self._show()

    def count(self, *, answered: bool = True, failed: bool = False) -> None:
        """Count a written line: one that the model answered, one with an error, or both."""
        self._done += 1
        self._n_errors += failed
        self._n_answered += answered
        self._show()

    def _show(self) -> None:
        now = time.monotonic()
        if not self._live or self._started is None or now - self._shown_at < SHOW_EVERY_S:
            return
        self._shown_at = now
        elapsed_s = now - self._started
        parts = [f"{self._done:,}/{self._total:,}", f"{self._n_tokens / elapsed_s:.1f} tokens/s"]
        if self._n_answered:
            left_s = round((self._total - self._done) * elapsed_s / self._n_answered)
            parts.append(f"{left_s // 3600}:{left_s // 60 % 60:02}:{left_s % 60:02} left")
        if self._n_errors:
            parts.append(f"{self._n_errors:,} with an error")
        self._draw(f"\r{self._fitted(', '.join(parts))}\x1b[K")
        self._is_drawn = True

    def _fitted(self, text: str) -> str:
        """Fit the line to the terminal's width, with a bar if there is room; it must not wrap."""
        try:
            columns = os.get_terminal_size(sys.stderr.fileno()).columns
        except (OSError, ValueError):
            columns = FALLBACK_COLUMNS
        n_cells = min(MOST_CELLS, columns - len(text) - 2)
        if n_cells < LEAST_CELLS:
            return text[: max(0, columns - 1)]
        n_full = n_cells * self._done // self._total
        return f"{text} {'━' * n_full}{'─' * (n_cells - n_full)}"

    def _draw(self, text: str) -> None:
        # Bypass Python's buffer: a signal handler may find its lock taken.
        with contextlib.suppress(OSError, ValueError):
            os.write(sys.stderr.fileno(), text.encode())

    def clear(self) -> None:
        """Erase the line, and show the cursor, which the loading bar hides."""
        if self._live and self._started is None:
            self._draw("\x1b[?25h")
        if self._is_drawn:
            self._is_drawn = False
            self._draw("\r\x1b[K")

    def interrupted(self) -> None:
        """Print how many lines are written; can be called in a signal handler."""
        self.clear()
        if not self._quiet and sys.stderr is not None:
            self._draw(
                f"mistral-chat: interrupted: {self._done:,} of {self._total:,} lines are written\n"
            )

    def finish(self) -> int:
        """Print the outcome; return the exit code."""
        from mistral_chat.cli.console import render

        self.clear()
        if self._n_errors:
            hint = "; --retry_errors tries them again" if self._can_retry else ""
            render.error(
                f"{self._n_errors:,} of {self._total:,} lines have an error, which their line of "
                f"OUT says{hint}"
            )
            return FAILED
        if not self._quiet:
            render.note(f"mistral-chat: {self._summary()}")
        return 0

    def _summary(self) -> str:
        parts = [f"{self._total:,} lines answered"]
        if self._before:
            parts[0] += f" ({self._before:,} of them before)"
        if self._started is not None:
            elapsed_s = time.monotonic() - self._started
            parts.append(f"{self._n_tokens:,} tokens, {self._n_tokens / elapsed_s:.1f} tokens/s")
        return ", ".join(parts)
