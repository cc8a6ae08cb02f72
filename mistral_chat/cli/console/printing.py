"""The one way to the person's streams: answers to stdout, everything else to stderr.

A terminal gets text without what it would obey, and notes that break between words; pipes get text
as it is. Knows nothing of answers. Imports nothing heavy.
"""

import contextlib
import os
import re
import sys
from collections.abc import Callable, Iterator
from typing import IO, Any

from mistral_chat.cli.console.terminal import is_fancy, is_terminal
from mistral_chat.errors import OutputError, one_line

__all__ = [
    "clean",
    "columns_of",
    "draw",
    "drawn",
    "error",
    "note",
    "say",
    "take_down_drawn",
    "tell_terminal",
    "width_of",
    "wrap",
]

FALLBACK_COLUMNS = 80
# Each character stands for itself alone, so a sequence that comes in pieces is cleaned, too.
_OBEYED: dict[int, str | None] = {
    **{code: chr(0x2400 + code) for code in range(0x20)},  # a letter that shows which it was
    0x7F: "\u2421",
    **dict.fromkeys(range(0x80, 0xA0), "\ufffd"),  # C1: what ESC and a letter do, in one
    **dict.fromkeys([*range(0x202A, 0x202F), *range(0x2066, 0x206A)], "\ufffd"),  # turn direction
    **dict.fromkeys([0x061C, 0x200E, 0x200F, 0xFEFF]),  # hints on direction, seen by nobody
    **dict.fromkeys([0x2028, 0x2029], "\n"),
    ord("\t"): "\t",
    ord("\n"): "\n",
    ord("\r"): None,
}
# What our own drawing ends with: it moves no cursor to another line.
_SEQUENCES = re.compile(r"(?:\x1b\[[0-?]*[ -/]*[@-~])+$")


def clean(text: str) -> str:
    """A text as it is, but for what a terminal would obey; line ends and tabs stay.

    Pieces of a text give the pieces of the whole.
    """
    return text.translate(_OBEYED)


class _Cursor:
    """Whether the terminal's cursor stands behind something that was said."""

    is_behind_text = False


def say(text: str) -> None:
    """Write a piece of the answer to stdout, now.

    Raises:
        BrokenPipeError: the reader has gone.
        OutputError: it cannot be written, such as to a full disk.
    """
    _write_out(clean(text) if is_terminal(sys.stdout) else text)


def draw(text: str) -> None:
    """Write text with sequences of our own to stdout's terminal; what it quotes is clean already.

    Raises:
        BrokenPipeError: the reader has gone.
        OutputError: it cannot be written.
    """
    _write_out(text)


def _write_out(text: str) -> None:
    try:
        sys.stdout.write(text)
        sys.stdout.flush()
    except BrokenPipeError:
        raise
    except OSError as error:
        # The interpreter flushes what is left at its end, and would complain a second time.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise OutputError(
            f"stdout cannot be written ({error.strerror}): make room, or send it elsewhere"
        ) from error
    if text := _SEQUENCES.sub("", text):
        _Cursor.is_behind_text = not text.endswith("\n")


def note(text: str, *, dim: bool = False, whole: bool = False) -> None:
    """Write a line to stderr; a stderr that is closed or full stops nothing.

    Args:
        text: of one line or several; a terminal gets it clean, and broken between words.
        dim: less bright than others where the terminal can.
        whole: to be copied, so no line end comes into it.
    """
    if sys.stderr is None:
        return
    if is_terminal(sys.stderr):
        text = clean(text)
        if not whole:
            text = "\n".join(wrap(text, columns_of(sys.stderr)))
        if dim and is_fancy(sys.stderr):
            text = f"\x1b[2m{text}\x1b[0m"
        if _Cursor.is_behind_text and is_terminal(sys.stdout):
            text = f"\n{text}"
        _Cursor.is_behind_text = False
    with contextlib.suppress(OSError, ValueError):
        print(text, file=sys.stderr, flush=True)


def tell_terminal(sequence: str) -> None:
    """Have stderr's terminal do something, such as fill its clipboard; nothing where it is none."""
    if is_terminal(sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            print(sequence, end="", file=sys.stderr, flush=True)


def error(message: object) -> None:
    """The one line that says what went wrong."""
    note(f"mistral-chat: error: {one_line(message)}")


def columns_of(stream: IO[Any] | None) -> int:
    """Columns of a stream's terminal."""
    if stream is None:
        return FALLBACK_COLUMNS
    try:
        return os.get_terminal_size(stream.fileno()).columns or FALLBACK_COLUMNS
    except (OSError, ValueError):
        return FALLBACK_COLUMNS


def wrap(text: str, columns: int, indent: int | None = None) -> Iterator[str]:
    """The lines of a text, broken between words; one that is wider than the window stays whole.

    Args:
        text: of one line or several.
        columns: of the window.
        indent: blanks before what goes on; None are those that the line begins with.
    """
    for line in text.split("\n"):
        if width_of(line) <= columns:
            yield line
            continue
        words = line.lstrip(" ").split(" ")
        n_blanks = len(line) - len(line.lstrip(" "))
        row = _begun(words[0], n_blanks, columns)
        for word in words[1:]:  # two blanks in a row have an empty word between them
            if row.strip() and width_of(row) + 1 + width_of(word) > columns:
                yield row.rstrip()
                row = _begun(word, n_blanks if indent is None else indent, columns)
            else:
                row += f" {word}"
        yield row.rstrip()


def _begun(word: str, n_blanks: int, columns: int) -> str:
    """A row with its first word, and as many blanks before it as leave room for that."""
    return " " * max(0, min(n_blanks, columns - width_of(word))) + word


def width_of(text: str) -> int:
    """Columns that a text takes."""
    if text.isascii():
        return len(text)
    from rich.cells import cell_len

    return cell_len(text)


_drawn: list[Callable[[], None]] = []


@contextlib.contextmanager
def drawn(take_down: Callable[[], None]) -> Iterator[None]:
    """While something stands at the bottom of the window that last words must not mix with.

    Args:
        take_down: leaves the cursor at the start of a line of its own; any thread may call it.
    """
    _drawn.append(take_down)
    try:
        yield
    finally:
        _drawn.remove(take_down)


def take_down_drawn() -> None:
    """Make the window ready for last words: this process is about to end."""
    for take_down in reversed(_drawn[:]):
        with contextlib.suppress(Exception):  # whatever fails here, the words must come
            take_down()
