"""The messages of a chat, encoded so that the model's own tokens are kept.

Uses templates only through the tokenizer; knows nothing of generation.
"""

import json
import sys
from collections.abc import Sequence
from typing import Any

from mistral_common.protocol.instruct.chunk import TextChunk, ThinkChunk
from mistral_common.protocol.instruct.messages import (
    AssistantMessage,
    SystemMessage,
    ToolMessage,
    UserMessage,
)
from mistral_common.protocol.instruct.tool_calls import FunctionCall, Tool
from mistral_common.protocol.instruct.tool_calls import ToolCall as CallOfTemplate

from mistral_chat.chat.thinking import Thought
from mistral_chat.chat.tokenizer import Tokenizer
from mistral_chat.chat.tools import MAX_DEPTH, ToolCall, nests_at_most

__all__ = ["NOT_RUN", "Conversation", "Message", "calls_of", "text_of", "thinking_of"]

NOT_RUN = "error: this call was not run"
ONLY_THOUGHT = "\u2026"  # an answer cut short in its thinking, for templates without thinking

Message = SystemMessage | UserMessage | AssistantMessage | ToolMessage


class Conversation:
    """Messages, with the token ids that the model chose for its answers.

    Thinking of earlier answers is given back to the model where its template has a place for it,
    as mistral-common does: that of every answer, not only of the last.

    Args:
        system: system prompt, or None.
        tools: functions offered to the model.
        reasoning: the effort asked for; None leaves it to the model.
    """

    def __init__(
        self,
        system: str | None = None,
        tools: Sequence[Tool] = (),
        reasoning: str | None = None,
    ) -> None:
        self.tools = list(tools)
        self.reasoning = reasoning
        self.messages: list[Message] = []
        self._written: dict[int, tuple[int, ...]] = {}  # message index -> its ids
        if system is not None:
            self.messages.append(SystemMessage(content=system))

    def encode(self, tokenizer: Tokenizer, new: Sequence[Message] = ()) -> list[int]:
        """Encode all messages, and then `new` ones, with the template, ready for an answer.

        Encoding an answer's text again can give other ids than the model chose: mistral-common
        drops trailing spaces, and sampled text has more than one tokenization. So the model's own
        ids replace them; the model sees what it wrote, and the cache stays valid up to there.

        Raises:
            PromptError: the template refuses the conversation, or its reasoning effort.
        """
        messages = [_as_template_has_it(message, tokenizer) for message in (*self.messages, *new)]
        ids = tokenizer.encode_conversation(messages, self.tools, self.reasoning)
        answers = [i for i, m in enumerate(messages) if isinstance(m, AssistantMessage)]
        return _put_back(ids, [self._written.get(i) for i in answers], tokenizer)

    def add_user(self, text: str) -> None:
        """Add a user message. Calls without a result get one that says they were not run."""
        self.close_calls(NOT_RUN)
        self.messages.append(UserMessage(content=text))

    def add_answer(
        self, text: str, ids: Sequence[int] | None, thought: Thought | None = None
    ) -> None:
        """Add the model's answer.

        Args:
            text: the answer.
            ids: its tokens without the end token; None if they encode more than this text.
            thought: what the model thought before it.
        """
        if ids is not None:
            self._written[len(self.messages)] = tuple(ids)
        self.messages.append(AssistantMessage(content=_content(text, thought)))

    def add_calls(
        self,
        text: str,
        calls: Sequence[ToolCall],
        ids: Sequence[int] | None,
        thought: Thought | None = None,
    ) -> None:
        """Add the model's tool calls; each of them needs a result later.

        Args:
            text: what the model said before them.
            calls: the calls, in the model's order.
            ids: its tokens without the end token; None lets the template write the calls.
            thought: what the model thought before them.
        """
        if ids is not None:
            self._written[len(self.messages)] = tuple(ids)
        listed = [
            CallOfTemplate(
                id=call.id,
                function=FunctionCall(
                    name=call.name, arguments=json.dumps(call.arguments, ensure_ascii=False)
                ),
            )
            for call in calls
        ]
        content = _content(text, thought) or None
        self.messages.append(AssistantMessage(content=content, tool_calls=listed))

    def add_result(self, call: ToolCall, text: str) -> None:
        """Add the result of a call. Text that some template cannot encode becomes an error."""
        self.messages.append(
            ToolMessage(content=_checked_result(text), tool_call_id=call.id, name=call.name)
        )

    @property
    def open_calls(self) -> list[ToolCall]:
        """Calls of the last answer that have no result yet."""
        done = set()
        for message in reversed(self.messages):
            if isinstance(message, ToolMessage):
                done.add(message.tool_call_id)
            elif isinstance(message, AssistantMessage):
                return [c for c in calls_of(message) if c.id not in done]
            else:
                break
        return []

    def close_calls(self, text: str) -> list[ToolCall]:
        """Give every open call this result, as templates require one; return these calls."""
        calls = self.open_calls
        for call in calls:
            self.add_result(call, text)
        return calls

    @property
    def system(self) -> str | None:
        """The system prompt, or None."""
        first = self.messages[0] if self.messages else None
        return str(first.content) if isinstance(first, SystemMessage) else None

    @property
    def last_ids(self) -> tuple[int, ...] | None:
        """The last message's ids, if the model chose them."""
        return self._written.get(len(self.messages) - 1)

    def set_system(self, system: str | None) -> None:
        """Replace or, with None, remove the system prompt."""
        had = self.system is not None
        rest = self.messages[1:] if had else self.messages
        new: list[Message] = [] if system is None else [SystemMessage(content=system)]
        shift = len(new) - had
        self.messages = [*new, *rest]
        self._written = {index + shift: ids for index, ids in self._written.items()}

    def undo(self) -> str | None:
        """Remove the last turn.

        Returns:
            the user message of that turn; None if there was none.
        """
        said = [i for i, message in enumerate(self.messages) if isinstance(message, UserMessage)]
        if not said:
            return None
        text = str(self.messages[said[-1]].content)
        self._keep_only(self.messages[: said[-1]])
        return text

    @property
    def n_turns(self) -> int:
        """Number of turns: a user message and all that follows it."""
        return sum(isinstance(message, UserMessage) for message in self.messages)

    def drop(self, n: int) -> None:
        """Remove the oldest turns; keep the system prompt.

        Args:
            n: how many, at most `n_turns`.
        """
        assert 0 <= n <= self.n_turns
        said = [i for i, message in enumerate(self.messages) if isinstance(message, UserMessage)]
        end = [*said, len(self.messages)][n]
        system = [m for m in self.messages[:end] if isinstance(m, SystemMessage)]
        self._keep_only([*system, *self.messages[end:]])

    def copy(self) -> "Conversation":
        """Return an independent copy."""
        other = Conversation(tools=self.tools, reasoning=self.reasoning)
        other.messages, other._written = list(self.messages), dict(self._written)
        return other

    def _keep_only(self, messages: list[Message]) -> None:
        """Keep only these of the messages, with their ids."""
        places = {id(message): index for index, message in enumerate(self.messages)}
        ids = [self._written.get(places[id(message)]) for message in messages]
        self._written = {index: own for index, own in enumerate(ids) if own is not None}
        self.messages = messages

    def clear(self) -> None:
        """Remove all messages but the system prompt."""
        self._keep_only([m for m in self.messages if isinstance(m, SystemMessage)])


