"""Parse the lines of a batch's IN, in our form or OpenAI's: questions, or errors.

Reads all lines before the model is loaded, so imports nothing heavy. Knows nothing of OUT.
"""

import errno
import json
import os
import re
import stat
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO

from mistral_chat import errors
from mistral_chat.chat.batch import Question
from mistral_chat.chat.messages import read_messages
from mistral_chat.cli.command_line import flags_of
from mistral_chat.cli.requests import AnswersRequest
from mistral_chat.config import SamplingParams
from mistral_chat.errors import PromptError, UsageError

__all__ = ["Line", "asks_json", "check_source", "read_lines", "read_source", "shown"]

MOST_BYTES = 1 << 30
_SAMPLING = flags_of(SamplingParams)
_FIELDS = ("id", "prompt", "messages", "tools", "json_schema", "json_object", "reasoning",
           *_SAMPLING)  # fmt: skip
_EFFORTS = flags_of(AnswersRequest)["reasoning"].choices
_OPENAI_FIELDS = ("custom_id", "method", "url", "body")
_CHAT_URL, _COMPLETION_URL = "/v1/chat/completions", "/v1/completions"
# Fields of OpenAI's bodies that have no effect here, and fields with one supported value.
_IGNORED = ("model", "user", "metadata", "store", "service_tier")
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "n": (1,),
    "best_of": (1,),
    "stream": (False,),
    "echo": (False,),
    "presence_penalty": (0,),
    "frequency_penalty": (0,),
    "logit_bias": ({},),
    "tool_choice": ("auto",),
    "parallel_tool_calls": (True,),
}
_BODY_FIELDS = ("prompt", "messages", "tools", "response_format", *_SAMPLING,
                "max_completion_tokens", "reasoning_effort", "top_logprobs", *_IGNORED,
                *_NEUTRAL)  # fmt: skip
_SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")


@dataclass(frozen=True, kw_only=True)
class Line:
    """A line of IN.

    Args:
        number: counted from 1.
        id: the id of its record.
        question: the question, unless there is an error.
        error: why the line cannot be answered.
    """

    number: int
    id: str | int
    question: Question | None = None
    error: str | None = None


class _LineError(Exception):
    """A line of IN is invalid; the message says why."""


