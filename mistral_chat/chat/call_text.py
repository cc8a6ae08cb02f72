"""Parse function calls as models write them, in text that is not quite JSON.

Models leave lists open, continue talking after them, omit arguments or rename the key. Nothing is
guessed: a call is read completely, with every argument that was written, or not at all. Knows
nothing of tokens or templates.
"""

import json
import re
from typing import Any

__all__ = [
    "MAX_DEPTH",
    "WrittenCall",
    "is_name",
    "nests_at_most",
    "read_arguments",
    "read_listed_calls",
    "read_named_call",
]

MAX_DEPTH = 64
WrittenCall = tuple[str, dict[str, Any], Any]  # name, arguments, value of the id field
_SPACE = " \t\r\n"
_KEYS = {"name", "arguments", "id", "type"}
_BEGINS_CALLS = re.compile(r'\[\s*\{|\{\s*"')  # text after calls that looks like this is more calls


def read_listed_calls(text: str) -> list[WrittenCall] | None:
    """Parse calls written as a JSON list of objects, or as one object; ignore text after them.

    Returns:
        the calls, at least one; None unless all of them can be parsed.
    """
    found: list[WrittenCall] = []
    rest = text.lstrip(_SPACE)
    while _BEGINS_CALLS.match(rest):
        read = _read_list(rest[1:]) if rest[0] == "[" else _read_entry(rest)
        if read is None:
            return None
        calls, rest = read
        found += calls
        rest = rest.lstrip(_SPACE)
    return found or None


def read_named_call(name: str, body: str) -> tuple[str, dict[str, Any]] | None:
    """Parse a call written as a name followed by a JSON object; ignore text after it.

    Args:
        name: the text before the arguments.
        body: the text of the arguments; empty for none.

    Returns:
        name and arguments; None if they cannot be parsed.
    """
    name, body = name.strip(), body.lstrip(_SPACE)
    if not is_name(name):
        return None
    if not body:
        return name, {}
    read = _read_value(body)
    if read is None or _BEGINS_CALLS.match(read[1].lstrip(_SPACE)):
        return None
    arguments = read_arguments(read[0])
    return None if arguments is None else (name, arguments)


def read_arguments(value: Any) -> dict[str, Any] | None:
    """Read arguments given as an object or as JSON text; null and empty text mean none.

    Returns:
        the arguments by name; None for anything else.
    """
    if isinstance(value, str):
        try:
            value = _load(value) if value.strip(_SPACE) else None
        except (ValueError, RecursionError):
            return None
    if value is None:
        return {}
    return value if isinstance(value, dict) else None


def nests_at_most(value: Any, depth: int) -> bool:
    """Return whether lists and objects are nested at most `depth` levels deep."""
    if not isinstance(value, (list, dict)):
        return True
    inner = value.values() if isinstance(value, dict) else value
    return depth > 0 and all(nests_at_most(entry, depth - 1) for entry in inner)


def is_name(text: str) -> bool:
    """Return whether mistral-common accepts this as a function name."""
    return re.fullmatch(r"[a-zA-Z0-9_-]{1,64}", text) is not None


def _read_list(rest: str) -> tuple[list[WrittenCall], str] | None:
    """Parse the calls after a list's opening bracket, and return the text that follows it."""
    found: list[WrittenCall] = []
    while True:
        read = _read_entry(rest.lstrip(_SPACE))
        if read is None:
            return None
        calls, rest = read
        found += calls
        rest = rest.lstrip(_SPACE)
        if not rest or rest.startswith("]"):
            return found, rest[1:]
        if not rest.startswith(","):
            return None
        rest = rest[1:]


def _read_entry(text: str) -> tuple[list[WrittenCall], str] | None:
    """Parse the call at the start of a text, and return the text that follows it."""
    read = _read_value(text)
    if read is None:
        return None
    entry, rest = read
    if not isinstance(entry, dict) or not isinstance(entry.get("name"), str):
        return None
    arguments = read_arguments(entry.get("arguments"))
    if arguments is None or not is_name(entry["name"]):
        return None
    if not arguments and entry.keys() - _KEYS:
        return None  # the arguments are under another key, such as parameters
    return [(entry["name"], arguments, entry.get("id"))], rest


def _read_value(text: str) -> tuple[Any, str] | None:
    """Parse the JSON value at the start of a text, and return the text that follows it."""
    decoder = json.JSONDecoder(parse_constant=_refuse_constant, object_pairs_hook=_members)
    try:
        value, end = decoder.raw_decode(text)
        _check(value)
    except (ValueError, RecursionError):
        return None
    return value, text[end:]


def _load(text: str) -> Any:
    value = json.loads(text, parse_constant=_refuse_constant, object_pairs_hook=_members)
    _check(value)
    return value


def _check(value: Any) -> None:
    """Refuse JSON that cannot be serialized again and put into every template.

    Raises:
        ValueError: a number out of range, a lone surrogate, or nesting deeper than MAX_DEPTH.
        RecursionError: nesting deeper than Python's recursion limit.
    """
    json.dumps(value, ensure_ascii=False, allow_nan=False).encode()  # 1e999 is parsed as infinity
    if not nests_at_most(value, MAX_DEPTH):
        raise ValueError(f"deeper than {MAX_DEPTH}")


def _members(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) < len(pairs):
        raise ValueError("a name stands twice in one object")
    return value


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is no JSON")
