"""Markdown rendered piece by piece: the screen must show what the whole text gives at once."""

import random
from collections.abc import Callable, Iterator

import pyte
import pytest
from rich.cells import cell_len

from mistral_chat.cli.console.markdown import render, to_ansi
from mistral_chat.cli.talk import answer_view
from mistral_chat.cli.talk.answer_view import SHARE, MarkdownView
from tests.terminal import rows_of

SAMPLE = """# A title with `code` and 中文 🎉

A paragraph with **bold**, *slant*, ~~gone~~ and [a link](https://example.org/x), long enough to wrap
in a window of eighty columns. 日本語のテキストはとても長いので、折り返しが必要です。日本語のテキスト。
- one
- two
  - nested

    with a paragraph
- three

1. first

2. second
   ```python
   def f(x):
       return "中文"  # comment
   ```
10. third

| name | value | 说明 |
|:-----|------:|:----:|
| a | 1 | 中文 |
| b `c` | 22 | 🎉🎉 |

```python
class A:
    \"""A text
    of two lines.\"""

    def f(self) -> int:
        return 12 if self else "a string" + 'b'  # a comment that runs on and on, past the window
```
> a quote
>
> - with a list

***

Setext
------
text with <b>tags</b> &amp; a \x1b[31mred\x07 escape
"""  # noqa: E501
# Pieces of Markdown that change what stands before or after them.
PIECES = ["- a", "* b", "1. c", "2) d", "10. e", "  - n", "    deep", "```", "```py", "~~~", "> q",
          ">", "# h", "---", "===", "***", "| a | b |", "|---|---|", "**b", "c** d", "x `y", "",
          "", "", "   three", "text", "\tTab", "- - x", "> - y", "<div>", "[x]: http://a", "[x]",
          "+ p", "   - o", "中文 🎉 wide " * 3, "long word " * 12, "-", "1.", "- ```", "  ```",
          "  def f(): pass", "\\(a_1\\)", "![i](u)", "<a@b.c>", "1234567890" * 5,
          "\\[", "\\]", "$$", "$", "\\begin{align}", "\\end{align} x", "\\(", "a\\) b", "x\\\\",
          "$$ a", "b $$", "$5 and $10", "| \\| | $a\\|b$ |", "\\", "\\{ *x* \\}"]  # fmt: skip


class Window:
    """A terminal for a view to write to."""

    def __init__(self, columns: int, rows: int) -> None:
        self.screen = pyte.HistoryScreen(columns, rows, history=100_000)
        self._stream = pyte.Stream(self.screen)
        self.n_written = 0
        self.view = MarkdownView(self._take, self._size, refresh_s=0, share=1e9, resting_s=0)

    def _take(self, text: str) -> None:
        self.n_written += len(text)
        self._stream.feed(text)

    def _size(self) -> tuple[int, int]:
        return self.screen.columns, self.screen.lines

    @property
    def rows(self) -> list[str]:
        return without_end(rows_of(self.screen))


def without_end(rows: list[str]) -> list[str]:
    return rows[: max((n for n, row in enumerate(rows, 1) if row), default=0)]


def rendered(text: str, columns: int) -> list[str]:
    return without_end([line.plain.rstrip() for line in render(visible(text), columns)])


def visible(text: str) -> str:
    return text.replace("\x1b", "␛").replace("\x07", "␇")


def pieces(text: str, rng: random.Random) -> Iterator[str]:
    at = 0
    while at < len(text):
        n = rng.choice([1, 1, 2, 3, 5, 8, 20])
        yield text[at : at + n]
        at += n


# Whatever the pieces, each line is once on the screen or above it.
@pytest.mark.parametrize("size", [(80, 24), (200, 50), (40, 10), (80, 4)])
@pytest.mark.parametrize("seed", range(3))
def test_sample_streamed_is_the_rendering_of_the_whole(size: tuple[int, int], seed: int) -> None:
    window = Window(*size)
    for piece in pieces(SAMPLE, random.Random(seed)):
        window.view.add(piece)
    window.view.finish()
    assert window.rows == rendered(SAMPLE, size[0])
    assert window.screen.cursor.x == 0


