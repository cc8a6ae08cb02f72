"""Read OpenAI's form of messages, for Python and batch alike, and encode it with the template.

Every error names the message, counted from 1, the field, and what was expected. Reading imports
nothing heavy, so that messages can be checked before the model is loaded.
"""

import json
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from mistral_chat.chat.call_text import is_name, read_arguments
from mistral_chat.errors import PromptError, shown

if TYPE_CHECKING:
    from mistral_common.protocol.instruct.messages import ChatMessage
    from mistral_common.protocol.instruct.tool_calls import Tool

    from mistral_chat.chat.tokenizer import Tokenizer

__all__ = ["encode_messages", "ends_with_prefix", "read_messages"]

_ROLES = ("system", "developer", "user", "assistant", "tool")
# Fields allowed in a message. No template uses OpenAI's `name` of a speaker, so it is ignored.
_FIELDS: dict[str, tuple[str, ...]] = {
    "system": ("role", "content", "name"),
    "user": ("role", "content", "name"),
    "assistant": ("role", "content", "name", "tool_calls", "prefix", "reasoning",
                  "reasoning_content"),
    "tool": ("role", "content", "name", "tool_call_id"),
}  # fmt: skip
_FOLLOWERS = {
    "system": ("user", "assistant", "system"),
    "user": ("assistant", "user", "system"),
    "assistant": ("user", "tool", "assistant"),
    "tool": ("assistant", "tool", "user"),
}
_NAMES = "1 to 64 of a-z, A-Z, 0-9, _, -"
_CALL_ID = 9  # letters and digits, in templates that write it


def read_messages(messages: object) -> list[dict[str, Any]]:
    """Check a conversation, and drop fields that are null or have no effect.

    Args:
        messages: a list of objects with `role` and `content`. `developer` is a synonym of system.
            With `prefix` on a last assistant message the answer continues its text.

    Returns:
        the messages, checked as far as possible without a template; reading them again changes
        nothing.

    Raises:
        PromptError: not a valid conversation; the message says why.
    """
    if not isinstance(messages, Sequence) or isinstance(messages, (str, bytes)):
        raise PromptError(f"messages are {shown(messages)}: expected a list of objects")
    if not messages:
        raise PromptError("messages are empty: expected one at least, such as a user's")
    read = [_read_message(entry, f"message {n}") for n, entry in enumerate(messages, 1)]
    _check_order(read)
    _check_results(read)
    return read


def ends_with_prefix(messages: Sequence[Mapping[str, Any]]) -> bool:
    """Return whether the answer continues the text of the last message."""
    return messages[-1].get("prefix") is True


def encode_messages(
    tokenizer: "Tokenizer",
    messages: object,
    tools: Sequence["Tool"],
    system: str | None = None,
    reasoning: str | None = None,
) -> list[int]:
    """Encode a conversation in OpenAI's form with the model's template.

    Args:
        tokenizer: the model's tokenizer.
        messages: the conversation, as `read_messages` takes it.
        tools: functions offered to the model.
        system: system prompt, if the conversation has no system or developer message.
        reasoning: effort; None leaves it to the model.

    Raises:
        PromptError: not a valid conversation, or one that the template does not support.
    """
    read = read_messages(messages)
    for number, message in enumerate(read, 1):
        _check_template(tokenizer, message, f"message {number}")
    made: list[Any] = [_as_mistral_has_it(message) for message in read]
    if system is not None and all(message["role"] != "system" for message in read):
        made.insert(0, tokenizer.system_message(system))
    return tokenizer.encode_conversation(made, tools, reasoning)


def _as_mistral_has_it(message: dict[str, Any]) -> "ChatMessage":
    from mistral_common.protocol.instruct import messages as known

    if message["role"] == "system":
        return known.SystemMessage.from_openai(message)
    if message["role"] == "user":
        return known.UserMessage.from_openai(message)
    if message["role"] == "tool":
        return known.ToolMessage.from_openai(message)
    made = known.AssistantMessage.from_openai(message)
    made.prefix = ends_with_prefix([message])  # from_openai ignores it
    return made


def _read_message(entry: object, where: str) -> dict[str, Any]:
    if not isinstance(entry, Mapping):
        raise PromptError(f"{where} is {shown(entry)}: expected an object with role and content")
    role = entry.get("role")
    if role not in _ROLES:
        raise PromptError(f"{where}: role {_found(entry, 'role')}: expected {_listed(_ROLES)}")
    role = "system" if role == "developer" else role
    for name, value in entry.items():
        if name not in _FIELDS[role] and value not in (None, False, "", [], {}):
            raise PromptError(
                f"{where}: the field {shown(name)} has no meaning in a {role} message: expected "
                f"{_listed(_FIELDS[role])}"
            )
    if role == "assistant":
        return _read_assistant(entry, where)
    message = {"role": role, "content": _read_content(entry, role, where)}
    if role == "tool":
        message["tool_call_id"] = _read_text(entry, "tool_call_id", where, "the id of a call")
        if entry.get("name") is not None:
            message["name"] = _read_name(entry, where)
    return message


