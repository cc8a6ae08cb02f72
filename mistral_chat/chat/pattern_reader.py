r"""Parse the regular expressions of JSON schemas into trees.

Accepts what both Python's `re`, which validates answers, and ECMA-262, which JSON schema names,
support. Where they differ, takes the narrower meaning: `\d` is 0 to 9, and `\D` excludes every
Unicode digit. Anything else is refused by name. Knows nothing of llguidance.
"""

import re
from dataclasses import dataclass

from mistral_chat.chat.characters import (
    DIGITS,
    ENDS_OF_LINES,
    SPACES,
    WORD,
    Ranges,
    common,
    complement,
    union,
    widest,
)

__all__ = [
    "Anchor",
    "Chars",
    "Choice",
    "Node",
    "NotHeldError",
    "Reader",
    "Repeat",
    "Sequence",
]

MOST_REPEATS = 10_000
_CONTROLS = {"t": 9, "n": 10, "v": 11, "f": 12, "r": 13}


class NotHeldError(Exception):
    """A part of a schema is not supported; the message says why, in plain words."""


@dataclass(frozen=True)
class Chars:
    """One character out of these ranges."""

    ranges: Ranges


@dataclass(frozen=True)
class Anchor:
    """The start or end of the text."""

    at_start: bool


@dataclass(frozen=True)
class Sequence:
    """Parts that follow one another."""

    parts: "tuple[Node, ...]"


@dataclass(frozen=True)
class Choice:
    """One of several options."""

    options: "tuple[Node, ...]"


@dataclass(frozen=True)
class Repeat:
    """A repeated part; `most` is None if unbounded."""

    part: "Node"
    least: int
    most: int | None


Node = Chars | Anchor | Sequence | Choice | Repeat


