"""A schema's mask for models that think: it holds from the end of the thinking on.

Knows nothing of schemas, nor of how an answer is run.
"""

from typing import TYPE_CHECKING, Literal

from mistral_chat.chat.tokenizer import Tokenizer
from mistral_chat.engine.engine import TokenMask

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["ThinkingMask"]


class ThinkingMask:
    """Lets an answer begin with thinking, in which any text but the end of the answer may stand.

    Implements the engine's `TokenMask`.

    Args:
        mask: of the answer after the thinking, at its beginning.
        tokenizer: of the model; it has marks of thinking.
        vocab_size: the model's vocabulary size.
    """

    def __init__(self, mask: TokenMask, tokenizer: Tokenizer, vocab_size: int) -> None:
        assert tokenizer.begin_think_id is not None
        self._mask = mask
        self._begin, self._end = tokenizer.begin_think_id, tokenizer.end_think_id
        # An answer that ended here would be no JSON.
        self._forbidden = [i for i in (*tokenizer.end_ids, self._begin) if i < vocab_size]
        self._n_words = -(-vocab_size // 32)
        self._place: Literal["start", "thinking", "answer"] = "start"

    def allowed(self) -> "Tensor":
        """Return the tokens allowed next, as `GrammarMask.allowed` does.

        Raises:
            PromptError: as there.
        """
        import torch

        if self._place == "answer":
            return self._mask.allowed()
        if self._place == "start":
            words = self._mask.allowed().clone()
            words[self._begin // 32] |= _bit(self._begin)
            return words
        words = torch.full((self._n_words,), -1, dtype=torch.int32)
        for token in self._forbidden:
            words[token // 32] &= ~_bit(token)
        return words

    def take(self, token: int) -> None:
        """Advance by the token that was chosen."""
        if self._place == "start" and token == self._begin:
            self._place = "thinking"
        elif self._place == "thinking":
            self._place = "answer" if token == self._end else "thinking"
        else:
            self._place = "answer"
            self._mask.take(token)


def _bit(token: int) -> int:
    """Return a token's bit in its word, as a signed number of 32 bits."""
    bit = 1 << token % 32
    return bit - (1 << 32) if bit >> 31 else bit