def _read_assistant(entry: Mapping[str, Any], where: str) -> dict[str, Any]:
    message: dict[str, Any] = {"role": "assistant"}
    calls = entry.get("tool_calls")
    if calls is not None:
        if not isinstance(calls, (list, tuple)):
            raise PromptError(f"{where}: tool_calls is {shown(calls)}: expected a list of calls")
        read = [_read_call(call, f"{where}: call {n}") for n, call in enumerate(calls, 1)]
        if read:
            message["tool_calls"] = read
    content = [] if entry.get("content") is None else _read_content(entry, "assistant", where)
    content = _with_reasoning(content, entry, where)
    if content:
        message["content"] = content
    elif "tool_calls" not in message:
        raise PromptError(
            f"{where}: content {_found(entry, 'content')} and there are no tool_calls: expected "
            f"one of them"
        )
    prefix = entry.get("prefix")
    if prefix is not None and not isinstance(prefix, bool):
        raise PromptError(f"{where}: prefix is {shown(prefix)}: expected true or false")
    if prefix:
        if "tool_calls" in message:
            raise PromptError(f"{where}: prefix and tool_calls: expected one of them")
        message["prefix"] = True
    return message


def _with_reasoning(content: Any, entry: Mapping[str, Any], where: str) -> Any:
    """Return the content with the text of `reasoning` or `reasoning_content` put before it."""
    named = [n for n in ("reasoning", "reasoning_content") if entry.get(n) not in (None, "")]
    if not named:
        return content
    thought = _read_text(entry, named[0], where, "a text")
    if entry[named[-1]] != thought:
        raise PromptError(f"{where}: reasoning and reasoning_content differ: expected one of them")
    parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
    if any(part["type"] == "thinking" for part in parts):
        raise PromptError(f"{where}: {named[0]} and a thinking part of content: expected one")
    return [{"type": "thinking", "thinking": thought}, *parts]


def _read_call(call: object, where: str) -> dict[str, Any]:
    if not isinstance(call, Mapping):
        raise PromptError(f"{where} is {shown(call)}: expected an object with id and function")
    id_ = _read_text(call, "id", where, "the text that its tool message has as tool_call_id")
    if call.get("type") not in (None, "function"):
        raise PromptError(f"{where}: type is {shown(call['type'])}: expected function")
    function = call.get("function")
    if not isinstance(function, Mapping):
        found = _found(call, "function")
        raise PromptError(f"{where}: function {found}: expected an object with name and arguments")
    name = _read_name(function, where)
    given = function.get("arguments")
    arguments = read_arguments(given)
    if arguments is None:
        raise PromptError(
            f"{where}: arguments {_found(function, 'arguments')}: expected a JSON object, or its "
            f"text"
        )
    text = given if isinstance(given, str) and arguments else json.dumps(arguments)
    return {"id": id_, "type": "function", "function": {"name": name, "arguments": text}}


def _read_content(entry: Mapping[str, Any], role: str, where: str) -> Any:
    content = entry.get("content")
    if isinstance(content, (list, tuple)):
        return [
            _read_part(part, role, f"{where}: part {n} of content")
            for n, part in enumerate(content, 1)
        ]
    if content == "":
        return ""
    return _read_text(entry, "content", where, "a text or a list of text parts")


def _read_part(part: object, role: str, where: str) -> dict[str, Any]:
    if not isinstance(part, Mapping):
        raise PromptError(f"{where} is {shown(part)}: expected an object with type and text")
    kind = part.get("type")
    if kind == "text":
        text = "" if part.get("text") == "" else _read_text(part, "text", where, "a text")
        return {"type": "text", "text": text}
    if kind == "thinking" and role in ("assistant", "system"):
        closed = part.get("closed") is not False
        thought = _read_text(part, "thinking", where, "a text")
        return {"type": "thinking", "thinking": thought, "closed": closed}
    # No images or audio: mistral-common would fetch them and put their tokens into the prompt.
    raise PromptError(f"{where}: type {_found(part, 'type')}: expected text, and nothing else")


