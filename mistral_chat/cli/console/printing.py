"""The only way to write to the user's streams: answers to stdout, everything else to stderr.

Removes control characters at a terminal, and wraps notes between words there; pipes get text
unchanged. Knows nothing of answers. Imports nothing heavy.
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
# Map single characters, so that a sequence that arrives in pieces is removed as well.
_OBEYED: dict[int, str | None] = {
    **{code: chr(0x2400 + code) for code in range(0x20)},  # the character's Unicode control picture
    0x7F: "\u2421",
    **dict.fromkeys(range(0x80, 0xA0), "\ufffd"),  # C1: short forms of ESC sequences
    **dict.fromkeys([*range(0x202A, 0x202F), *range(0x2066, 0x206A)], "\ufffd"),  # turn direction
    **dict.fromkeys([0x061C, 0x200E, 0x200F, 0xFEFF]),  # invisible hints on text direction
    **dict.fromkeys([0x2028, 0x2029], "\n"),
    ord("\t"): "\t",
    ord("\n"): "\n",
    ord("\r"): None,
}
# Escape sequences at the end of our own drawing; they do not move the cursor to another line.
_SEQUENCES = re.compile(r"(?:\x1b\[[0-?]*[ -/]*[@-~])+$")


def clean(text: str) -> str:
    """Replace control characters in a text; keep newlines and tabs.

    Cleaning a text in pieces gives the same as cleaning the whole.
    """
    return text.translate(_OBEYED)


class _Cursor:
    """Whether the terminal's cursor is at the end of a line of text."""

    is_behind_text = False


def say(text: str) -> None:
    """Write a piece of the answer to stdout and flush it.

    Raises:
        BrokenPipeError: the reader has gone.
        OutputError: it cannot be written, for example to a full disk.
    """
    _write_out(clean(text) if is_terminal(sys.stdout) else text)


def draw(text: str) -> None:
    """Write text with escape sequences of our own to stdout; its quoted parts must be clean.

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
        # Otherwise the interpreter would flush the rest at exit and report the error again.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise OutputError(
            f"stdout cannot be written ({error.strerror}): make room, or send it elsewhere"
        ) from error
    if text := _SEQUENCES.sub("", text):
        _Cursor.is_behind_text = not text.endswith("\n")


def note(text: str, *, dim: bool = False, whole: bool = False) -> None:
    """Write a line to stderr; ignore a stderr that is closed or full.

    Args:
        text: one or several lines; a terminal gets it clean and wrapped between words.
        dim: whether to dim it, if the terminal can.
        whole: whether to leave it unwrapped, because it will be copied.
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
    """Send an escape sequence to stderr's terminal, for example to fill its clipboard."""
    if is_terminal(sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            print(sequence, end="", file=sys.stderr, flush=True)


def error(message: object) -> None:
    """Print the one line that says what went wrong."""
    note(f"mistral-chat: error: {one_line(message)}")


def columns_of(stream: IO[Any] | None) -> int:
    """Return the width of a stream's terminal in columns."""
    if stream is None:
        return FALLBACK_COLUMNS
    try:
        return os.get_terminal_size(stream.fileno()).columns or FALLBACK_COLUMNS
    except (OSError, ValueError):
        return FALLBACK_COLUMNS


def wrap(text: str, columns: int, indent: int | None = None) -> Iterator[str]:
    """Wrap a text between words; a word wider than the window stays whole.

    Args:
        text: one or several lines.
        columns: width of the window.
        indent: spaces before continuation lines; None repeats the line's own indentation.
    """
    for line in text.split("\n"):
        if width_of(line) <= columns:
            yield line
            continue
        words = line.lstrip(" ").split(" ")
        n_blanks = len(line) - len(line.lstrip(" "))
        row = _begun(words[0], n_blanks, columns)
        for word in words[1:]:  # two spaces in a row give an empty word
            if row.strip() and width_of(row) + 1 + width_of(word) > columns:
                yield row.rstrip()
                row = _begun(word, n_blanks if indent is None else indent, columns)
            else:
                row += f" {word}"
        yield row.rstrip()


def _begun(word: str, n_blanks: int, columns: int) -> str:
    """Begin a row with its first word, indented as far as the word fits."""
    return " " * max(0, min(n_blanks, columns - width_of(word))) + word


def width_of(text: str) -> int:
    """Return how many columns a text takes."""
    if text.isascii():
        return len(text)
    from rich.cells import cell_len

    return cell_len(text)


_drawn: list[Callable[[], None]] = []


@contextlib.contextmanager
def drawn(take_down: Callable[[], None]) -> Iterator[None]:
    """Register something drawn at the bottom of the window, to be removed before last words.

    Args:
        take_down: moves the cursor to the start of an empty line; any thread may call it.
    """
    _drawn.append(take_down)
    try:
        yield
    finally:
        _drawn.remove(take_down)


def take_down_drawn() -> None:
    """Remove what is drawn at the bottom, as this process is about to end."""
    for take_down in reversed(_drawn[:]):
        with contextlib.suppress(Exception):  # the last words must be printed whatever fails here
            take_down()
