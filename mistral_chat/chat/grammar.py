"""Answers that are JSON of a schema, by construction: which token may come next.

llguidance follows the schema through an answer's bytes; here it is given the tokenizer and the
schema. Knows nothing of sampling or of how an answer is run. Imports torch only for an answer, so
that a schema can be judged before ranks are started.
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
    """A tokenizer as llguidance asks for it: the bytes of each id.

    Args:
        tokenizer: of the model.
        vocab_size: of the model.
    """

    def __init__(self, tokenizer: "Tokenizer", vocab_size: int) -> None:
        banned = {*tokenizer.banned_ids(vocab_size, tools=False), *tokenizer.end_ids}
        special = {i for i in range(vocab_size) if i in banned or tokenizer.is_special(i)}
        self.is_tokenizer_wrapper = True  # what LLTokenizer looks for
        self.bos_token_id = None
        self.eos_token_id = tokenizer.eos_id
        self.special_token_ids = sorted(special)
        self.tokens = [b"" if i in special else tokenizer.token_bytes(i) for i in range(vocab_size)]

    def __call__(self, s: str) -> list[int]:
        raise AssertionError(f"nothing is forced, so nothing is tokenized; asked for {s!r}")


class Grammar:
    """What an answer may be: JSON that is valid against a schema.

    Args:
        schema: a JSON schema.
        where: names it in errors.

    Raises:
        PromptError: not a schema, or one that no answer can be kept to, and why.
    """

    def __init__(self, schema: Mapping[str, Any], where: str = "json_schema") -> None:
        self._where = where
        self._lark = compile_schema(schema, where)

    def mask(self, tokenizer: "Tokenizer", vocab_size: int) -> "GrammarMask":
        """The masks of one answer, at its beginning.

        Args:
            tokenizer: of the model.
            vocab_size: of the model.

        Raises:
            PromptError: llguidance cannot follow the schema.
        """
        matcher = LLMatcher(_vocabulary(tokenizer, vocab_size), self._lark, log_level=0)
        return GrammarMask(matcher, vocab_size, self._where)


class GrammarMask:
    """What the tokens of one answer may be; the end token exactly where the JSON is complete.

    It is the engine's `TokenMask`.

    Args:
        matcher: at the beginning of an answer.
        vocab_size: of the model.
        where: names the schema in errors.

    Raises:
        PromptError: llguidance cannot follow the schema.
    """

    def __init__(self, matcher: LLMatcher, vocab_size: int, where: str) -> None:
        self._matcher = matcher
        self._n_words = -(-vocab_size // 32)
        self._where = where
        self._check()

    def allowed(self) -> "Tensor":
        """What the next token may be.

        Returns:
            (ceil(vocabulary / 32),) int32, bit i % 32 of word i // 32 for token i.

        Raises:
            PromptError: following the schema takes more than llguidance's limits, or no text
                goes on from here.
        """
        import torch

        data = bytearray(self._matcher.compute_bitmask())
        self._check()
        # where nothing but the end may come, llguidance appends an empty word
        words = torch.frombuffer(data, dtype=torch.int32)[: self._n_words]
        if not words.any():
            raise PromptError(
                f"{self._where}: the schema leads to a place where no text is valid: expected one "
                f"that can be satisfied however it is begun"
            )
        return words

    def take(self, token: int) -> None:
        """Note the token that was chosen."""
        self._matcher.consume_token(token)
        self._check()

    def _check(self) -> None:
        if self._matcher.is_error():
            lines = self._matcher.get_error().splitlines()
            raise PromptError(f"{self._where}: llguidance cannot follow this schema ({lines[0]})")


def read_grammar(path: Path) -> Grammar:
    """Read a JSON schema from a file.

    Raises:
        PromptError: unreadable, not a JSON object, or a schema that no answer can be kept to.
    """
    return Grammar(read_schema(path), str(path))


def choose_grammar(json_schema: Mapping[str, Any] | None, json_object: bool) -> Grammar | None:
    """The grammar that is asked for by a schema, or for any object; None for free text.

    Raises:
        UsageError: both are asked for.
        PromptError: a schema that no answer can be kept to.
    """
    if json_schema is not None and json_object:
        raise UsageError("json_schema and json_object: expected one of them")
    if json_object:
        return Grammar(ANY_OBJECT, "json_object")
    return None if json_schema is None else Grammar(json_schema)


_made: WeakKeyDictionary["Tokenizer", dict[int, LLTokenizer]] = WeakKeyDictionary()


def _vocabulary(tokenizer: "Tokenizer", vocab_size: int) -> LLTokenizer:
    """A tokenizer's vocabulary for llguidance, made once: half a second for 131,072 ids."""
    made = _made.setdefault(tokenizer, {})
    if vocab_size not in made:
        wrapped = _Vocabulary(tokenizer, vocab_size)
        made[vocab_size] = LLTokenizer(wrapped, slices=LLTokenizer.json_slices())
    return made[vocab_size]
