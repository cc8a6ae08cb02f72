"""Print an answer to stdout as it arrives: as raw text or, at a terminal, as Markdown.

What can no longer change is printed once and scrolls away like any output. Only the block that is
still growing is redrawn in place, clipped to the window. Knows nothing of where text comes from.
"""

import os
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import takewhile
from typing import ClassVar, NamedTuple, Protocol

from rich.text import Text

from mistral_chat.cli.console import render
from mistral_chat.cli.console.markdown import DIM, START, Seam, code_rows, finished, to_ansi
from mistral_chat.cli.console.markdown import render as render_markdown
from mistral_chat.cli.console.printing import clean
from mistral_chat.cli.console.terminal import is_fancy

__all__ = ["AnswerView", "MarkdownView", "RawView", "make_view"]

REFRESH_S = 0.05  # people do not notice faster updates
SHARE = 0.1  # largest share of the time spent drawing; long blocks are redrawn less often
RESTING_S = 0.2  # wait this long after the last resize, since the window may still be dragged
NO_WRAP, WRAP = "\x1b[?7l", "\x1b[?7h"
ERASE_LINE, ERASE_BELOW, HOME = "\x1b[K", "\x1b[J", "\x1b[H"


class _Row(NamedTuple):
    """A line on the screen: its text with escape sequences, and its width in columns."""

    ansi: str
    width: int


class AnswerView(Protocol):
    """Shows the text of an answer.

    `redraws` is whether lines can be shown below it and taken away again.
    """

    redraws: ClassVar[bool]

    def add(self, text: str) -> None:
        """Take the next piece of the answer."""

    def draw_anew(self) -> None:
        """Redraw below what a shell has written in the meantime."""

    def finish(self) -> None:
        """Show the whole answer, complete or not, and put the cursor at the start of a line."""

    def show_below(self, lines: Sequence[str]) -> None:
        """Show lines below the answer while it grows, if the view supports it."""

    def print_dim(self, lines: Sequence[str]) -> None:
        """Print finished lines above the answer, of which nothing is shown yet."""


class RawView:
    """Write text as it arrives, then one newline; shows nothing below the answer."""

    redraws: ClassVar[bool] = False

    def add(self, text: str) -> None:
        """Write the next piece."""
        render.say(text)

    def draw_anew(self) -> None:
        """Do nothing, as written text stays."""

    def finish(self) -> None:
        """End the line."""
        render.say("\n")

    def show_below(self, lines: Sequence[str]) -> None:
        """Do nothing, as written text cannot be drawn over."""

    def print_dim(self, lines: Sequence[str]) -> None:
        """Write the lines to stderr, since stdout is for the answer alone."""
        for line in lines:
            render.note(line, dim=True)


def make_view(*, plain: bool) -> AnswerView:
    """Return a view of one answer on stdout; Markdown only at a terminal that supports it."""
    if plain or not is_fancy(sys.stdout):
        return RawView()
    return MarkdownView(render.draw, window_size)


def window_size() -> tuple[int, int]:
    """Return the columns and rows of stdout's terminal."""
    columns, rows = os.get_terminal_size(sys.stdout.fileno())
    return columns or 80, rows or 24  # a terminal that does not know its size reports 0


