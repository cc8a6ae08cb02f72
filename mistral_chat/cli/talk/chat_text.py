"""A chat's messages as text for people: on one line, in a file, on the clipboard.

Knows nothing of terminals except the escape sequence that sets the clipboard.
"""

import base64
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from mistral_common.protocol.instruct.messages import (
    AssistantMessage,
    ToolMessage,
    UserMessage,
)

from mistral_chat.chat.conversation import (
    Conversation,
    Message,
    calls_of,
    text_of,
    thinking_of,
)
from mistral_chat.chat.tools import UNREADABLE, ToolCall
from mistral_chat.cli.console.printing import clean, wrap
from mistral_chat.errors import OutputError

__all__ = [
    "call_line",
    "clipboard_sequence",
    "last_turn",
    "shorten",
    "thinking_of_last_turn",
    "two_columns",
    "visible",
    "write_markdown",
]


def shorten(text: str, width: int = 70) -> str:
    """Put text on one line, shortened, without control characters."""
    line = clean(" ".join(text.split()))
    return line if len(line) <= width else line[: width - 1] + "…"


def two_columns(rows: Mapping[str, str], columns: int, least: int) -> str:
    """Format names and meanings with word wrap; below each other in a narrow window.

    Args:
        rows: name -> meaning.
        columns: width of the window.
        least: the fewest columns in which both fit side by side.
    """
    width = max(map(len, rows))
    lines: list[str] = []
    for name, meaning in rows.items():
        if columns >= least:
            lines += wrap(f"{name:{width}}  {meaning}", columns, width + 2)
        else:
            lines += [*wrap(name, columns), *wrap(f"  {meaning}", columns)]
    return "\n".join(lines)


def call_line(call: ToolCall) -> str:
    """Format a call on one line, such as `weather(city="Paris")`, with invisible text escaped."""
    if call.name == UNREADABLE:
        return f"(unreadable) {visible(str(call.arguments.get('text', '')))}"
    arguments = ", ".join(
        f"{name}={json.dumps(value, ensure_ascii=False)}" for name, value in call.arguments.items()
    )
    return f"{call.name}({visible(arguments)})"


def visible(text: str) -> str:
    """Escape control characters and other invisible ones, such as those that reverse text."""
    return "".join(c if c.isprintable() else f"\\u{ord(c):04x}" for c in text)


def _messages_of_last_turn(conversation: Conversation) -> Sequence[Message]:
    said = [i for i, m in enumerate(conversation.messages) if isinstance(m, UserMessage)]
    return conversation.messages[said[-1] if said else 0 :]


def thinking_of_last_turn(conversation: Conversation) -> str:
    """Return what the model thought in the last turn; empty for nothing."""
    return "\n\n".join(filter(None, map(thinking_of, _messages_of_last_turn(conversation))))


def last_turn(conversation: Conversation) -> Iterator[str]:
    """Yield the last turn as short lines, to remind the user of it."""
    for message in _messages_of_last_turn(conversation):
        if isinstance(message, UserMessage):
            yield f"> {shorten(str(message.content), 200)}"
        elif isinstance(message, AssistantMessage):
            if text := text_of(message):
                yield shorten(text, 400)
            elif thinking_of(message) and not message.tool_calls:
                yield "(an answer that ended within its thinking)"
            for call in calls_of(message):
                yield f"calls {shorten(call_line(call), 200)}"


def clipboard_sequence(text: str) -> str:
    """Return the sequence that sets the terminal's clipboard (OSC 52), which works over ssh."""
    return f"\x1b]52;c;{base64.b64encode(text.encode()).decode()}\x07"


def _markdown_of(message: Message) -> str:
    """Format a message under a heading; results are fenced, since they are not Markdown."""
    titles = {"system": "System", "user": "You", "assistant": "Model"}
    if isinstance(message, ToolMessage):
        text = str(message.content)
        runs = re.findall("`+", text)
        fence = "`" * max(3, 1 + max(map(len, runs), default=0))
        return f"## Result of {message.name}\n\n{fence}\n{text}\n{fence}\n"
    parts = [text_of(message)] if message.content else []
    if thinking := thinking_of(message):
        parts.insert(0, f"<details><summary>Thinking</summary>\n\n{thinking}\n\n</details>")
    parts += [f"calls `{call_line(call)}`" for call in calls_of(message)]
    return f"## {titles[message.role]}\n\n" + "\n\n".join(parts) + "\n"


def write_markdown(path: Path, conversation: Conversation) -> None:
    """Write a chat as Markdown; never overwrite a file.

    Raises:
        OutputError: the file exists already, or cannot be written.
    """
    parts = [_markdown_of(message) for message in conversation.messages]
    try:
        with path.open("x", encoding="utf-8") as file:
            file.write("\n".join(parts))
    except FileExistsError as error:
        raise OutputError(f"{path} is there already: expected a new name") from error
    except OSError as error:
        raise OutputError(f"{path} cannot be written ({error.strerror})") from error
