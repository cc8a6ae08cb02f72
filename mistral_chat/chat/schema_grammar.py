"""Compile a JSON schema into a grammar for llguidance, or say why it is not supported.

Needs neither a tokenizer nor torch, so that a bad schema is refused before anything is loaded.
"""

import json
import re
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jsonschema.exceptions import SchemaError
from jsonschema.validators import Draft3Validator, Draft202012Validator, validator_for
from llguidance import LLMatcher

from mistral_chat.chat.patterns import NotHeldError, Pattern
from mistral_chat.chat.schemas import needs_unicode_escapes, rewrite_schema
from mistral_chat.errors import PromptError, one_line, shown
from mistral_chat.files import read_json

__all__ = ["compile_schema", "read_schema"]

# As json.dumps or a person writes it, and bounded: an unsure model fills pages with spaces.
_WHITESPACE = r"[ ]|\n[ ]{0,40}"
# Each character has one spelling: `\u0061` would be another name for a property called a.
_ESCAPES = r'"\nrtbf'
# Many models begin an answer with a token that starts with a space. Do not force text: it would
# get one fixed tokenization, and the model may prefer another.
_LARK = """\
%llguidance {{"no_forcing": true}}
start: " "? value
value: %json {schema}
"""

# Plain words for llguidance's messages.
_SAYS = {
    r"Unimplemented keys: \[(.*)\]": r"not supported: \1",
    r".*Regex is empty.*": "a text that pattern, format and lengths leave no value for",
    r".*Unable to determine if regex is empty.*": "pattern, format and lengths are too much to "
    "follow together",
    r"patternProperty regexes .* are not disjoint": "patternProperties that match the same name",
    r"can't determine if patternProperty regexes .* are disjoint": "patternProperties that may "
    "match the same name",
}


def read_schema(path: Path) -> Mapping[str, Any]:
    """Read a JSON schema from a file, without checking whether it is supported.

    Raises:
        PromptError: unreadable, or not a JSON object.
    """
    schema = read_json(path, PromptError, pipes=True)
    if not isinstance(schema, dict):
        raise PromptError(
            f"{path}: found {type(schema).__name__}, expected a JSON object, which is the schema"
        )
    return schema


def compile_schema(schema: Mapping[str, Any], where: str = "json_schema") -> str:
    """Compile a schema into a grammar for llguidance.

    Args:
        schema: a JSON schema.
        where: what errors call the schema.

    Raises:
        PromptError: not a schema, or one that is not supported; the message says why.
    """
    try:
        return _compile(schema)
    except NotHeldError as error:
        raise PromptError(
            f"{where}: answers cannot be kept to this schema: {one_line(error, 200)}"
        ) from error


def _compile(schema: Mapping[str, Any]) -> str:
    if not isinstance(schema.get("$schema", ""), str):  # validator_for would fail on it
        raise NotHeldError("not a JSON schema: $schema is not of type 'string'")
    kind = validator_for(schema, default=Draft202012Validator)
    if kind is Draft3Validator:
        raise NotHeldError("draft 3, expected draft 4 or later")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", FutureWarning)  # raised by `re` for doubtful patterns
            kind.check_schema(schema)
        rewritten = rewrite_schema(json.loads(json.dumps(schema, allow_nan=False)))
    except SchemaError as error:
        at = error.json_path.removeprefix("$").removeprefix(".") or "its root"
        if error.validator == "format" and error.validator_value == "regex":
            raise NotHeldError(f"{at}: {_reason(str(error.instance))}") from error
        raise NotHeldError(f"not a JSON schema: {at}: {error.message}") from error
    except FutureWarning as error:  # people who write [[:alpha:]] or && mean more than Python reads
        reason = f"a pattern that means one thing here and another there ({error})"
        raise NotHeldError(reason) from error
    except RecursionError as error:
        raise NotHeldError("nested too deeply") from error
    except (TypeError, ValueError) as error:
        raise NotHeldError(f"not JSON ({error})") from error
    options = {
        "whitespace_pattern": _WHITESPACE,
        "json_allowed_escapes": _ESCAPES + ("u" if needs_unicode_escapes(rewritten) else ""),
        "json_allow_general_unicode_escapes": False,
        "lenient": False,
        "coerce_one_of": False,
    }
    own = json.dumps({**rewritten, "x-guidance": options})
    lark = LLMatcher.grammar_from_lark(_LARK.format(schema=own))
    for grammar in (LLMatcher.grammar_from_json_schema(own), lark):  # the first is more concise
        is_error, messages = LLMatcher.validate_grammar_with_warnings(grammar)
        if is_error or messages:
            raise NotHeldError(_in_plain_words("; ".join(messages)))
    return lark


def _reason(pattern: str) -> str:
    """Return why Python cannot read a pattern."""
    try:
        Pattern(pattern)
    except NotHeldError as error:
        return f"pattern {shown(pattern)}: {error}"
    return f"pattern {shown(pattern)}: Python's `re`, which judges answers, does not read it"


def _in_plain_words(message: str) -> str:
    for says, plain in _SAYS.items():
        message = re.sub(says, plain, message, flags=re.DOTALL)
    return message