def check_source(source: str) -> None:
    """Refuse an IN that cannot be read, without reading it, since it may be a pipe.

    Raises:
        PromptError: it does not exist, is a folder or a device, or cannot be read.
    """
    if source == "-":
        if sys.stdin is None:
            raise PromptError("IN is - and stdin is closed: expected lines on stdin")
        return
    path = Path(source)
    try:
        mode = path.stat().st_mode
        if stat.S_ISDIR(mode):
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
        if not os.access(path, os.R_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
    except (OSError, ValueError) as error:
        raise _cannot_read(source, error) from error
    if stat.S_ISCHR(mode) or stat.S_ISBLK(mode):
        raise PromptError(f"{source} is a device: expected a file or a pipe of JSON lines")


def _cannot_read(source: str, error: Exception) -> PromptError:
    reason = error.strerror if isinstance(error, OSError) else str(error)
    return PromptError(f"{source}: cannot be read ({reason})")


def read_source(source: str) -> tuple[bytes, os.stat_result]:
    """Read all of IN; return it with its stat.

    Raises:
        PromptError: it cannot be read, or is too large.
    """
    try:
        if source != "-":
            with Path(source).open("rb") as file:
                return _read_all(file, source), os.fstat(file.fileno())
        if sys.stdin is None:
            raise PromptError("IN is - and stdin is closed: expected lines on stdin")
        return _read_all(sys.stdin.buffer, "stdin"), os.fstat(sys.stdin.fileno())
    except OSError as error:
        raise _cannot_read(source, error) from error


def _read_all(file: BinaryIO, where: str) -> bytes:
    data = file.read(MOST_BYTES + 1)  # a pipe may never end
    if len(data) > MOST_BYTES:
        raise PromptError(f"{where} has more than {MOST_BYTES >> 30} GiB: divide it")
    return data


def read_lines(data: bytes, request: AnswersRequest, system: str | None) -> list[Line]:
    """The lines of IN, those that cannot be answered included; empty ones are none.

    Args:
        data: all of IN.
        request: its sampling is the default; instruct makes a prompt a message.
        system: put before a conversation that has no system or developer message.
    """
    found: list[Line] = []
    owners: dict[str | int, int] = {}
    for number, text in enumerate(data.removeprefix(b"\xef\xbb\xbf").split(b"\n"), 1):
        if not text.strip():
            continue
        id_: str | int = number
        question = None
        error = None
        try:
            value = _read_object(text)
            id_ = _read_id(value, number)
            question = _read_question(value, request, system)
        except _LineError as fault:
            error = f"line {number}: {fault}"
        if id_ in owners:
            question = None
            as_json = json.dumps(id_, ensure_ascii=False)
            error = (
                f"line {number}: the id {as_json} is that of line {owners[id_]} already: expected "
                f"one of its own"
            )
        owners.setdefault(id_, number)
        found.append(Line(number=number, id=id_, question=question, error=error))
    return found


def _read_object(text: bytes) -> dict[str, Any]:
    try:
        value = json.loads(text.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise _LineError(f"not UTF-8 text: byte 0x{text[error.start]:02x}") from error
    except RecursionError as error:
        raise _LineError("not JSON that can be read: nested too deeply") from error
    except ValueError as error:
        raise _LineError(f"not JSON ({error})") from error
    if not isinstance(value, dict):
        raise _LineError("expected a JSON object with prompt or messages")
    if _SURROGATE.search(text) and is_torn(json.dumps(value, ensure_ascii=False)):
        raise _LineError("holds half of a surrogate pair (\\ud800 to \\udfff), which is no text")
    return _without_nulls(value)


def _without_nulls(value: Mapping[str, Any]) -> dict[str, Any]:
    """Drop fields that are null, which clients send for unset ones."""
    return {name: entry for name, entry in value.items() if entry is not None}


def is_torn(text: str) -> bool:
    """Return whether a text contains a lone surrogate, which UTF-8 cannot encode."""
    return any("\ud800" <= character <= "\udfff" for character in text)


def _read_id(value: Mapping[str, Any], number: int) -> str | int:
    name = "custom_id" if "custom_id" in value or "body" in value else "id"
    id_ = value.get(name)
    if id_ is None:
        return number
    if isinstance(id_, (str, int)) and not isinstance(id_, bool):
        return id_
    raise _LineError(f"{name} is {shown(id_)}: expected a text or a whole number")


def _read_question(
    value: Mapping[str, Any], request: AnswersRequest, system: str | None
) -> Question:
    instruct = request.instruct
    if "custom_id" in value or "body" in value:
        value, url = _read_body(value)
        instruct = instruct and url is None  # a url already says which of the two it is
    else:
        _check_names(value, _FIELDS, "")
    prompt, messages, tools = (value.get(name) for name in ("prompt", "messages", "tools"))
    if (prompt is None) == (messages is None):
        raise _LineError("expected either prompt or messages")
    if prompt is not None and not isinstance(prompt, str):
        raise _LineError(f"prompt is {shown(prompt)}: expected a text")
    if messages is not None:
        try:
            messages = read_messages(messages)
        except PromptError as error:
            raise _LineError(str(error)) from error
    if tools is not None and not isinstance(tools, list):
        raise _LineError(f"tools are {errors.shown(tools)}: expected a list of function schemas")
    params = _read_sampling(value, request.sampling)
    held = _read_format(value)
    is_message = prompt is None or instruct
    if tools and not is_message:
        raise _LineError("tools need messages, or a prompt with --instruct")
    reasoning = value.get("reasoning")
    if reasoning is not None and not is_message:
        raise _LineError("reasoning needs messages, or a prompt with --instruct")
    if reasoning not in (None, *_EFFORTS):
        raise _LineError(f"reasoning is {shown(reasoning)}: expected {' or '.join(_EFFORTS)}")
    if not is_message:
        question = Question(prompt=prompt, params=params, **held)
    else:
        if messages is None:
            messages = [{"role": "user", "content": prompt}]
        held["reasoning"] = reasoning or request.reasoning
        question = Question(messages=messages, system=system, tools=tools, params=params, **held)
    if question.is_json(by_default=asks_json(request)):
        offers_tools = tools or (tools is None and is_message and request.tools is not None)
        for name, given in (("stop", params.stop), ("tools", offers_tools)):
            if given:
                raise _LineError(f"{name} and a JSON schema: expected one of them")
    return question


def asks_json(request: AnswersRequest) -> bool:
    """Whether the command line asks for JSON, which a line may change for itself."""
    return request.json_object or request.json_schema is not None


def _read_format(value: Mapping[str, Any]) -> dict[str, Any]:
    """Read a line's answer format, as arguments of Question."""
    schema, any_object = value.get("json_schema"), value.get("json_object")
    if schema is not None and not isinstance(schema, dict):
        raise _LineError(f"json_schema is {shown(schema)}: expected a schema, which is an object")
    if any_object is not None and not isinstance(any_object, bool):
        raise _LineError(f"json_object is {shown(any_object)}: expected true or false")
    if schema is not None and any_object:
        raise _LineError("json_schema and json_object: expected one of them")
    return {"json_schema": schema, "json_object": any_object}


def _read_body(value: Mapping[str, Any]) -> tuple[dict[str, Any], str | None]:
    """Return the body of a line in OpenAI's form, with our field names, and its url."""
    _check_names(value, _OPENAI_FIELDS, " in a line with custom_id or body")
    method, url, body = (value.get(name) for name in ("method", "url", "body"))
    if method not in (None, "POST"):
        raise _LineError(f"method is {shown(method)}: expected POST")
    if url not in (None, _CHAT_URL, _COMPLETION_URL):
        raise _LineError(f"url is {shown(url)}: expected {_CHAT_URL} or {_COMPLETION_URL}")
    if not isinstance(body, dict):
        raise _LineError(f"body is {shown(body)}: expected an object")
    body = _without_nulls(body)
    _check_names(body, _BODY_FIELDS, " in body")
    needed = {_CHAT_URL: "messages", _COMPLETION_URL: "prompt"}.get(url or "")
    if needed and needed not in body:
        raise _LineError(f"body has no {needed}, which {url} needs")
    for name, neutral in _NEUTRAL.items():
        if name in body and body[name] not in neutral:
            found = shown(body[name])
            raise _LineError(f"{name} is {found}: expected {shown(neutral[0])}, or to leave it out")
    fields = {name: body[name] for name in body if name in _FIELDS}
    if "max_completion_tokens" in body:
        fields["max_tokens"] = body["max_completion_tokens"]
    if "reasoning_effort" in body:
        fields["reasoning"] = body["reasoning_effort"]
    if "response_format" in body:
        fields |= _read_response_format(body["response_format"])
    if isinstance(body.get("logprobs"), bool):  # chat: a switch, with the number in a second field
        top = body.get("top_logprobs")
        fields["logprobs"] = (0 if top is None else top) if body["logprobs"] else None
    elif "top_logprobs" in body:
        raise _LineError("top_logprobs needs logprobs to be true")
    return fields, url


def _read_response_format(found: Any) -> dict[str, Any]:
    """Translate OpenAI's response_format; its `text` turns JSON off, whatever the flags say."""
    kind = found.get("type") if isinstance(found, dict) else None
    if kind not in ("text", "json_object", "json_schema"):
        raise _LineError(
            f"response_format is {shown(found)}: expected the type text, json_object or json_schema"
        )
    found = _without_nulls(found)
    _check_names(found, ("type", "json_schema"), " in response_format")
    if kind != "json_schema":
        return {"json_object": kind == "json_object"}
    named = found.get("json_schema")
    schema = named.get("schema") if isinstance(named, dict) else None
    if not isinstance(schema, dict):
        raise _LineError("response_format has no json_schema.schema, which is an object")
    return {"json_schema": schema}


def _check_names(value: Mapping[str, Any], known: Sequence[str], where: str) -> None:
    unknown = [name for name in value if name not in known]
    if unknown:
        raise _LineError(f"unknown field {shown(unknown[0])}{where}: expected {', '.join(known)}")


def _read_sampling(value: Mapping[str, Any], defaults: SamplingParams) -> SamplingParams:
    changes: dict[str, Any] = {}
    for name, flag in _SAMPLING.items():
        found = value.get(name)
        if found is None:
            continue
        if flag.kind is int and type(found) is not int:
            raise _LineError(f"{name} is {shown(found)}: expected a whole number")
        if flag.kind is float:
            try:
                if isinstance(found, bool) or not isinstance(found, (int, float)):
                    raise TypeError
                found = float(found)
            except (TypeError, OverflowError):
                raise _LineError(f"{name} is {shown(found)}: expected a number") from None
        if flag.repeats:
            found = [found] if isinstance(found, str) else found
            if not _is_list_of(found, str):
                raise _LineError(f"{name} is {shown(found)}: expected a text or a list of texts")
        changes[name] = found
    try:
        return replace(defaults, **changes)
    except UsageError as error:
        raise _LineError(str(error).removeprefix("--")) from error


def _is_list_of(value: Any, kind: type) -> bool:
    return isinstance(value, list) and all(isinstance(entry, kind) for entry in value)


def shown(value: Any) -> str:
    """Format a value as JSON, shortened."""
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else f"{text[:57]}..."
