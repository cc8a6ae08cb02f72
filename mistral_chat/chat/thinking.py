"""What a model thinks before it answers: the pieces as they arrive, and the whole.

Knows nothing of tokens or templates, and imports nothing heavy.
"""

from dataclasses import dataclass

__all__ = ["Thinking", "Thought"]


@dataclass(frozen=True, slots=True)
class Thinking:
    """A piece of what the model thinks before it answers; not part of the answer's text.

    Args:
        text: the piece, never empty.
        n_tokens: tokens of thinking so far.
        seconds: how long it has been thinking.
    """

    text: str
    n_tokens: int
    seconds: float


@dataclass(frozen=True, slots=True)
class Thought:
    """What a model thought before its answer.

    Args:
        text: the thinking, without its marks; a blank line between pieces of it.
        n_tokens: how many tokens it took.
        seconds: how long it took.
        is_closed: whether the model ended it; False if the answer ended within it.
    """

    text: str
    n_tokens: int = 0
    seconds: float = 0.0
    is_closed: bool = True