@pytest.mark.parametrize("seed", range(60))
def test_any_text_streamed_is_the_rendering_of_the_whole(seed: int) -> None:
    rng = random.Random(seed)
    text = "\n".join(rng.choice(PIECES) for _ in range(rng.randint(1, 25)))
    columns, rows = rng.choice([(80, 24), (30, 6), (20, 10), (200, 50), (12, 3), (9, 2)])
    window = Window(columns, rows)
    for piece in pieces(text, rng):
        window.view.add(piece)
    window.view.finish()
    assert window.rows == rendered(text, columns), text


# Lines below a growing answer, such as text typed meanwhile, leave no trace.
@pytest.mark.parametrize("seed", range(30))
def test_lines_below_an_answer_go_with_its_end(seed: int) -> None:
    rng = random.Random(seed)
    text = "\n".join(rng.choice(PIECES) for _ in range(rng.randint(0, 25)))
    columns, rows = rng.choice([(80, 24), (30, 6), (20, 10), (12, 3), (9, 2)])
    window = Window(columns, rows)
    for piece in pieces(text, rng):
        window.view.add(piece)
        below = [f"below {n} " * rng.choice([1, 9]) for n in range(rng.randrange(4))]
        window.view.show_below(below)
        if below and rows > 8:
            shown = without_end([row.rstrip() for row in window.screen.display])
            assert shown[-1].startswith("below")
    window.view.finish()
    assert window.rows == rendered(text, columns), text
    assert window.screen.cursor.x == 0


# Colours of code that has scrolled away before a string in it was closed may differ; here all fits.
def test_styles_streamed_are_those_of_the_whole() -> None:
    streamed, at_once = Window(100, 80), Window(100, 80)
    for piece in pieces(SAMPLE, random.Random(1)):
        streamed.view.add(piece)
    streamed.view.finish()
    at_once.view.add(SAMPLE)
    at_once.view.finish()
    for y in range(80):
        for x in range(60):
            assert streamed.screen.buffer[y][x] == at_once.screen.buffer[y][x], (y, x)


@pytest.mark.parametrize("mark", ["*", "_", "~~", "**", "*a ", "![*"])
def test_spans_in_thousands_of_others_are_shown(mark: str) -> None:
    text = mark * 2000 + "x" + mark[::-1] * 2000
    assert "x" in "".join(line.plain for line in render(text, 80))


@pytest.mark.parametrize("columns", [8, 20, 80, 200])
def test_no_line_is_wider_than_the_window(columns: int) -> None:
    for line in render(SAMPLE + "| a " * 60 + "|\n" + "|-" * 60 + "|\n", columns):
        assert cell_len(line.plain) <= columns, line.plain


def test_styles_suit_light_and_dark_windows() -> None:
    text = "\n".join(map(to_ansi, render(SAMPLE, 80)))
    codes = {
        int(code)
        for sequence in text.split("\x1b[")[1:]
        for code in sequence.partition("m")[0].split(";")
    }
    assert {1, 3, 4} <= codes  # bold, slant, underline
    assert codes & {31, 32, 35, 36}
    # No black, yellow, blue or white letters, no bright ones, no palette, no background.
    assert codes <= {0, 1, 2, 3, 4, 9, 31, 32, 35, 36}


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("# Head\ntext", ["Head", "", "text"]),
        ("a\nb", ["a", "b"]),
        ("- a\n- b\n\n- c", [" • a", " • b", "", " • c"]),
        ("9. a\n9. b", [" 9. a", "10. b"]),
        ("> a\n> b", ["│ a", "│ b"]),
        ("```python\nx\n```", ["─── python", "x", "───"]),
        ("[t](http://u) <http://v>", ["t (http://u) http://v"]),
        ("**b** `c` ~~d~~ <i>", ["b c d <i>"]),
        ("|a|b|\n|-|-:|\n|中文|1|", ["a      b", "────────", "中文   1"]),
        ("", []),
    ],
)
def test_render(text: str, expected: list[str]) -> None:
    assert [line.plain for line in render(text, 80)] == expected


FORMULAS = [r"\(a_1*b*c_2\)", r"\[ x*y*z \]", "$a*b*c$", "$ a*b*c $", "$$x*y*z$$",
            r"\(f(x) = \{1\}\)",
            r"\begin{pmatrix}a*b & c*d \\ 1\end{pmatrix}", r"$\$5*y*3$",
            r"$\alpha_{*}^{*}\,$"]  # fmt: skip


