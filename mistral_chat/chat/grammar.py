"""Answers that are JSON of a schema, by construction: which token may come next.

llguidance follows the schema through an answer's bytes; here it is given the tokenizer and the
schema. Knows nothing of sampling or of how an answer is run. Imports torch only for an answer, so
that a schema can be judged before ranks are started.
"""

import json
import math
import re
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

from jsonschema.exceptions import SchemaError
from jsonschema.validators import Draft3Validator, Draft202012Validator, validator_for
from llguidance import LLMatcher, LLTokenizer, TokenizerWrapper

from mistral_chat.errors import PromptError, UsageError
from mistral_chat.files import read_json

if TYPE_CHECKING:
    from torch import Tensor

    from mistral_chat.chat.tokenizer import Tokenizer

__all__ = ["ANY_OBJECT", "Grammar", "GrammarMask", "choose_grammar", "read_grammar"]

ANY_OBJECT: Mapping[str, Any] = {"type": "object"}

# As json.dumps or a person writes it, and bounded: a model that is unsure fills pages with spaces.
_WHITESPACE = r"[ ]|\n[ ]{0,40}"
# One way to write a character: `\u0061` would be another name for a property called a.
_ESCAPES = r'"\nrtbf'
# Many models begin an answer with a token that begins with a space. Nothing is forced: a forced
# text would be tokenized in one way, and the model may prefer another.
_LARK = """\
%llguidance {{"no_forcing": true}}
start: " "? value
value: %json {schema}
"""
_NAMED = ("properties", "patternProperties", "$defs", "definitions")  # names to schemas
_VALUES = ("enum", "const", "default", "examples", "required")  # hold no schemas
# llguidance rounds a number from 2^53 on, where it must be exact; a bound it cuts to 64 bits, which
# is as good.
_EXACT: dict[str, float] = {
    **dict.fromkeys(("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum"), 2**63 - 1),
    **dict.fromkeys(("const", "enum"), math.inf),
}


class _Vocabulary(TokenizerWrapper):
    """A tokenizer as llguidance asks for it: the bytes of each id.

    Args:
        tokenizer: of the model.
        vocab_size: of the model.
    """

    def __init__(self, tokenizer: "Tokenizer", vocab_size: int) -> None:
        banned = set(tokenizer.banned_ids(vocab_size, tools=False))
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
        self._lark = self._compile(schema)

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

    def _compile(self, schema: Mapping[str, Any]) -> str:
        if not isinstance(schema.get("$schema", ""), str):  # validator_for would fail on it
            raise self._refusal("not a JSON schema: $schema is not of type 'string'")
        kind = validator_for(schema, default=Draft202012Validator)
        if kind is Draft3Validator:
            raise self._refusal("draft 3, expected draft 4 or later")
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("error", FutureWarning)  # of patterns
                kind.check_schema(schema)
            text = json.dumps(schema)
        except SchemaError as error:
            at = error.json_path.removeprefix("$").removeprefix(".") or "its root"
            raise self._refusal(f"not a JSON schema: {at}: {error.message}") from error
        except FutureWarning as error:  # llguidance takes [[:alpha:]] or && for more than it says
            reason = f"a pattern that means one thing here and another there ({error})"
            raise self._refusal(reason) from error
        except RecursionError as error:
            raise self._refusal("nested too deeply") from error
        except (TypeError, ValueError) as error:
            raise self._refusal(f"not JSON ({error})") from error
        for found in _schemas(schema):
            least, required = found.get("minProperties", 0), found.get("required", [])
            # under a keyword of somebody's own, where no metaschema looks, they may be anything
            are_read = isinstance(least, (int, float)) and isinstance(required, list)
            if are_read and least > len(required):
                # the same name twice is two properties to llguidance
                raise self._refusal("minProperties above the number of required properties")
            for name, most in _EXACT.items():  # with a value near -2^63 the process would end
                if any(2**53 <= abs(number) < most for number in _numbers(found.get(name))):
                    raise self._refusal(f"{name}: a number of 2^53 or more, which would be rounded")
        written = _ESCAPES + ("u" if re.search(r"\\u00[01]|\x7f", text) else "")
        options = {
            "whitespace_pattern": _WHITESPACE,
            "json_allowed_escapes": written,
            "json_allow_general_unicode_escapes": False,
            "lenient": False,
            "coerce_one_of": False,
        }
        own = json.dumps({**schema, "x-guidance": options})
        lark = LLMatcher.grammar_from_lark(_LARK.format(schema=own))
        for grammar in (LLMatcher.grammar_from_json_schema(own), lark):  # the first says it shorter
            is_error, messages = LLMatcher.validate_grammar_with_warnings(grammar)
            if is_error or messages:
                raise self._refusal("; ".join(messages))
        return lark

    def _refusal(self, reason: str) -> PromptError:
        reason = " ".join(reason.split())[:300]
        return PromptError(f"{self._where}: answers cannot be kept to this schema: {reason}")


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
    schema = read_json(path, PromptError)
    if not isinstance(schema, dict):
        raise PromptError(
            f"{path}: found {type(schema).__name__}, expected a JSON object, which is the schema"
        )
    return Grammar(schema, str(path))


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


def _schemas(schema: Any) -> Iterator[Mapping[str, Any]]:
    """A schema and all that lie in it."""
    if isinstance(schema, Mapping):
        yield schema
        for key, value in schema.items():
            if key in _NAMED and isinstance(value, Mapping):
                for named in value.values():
                    yield from _schemas(named)
            elif key not in _VALUES:
                yield from _schemas(value)
    elif isinstance(schema, list):
        for entry in schema:
            yield from _schemas(entry)


def _numbers(value: Any) -> Iterator[int | float]:
    """The numbers in a JSON value."""
    if isinstance(value, (int, float)):
        yield value
    elif isinstance(value, (Mapping, list)):
        for entry in value.values() if isinstance(value, Mapping) else value:
            yield from _numbers(entry)
