"""Render Markdown as lines of styled text for a window of a given width.

Renders each block and list item from its own source alone, so that text that arrives in pieces
gives the same lines as the whole. Knows nothing of streams, cursors or windows.
"""

import io
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache

from markdown_it import MarkdownIt
from markdown_it.token import Token
from markdown_it.tree import SyntaxTreeNode
from pygments.lexer import Lexer
from pygments.lexers import get_lexer_by_name
from pygments.token import Comment, Generic, Keyword, Name, Number, Operator, String
from pygments.util import ClassNotFound
from rich import box
from rich.cells import chop_cells
from rich.color import ColorSystem
from rich.console import Console, JustifyMethod
from rich.style import Style
from rich.syntax import ANSISyntaxTheme
from rich.table import Table
from rich.text import Text

from mistral_chat.cli.console.formulas import FORMULA, keep_formulas

__all__ = ["START", "Seam", "code_blocks", "code_rows", "finished", "render", "to_ansi"]

# Use only weight, slant and those of the terminal's 16 colours that are readable on both light and
# dark backgrounds: no yellow, no blue, nothing bright, no background colour.
DIM = Style(dim=True)
BOLD = Style(bold=True)
INLINE_CODE = Style(color="magenta")
LINK = Style(underline=True)
HEADINGS = {"h1": Style(bold=True, underline=True), "h2": BOLD, "h3": Style(bold=True, italic=True)}
LOW_HEADING = Style(italic=True, underline=True)
SPANS = {"em": Style(italic=True), "strong": BOLD, "s": Style(strike=True)}
CODE_THEME = ANSISyntaxTheme(
    {
        Comment: Style(dim=True, italic=True),
        Keyword: Style(color="magenta"),
        Operator.Word: Style(color="magenta"),
        String: Style(color="green"),
        Number: Style(color="cyan"),
        Name.Builtin: Style(color="cyan"),
        Name.Class: BOLD,
        Name.Decorator: Style(color="cyan"),
        Name.Function: BOLD,
        Name.Tag: Style(color="magenta"),
        Generic.Deleted: Style(color="red"),
        Generic.Inserted: Style(color="green"),
        Generic.Heading: BOLD,
    }
)
JUSTIFY: dict[str, JustifyMethod] = {
    "text-align:left": "left",
    "text-align:center": "center",
    "text-align:right": "right",
}
LISTS = ("bullet_list", "ordered_list")
BULLET, BAR = " • ", "│ "
NARROWEST = 8  # narrower windows clip lines instead of wrapping them
TAB = 4
DEEPEST = 20  # nested spans; a model that repeats itself opens hundreds

# HTML is off: show tags that a model writes as text. Link definitions are off: they may come after
# their use, when the line is already printed.
_PARSER = keep_formulas(
    MarkdownIt("commonmark", {"html": False})
    .enable(["table", "strikethrough"])
    .disable(["reference"])
)
# Stands for an escaped bar while a table is split at the other bars, as the parser would drop the
# backslash. A character without meaning, so it does not occur in text.
_KEPT_BAR = "\U0010fffd"
_CONSOLE = Console(file=io.StringIO(), width=80, color_system=None, legacy_windows=False)


@dataclass(frozen=True, kw_only=True)
class Seam:
    """How a source continues after the part that is already printed.

    Args:
        separate: whether a blank line comes first.
        number: number of the first item, if the source begins inside an ordered list.
        code_lines: lines already printed of the code block that the source begins with.
    """

    separate: bool = False
    number: int | None = None
    code_lines: int = 0


START = Seam()


def render(source: str, width: int, seam: Seam = START) -> list[Text]:
    """Render a source as lines, none wider than the window.

    Args:
        source: Markdown.
        width: columns of the window.
        seam: how the source continues after the printed part.
    """
    page = _Page(source)
    lines = []
    for n, node in enumerate(page.blocks):
        goes_on = seam if n == 0 else Seam(separate=True)
        if goes_on.separate and not goes_on.code_lines:
            lines.append(Text())
        lines += page.block(node, max(width, NARROWEST), goes_on)
    return [_cut(line, width) for line in lines]


def finished(source: str, seam: Seam) -> tuple[int, Seam]:
    """Find how much of a source can no longer change, whatever follows.

    Args:
        source: whole lines only, as a line that is still growing may become something else.
        seam: how the source continues after the printed part.

    Returns:
        the number of finished lines (all blocks and items but the last), and the seam before the
        remaining lines.
    """
    page = _Page(source)
    if not page.blocks:
        return 0, seam
    last = page.blocks[-1]
    if len(page.blocks) > 1:
        seam = Seam(separate=True)
    if last.type in LISTS and len(last.children) > 1:
        item = last.children[-1]
        number = _first_number(last, seam) + len(last.children) - 1
        ordered = last.type == "ordered_list"
        seam = Seam(separate=page.blank_before(item), number=number if ordered else None)
        last = item
    return _first_line(last), seam


