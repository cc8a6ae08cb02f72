"""Show an answer of a chat with what the model thinks before it: one line, or all of it, dimmed.

Knows nothing of where it comes from, nor of how an answer's text is drawn.
"""

import sys
from collections.abc import Callable, Sequence

from mistral_chat.chat.answer import Answer, Delta
from mistral_chat.chat.thinking import Thinking
from mistral_chat.cli.console.printing import clean, columns_of, note, wrap
from mistral_chat.cli.console.terminal import is_terminal
from mistral_chat.cli.talk.answer_view import make_view

__all__ = ["AnswerScreen", "DimRows", "note_dim"]

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
        at_terminal = is_terminal(sys.stderr)
        *lines, self._rest = (self._rest + (clean(text) if at_terminal else text)).split("\n")
        if at_terminal:
            columns = columns_of(sys.stderr)
            lines = [row for line in lines for row in wrap(line, columns)]
            words = self._rest.rstrip(" ")  # spaces may end a row or stand before a word
            *rows, last = wrap(words, columns)
            lines, self._rest = lines + rows, last + self._rest[len(words) :]
        if lines:
            self._show(lines)

    def end(self) -> None:
        """Show the rest."""
        if self._rest:
            self._show([self._rest])
        self._rest = ""


class AnswerScreen:
    """One answer of a chat on the screen: what the model thinks, folded or whole, then its text.

    Args:
        plain: whether the text is shown raw rather than as Markdown.
        is_open: whether to show all of the thinking from the beginning.
        quiet: whether to leave out the line that says how long it took.
    """

    def __init__(self, *, plain: bool, is_open: bool, quiet: bool) -> None:
        self._plain = plain
        self._is_open = is_open
        self._quiet = quiet
        self._view = make_view(plain=plain)
        self._has_text = False
        self._rows = DimRows(lambda lines: self._view.print_dim(lines))
        self._thoughts: list[str] = []  # since the thinking that is going on began
        self._last: Thinking | None = None  # None while nothing is thought

    def add(self, piece: Thinking | Delta) -> None:
        """Take the next piece; calls are not for people."""
        if isinstance(piece, Thinking):
            self._think(piece)
            return
        self._end_thinking()
        if not piece.is_call:
            self._view.add(piece.text)
            self._has_text = True

    def _think(self, piece: Thinking) -> None:
        if self._has_text:  # rare: it thinks again, and lines are printed above a new text
            self._view.show_below(())
            self._view.finish()
            self._view, self._has_text = make_view(plain=self._plain), False
        if self._last is None and not (self._view.redraws or self._is_open or self._quiet):
            self._view.print_dim([f"thinking ...; {OPENS}"])
        self._last = piece
        self._thoughts.append(piece.text)
        if self._is_open:
            self._rows.add(piece.text)

    def open_thinking(self) -> bool:
        """Show all of the thinking from now on; return whether it was going on."""
        if self._last is None:
            return False
        if not self._is_open:
            self._is_open = True
            self._rows.add("".join(self._thoughts))
        return True

    def _end_thinking(self) -> None:
        """Leave one line of it, without the lines that were below."""
        if self._last is None:
            return
        self._view.show_below(())
        self._rows.end()
        if not self._quiet:
            hint = "" if self._is_open else f"; {OPENS}"
            self._view.print_dim([f"thought for {_measures(self._last)}{hint}"])
        self._last = None
        self._thoughts.clear()

    def show_below(self, lines: Sequence[str]) -> None:
        """Show lines below, and how long the model has been thinking if that is folded."""
        count = []
        if self._last is not None and not self._is_open:
            count = [f"thinking: {_measures(self._last)}; {OPENS}"]
        self._view.show_below([*count, *lines])

    def draw_anew(self) -> None:
        """Redraw below what a shell has written in the meantime."""
        self._view.draw_anew()

    def finish(self, answer: Answer) -> None:
        """Show the whole answer, complete or not, and put the cursor at the start of a line."""
        self._end_thinking()
        self._view.show_below(())
        if self._has_text or (answer.call_at is None and answer.thought is None):
            self._view.finish()


def _measures(piece: Thinking) -> str:
    tokens = f"{piece.n_tokens:,} token{'s' * (piece.n_tokens != 1)}"
    return f"{piece.seconds:.0f} s, {tokens}"
