"""Constrain an answer to JSON that follows a schema: which tokens may come next.

llguidance follows the schema through the answer's bytes; this gives it the tokenizer and the
schema. Knows nothing of sampling or of how an answer is run. Imports torch only for an answer, so
schemas can be checked before ranks are started.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

from llguidance import LLMatcher, LLTokenizer, TokenizerWrapper

from mistral_chat.chat.schema_grammar import compile_schema, read_schema
from mistral_chat.errors import PromptError, UsageError

if TYPE_CHECKING:
    from torch import Tensor

    from mistral_chat.chat.tokenizer import Tokenizer

__all__ = ["ANY_OBJECT", "Grammar", "GrammarMask", "choose_grammar", "read_grammar"]

ANY_OBJECT: Mapping[str, Any] = {"type": "object"}


class _Vocabulary(TokenizerWrapper):
    """A tokenizer in the form that llguidance expects: the bytes of each id.

    Args:
        tokenizer: the model's tokenizer.
        vocab_size: the model's vocabulary size.
    """

    def __init__(self, tokenizer: "Tokenizer", vocab_size: int) -> None:
        banned = {*tokenizer.banned_ids(vocab_size, tools=False), *tokenizer.end_ids}
        special = {i for i in range(vocab_size) if i in banned or tokenizer.is_special(i)}
        self.is_tokenizer_wrapper = True  # LLTokenizer checks for this
        self.bos_token_id = None
        self.eos_token_id = tokenizer.eos_id
        self.special_token_ids = sorted(special)
        self.tokens = [b"" if i in special else tokenizer.token_bytes(i) for i in range(vocab_size)]

    def __call__(self, s: str) -> list[int]:
        raise AssertionError(f"nothing is forced, so nothing is tokenized; asked for {s!r}")


class Grammar:
    """Constrains an answer to JSON that is valid against a schema.

    Args:
        schema: a JSON schema.
        where: what errors call the schema.

    Raises:
        PromptError: not a schema, or one that is not supported; the message says why.
    """

    def __init__(self, schema: Mapping[str, Any], where: str = "json_schema") -> None:
        self._where = where
        self._lark = compile_schema(schema, where)

    def mask(self, tokenizer: "Tokenizer", vocab_size: int) -> "GrammarMask":
        """Return a mask for one answer, at its beginning.

        Args:
            tokenizer: the model's tokenizer.
            vocab_size: the model's vocabulary size.

        Raises:
            PromptError: llguidance cannot follow the schema.
        """
        matcher = LLMatcher(_vocabulary(tokenizer, vocab_size), self._lark, log_level=0)
        return GrammarMask(matcher, vocab_size, self._where)


class GrammarMask:
    """The tokens allowed next in one answer; the end token only where the JSON is complete.

    Implements the engine's `TokenMask`.

    Args:
        matcher: a matcher at the beginning of an answer.
        vocab_size: the model's vocabulary size.
        where: what errors call the schema.

    Raises:
        PromptError: llguidance cannot follow the schema.
    """

    def __init__(self, matcher: LLMatcher, vocab_size: int, where: str) -> None:
        self._matcher = matcher
        self._n_words = -(-vocab_size // 32)
        self._where = where
        self._check()

    def allowed(self) -> "Tensor":
        """Return the tokens allowed next.

        Returns:
            (ceil(vocabulary / 32),) int32, bit i % 32 of word i // 32 for token i.

        Raises:
            PromptError: the schema exceeds llguidance's limits, or no valid text continues from
                here.
        """
        import torch

        data = bytearray(self._matcher.compute_bitmask())
        self._check()
        # where only the end token is allowed, llguidance appends an empty word
        words = torch.frombuffer(data, dtype=torch.int32)[: self._n_words]
        if not words.any():
            raise PromptError(
                f"{self._where}: the schema leads to a place where no text is valid: expected one "
                f"that can be satisfied however it is begun"
            )
        return words

    def take(self, token: int) -> None:
        """Advance by the token that was chosen."""
        self._matcher.consume_token(token)
        self._check()

    def _check(self) -> None:
        if self._matcher.is_error():
            lines = self._matcher.get_error().splitlines()
            raise PromptError(f"{self._where}: llguidance cannot follow this schema ({lines[0]})")


def read_grammar(path: Path) -> Grammar:
    """Read a JSON schema from a file and build its grammar.

    Raises:
        PromptError: unreadable, not a JSON object, or a schema that is not supported.
    """
    return Grammar(read_schema(path), str(path))


def choose_grammar(json_schema: Mapping[str, Any] | None, json_object: bool) -> Grammar | None:
    """Return the grammar of a schema or of any JSON object; None if neither is requested.

    Raises:
        UsageError: both are requested.
        PromptError: the schema is not supported.
    """
    if json_schema is not None and json_object:
        raise UsageError("json_schema and json_object: expected one of them")
    if json_object:
        return Grammar(ANY_OBJECT, "json_object")
    return None if json_schema is None else Grammar(json_schema)


_made: WeakKeyDictionary["Tokenizer", dict[int, LLTokenizer]] = WeakKeyDictionary()


def _vocabulary(tokenizer: "Tokenizer", vocab_size: int) -> LLTokenizer:
    """Build llguidance's form of a vocabulary, once: 131,072 ids take half a second."""
    made = _made.setdefault(tokenizer, {})
    if vocab_size not in made:
        wrapped = _Vocabulary(tokenizer, vocab_size)
        made[vocab_size] = LLTokenizer(wrapped, slices=LLTokenizer.json_slices())
    return made[vocab_size]
