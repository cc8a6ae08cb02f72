"""Parser rules that keep formulas in Markdown as they were written.

Keeps every backslash, and takes nothing between LaTeX delimiters for Markdown. Knows nothing of
windows.
"""

import re

from markdown_it import MarkdownIt
from markdown_it.rules_block import StateBlock
from markdown_it.rules_inline import StateInline

__all__ = ["FORMULA", "keep_formulas"]

FORMULA = "formula"  # token type of a block
LONGEST = 4000  # characters of an inline formula
_CLOSING = {"\\(": "\\)", "\\[": "\\]", "$$": "$$"}
_OPENING = re.compile(r"\\\(|\\\[|\$\$(?!\$)|\\begin\{[A-Za-z]+\*?\}")
# A single dollar is usually money. As a delimiter both signs have a space inside or neither has,
# and no letter or digit outside: "$5 and $10" is no formula, nor is "$5-$10" or "5$ (10$)".
_IN_DOLLARS = re.compile(
    rf"(?<!\w)\$(?:(?![\s$])|(?=(?P<apart>[ ])))(?:\\[^`]|[^\\$`]){{1,{LONGEST}}}?"
    rf"(?(apart)(?<= )|(?<!\s))\$(?![\w$])"
)
_PUNCTUATION = frozenset("!\"#$%&'()*+,-./:;<=>?@[\\]^_`{|}~")


def keep_formulas(parser: MarkdownIt) -> MarkdownIt:
    """Add these rules to a parser."""
    parser.inline.ruler.at("escape", _keep_backslash)
    parser.inline.ruler.before("escape", FORMULA, _keep_formula)
    interrupted = ["paragraph", "reference", "blockquote", "list"]
    parser.block.ruler.before("fence", FORMULA, _keep_formula_block, {"alt": interrupted})
    return parser


def _closing(opening: str) -> str:
    return _CLOSING.get(opening) or opening.replace("begin", "end", 1)


def _keep_backslash(state: StateInline, silent: bool) -> bool:
    """Keep a backslash before punctuation and show both; the punctuation marks nothing."""
    pair = state.src[state.pos : min(state.pos + 2, state.posMax)]
    if pair[0] != "\\" or pair[1:] not in _PUNCTUATION:
        return False
    _take(state, state.pos + 2, silent)
    return True


def _keep_formula(state: StateInline, silent: bool) -> bool:
    """Keep an inline formula, unless it contains a code span."""
    begin = state.pos
    if state.src[begin] not in "\\$":
        return False
    if found := _OPENING.match(state.src, begin, state.posMax):
        closing = _closing(found[0])
        end = state.src.find(closing, found.end(), min(state.posMax, begin + LONGEST))
        if end < 0 or "`" in state.src[begin:end]:
            return False
        end += len(closing)
    elif found := _IN_DOLLARS.match(state.src, begin, state.posMax):
        end = found.end()
    else:
        return False
    _take(state, end, silent)
    return True


def _take(state: StateInline, end: int, silent: bool) -> None:
    if not silent:
        state.push("text_special", "", 0).content = state.src[state.pos : end]
    state.pos = end


def _keep_formula_block(state: StateBlock, begin: int, end: int, silent: bool) -> bool:
    """Keep the lines from an opening delimiter to the closing one, or to a blank line.

    Every line is shown on its own, so that a text that is still growing gives the same result.
    """
    if state.is_code_block(begin):
        return False
    found = _OPENING.match(
        state.src, state.bMarks[begin] + state.tShift[begin], state.eMarks[begin]
    )
    if found is None or found[0] == "\\(":
        return False
    closing = _closing(found[0])
    if state.src.find(closing, found.end(), state.eMarks[begin]) >= 0:
        return False  # text that begins with a formula
    if silent:
        return True
    line = begin + 1
    while line < end and not state.isEmpty(line) and state.sCount[line] >= state.blkIndent:
        line += 1
        if state.src.find(closing, state.bMarks[line - 1], state.eMarks[line - 1]) >= 0:
            break
    state.line = line
    token = state.push(FORMULA, "", 0)
    token.content = state.getLines(begin, line, state.sCount[begin], False)
    token.map = [begin, line]
    return True