def _read_text(entry: Mapping[str, Any], name: str, where: str, expected: str) -> str:
    """Return the text of a field, which must not be empty."""
    text = entry.get(name)
    if not isinstance(text, str) or not text:
        raise PromptError(f"{where}: {name} {_found(entry, name)}: expected {expected}")
    if any("\ud800" <= character <= "\udfff" for character in text):
        raise PromptError(f"{where}: {name} holds half of a surrogate pair: expected UTF-8")
    return text


def _read_name(entry: Mapping[str, Any], where: str) -> str:
    name = _read_text(entry, "name", where, _NAMES)
    if not is_name(name):
        raise PromptError(f"{where}: name is {shown(name)}: expected {_NAMES}")
    return name


def _found(entry: Mapping[str, Any], name: str) -> str:
    if name not in entry:
        return "is missing"
    return "is null" if entry[name] is None else f"is {shown(entry[name])}"


def _listed(words: Sequence[str]) -> str:
    return f"{', '.join(words[:-1])} or {words[-1]}"


def _check_order(messages: Sequence[dict[str, Any]]) -> None:
    """Refuse an order of roles that no template supports."""
    for number, (message, following) in enumerate(pairwise(messages), 1):
        before, after = message["role"], following["role"]
        if "prefix" in message:
            raise PromptError(f"message {number}: prefix is true: expected it on the last message")
        if after not in _FOLLOWERS[before]:
            raise PromptError(
                f"message {number + 1}: role {after} after {before}: expected "
                f"{_listed(_FOLLOWERS[before])}"
            )
    first, last = messages[0], messages[-1]
    if last["role"] == "assistant" and "prefix" not in last:
        raise PromptError(
            f"message {len(messages)}: the last message is the assistant's: expected the user's or "
            f"a tool's, or prefix true, which has the answer go on from it"
        )
    if len(messages) == 1 and first["role"] == "assistant":
        raise PromptError("message 1: prefix without a message before it: expected the user's")


def _check_results(messages: Sequence[dict[str, Any]]) -> None:
    """Refuse results without a call, and calls that the next assistant message finds unanswered."""
    open_: dict[str, int] = {}  # id of a call without a result -> number of its message
    for number, message in enumerate(messages, 1):
        if message["role"] == "tool":
            id_ = message["tool_call_id"]
            if id_ not in open_:
                waiting = ", ".join(map(shown, open_)) or "a call before it"
                raise PromptError(
                    f"message {number}: tool_call_id is {shown(id_)}, which is no call without a "
                    f"result: expected {waiting}"
                )
            del open_[id_]
        elif message["role"] == "assistant":
            for id_, owner in open_.items():
                raise PromptError(
                    f"message {owner}: the call {shown(id_)} has no result: expected a tool "
                    f"message with this tool_call_id before message {number}"
                )
            for n, call in enumerate(message.get("tool_calls", ()), 1):
                if call["id"] in open_:
                    raise PromptError(
                        f"message {number}: call {n}: id is {shown(call['id'])}, which an earlier "
                        f"call has: expected one of its own"
                    )
                open_[call["id"]] = number


def _check_template(tokenizer: "Tokenizer", message: dict[str, Any], where: str) -> None:
    """Refuse what this template does not support, as far as one message shows it."""
    template = f"the {tokenizer.version} template"
    calls, content = message.get("tool_calls", ()), message.get("content")
    if tokenizer.template.calls_have_ids:
        ids = [(f"call {n}: id", call["id"]) for n, call in enumerate(calls, 1)]
        if message["role"] == "tool":
            ids.append(("tool_call_id", message["tool_call_id"]))
        for name, id_ in ids:
            if not (len(id_) == _CALL_ID and id_.isascii() and id_.isalnum()):
                raise PromptError(
                    f"{where}: {name} is {shown(id_)}: {template} takes {_CALL_ID} letters and "
                    f"digits"
                )
    if tokenizer.tool_calls_id is None and (calls or message["role"] == "tool"):
        raise PromptError(f"{where}: {template} knows no calls of functions: expected text alone")
    if calls and content and not tokenizer.template.calls_have_text:
        raise PromptError(
            f"{where}: content and tool_calls: {template} takes one of them: leave content out"
        )
    is_system = message["role"] == "system"
    takes_thinking = tokenizer.takes_system_thinking if is_system else tokenizer.takes_thinking
    if not takes_thinking and isinstance(content, list):
        for n, part in enumerate(content, 1):
            if part["type"] == "thinking":
                raise PromptError(
                    f"{where}: part {n} of content is thinking, which {template} does not know"
                    f"{' in a system prompt' * is_system}: leave it out"
                )
