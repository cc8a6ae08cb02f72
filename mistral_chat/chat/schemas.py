"""Rewrite JSON schemas into ones that llguidance follows exactly, or refuse them by name.

llguidance reads some keywords more or less strictly than the standard: character classes,
exclusive bounds, formats, property names that run out. Each is rewritten so that the allowed
answers are the same or fewer. Knows nothing of tokens.
"""

import json
import math
import re
from collections import deque
from collections.abc import Iterator, Mapping
from functools import cache
from typing import Any
from urllib.parse import unquote

from mistral_chat.chat.characters import KEY_ASCII, KEY_TEXT, TEXT, Ranges, common, complement
from mistral_chat.chat.formats import FORMATS, NOT_HELD
from mistral_chat.chat.number_bounds import check_multiples, rewrite_numbers
from mistral_chat.chat.patterns import NotHeldError, Pattern, write_search
from mistral_chat.errors import shown

__all__ = ["needs_unicode_escapes", "rewrite_schema"]

_IN_ONE = (
    *("additionalProperties", "items", "additionalItems", "contains", "propertyNames", "not"),
    *("if", "then", "else", "unevaluatedProperties", "unevaluatedItems", "contentSchema"),
)
_IN_LISTS = ("allOf", "anyOf", "oneOf", "prefixItems", "items")
_NAMED = ("properties", "patternProperties", "$defs", "definitions", "dependentSchemas")
# llguidance rounds numbers from 2^53 on, where they must be exact; it clamps bounds to 64 bits,
# which is harmless.
_EXACT: dict[str, float] = {
    **dict.fromkeys(("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum"), 2**63 - 1),
    **dict.fromkeys(("const", "enum"), math.inf),
}
MOST_NAMES = 64  # names of one pattern that are listed as properties

Found = dict[str, Any]


def rewrite_schema(schema: Mapping[str, Any]) -> Found:
    """Rewrite a schema for llguidance; it allows the same answers or fewer.

    Args:
        schema: a JSON value that is valid against its metaschema.

    Raises:
        NotHeldError: a part is not supported; its place is named.
    """
    root: Found = json.loads(json.dumps(schema))
    places = list(_reachable(root))
    texts = {text for text in _texts(root) if len(text) < 256}
    escapes = needs_unicode_escapes(root)
    check_multiples([found["multipleOf"] for _, found in places if "multipleOf" in found])
    for at, found in places:
        try:
            _check_counts(found)
            rewrite_numbers(found)
            _rewrite_text(found)
            if escapes:
                _check_names_are_plain(found)
            if isinstance(found.get("patternProperties"), dict):
                _rewrite_names(found, texts)
            if found.get("uniqueItems") is False:
                del found["uniqueItems"]
        except NotHeldError as error:
            raise NotHeldError(f"{at or 'its root'}: {error}") from error
    return root


def needs_unicode_escapes(schema: Any) -> bool:
    r"""Return whether a constant has a character that JSON can only write like \u0001."""
    if isinstance(schema, Mapping):
        constants = [schema.get("const"), schema.get("enum")]
        held = (text for constant in constants for text in _texts(constant))
        return any(map(_is_control, "".join(held))) or any(
            needs_unicode_escapes(value) for value in schema.values()
        )
    return isinstance(schema, list) and any(map(needs_unicode_escapes, schema))


def _is_control(char: str) -> bool:
    return (char < " " and char not in "\b\t\n\f\r") or char == "\x7f"


