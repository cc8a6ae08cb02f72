"""Fold long pieces of a typed message into marks such as `[300 lines]`.

In the prompt's text a piece is one character: the cursor steps over it, and one key deletes it.
"""

from prompt_toolkit.formatted_text import StyleAndTextTuples
from prompt_toolkit.formatted_text.utils import fragment_list_to_text
from prompt_toolkit.layout.processors import (
    Processor,
    Transformation,
    TransformationInput,
)
from prompt_toolkit.layout.utils import explode_text_fragments

__all__ = ["Folds"]

MOST_LINES, MOST_CHARACTERS = 10, 2000  # of a piece that is shown as it is
FIRST, LAST = 0x10F000, 0x10FFF0  # private-use characters


class Folds:
    """The long pieces typed in a chat, kept until the chat ends."""

    def __init__(self) -> None:
        self._pieces: dict[str, str] = {}

    def fold(self, text: str) -> str:
        """Replace a long text by a mark; return a short one unchanged.

        Pieces that were pasted before get the same marks again.
        """
        for mark, piece in self._pieces.items():
            text = text.replace(piece, mark)
        if text.count("\n") < MOST_LINES and len(text) <= MOST_CHARACTERS:
            return text
        text = self.unfold(text)
        free = (chr(code) for code in range(FIRST, LAST))
        for mark in free:
            if mark not in self._pieces and mark not in text:
                self._pieces[mark] = text
                return mark
        return text

    def unfold(self, text: str) -> str:
        """Replace the marks in a text by their pieces."""
        return "".join(self._pieces.get(character, character) for character in text)

    def shown(self, text: str) -> str:
        """Return a text as the user sees it."""
        return "".join(map(self._shown, text))

    def _shown(self, character: str) -> str:
        piece = self._pieces.get(character)
        if piece is None:
            return character
        n = piece.removesuffix("\n").count("\n") + 1
        return f"[{n:,} lines]" if n > MOST_LINES else f"[{len(piece):,} characters]"

    @property
    def processor(self) -> Processor:
        """A processor that draws the marks at a prompt."""
        return _Marks(self)


class _Marks(Processor):
    """Draws each piece's character as its mark."""

    def __init__(self, folds: Folds) -> None:
        self._folds = folds

    def apply_transformation(self, transformation_input: TransformationInput) -> Transformation:
        fragments = transformation_input.fragments
        text = fragment_list_to_text(fragments)
        if self._folds.shown(text) == text:
            return Transformation(fragments)
        drawn: StyleAndTextTuples = []
        starts = []  # display position of each character
        column = 0
        for style, character, *_ in explode_text_fragments(fragments):
            shown = self._folds.shown(character)
            starts.append(column)
            column += len(shown)
            drawn.append((style if shown == character else f"{style} bold", shown))

        def to_drawn(at: int) -> int:
            return starts[at] if at < len(starts) else column + at - len(starts)

        def to_source(at: int) -> int:
            if at >= column:
                return len(starts) + at - column
            return max(n for n, start in enumerate(starts) if start <= at)

        return Transformation(drawn, source_to_display=to_drawn, display_to_source=to_source)
