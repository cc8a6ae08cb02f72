"""Function tools: schemas from a file, and calls from an answer's tokens.

Finds calls by the control token that starts them, never by searching text. Runs nothing.
"""

import hashlib
import json
import string
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jsonschema.exceptions import SchemaError
from jsonschema.validators import Draft7Validator
from mistral_common.protocol.instruct.tool_calls import Function, Tool
from pydantic import ValidationError

from mistral_chat.chat.call_text import (
    MAX_DEPTH,
    WrittenCall,
    is_name,
    nests_at_most,
    read_listed_calls,
    read_named_call,
)
from mistral_chat.errors import PromptError, shown
from mistral_chat.files import read_json

if TYPE_CHECKING:
    from mistral_chat.chat.tokenizer import Tokenizer

__all__ = [
    "MAX_DEPTH",
    "UNREADABLE",
    "ToolCall",
    "make_id",
    "make_tool",
    "make_tools",
    "nests_at_most",
    "parse_tool_calls",
    "read_tools",
]

UNREADABLE = "unreadable_call"  # the history's name for calls that cannot be parsed
_ID_ALPHABET = string.ascii_letters + string.digits


NO_PARAMETERS = {"type": "object", "properties": {}}


@dataclass(frozen=True, slots=True)
class ToolCall:
    """A call that the model asks for.

    Args:
        id: nine letters and digits, as mistral-common requires.
        name: name of the function.
        arguments: values by name.
    """

    id: str
    name: str
    arguments: dict[str, Any]


def read_tools(path: Path) -> list[Tool]:
    """Read function schemas from a JSON file: OpenAI's or Mistral's form, or bare functions.

    Raises:
        PromptError: unreadable, or not a list of function schemas.
    """
    if path.suffix != ".json":
        raise PromptError(f"{path}: expected a .json file of function schemas")
    listed = read_json(path, PromptError)
    if not isinstance(listed, list) or not listed:
        raise PromptError(f"{path}: expected a JSON list of function schemas")
    return [make_tool(entry, f"{path}, tool {n}") for n, entry in enumerate(listed, 1)]


def make_tools(tools: Sequence[Mapping[str, Any] | Tool]) -> list[Tool]:
    """Convert tools from their JSON form; leave those that are Tool objects as they are.

    Raises:
        PromptError: not a list, or not a function schema; the faulty one is named.
    """
    if not isinstance(tools, (list, tuple)):
        raise PromptError(f"tools are {shown(tools)}: expected a list of function schemas")
    made = []
    for n, tool in enumerate(tools, 1):
        entry = dict(tool) if isinstance(tool, Mapping) else tool
        made.append(tool if isinstance(tool, Tool) else make_tool(entry, f"tool {n}"))
    return made


def make_tool(entry: Any, where: str) -> Tool:
    """Convert a tool from its JSON form and check it as the template would.

    Raises:
        PromptError: not a function schema; `where` is named.
    """
    try:
        tool = Tool.model_validate(_as_mistral_has_it(entry))
    except ValidationError as error:
        fault = error.errors()[0]
        at = ".".join(str(part) for part in fault["loc"]) or "it"
        raise PromptError(f"{where}: not a function schema: {at}: {fault['msg']}") from error
    if refusal := _refusal(tool.function):
        raise PromptError(f"{where}: not a function schema: {refusal}")
    return tool


def _as_mistral_has_it(entry: Any) -> Any:
    """Convert OpenAI's form, flat or nested, or a bare function, and add omitted defaults."""
    if not isinstance(entry, dict):
        return entry
    if "function" not in entry:
        kind = entry.get("type", "function")
        function = {name: value for name, value in entry.items() if name != "type"}
        entry = {"type": kind, "function": function}
    function = entry["function"]
    if isinstance(function, dict):
        given = {name: value for name, value in function.items() if value is not None}
        entry = entry | {"function": {"parameters": NO_PARAMETERS} | given}
    return entry


def _refusal(function: Function) -> str | None:
    """Return why no template accepts it; None if they do."""
    if not is_name(function.name):
        return f"function.name: found {function.name!r}, expected 1 to 64 of a-z, A-Z, 0-9, _, -"
    try:
        json.dumps(function.model_dump(), ensure_ascii=False).encode()
        Draft7Validator.check_schema(function.parameters)
    except SchemaError as error:
        return f"function.parameters at {error.json_path}: {error.message}"
    except UnicodeEncodeError:
        return "it holds half of a surrogate pair, which is no text"
    except RecursionError:
        return "it is nested too deeply"
    return None


def parse_tool_calls(
    tokenizer: "Tokenizer", ids: Sequence[int], seed: int
) -> tuple[ToolCall, ...] | None:
    """Parse the calls in an answer.

    v2 to v7 write one control token and a JSON list; from v11 on there is one control token per
    call, with `name[ARGS]{...}` or `name[CALL_ID]id[ARGS]{...}`.

    Args:
        tokenizer: knows the control token that starts a call.
        ids: the answer's token ids.
        seed: determines ids for calls without one, so that a seed repeats the whole answer.

    Returns:
        the calls, all with different ids; None if there are none or one cannot be parsed.
    """
    start = tokenizer.tool_calls_id
    if start is None or start not in ids:
        return None
    before_end = _split(ids, tokenizer.eos_id)[0]
    calls: list[ToolCall] = []
    for part in _split(before_end, start)[1:]:
        text = _decode(tokenizer, part)
        is_json = text.lstrip().startswith(("[", "{"))
        found = read_listed_calls(text) if is_json else _named_call(tokenizer, part)
        if found is None:
            return None
        for name, arguments, written in found:
            id_ = _checked_id(written)
            if id_ is None or any(call.id == id_ for call in calls):
                id_ = make_id(seed, len(calls))
            calls.append(ToolCall(id_, name, arguments))
    return tuple(calls) or None


def _split(ids: Sequence[int], at: int | None) -> list[list[int]]:
    """Split ids at each `at`."""
    parts: list[list[int]] = [[]]
    for token in ids:
        if token == at:
            parts.append([])
        else:
            parts[-1].append(token)
    return parts


def _decode(tokenizer: "Tokenizer", ids: Sequence[int]) -> str:
    detokenizer = tokenizer.detokenizer(continues=True)
    return "".join(map(detokenizer.add, ids)) + detokenizer.flush()


def _named_call(tokenizer: "Tokenizer", ids: Sequence[int]) -> list[WrittenCall] | None:
    head_ids, *bodies = _split(ids, tokenizer.args_id)
    named, *id_parts = _split(head_ids, tokenizer.call_id_id)
    name = _decode(tokenizer, named)
    if len(bodies) > 1:
        return None
    if bodies:
        body = _decode(tokenizer, bodies[0])
    else:  # in v11 the [ARGS] mark may be missing, but then the arguments must not be
        name, brace, rest = name.partition("{")
        if not brace:
            return None
        body = brace + rest
    found = read_named_call(name, body)
    if found is None:
        return None
    return [(*found, _decode(tokenizer, id_parts[0]).strip() if id_parts else None)]


def _checked_id(value: Any) -> str | None:
    ok = isinstance(value, str) and len(value) == 9 and all(c in _ID_ALPHABET for c in value)
    return value if ok else None


def make_id(seed: int, index: int) -> str:
    """Make an id for a call that came without one; a seed repeats it."""
    digest = hashlib.sha256(f"{seed}:{index}".encode()).digest()
    return "".join(_ID_ALPHABET[byte % len(_ID_ALPHABET)] for byte in digest[:9])