def _texts(value: Any) -> Iterator[str]:
    """Yield all strings in a JSON value, names included."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for name, inner in value.items():
            yield name
            yield from _texts(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from _texts(inner)


def _reachable(root: Found) -> Iterator[tuple[str, Found]]:
    """Yield every subschema and its path: those in standard keywords and those referenced."""
    todo: deque[tuple[str, Any]] = deque([("", root)])
    seen: set[int] = set()
    while todo:
        at, found = todo.popleft()
        if not isinstance(found, dict) or id(found) in seen:
            continue
        seen.add(id(found))
        yield at, found
        for name, value in found.items():
            here = f"{at}.{name}".lstrip(".")
            if name in _IN_ONE:
                todo.append((here, value))
            if name in _IN_LISTS and isinstance(value, list):
                todo.extend((f"{here}[{n}]", entry) for n, entry in enumerate(value))
            elif name in _NAMED and isinstance(value, dict):
                todo.extend((f"{here}.{key}", entry) for key, entry in value.items())
            elif name == "$ref" and isinstance(value, str) and value.startswith("#/"):
                todo.append((value, _pointed_at(root, value)))


def _pointed_at(root: Found, pointer: str) -> Any:
    found: Any = root
    for part in unquote(pointer[2:]).split("/"):
        name = part.replace("~1", "/").replace("~0", "~")
        if isinstance(found, list):
            found = found[int(name)] if name.isdigit() and int(name) < len(found) else None
        else:
            found = found.get(name) if isinstance(found, dict) else None
    return found


def _check_counts(found: Found) -> None:
    if found.get("minProperties", 0) > len(found.get("required", [])) + 1:
        # llguidance counts a name that is written twice as two properties
        raise NotHeldError("minProperties above the number of required properties and one more")
    for name, most in _EXACT.items():  # llguidance aborts the process for a value near -2^63
        if any(2**53 <= abs(number) < most for number in _numbers(found.get(name))):
            raise NotHeldError(f"{name}: a number of 2^53 or more, which would be rounded")


def _numbers(value: Any) -> Iterator[int | float]:
    """Yield the numbers in a JSON value."""
    if isinstance(value, (int, float)):
        yield value
    elif isinstance(value, (dict, list)):
        for entry in value.values() if isinstance(value, dict) else value:
            yield from _numbers(entry)


def _rewrite_text(found: Found) -> None:
    pattern, name = found.get("pattern"), found.pop("format", None)
    if isinstance(pattern, str):
        try:
            found["pattern"] = Pattern(pattern).written()
        except NotHeldError as error:
            raise NotHeldError(f"pattern {shown(pattern)}: {error}") from error
    types = found.get("type", "string")
    if not isinstance(name, str) or "string" not in ([types] if isinstance(types, str) else types):
        return
    if name in NOT_HELD:
        raise NotHeldError(f"format {name!r}: {NOT_HELD[name]}")
    if name not in FORMATS:  # only an annotation
        return
    form = FORMATS[name]
    held: Found = {"pattern": _written(form.pattern)}
    if form.most is not None:
        held["maxLength"] = form.most
    if "pattern" in found or ("maxLength" in found and "maxLength" in held):
        found["allOf"] = [*found.get("allOf", []), held]
    else:
        found.update(held)


@cache
def _written(pattern: str) -> str:
    return Pattern(f"^(?:{pattern})$").written()


def _check_names_are_plain(found: Found) -> None:
    r"""Refuse additional names beside known ones if llguidance may write a letter as \u0061."""
    named = any(found.get(key) for key in ("properties", "required", "patternProperties"))
    if named and found.get("additionalProperties", True) is not False:
        raise NotHeldError(
            "additionalProperties: expected false, since a constant of this schema has a control "
            "character, beside which a name could be written in two ways"
        )


def _rewrite_names(found: Found, texts: set[str]) -> None:
    """Rewrite patternProperties to match exactly; list the names where they may run out."""
    patterns: Found = found["patternProperties"]
    alphabet = KEY_TEXT
    if any(_key_pattern(key, KEY_TEXT).is_ambiguous for key in patterns):
        alphabet = KEY_ASCII
    outside = common(TEXT, complement(alphabet))
    is_open = found.get("additionalProperties", True) is not False
    fixed = {*found.get("properties", {}), *found.get("required", [])}
    for name in fixed:
        is_strange = any(not any(a <= ord(char) <= b for a, b in alphabet) for char in name)
        if is_strange and (is_open or any(re.search(key, name) for key in patterns)):
            raise NotHeldError(f"the name {shown(name)} beside patternProperties")
    rewritten: Found = {}
    for key, schema in patterns.items():
        if not key:
            raise NotHeldError("patternProperties '': jsonschema overlooks it; write '.*'")
        pattern = _key_pattern(key, alphabet)
        names = pattern.texts(MOST_NAMES)
        if names is not None and all(name in texts for name in names):
            # once an answer has all of them, llguidance would still expect another
            properties = found.setdefault("properties", {})
            for name in names:
                has = name in properties
                properties[name] = {"allOf": [properties[name], schema]} if has else schema
            continue
        written = pattern.written()
        if written in rewritten:
            raise NotHeldError(f"patternProperties: {shown(key)} matches the names of another")
        rewritten[written] = schema
        if pattern.matches_all():
            is_open, found["additionalProperties"] = False, False
    if is_open:  # refuse names for which the patterns are not exact
        rewritten[write_search(outside)] = False
    found["patternProperties"] = rewritten


def _key_pattern(key: str, alphabet: Ranges) -> Pattern:
    try:
        return Pattern(key, alphabet)
    except NotHeldError as error:
        raise NotHeldError(f"patternProperties {shown(key)}: {error}") from error