@pytest.mark.parametrize("formula", FORMULAS)
@pytest.mark.parametrize(
    "around",
    ["{}", "so {}, *and* then", "- {}", "> {}", "# {}", "1. *x* {}",
     "| a | b |\n|-|-|\n| {} | *b* |", "**{}**", "*a* {}\n{} *a*"],
)  # fmt: skip
def test_formula_in_a_line_stays_as_it_was_written(formula: str, around: str) -> None:
    text = around.replace("{}", formula)
    shown = "\n".join(line.plain for line in render(text, 100))
    assert shown.count(formula) == text.count(formula)
    assert "*and*" not in shown
    assert "*x*" not in shown
    assert "*a*" not in shown


LINES = [
    "a &= b_1 *c* \\\\",
    "- d*e*f",
    "# g",
    "> h",
    "1. i",
    "=== ",
    "+ \\frac{1}{2}",
    "    j",
    "| k |",
]


@pytest.mark.parametrize(
    ("opening", "closing"),
    [("\\[", "\\]"), ("$$", "$$"), ("\\begin{align*}", "\\end{align*}"), ("$$ x", "y $$")],
)
@pytest.mark.parametrize("indent", ["", "> ", "   "])
def test_formula_of_lines_stays_as_it_was_written(opening: str, closing: str, indent: str) -> None:
    formula = [opening, *LINES, closing]
    text = [
        "1. *text*" if indent == "   " else "*text*",
        *(indent + line for line in formula),
        "",
        "*end*",
    ]
    shown = [line.plain.rstrip() for line in render("\n".join(text), 100)]
    margin = {"": "", "> ": "│ ", "   ": "    "}[indent]
    at = shown.index(margin + opening)
    assert shown[at : at + len(formula)] == [(margin + line).rstrip() for line in formula]
    assert shown[0].endswith("text")
    assert "*" not in shown[0]
    assert shown[-1] == "end"


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("$5 and $10, *so* $15", "$5 and $10, so $15"),
        ("$5-$10 *a* US$3, A$4", "$5-$10 a US$3, A$4"),
        ("costs 5$ or *6* $", "costs 5$ or 6 $"),
        ("`\\(a*b*c\\)` $`a`*b*$", "\\(a*b*c\\) $ab$"),
        ("\\(never *closed*", "\\(never closed"),
        ("\\[ *a*\n\n*b*", "\\[ *a*\n\nb"),
        ("a\\\nb\\", "a\\\nb\\"),
        ("\\*a\\* *b*", "\\*a\\* b"),
    ],
)
def test_what_is_no_formula(text: str, shown: str) -> None:
    assert "\n".join(line.plain for line in render(text, 80)) == shown


@pytest.mark.parametrize("seed", range(40))
def test_no_backslash_is_lost(seed: int) -> None:
    rng = random.Random(seed)
    parts = [*FORMULAS, *LINES, "\\[", "\\]", "$$", "\\", "\\\\", "\\{", "\\_", "\\|", "`\\|`",
             "*a*", "**", "\n", "\n\n", "\n- ", "\n> ",
             "\n\n| a \\| b |\n|--|\n| c\\|d |\n\n", "\n```\n\\|\n```\n", " ", "x"]  # fmt: skip
    text = "".join(rng.choice(parts) for _ in range(40))
    shown = "".join(line.plain for line in render(text, 400))
    assert shown.count("\\") == text.count("\\"), text


def long_code() -> str:
    return "```python\n" + "".join(f"x{n} = {n}  # line {n}\n" for n in range(120)) + "```\n"


def long_list() -> str:
    return "".join(f"- item {n}\n" for n in range(120))


def long_table() -> str:
    return "| n | square |\n|---|---|\n" + "".join(f"| {n} | {n * n} |\n" for n in range(120))


def long_item() -> str:
    return "- head\n" + "".join(f"  - item {n}\n" for n in range(120))


def long_paragraph() -> str:
    return " ".join(f"word{n}" for n in range(600))


