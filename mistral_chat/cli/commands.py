"""What the chat's commands do that needs no terminal: settings, texts, the clipboard."""

import base64
from collections.abc import Iterator
from dataclasses import fields, replace
from pathlib import Path

from mistral_common.protocol.instruct.messages import AssistantMessage, SystemMessage, UserMessage

from mistral_chat.chat.conversation import Conversation
from mistral_chat.config import SamplingParams
from mistral_chat.errors import OutputError, UsageError

__all__ = [
    "TAKE_WORDS",
    "clipboard_sequence",
    "last_exchange",
    "n_said",
    "sampling_line",
    "set_sampling",
    "shorten",
    "write_markdown",
]

TAKE_WORDS = ("/system", "/set", "/file", "/save", "/load")
SETTABLE = ("max_tokens", "temperature", "top_p", "top_k", "min_p", "seed", "stop")
UNSET = ("none", "default", "-")
_WHOLE = ("max_tokens", "top_k", "seed")


def set_sampling(params: SamplingParams, words: str) -> SamplingParams:
    """The settings with one changed.

    Args:
        params: as they are.
        words: a name and a value; `default` takes back what was set. `stop` adds a text.

    Raises:
        UsageError: an unknown name, or a value out of its range.
    """
    name, _, value = words.replace("=", " ", 1).partition(" ")
    name, value = name.removeprefix("--").replace("-", "_"), value.strip()
    if name not in SETTABLE or not value:
        raise UsageError(f"/set takes a name and a value; the names are {', '.join(SETTABLE)}")
    if value in UNSET:
        defaults = {field.name: field.default for field in fields(SamplingParams)}
        return replace(params, **{name: defaults[name]})  # type: ignore[arg-type]
    if name == "stop":
        return replace(params, stop=(*params.stop, value))
    try:
        number = int(value) if name in _WHOLE else float(value)
    except ValueError:
        kind = "whole number" if name in _WHOLE else "number"
        raise UsageError(f"/set {name}: {value!r} is no {kind}") from None
    return replace(params, **{name: number})  # type: ignore[arg-type]


def sampling_line(params: SamplingParams) -> str:
    """All settings on a line."""
    values = {name: getattr(params, name) for name in SETTABLE}
    values["stop"] = list(params.stop) or None
    return ", ".join(f"{name} {'-' if v is None else v}" for name, v in values.items())


def shorten(text: str, width: int = 70) -> str:
    """A text on one line, cut where it is long."""
    line = " ".join(text.split())
    return line if len(line) <= width else line[: width - 1] + "…"


def n_said(conversation: Conversation) -> int:
    """Messages but the system prompt."""
    return sum(not isinstance(message, SystemMessage) for message in conversation.messages)


def last_exchange(conversation: Conversation) -> Iterator[str]:
    """The last message of each side, to remind of."""
    for message in conversation.messages[-2:]:
        if isinstance(message, UserMessage):
            yield f"> {shorten(str(message.content), 200)}"
        elif isinstance(message, AssistantMessage):
            yield shorten(str(message.content or ""), 400)


def clipboard_sequence(text: str) -> str:
    """What tells a terminal to take a text on its clipboard (OSC 52), also over ssh."""
    return f"\x1b]52;c;{base64.b64encode(text.encode()).decode()}\x07"


def write_markdown(path: Path, conversation: Conversation) -> None:
    """Write a chat for people to read; an existing file is not overwritten.

    Raises:
        OutputError: there is such a file, or it cannot be written.
    """
    titles = {"system": "System", "user": "You", "assistant": "Model"}
    parts = [
        f"## {titles.get(message.role, message.role)}\n\n{message.content or ''}\n"
        for message in conversation.messages
    ]
    try:
        with path.open("x", encoding="utf-8") as file:
            file.write("\n".join(parts))
    except FileExistsError as error:
        raise OutputError(f"{path} is there already: expected a new name") from error
    except OSError as error:
        raise OutputError(f"{path} cannot be written ({error.strerror})") from error