def code_rows(source: str, width: int, seam: Seam) -> list[list[Text]]:
    """Return the rows of each complete line of code that is not printed yet.

    Args:
        source: begins with a fence, which may still be open; anything else gives no rows.
        width: columns of the window.
        seam: how the source continues after the printed part.
    """
    page = _Page(source)
    if len(page.blocks) != 1 or page.blocks[0].type != "fence":
        return []
    node = page.blocks[0]
    n_whole = source.count("\n") - _first_line(node) - 1  # the fence counts as a line
    rows = list(_code(node, width))
    lines = [[_cut(row, width) for row in line] for line in rows[:n_whole]]
    if seam.code_lines == 0 and lines:
        lines[0] = [*([Text()] if seam.separate else []), _code_head(node), *lines[0]]
    return lines[seam.code_lines :]


def code_blocks(source: str) -> list[str]:
    """Return the text of each code block in a source."""
    tokens = _PARSER.parse(source)
    return [t.content.removesuffix("\n") for t in tokens if t.type in ("fence", "code_block")]


def to_ansi(line: Text) -> str:
    """Format a line with escape sequences for a terminal."""
    return "".join(
        segment.style.render(segment.text, color_system=ColorSystem.STANDARD)
        if segment.style
        else segment.text
        for segment in line.render(_CONSOLE, end="")
    )


class _Page:
    """A parsed source.

    Args:
        source: Markdown.
    """

    def __init__(self, source: str) -> None:
        self._lines = source.split("\n")
        tokens = _PARSER.parse(source.replace("\\|", f"\\{_KEPT_BAR}"))
        for token in tokens:
            token.children = _shallow(token.children)
            _put_back_bars(token)
        self.blocks: Sequence[SyntaxTreeNode] = SyntaxTreeNode(tokens).children

    def blank_before(self, node: SyntaxTreeNode) -> bool:
        """Return whether a blank line, or one with only quote marks, precedes a block."""
        start = _first_line(node)
        return start > 0 and not self._lines[start - 1].strip(" \t>")

    def block(self, node: SyntaxTreeNode, width: int, seam: Seam = START) -> list[Text]:
        """Render one block as lines."""
        match node.type:
            case "heading":
                style = HEADINGS.get(node.tag, LOW_HEADING)
                return _wrap(_inline(node.children, style), width)
            case "fence" | "code_block":
                rows = [row for line in list(_code(node, width))[seam.code_lines :] for row in line]
                head = [] if seam.code_lines else [_code_head(node)]
                return [*head, *rows, Text("───", DIM)]
            case _ if node.type == FORMULA:
                return [row for line in _verbatim(node.content, width) for row in line]
            case "hr":
                return [Text("─" * width, DIM)]
            case "blockquote":
                bar = Text(BAR, DIM)
                return [bar + line for line in self._inside(node, width - len(BAR))]
            case "bullet_list" | "ordered_list":
                return self._list(node, width, seam)
            case "table":
                return _table(node, width)
            case _:
                return _wrap(_inline(node.children), width)

    def _inside(self, node: SyntaxTreeNode, width: int) -> list[Text]:
        """Render the blocks in an item or a quote, with blank lines where the source has them."""
        lines: list[Text] = []
        for n, child in enumerate(node.children):
            if n and self.blank_before(child):
                lines.append(Text())
            lines += self.block(child, max(width, NARROWEST))
        return lines

    def _list(self, node: SyntaxTreeNode, width: int, seam: Seam) -> list[Text]:
        lines = []
        number = _first_number(node, seam)
        for n, item in enumerate(node.children):
            # Do not align numbers: while the list grows, the width of its last number is unknown.
            mark = BULLET if node.type == "bullet_list" else f"{number + n:>2}. "
            if n and self.blank_before(item):
                lines.append(Text())
            inside = self._inside(item, width - len(mark)) or [Text()]
            marks = [Text(mark, BOLD), *[Text(" " * len(mark))] * (len(inside) - 1)]
            lines += [mark + line for mark, line in zip(marks, inside, strict=True)]
        return lines


def _shallow(spans: list[Token] | None) -> list[Token] | None:
    """Remove spans that are nested too deeply; the parser only limits blocks."""
    if spans is None:
        return None
    for span in spans:
        span.children = _shallow(span.children)  # the text of an image
    return [span for span in spans if not span.nesting or span.level < DEEPEST]