class MarkdownView:
    """One answer drawn as Markdown.

    Args:
        write: writes to the terminal without buffering.
        size: returns the window's columns and rows.
        refresh_s: minimum seconds between two drawings.
        share: largest share of the time spent drawing.
        resting_s: seconds that a new window size must stay unchanged before drawing for it.
    """

    redraws: ClassVar[bool] = True

    def __init__(
        self,
        write: Callable[[str], None],
        size: Callable[[], tuple[int, int]],
        *,
        refresh_s: float = REFRESH_S,
        share: float = SHARE,
        resting_s: float = RESTING_S,
    ) -> None:
        self._write = write
        self._get_size = size
        self._refresh_s, self._share, self._resting_s = refresh_s, share, resting_s
        self._size = self._seen_size = size()
        self._seen_at = self._due = 0.0
        self._done: list[str] = []  # source text of blocks that are printed for good
        self._source = ""  # source text that may still change
        self._seam: Seam = START
        self._n_checked = 0  # characters of it already searched for finished blocks
        self._below: tuple[str, ...] = ()
        self._drawn: list[_Row] = []  # lines on the screen that may be redrawn

    def add(self, text: str) -> None:
        """Take the next piece of the answer; draw it unless the last drawing was just now."""
        self._source += clean(text)
        self._draw_when_due()

    def show_below(self, lines: Sequence[str]) -> None:
        """Show lines below the answer, clipped to the window; no lines removes them at once."""
        if tuple(lines) != self._below:
            self._below = tuple(lines)
            if lines:
                self._draw_when_due()
            else:
                self._draw(final=False)

    def print_dim(self, lines: Sequence[str]) -> None:
        """Print finished lines above the answer, of which nothing is shown yet."""
        size = self._get_size()
        out = self._adapt(size) if size != self._size else ""
        columns = size[0]
        printed = [Text(clean(line), DIM) for line in lines]
        below = [_below(line, columns) for line in self._below]
        self._write(out + self._paint(printed, below, columns))

    def _draw_when_due(self) -> None:
        started = time.monotonic()
        if started < self._due or not self._has_rested(started):
            return
        self._draw(final=False)
        took_s = time.monotonic() - started
        self._due = started + max(self._refresh_s, took_s / self._share)

    def draw_anew(self) -> None:
        """Redraw what may still change below what a shell has written."""
        self._drawn, self._due = [], 0.0

    def finish(self) -> None:
        """Show the whole answer, complete or not, and put the cursor at the start of a line."""
        self._draw(final=True)
        if not self._done and not self._source:
            self._write("\n")

    def _has_rested(self, now: float) -> bool:
        """Return whether the window's size is that of the last drawing, or new and settled."""
        size = self._get_size()
        if size != self._seen_size:
            self._seen_size, self._seen_at = size, now
        return size == self._size or now - self._seen_at >= self._resting_s

    def _draw(self, *, final: bool) -> None:
        size = self._get_size()
        out = self._adapt(size) if size != self._size else ""
        columns, rows = size
        below = [] if final else [_below(line, columns) for line in self._below][: rows // 3]
        rows -= len(below)
        printed = self._settle(columns)
        live = render_markdown(self._source, columns, self._seam)
        if final:
            printed, live = printed + live, []
        elif len(live) >= rows:
            for group in code_rows(self._source, columns, self._seam):
                if len(live) < rows:
                    break
                printed, live = printed + group, live[len(group) :]
                self._seam = replace(self._seam, code_lines=self._seam.code_lines + 1)
            live = live[-(rows - 1) :] if rows > 1 else []
        out += self._paint(printed, live + below, columns)
        if out:
            self._write(out)

    def _settle(self, columns: int) -> list[Text]:
        """Move finished blocks from the source to `_done`, and return their lines."""
        end = self._source.rfind("\n") + 1
        if end <= self._n_checked:
            return []
        n_lines, seam = finished(self._source[:end], self._seam)
        lines: list[Text] = []
        if n_lines:
            pieces = self._source.split("\n", n_lines)
            done = "".join(f"{piece}\n" for piece in pieces[:-1])
            lines = render_markdown(done, columns, self._seam)
            self._done.append(done)
            self._source, self._seam = pieces[-1], seam
            end -= len(done)
        self._n_checked = end
        return lines

    def _paint(self, printed: list[Text], live: list[Text], columns: int) -> str:
        """Return the output that turns what is drawn into final lines and lines that may change."""
        lines = [_Row(to_ansi(line), line.cell_len) for line in printed + live]
        drawn, self._drawn = self._drawn, lines[len(printed) :]
        if not printed and lines == drawn:
            return ""
        pairs = zip(drawn, lines, strict=False)
        n_same = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))
        # The cursor is at the end of the last line drawn, so that line is always redrawn.
        n_same = max(min(n_same, len(drawn) - 1, len(lines) - 1), 0)
        n_up = max(len(drawn) - 1 - n_same, 0)
        out = ["\r", f"\x1b[{n_up}A" if n_up else ""]
        for n, line in enumerate(lines[n_same:], n_same):
            # The terminal and our width tables may disagree: a line that is redrawn must not take
            # two rows, and a final one must not lose its end.
            out.append(NO_WRAP if n >= len(printed) else WRAP)
            # After a full line there is nothing to erase, and some terminals erase its last
            # letter.
            out += [line.ansi, ERASE_LINE if line.width < columns else ""]
            if n < len(lines) - 1 or not live:
                out.append("\r\n")
        if not lines:
            out.append(ERASE_LINE)
        if len(drawn) > len(lines):
            out.append(ERASE_BELOW)
        return "".join([*out, WRAP])

    def _adapt(self, size: tuple[int, int]) -> str:
        """Prepare for a window of another size.

        If a line that may be redrawn no longer fits, its place is unknown: some terminals rewrap
        it, some clip it. Then scroll everything away and draw the end of the answer on an empty
        screen.
        """
        self._size = size
        columns, rows = size
        if len(self._drawn) <= rows and all(row.width <= columns for row in self._drawn):
            return ""
        self._drawn = []
        whole = render_markdown("".join([*self._done, self._source]), columns)
        n_live = len(render_markdown(self._source, columns, self._seam))
        before = whole[: len(whole) - n_live]
        before = before[max(len(before) - max(rows - 1 - n_live, 0), 0) :]
        return "\r\n" * rows + HOME + ERASE_BELOW + self._paint(before, [], columns)


def _below(line: str, columns: int) -> Text:
    text = Text(clean(line), DIM)
    text.truncate(columns, overflow="ellipsis")
    return text
