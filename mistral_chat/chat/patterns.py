"""Rewrite the regular expressions of JSON schemas so that llguidance applies them to an answer.

Writes patterns that match the whole text and consist of plain ranges. llguidance treats a class
with every control character as if it also had the quote and the backslash, and it drops characters
that it cannot write; neither kind reaches it. Knows nothing of schemas.
"""

from collections.abc import Iterator

from mistral_chat.chat.characters import TEXT, Ranges
from mistral_chat.chat.pattern_reader import (
    Anchor,
    Chars,
    Choice,
    Node,
    NotHeldError,
    Reader,
    Repeat,
    Sequence,
)

__all__ = ["NotHeldError", "Pattern", "write_search"]

MOST_ALTERNATIVES = 200


def _has_anchor(node: Node) -> bool:
    if isinstance(node, Anchor):
        return True
    inner: tuple[Node, ...] = ()
    if isinstance(node, Sequence):
        inner = node.parts
    elif isinstance(node, Choice):
        inner = node.options
    elif isinstance(node, Repeat):
        inner = (node.part,)
    return any(map(_has_anchor, inner))


def _alternatives(parts: tuple[Node, ...]) -> Iterator[tuple[Node, ...]]:
    """Expand groups at either edge that contain anchors, so that anchors are at the edge itself."""
    for at in (0, len(parts) - 1):
        if not parts:
            break
        edge = parts[at]
        if isinstance(edge, (Sequence, Choice)) and _has_anchor(edge):
            options = edge.options if isinstance(edge, Choice) else (edge,)
            for option in options:
                opened = option.parts if isinstance(option, Sequence) else (option,)
                yield from _alternatives(parts[:at] + opened + parts[at + 1 :])
            return
        if at == 0 and edge == Anchor(True) and len(parts) > 1 and _has_anchor(parts[1]):
            # `^` before a group that may contain `^` or `$`
            for rest in _alternatives(parts[1:]):
                yield (edge, *rest) if rest[:1] != (edge,) else rest
            return
    yield parts


class Pattern:
    """A regular expression that is searched for in a text.

    Args:
        text: the regular expression.
        alphabet: the characters of that text; TEXT for strings.

    Raises:
        NotHeldError: a part is not supported; it is named.
    """

    def __init__(self, text: str, alphabet: Ranges = TEXT) -> None:
        reader = Reader(text, alphabet)
        found = reader.read()
        self.is_ambiguous = reader.is_ambiguous
        self._any = Repeat(Chars(alphabet), 0, None)
        options: list[Node] = []
        for parts in _alternatives((found,)):
            if len(options) == MOST_ALTERNATIVES:
                raise NotHeldError(f"more than {MOST_ALTERNATIVES} alternatives with ^ or $")
            options.append(self._whole(parts))
        self._node = options[0] if len(options) == 1 else Choice(tuple(options))

    def _whole(self, parts: tuple[Node, ...]) -> Node:
        held = list(parts)
        before: list[Node] = [self._any]
        after: list[Node] = [self._any]
        while held and held[0] == Anchor(True):
            held.pop(0)
            before = []
        while held and held[-1] == Anchor(False):
            held.pop()
            after = []
        if any(map(_has_anchor, held)):
            raise NotHeldError("^ or $ elsewhere than at the beginning and the end")
        return Sequence((*before, *held, *after))

    def matches_all(self) -> bool:
        """Return whether it is certain to match every text of its alphabet."""
        options = self._node.options if isinstance(self._node, Choice) else (self._node,)
        return any(
            isinstance(option, Sequence)
            and option.parts
            and all(part == self._any for part in option.parts)
            for option in options
        )

    def texts(self, most: int) -> list[str] | None:
        """Return all texts that match as a whole, or None if there are more than `most`."""
        return _texts(self._node, most)

    def written(self) -> str:
        """Return the expression for llguidance, matching the whole text."""
        return f"^(?:{_written(self._node)})$"


def write_search(ranges: Ranges) -> str:
    """Return an expression for llguidance that matches texts with one of these characters."""
    anything = Repeat(Chars(TEXT), 0, None)
    return f"^(?:{_written(Sequence((anything, Chars(ranges), anything)))})$"


def _texts(node: Node, most: int) -> list[str] | None:
    found: list[str] | None = [""]
    if isinstance(node, Chars):
        if sum(high - low + 1 for low, high in node.ranges) > most:
            return None
        found = [chr(code) for low, high in node.ranges for code in range(low, high + 1)]
    elif isinstance(node, Choice):
        parts = [_texts(option, most) for option in node.options]
        found = None if None in parts else [text for part in parts for text in part or ()]
    elif isinstance(node, Sequence):
        for part in node.parts:
            found = _joined(found, _texts(part, most), most)
    elif isinstance(node, Repeat):
        part_texts = _texts(node.part, most)
        if node.most is None or part_texts is None or node.most > most:
            return None
        found = []
        for n in range(node.least, node.most + 1):
            repeated: list[str] | None = [""]
            for _ in range(n):
                repeated = _joined(repeated, part_texts, most)
            if repeated is None:
                return None
            found += repeated
    if found is None or len(set(found)) > most:
        return None
    return sorted(set(found))


def _joined(one: list[str] | None, other: list[str] | None, most: int) -> list[str] | None:
    if one is None or other is None or len(one) * len(other) > most * most:
        return None
    both = {first + second for first in one for second in other}
    return sorted(both) if len(both) <= most else None


def _written(node: Node) -> str:
    if isinstance(node, Chars):
        return f"[{''.join(_range(low, high) for low, high in node.ranges)}]"
    if isinstance(node, Choice):
        return "(?:" + "|".join(map(_written, node.options)) + ")"
    if isinstance(node, Repeat):
        most = "" if node.most is None else node.most
        return f"(?:{_written(node.part)}){{{node.least},{most}}}"
    assert isinstance(node, Sequence), "anchors are gone"
    return "".join(map(_written, node.parts))


def _range(low: int, high: int) -> str:
    return f"\\x{{{low:x}}}" if low == high else f"\\x{{{low:x}}}-\\x{{{high:x}}}"
