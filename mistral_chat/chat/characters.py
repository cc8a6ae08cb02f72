"""Sets of characters in regular expressions and JSON text, as sorted ranges of code points.

Python's `re` and ECMA-262 disagree on some classes, so this has both the characters that the two
agree on and those that at least one of them includes.
"""

import re
import sys
from collections.abc import Iterable
from functools import cache

__all__ = [
    "DIGITS",
    "ENDS_OF_LINES",
    "KEY_ASCII",
    "KEY_TEXT",
    "SPACES",
    "TEXT",
    "WORD",
    "Ranges",
    "common",
    "complement",
    "union",
    "widest",
]

Ranges = tuple[tuple[int, int], ...]

# ECMA-262 adds U+2028 and U+2029; including them makes llguidance ten times slower.
ENDS_OF_LINES: Ranges = ((10, 10), (13, 13))
DIGITS: Ranges = ((48, 57),)
WORD: Ranges = ((48, 57), (65, 90), (95, 95), (97, 122))
# Spaces in both. Only Python adds U+001C to U+001F and U+0085, only ECMA-262 U+FEFF.
SPACES: Ranges = (
    *((9, 13), (32, 32), (0xA0, 0xA0), (0x1680, 0x1680), (0x2000, 0x200A)),
    *((0x2028, 0x2029), (0x202F, 0x202F), (0x205F, 0x205F), (0x3000, 0x3000)),
)
# Spaces in at least one of them.
_ALL_SPACES: Ranges = (*SPACES, (0x1C, 0x1F), (0x85, 0x85), (0xFEFF, 0xFEFF))


def union(ranges: Iterable[tuple[int, int]]) -> Ranges:
    merged: list[tuple[int, int]] = []
    for low, high in sorted(ranges):
        if merged and low <= merged[-1][1] + 1:
            merged[-1] = (merged[-1][0], max(high, merged[-1][1]))
        else:
            merged.append((low, high))
    return tuple(merged)


def complement(ranges: Ranges) -> Ranges:
    edges = [-1, *(edge for low, high in ranges for edge in (low - 1, high + 1)), sys.maxunicode]
    pairs = [(edges[0] + 1, edges[1]), *zip(edges[2::2], edges[3::2], strict=True)]
    return tuple((low, high) for low, high in pairs if low <= high)


def common(one: Ranges, other: Ranges) -> Ranges:
    return complement(union(complement(one) + complement(other)))


@cache
def widest(letter: str) -> Ranges:
    """Return what at least one of them matches as a digit (d), word character (w) or space (s)."""
    if letter == "s":
        return union(_ALL_SPACES)
    # takes 50 ms, hence the cache; no class spans U+D800 to U+DFFF
    every = "".join(map(chr, range(0xD800))) + "".join(map(chr, range(0xE000, sys.maxunicode + 1)))
    shift = 0xE000 - 0xD800
    found = [(m.start(), m.end() - 1) for m in re.finditer(rf"\{letter}+", every)]
    return union(
        (low, high) if high < 0xD800 else (low + shift, high + shift) for low, high in found
    )


# What an answer can contain: most of \u0000 to \u001f, and U+007F, have no short JSON escape.
TEXT = complement(((0, 7), (11, 11), (14, 31), (127, 127), (0xD800, 0xDFFF)))
# Property names: in Python `$` also matches before a final newline.
KEY_TEXT = common(TEXT, ((32, sys.maxunicode),))
KEY_ASCII: Ranges = ((32, 126),)