def _put_back_bars(token: Token) -> None:
    token.content = token.content.replace(_KEPT_BAR, "|")
    token.info = token.info.replace(_KEPT_BAR, "|")
    for span in token.children or ():
        _put_back_bars(span)


def _first_line(node: SyntaxTreeNode) -> int:
    assert node.map is not None  # the parser sets it for every block
    return node.map[0]


def _first_number(node: SyntaxTreeNode, seam: Seam) -> int:
    return int(node.attrs.get("start", 1)) if seam.number is None else seam.number


def _inline(nodes: Iterable[SyntaxTreeNode], style: Style | None = None) -> Text:
    """Build text from spans; keep line breaks, for example those of a poem."""
    text = Text(tab_size=TAB)
    for node in nodes:
        _append_inline(text, node, style or Style.null())
    return text


def _append_inline(text: Text, node: SyntaxTreeNode, style: Style) -> None:
    if node.type in ("softbreak", "hardbreak"):
        text.append("\n")
    elif node.type == "code_inline":
        text.append(node.content, style + INLINE_CODE)
    elif node.type == "image":
        _append_link(text, Text(node.content, style + LINK), str(node.attrs.get("src", "")), style)
    elif node.type == "link":
        inner = _inline(node.children, style + LINK)
        _append_link(text, inner, str(node.attrs.get("href", "")), style)
    elif node.children:
        for child in node.children:
            _append_inline(text, child, style + SPANS.get(node.type, Style.null()))
    else:
        text.append(node.content, style)


def _append_link(text: Text, inner: Text, url: str, style: Style) -> None:
    """Append a link with its address, which terminals make clickable."""
    text.append_text(inner)
    if inner.plain not in (url, url.removeprefix("mailto:")):
        text.append(f" ({url})" if inner.plain else url, style + DIM)


def _wrap(text: Text, width: int) -> list[Text]:
    if not text.plain:
        return []
    return list(text.wrap(_CONSOLE, width, overflow="fold"))


def _cut(line: Text, width: int) -> Text:
    if line.cell_len > width:
        line.truncate(width, overflow="crop")
    return line


def _table(node: SyntaxTreeNode, width: int) -> list[Text]:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False, border_style=DIM)
    rows = [row.children for part in node.children for row in part.children]
    head, *body = rows
    for cell in head:
        justify = JUSTIFY.get(str(cell.attrs.get("style")), "left")
        table.add_column(_inline(cell.children, BOLD), justify=justify, overflow="fold")
    for row in body:
        table.add_row(*(_inline(cell.children) for cell in row))
    options = _CONSOLE.options.update(width=width, height=None)
    lines = []
    for segments in _CONSOLE.render_lines(table, options, pad=False):
        line = Text.assemble(*((s.text, s.style or Style.null()) for s in segments if s.text))
        line.rstrip()
        lines.append(line)
    return lines


def _code_head(node: SyntaxTreeNode) -> Text:
    return Text(f"─── {_language(node)}".rstrip(), DIM)


def _language(node: SyntaxTreeNode) -> str:
    return (node.info.split() or [""])[0] if node.type == "fence" else ""


def _code(node: SyntaxTreeNode, width: int) -> Iterator[list[Text]]:
    """Yield the rows of each line of code, broken at the window's edge to keep its spaces."""
    for line in _highlight(node.content, _language(node)):
        yield _broken(line, width)


def _verbatim(content: str, width: int) -> Iterator[list[Text]]:
    """Yield the rows of each line of text that is shown as it is."""
    for line in content.expandtabs(TAB).split("\n"):
        yield _broken(Text(line), width)


def _broken(line: Text, width: int) -> list[Text]:
    """Split a line into rows that fill the window."""
    pieces = chop_cells(line.plain, width) if line.cell_len > width else []
    ends, at = [], 0
    for piece in pieces[:-1]:
        at += len(piece)
        ends.append(at)
    return list(line.divide(ends)) if ends else [line.copy()]


@lru_cache(maxsize=4)  # reused for code that has not changed since the last drawing
def _highlight(code: str, language: str) -> tuple[Text, ...]:
    code = code.expandtabs(TAB)
    if not code:
        return ()
    text = Text()
    lexer = _lexer(language)
    if lexer is None:
        text.append(code)
    else:
        style = CODE_THEME.get_style_for_token
        text.append_tokens((piece, style(kind)) for kind, piece in lexer.get_tokens(code))
    return tuple(text.split("\n"))


@lru_cache(maxsize=16)
def _lexer(language: str) -> Lexer | None:
    """Return the lexer of a language; None if unknown, and then code is not coloured."""
    try:
        # Keep the number of lines, so that a line's index is the same in source and rows.
        return get_lexer_by_name(language, stripnl=False, ensurenl=True)
    except ClassNotFound:
        return None
