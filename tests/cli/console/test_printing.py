"""What reaches a terminal: no control characters, and no word cut in two."""

import io
import random
import unicodedata
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise

import pyte
import pytest

from mistral_chat.cli.console import printing
from mistral_chat.cli.console.printing import clean, wrap
from mistral_chat.cli.talk.answer_view import MarkdownView, RawView

HOSTILE = [
    "\x1b]0;a title\x07",
    "\x1b]52;c;aGVsbG8=\x1b\\",
    "\x1b[2J\x1b[31m",
    "\x9b2J",
    "\x9d0;title\x9c",
    "\x1bP+q\x1b\\",
    "\u202etxet\u202c",
    "\u2066a\u2069\u200f\u200e\u061c",
    "\b\b\b\x7f\0\v\f",
    "a\r\nb\rc",
]

TURNING = ("LRE", "RLE", "LRO", "RLO", "PDF", "LRI", "RLI", "FSI", "PDI")


class Screen(io.StringIO):
    """A stream that claims to be a terminal."""

    def isatty(self) -> bool:
        return True


@contextmanager
def streams(monkeypatch: pytest.MonkeyPatch, columns: int = 80) -> Iterator[Screen]:
    """One terminal as both streams."""
    screen = Screen()
    with monkeypatch.context() as patch:
        patch.setenv("TERM", "xterm")
        patch.delenv("NO_COLOR", raising=False)
        patch.setattr("sys.stdout", screen)
        patch.setattr("sys.stderr", screen)
        patch.setattr(printing, "columns_of", lambda stream: columns)
        patch.setattr(printing._Cursor, "is_behind_text", False)
        yield screen


def is_harmless(text: str) -> bool:
    return not any(
        (unicodedata.category(c) in ("Cc", "Zl", "Zp") and c not in "\n\t")
        or unicodedata.bidirectional(c) in TURNING
        or c in "\u200e\u200f\u061c"
        for c in text
    )


@pytest.mark.parametrize("seed", range(20))
def test_pieces_of_a_text_are_cleaned_as_the_whole(seed: int) -> None:
    rng = random.Random(seed)
    text = "".join(rng.choice([*HOSTILE, "word ", "\n", "\t", "é中👩‍👧"]) for _ in range(30))
    cuts = sorted(rng.randrange(len(text)) for _ in range(20))
    pieces = [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True)]
    assert "".join(map(clean, pieces)) == clean(text)
    assert is_harmless(clean(text))


def test_every_character_is_cleaned_or_left() -> None:
    for code in range(0x11000):
        assert is_harmless(clean(chr(code))), hex(code)
    kept = "naïve 日本語 👩‍👩‍👧 \t\n שלום مرحبا ␛ ´"
    assert clean(kept) == kept


@pytest.mark.parametrize("text", HOSTILE)
def test_terminal_gets_nothing_to_obey_and_a_pipe_the_text(
    text: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with streams(monkeypatch) as screen:
        view = RawView()
        for character in text:
            view.add(character)
        view.finish()
        printing.note(text)
        assert is_harmless(screen.getvalue())
        drawn: list[str] = []
        markdown = MarkdownView(drawn.append, lambda: (80, 24), refresh_s=0, share=1e9)
        for character in text:
            markdown.add(character)
        markdown.finish()
    shown, plain = pyte.Screen(80, 24), pyte.Screen(80, 24)
    pyte.Stream(shown).feed("".join(drawn))
    pyte.Stream(plain).feed(clean(text).replace("\n", "\r\n"))
    assert [row.rstrip() for row in shown.display] == [row.rstrip() for row in plain.display]
    printing.say(text)
    printing.note(text)
    captured = capsys.readouterr()
    assert (captured.out, captured.err) == (text, f"{text}\n")


@pytest.mark.parametrize("seed", range(20))
def test_notes_break_between_words_at_any_width(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    rng = random.Random(seed)
    words = [rng.choice("xé中") * rng.choice([1, 3, 7, 10]) for _ in range(60)]
    text = "  " * rng.randrange(3) + " ".join(words)
    columns = rng.randrange(20, 120)
    with streams(monkeypatch, columns) as screen:
        printing.note(text)
    lines = screen.getvalue().removesuffix("\n").split("\n")
    assert " ".join(lines).split() == words
    assert all(printing.width_of(line) <= columns for line in lines)
    # No line could have taken the first word of the next.
    for line, following in pairwise(lines):
        assert printing.width_of(f"{line} {following.split()[0]}") > columns
    with streams(monkeypatch, columns) as screen:
        printing.note(text, whole=True)  # a command to be copied
    assert screen.getvalue() == f"{text}\n"


def test_table_keeps_its_blanks() -> None:
    assert list(wrap("a  b", 80)) == ["a  b"]
    assert list(wrap("aaa  bbb ccc", 9)) == ["aaa  bbb", "ccc"]
    assert list(wrap("aaa  bbb ccc", 9, 5)) == ["aaa  bbb", "     ccc"]


@pytest.mark.parametrize(
    ("said", "before"), [("an answer", "an answer\n"), ("an answer\n", "an answer\n"), ("", "")]
)
def test_what_stderr_says_begins_on_a_line_of_its_own(
    said: str, before: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with streams(monkeypatch) as screen:
        printing.say(said)
        printing.error("rank 1 is gone")
    assert screen.getvalue() == f"{before}mistral-chat: error: rank 1 is gone\n"
    with streams(monkeypatch) as screen:
        view = MarkdownView(printing.draw, lambda: (80, 24), refresh_s=0, share=1e9)
        view.add(f"- list\n- {said}")
        printing.error("gone")
    rows = pyte.Screen(80, 24)
    pyte.Stream(rows).feed(screen.getvalue().replace("\n", "\r\n"))
    assert rows.display[2].startswith("mistral-chat: error: gone")