LONG: list[Callable[[], str]] = [long_code, long_list, long_table, long_item, long_paragraph]


@pytest.mark.parametrize("make", LONG)
def test_block_longer_than_the_window_stands_once(make: Callable[[], str]) -> None:
    text = make()
    window = Window(80, 12)
    whole = rendered(text, 80)
    for at in range(0, len(text), 160):
        window.view.add(text[at : at + 160])
        above = rows_of(window.screen)[: len(window.screen.history.top)]
        assert above == whole[: len(above)]  # what is above the screen is there for good
    window.view.finish()
    assert window.rows == whole


class Clock:
    """A clock that moves when told to."""

    def __init__(self) -> None:
        self.now = 100.0

    def monotonic(self) -> float:
        return self.now


@pytest.mark.parametrize("make", [long_code, long_list])
@pytest.mark.parametrize("draw_s", [0.0001, 0.005, 0.2])
def test_drawing_takes_its_share_of_the_time(
    make: Callable[[], str], draw_s: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = Clock()
    monkeypatch.setattr(answer_view, "time", clock)
    spent = 0.0

    def write(_: str) -> None:
        nonlocal spent
        spent += draw_s
        clock.now += draw_s

    view = MarkdownView(write, lambda: (100, 40))
    text = make()
    for at in range(0, len(text), 4):
        clock.now += 0.01
        view.add(text[at : at + 4])
    took = clock.now - 100
    assert spent <= (SHARE + 0.02) * took + draw_s
    assert spent / draw_s <= took / answer_view.REFRESH_S + 1
    # It is redrawn as often as that allows.
    assert spent / draw_s >= 0.5 * min(took / answer_view.REFRESH_S, took * SHARE / draw_s)


@pytest.mark.parametrize(
    "sizes",
    [
        [(80, 24), (200, 24)],
        [(80, 24), (40, 24)],
        [(200, 50), (80, 50), (200, 50)],
        [(60, 20), (61, 30), (30, 30), (100, 31)],
    ],
)
@pytest.mark.parametrize("make", [*LONG, lambda: SAMPLE])
def test_resized_while_streaming_shows_the_end_at_the_new_width(
    make: Callable[[], str], sizes: list[tuple[int, int]]
) -> None:
    text = make()
    window = Window(*sizes[0])
    for n, size in enumerate(sizes):
        window.screen.resize(size[1], size[0])
        part = text[len(text) * n // len(sizes) : len(text) * (n + 1) // len(sizes)]
        for at in range(0, len(part), 150):
            window.view.add(part[at : at + 150])
    window.view.finish()
    shown = window.rows[len(window.screen.history.top) :]
    whole = rendered(text, window.screen.columns)
    n_since = min(len(shown), window.screen.lines // 2)  # what was drawn since the last change
    assert shown[-n_since:] == whole[-n_since:]


def test_resized_where_lines_no_longer_fit_begins_on_a_clean_screen() -> None:
    window = Window(80, 20)
    text = "# Head\n\n" + long_paragraph()[:600]
    window.view.add("first\n\n")
    window.view.add(text)
    window.screen.resize(20, 50)
    window.view.add(" and")
    whole = rendered("first\n\n" + text + " and", 50)
    assert without_end([row.rstrip() for row in window.screen.display]) == whole


def test_dragged_window_is_left_alone_until_it_rests(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock()
    monkeypatch.setattr(answer_view, "time", clock)
    written: list[str] = []
    columns = 80
    view = MarkdownView(written.append, lambda: (columns, 24))
    for _ in range(20):
        clock.now += 0.06
        columns -= 1
        view.add("word ")
    assert not written
    for _ in range(5):
        clock.now += 0.06
        view.add("word ")
    assert written


def test_wide_letters_that_the_terminal_counts_otherwise_leave_no_double_lines() -> None:
    flag = "\U0001f1eb\U0001f1f7"  # 2 columns for rich, 4 for this terminal
    window = Window(40, 10)
    for piece in pieces(f"- {flag * 12} and\n- more\n\nafter {flag} it\n", random.Random(0)):
        window.view.add(piece)
    window.view.finish()
    text = "\n".join(window.rows)
    assert text.count("•") == 2
    assert text.count("after") == text.count("more") == text.count("and") == 1
