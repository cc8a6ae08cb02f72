"""Show what a model thinks before it answers: folded to one line, or whole and dimmed.

Knows nothing of where the thinking comes from, nor of how an answer is drawn.
"""

import sys
from collections.abc import Callable, Sequence

from mistral_chat.chat.thinking import Thinking
from mistral_chat.cli.console.printing import clean, columns_of, note, wrap
from mistral_chat.cli.console.terminal import is_terminal

__all__ = ["OPENS", "DimRows", "ThinkingView", "note_dim"]

OPENS = "Ctrl-T opens it"


def note_dim(lines: Sequence[str]) -> None:
    """Write finished lines to stderr, dimmed at a terminal."""
    for line in lines:
        note(line, dim=True)


class DimRows:
    """Divides arriving text into finished lines; at a terminal, into rows as they fill.

    Args:
        show: writes finished lines.
    """

    def __init__(self, show: Callable[[Sequence[str]], None] = note_dim) -> None:
        self._show = show
        self._rest = ""

    def add(self, text: str) -> None:
        """Take the next piece; show the lines that it finishes."""
        *lines, self._rest = (self._rest + clean(text)).split("\n")
        if is_terminal(sys.stderr):
            columns = columns_of(sys.stderr)
            lines = [row for line in lines for row in wrap(line, columns)]
            *rows, last = wrap(self._rest, columns)
            if rows:
                spaces = len(self._rest) - len(self._rest.rstrip(" "))
                lines, self._rest = lines + rows, last + " " * spaces
        if lines:
            self._show(lines)

    def end(self) -> None:
        """Show the rest."""
        if self._rest:
            self._show([self._rest])
        self._rest = ""


class ThinkingView:
    """The thinking before one answer of a chat.

    Args:
        show: writes finished lines above the answer.
        is_open: whether to show all of it from the beginning.
        quiet: whether to leave out the line that says how long it took.
    """

    def __init__(
        self, show: Callable[[Sequence[str]], None], *, is_open: bool, quiet: bool
    ) -> None:
        self.show = show
        self._is_open = is_open
        self._quiet = quiet
        self._rows = DimRows(lambda lines: self.show(lines))
        self._text: list[str] = []
        self._last: Thinking | None = None  # None while nothing is thought

    @property
    def is_going_on(self) -> bool:
        """Whether something was thought, and the answer has not begun."""
        return self._last is not None

    @property
    def lines(self) -> list[str]:
        """The line to show below while the model thinks; none when it is open."""
        if self._last is None or self._is_open:
            return []
        return [f"thinking: {_measures(self._last)}; {OPENS}"]

    def add(self, piece: Thinking) -> None:
        """Take the next piece."""
        self._last = piece
        self._text.append(piece.text)
        if self._is_open:
            self._rows.add(piece.text)

    def open(self) -> bool:
        """Show all of it from now on; return whether it was going on."""
        if self._last is None:
            return False
        if not self._is_open:
            self._is_open = True
            self._rows.add("".join(self._text))
        return True

    def end(self) -> None:
        """End it, as the answer begins or nothing follows."""
        if self._last is None:
            return
        self._rows.end()
        hint = "" if self._is_open else f"; {OPENS}"
        if not self._quiet:
            self.show([f"thought for {_measures(self._last)}{hint}"])
        self._last = None
        self._text.clear()


def _measures(piece: Thinking) -> str:
    tokens = f"{piece.n_tokens:,} token{'s' * (piece.n_tokens != 1)}"
    return f"{piece.seconds:.0f} s, {tokens}"