def calls_of(message: Message) -> list[ToolCall]:
    """Return the calls of a message."""
    listed = (isinstance(message, AssistantMessage) and message.tool_calls) or []
    return [
        ToolCall(call.id, call.function.name, json.loads(call.function.arguments))
        for call in listed
    ]


def text_of(message: Message) -> str:
    """Return what a message says, without thinking; empty for calls alone."""
    content = message.content or ""
    if isinstance(content, str):
        return content
    return "".join(chunk.text for chunk in content if isinstance(chunk, TextChunk))


def thinking_of(message: Message) -> str:
    """Return what the model thought before it answered; empty for nothing."""
    content = message.content if isinstance(message, AssistantMessage) else None
    chunks = content if isinstance(content, list) else []
    return "".join(chunk.thinking for chunk in chunks if isinstance(chunk, ThinkChunk))


def _content(text: str, thought: Thought | None) -> str | list[Any]:
    if thought is None:
        return text
    thinking = ThinkChunk(thinking=thought.text, closed=thought.is_closed)
    return [thinking, TextChunk(text=text)] if text else [thinking]


def _as_template_has_it(message: Message, tokenizer: Tokenizer) -> Message:
    """Return a message without what the template has no place for."""
    if isinstance(message, SystemMessage):
        return tokenizer.system_message(text_of(message))
    if not isinstance(message, AssistantMessage):
        return message
    if message.tool_calls and message.content and not tokenizer.template.calls_have_text:
        return message.model_copy(update={"content": None})
    if isinstance(message.content, list) and not tokenizer.takes_thinking:
        text = text_of(message) or (None if message.tool_calls else ONLY_THOUGHT)
        return message.model_copy(update={"content": text})
    return message


def _checked_result(text: str) -> str:
    """Return the text, or an error if it is JSON that older templates cannot serialize again."""
    try:
        value = json.loads(text)
        json.dumps(value, ensure_ascii=False).encode()
        if nests_at_most(value, MAX_DEPTH):
            return text
        fault = f"is nested deeper than {MAX_DEPTH}"
    except json.JSONDecodeError:
        return text
    except RecursionError:
        fault = f"is nested deeper than {MAX_DEPTH}"
    except UnicodeEncodeError:
        fault = "holds half of a surrogate pair"
    except ValueError:
        fault = f"holds a number of more than {sys.get_int_max_str_digits():,} digits"
    return f"error: the result {fault}"


def _put_back(
    ids: list[int], written: Sequence[tuple[int, ...] | None], tokenizer: Tokenizer
) -> list[int]:
    """Replace each answer's ids with those that the model chose.

    An answer ends at an end token. It begins after the last control token before it that models do
    not write themselves (they do write a call's). If that one is the first or another end token,
    the template's marks are plain text (v1) and the beginning cannot be found.
    """
    outer = {int(tokenizer.raw.bos_id), tokenizer.eos_id}
    ends = [i for i, token in enumerate(ids) if token == tokenizer.eos_id]
    if len(ends) != len(written):
        return ids
    spliced = list(ids)
    for end, own in reversed(list(zip(ends, written, strict=True))):
        begin = end
        while begin > 0 and (
            not tokenizer.is_special(spliced[begin - 1]) or tokenizer.is_written(spliced[begin - 1])
        ):
            begin -= 1
        if own is not None and begin > 0 and spliced[begin - 1] not in outer:
            spliced[begin:end] = own
    return spliced