class Reader:
    """A parser for what Python and ECMA-262 agree on.

    Args:
        text: the regular expression.
        alphabet: the characters of the texts that it is matched with.
    """

    def __init__(self, text: str, alphabet: Ranges) -> None:
        self._text = text
        self._alphabet = alphabet
        self._at = 0
        self.is_ambiguous = False  # contains a class that the two read differently

    def read(self) -> Node:
        """Parse the whole expression.

        Raises:
            NotHeldError: a part is not supported; it is named.
        """
        try:
            node = self._choice()
        except RecursionError:
            raise NotHeldError("groups are nested too deeply") from None
        if self._at < len(self._text):
            raise NotHeldError(f"a ) without ( at character {self._at + 1}")
        return node

    def _next(self, n: int = 1) -> str:
        return self._text[self._at : self._at + n]

    def _take(self, n: int = 1) -> str:
        taken = self._next(n)
        if len(taken) < n:
            raise NotHeldError("it ends too early")
        self._at += n
        return taken

    def _skip(self, text: str) -> bool:
        found = self._text.startswith(text, self._at)
        self._at += len(text) * found
        return found

    def _choice(self) -> Node:
        options = [self._sequence()]
        while self._skip("|"):
            options.append(self._sequence())
        return options[0] if len(options) == 1 else Choice(tuple(options))

    def _sequence(self) -> Node:
        parts: list[Node] = []
        while self._next() not in ("", "|", ")"):
            parts.append(self._repeated(self._atom()))
        return parts[0] if len(parts) == 1 else Sequence(tuple(parts))

    def _repeated(self, part: Node) -> Node:
        found = re.compile(r"\{(\d*)(,?)(\d*)\}").match(self._text, self._at)
        if self._next() in ("*", "+", "?"):
            least, most = {"*": (0, None), "+": (1, None), "?": (0, 1)}[self._take()]
        elif found and found[1]:
            self._at = found.end()
            if len(found[1]) > 6 or len(found[3]) > 6:
                raise NotHeldError(f"{found[0]}: more than {MOST_REPEATS:,} repeats")
            least = int(found[1])
            most = int(found[3]) if found[3] else None if found[2] else least
            if max(least, most or 0) > MOST_REPEATS:
                raise NotHeldError(f"{found[0]}: more than {MOST_REPEATS:,} repeats")
        elif found and found[2]:
            raise NotHeldError(f"{found[0]}: Python counts from 0, ECMA-262 takes it for text")
        else:
            return part
        if self._next() == "+":
            raise NotHeldError("a possessive repeat such as a++")
        self._skip("?")  # greedy or lazy, it matches the same texts
        if self._next() in ("*", "+", "?"):
            raise NotHeldError("a repeat of a repeat such as a**")
        return Repeat(part, least, most)

    def _atom(self) -> Node:
        char = self._take()
        if char == "(":
            return self._group()
        if char == "[":
            return self._class()
        if char == ".":
            self.is_ambiguous = True
            return self._chars(complement(ENDS_OF_LINES), ".")
        if char in "^$":
            return Anchor(char == "^")
        if char in "*+?":
            raise NotHeldError(f"a {char} with nothing before it")
        if char != "\\":
            return self._chars(((ord(char), ord(char)),), char)
        begin = self._at
        ranges = self._escape(in_class=False, negated=False)
        return self._chars(ranges, "\\" + self._text[begin : self._at])

    def _group(self) -> Node:
        if self._skip("?") and not self._skip(":"):
            named = re.compile(r"P<[A-Za-z_]\w*>", re.ASCII).match(self._text, self._at)
            if named is None:
                raise NotHeldError(self._group_name())
            self._at = named.end()
        node = self._choice()
        if not self._skip(")"):
            raise NotHeldError("a ( without )")
        # wrapped, so that a repeat applies to the whole group
        return Sequence((node,)) if isinstance(node, Anchor) else node

    def _group_name(self) -> str:
        rest = self._text[self._at :]
        opened = re.match(r"<[^>)]{1,20}>|[=!<]{0,2}|[^)\s]{0,3}", rest)
        shown = f"(?{opened[0] if opened else ''}"
        if rest.startswith(("=", "!", "<=", "<!")):
            return f"look-around ({shown}...)"
        if rest.startswith("<"):
            return f"a named group ({shown}...), which Python spells otherwise: write (...)"
        if rest.startswith("P="):
            return f"a back reference ({shown})"
        return f"{shown}...: flags, conditions and atomic groups"

    def _escape(self, *, in_class: bool, negated: bool) -> Ranges:
        """Parse an escape after its backslash; in a negated class return its widest meaning."""
        char = self._take()
        if char in "dwsDWS":
            self.is_ambiguous = True
            narrow = {"d": DIGITS, "w": WORD, "s": SPACES}[char.lower()]
            if char.islower():
                return widest(char) if negated else narrow
            return complement(narrow if negated else widest(char.lower()))
        code = _CONTROLS.get(char)
        if char == "b" and in_class:
            code = 8
        elif char == "0" and not self._next().isdigit():
            code = 0
        elif char in "xu":
            digits = self._take(2 if char == "x" else 4)
            if not re.fullmatch("[0-9a-fA-F]+", digits):
                raise NotHeldError(f"\\{char}{digits}: expected hexadecimal digits")
            code = int(digits, 16)
        elif code is None and (char.isalnum() or char == "_"):
            raise NotHeldError(self._escape_name(char))
        elif code is None:
            code = ord(char)
        return ((code, code),)

    def _escape_name(self, char: str) -> str:
        if char in "pP":
            braced = re.compile(r"\{[^}]{0,20}\}").match(self._text, self._at)
            return f"\\{char}{braced[0] if braced else ''} (a property of Unicode; write ranges)"
        if char in "bB":
            return f"\\{char} (the border of a word)"
        if char.isdigit() or char == "k":
            return f"\\{char} (a back reference)"
        return f"\\{char}, which Python and ECMA-262 do not read alike"

    def _class(self) -> Node:
        begin = self._at - 1
        negated = self._skip("^")
        if self._next() == "]":
            raise NotHeldError("a class that begins with ], which ECMA-262 takes for its end")
        found: list[tuple[int, int]] = []
        while not self._skip("]"):
            low = self._class_atom(negated)
            if self._next() == "-" and self._next(2) != "-]":
                self._take()
                high = self._class_atom(negated)
                if low[0][0] > high[-1][1]:
                    raise NotHeldError(f"a range the wrong way round in {self._text[begin:]}")
                found.append((low[0][0], high[-1][1]))
            else:
                found.extend(low)
        ranges = union(found)
        shown = self._text[begin : self._at]
        return self._chars(complement(ranges) if negated else ranges, shown)

    def _class_atom(self, negated: bool) -> Ranges:
        char = self._take()
        if char == "\\":
            return self._escape(in_class=True, negated=negated)
        return ((ord(char), ord(char)),)

    def _chars(self, ranges: Ranges, shown: str) -> Chars:
        held = common(ranges, self._alphabet)
        if not held:
            shown = ascii(shown)[1:-1].replace("\\\\", "\\")
            raise NotHeldError(f"{shown} asks for a character that answers cannot write there")
        return Chars(held)
