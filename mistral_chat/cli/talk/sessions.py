"""Keep chats on disk: one JSON object per line, synced before the chat goes on.

A session file is only appended to: its first line identifies it, then come messages and marks of
what was undone. `kill -9` loses at most the answer being written. People can read the file, but
only its owner. Knows nothing of terminals or models.
"""

import errno
import json
import os
import secrets
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mistral_chat.chat.thinking import Thought
from mistral_chat.chat.tools import ToolCall
from mistral_chat.cli.console.durable import make_folder, sync_folder
from mistral_chat.cli.console.locks import lock
from mistral_chat.cli.talk import session_files
from mistral_chat.errors import SessionError

if TYPE_CHECKING:
    from mistral_chat.chat.conversation import Conversation

__all__ = ["Session"]

INTERRUPTED = "error: the chat ended before there was a result"


class Session:
    """The file of a chat, appended to as the chat goes on.

    Args:
        path: a file that `create` or `open` has checked.
        model: name of the current model.
        tokenizer: fingerprint of its tokenizer; it cannot use the ids of answers that another one
            wrote. Without it, and in older files, the model's name decides.
    """

    def __init__(self, path: Path, model: str, tokenizer: str | None = None) -> None:
        self.path = path
        self.model = model
        self.tokenizer = tokenizer

    @property
    def id(self) -> str:
        """The value of `--resume` and `/load`."""
        return self.path.stem

    @property
    def is_begun(self) -> bool:
        """Whether the file exists; it is created with the first message."""
        return self._begin is None

    @classmethod
    def create(
        cls,
        model: str,
        system: str | None,
        tokenizer: str | None = None,
        reasoning: str | None = None,
    ) -> "Session":
        """Begin a new session; its file is created with the first message.

        Raises:
            SessionError: the folder cannot be created.
        """
        folder = session_files.sessions_folder()
        try:
            make_folder(folder)
        except OSError as error:
            raise SessionError(
                f"{folder} cannot be made ({error.strerror}): expected a place to keep chats; "
                f"--no_save keeps none"
            ) from error
        now = datetime.now()
        session = cls(
            folder / f"{now:%Y%m%d-%H%M%S}-{secrets.token_hex(2)}.jsonl", model, tokenizer
        )
        session._begin = {
            "type": "session", "version": session_files.VERSION,
            "created": now.isoformat(timespec="seconds"), "model": model, "system": system,
            **({} if reasoning is None else {"reasoning": reasoning}),
        }  # fmt: skip
        return session

    _begin: dict[str, Any] | None = None
    _held: int | None = None  # file descriptor that holds the lock

    @classmethod
    def open(cls, name: str, model: str, tokenizer: str | None = None) -> "Session":
        """Open an existing session.

        Args:
            name: its id, the start of an id, a file, or `latest`.
            model: name of the current model.
            tokenizer: fingerprint of the current tokenizer.

        Raises:
            SessionError: no such session, more than one, or not a session file.
        """
        path = session_files.find(name)
        session_files.read(path)
        session_files.cut_torn_line(path)
        return cls(path, model, tokenizer)

    @property
    def obstacle(self) -> str | None:
        """Why the chat cannot be kept, such as a read-only disk; None if it can."""
        if self._begin is not None:
            return None
        return session_files.obstacle_to_writing(self.path)

    def hold(self) -> None:
        """Lock the session until `release`; do nothing if it has no file yet.

        Two processes appending to one file would mix their histories.

        Raises:
            SessionError: another process has the chat open.
        """
        if self._held is not None or self._begin is not None:
            return
        try:
            handle = os.open(self.path, os.O_RDONLY)
        except OSError as error:
            raise SessionError(f"{self.path}: cannot be read ({error.strerror})") from error
        if not lock(handle):
            os.close(handle)
            raise SessionError(
                f"chat {self.id} is open in another process: leave it there, /branch from it "
                f"there, or take another one (/list)"
            )
        self._held = handle

    def release(self) -> None:
        """Let other processes open it."""
        if self._held is not None:
            os.close(self._held)
            self._held = None

    def add_user(self, text: str, *, replaces: bool = False) -> None:
        """Save a user message, before it is answered.

        Args:
            text: the message.
            replaces: whether it replaces the last turn, once it is answered.
        """
        mark = {"replaces": True} if replaces else {}
        self._write({"role": "user", "content": text} | mark)

    def add_answer(
        self,
        text: str,
        ids: tuple[int, ...] | None,
        finish_reason: str,
        thought: Thought | None = None,
    ) -> None:
        """Save an answer, and what the model thought before it."""
        self._write(
            {
                "role": "assistant",
                **_thinking(thought),
                "content": text,
                "finish_reason": finish_reason,
                **self._made(ids),
            }
        )

    def add_calls(
        self,
        text: str,
        calls: Sequence[ToolCall],
        ids: tuple[int, ...] | None,
        thought: Thought | None = None,
    ) -> None:
        """Save the calls that the model asks for, before any is run."""
        listed = [{"id": c.id, "name": c.name, "arguments": c.arguments} for c in calls]
        self._write(
            {"role": "assistant", **_thinking(thought), "content": text, "tool_calls": listed,
             "finish_reason": "tool_calls", **self._made(ids)}
        )  # fmt: skip

    def _made(self, ids: tuple[int, ...] | None) -> dict[str, Any]:
        """Return the model, tokenizer and ids of an answer."""
        made: dict[str, Any] = {"model": self.model, "ids": ids}
        return made if self.tokenizer is None else {"tokenizer": self.tokenizer, **made}

    def _ids_of(self, answer: dict[str, Any]) -> Sequence[int] | None:
        """Return an answer's ids if they mean the same to the current model."""
        known = "tokenizer" in answer and self.tokenizer is not None
        own = (
            (answer["tokenizer"] == self.tokenizer) if known else answer.get("model") == self.model
        )
        ids: Sequence[int] | None = answer.get("ids") if own else None
        return ids

    def add_result(self, call: ToolCall, text: str) -> None:
        """Save the result of a call."""
        self._write({"role": "tool", "tool_call_id": call.id, "name": call.name, "content": text})

    def drop_last(self) -> None:
        """Save that the last turn got no answer and is not part of the chat."""
        self._write({"type": "unsaid"})

    def undo(self) -> None:
        """Save that the last turn was taken back."""
        self._write({"type": "undo"})

    def drop(self, n: int) -> None:
        """Save that the oldest turns were dropped."""
        self._write({"type": "drop", "exchanges": n})

    def set_system(self, system: str | None) -> None:
        """Save another system prompt."""
        self._write({"type": "system", "content": system})

    def set_reasoning(self, effort: str | None) -> None:
        """Save another reasoning effort; None leaves it to the model."""
        self._write({"type": "reasoning", "content": effort})

    def replay(self, conversation: "Conversation", *, save: bool = True) -> str | None:
        """Restore a conversation from the session.

        Args:
            conversation: overwritten, except for its tools.
            save: whether to save what is done about unanswered messages and calls.

        Returns:
            a message that was never answered, to be asked again; the conversation does not contain
            it. Calls without a result get one that says so.
        """
        state = session_files.read(self.path)
        unanswered = None
        if state.messages and state.messages[-1]["role"] == "user":
            unanswered = state.messages[-1]["content"]
            if save:
                self.drop_last()
            state.unsay()
        conversation.clear()
        conversation.set_system(state.system)
        conversation.reasoning = state.reasoning
        for message in state.messages:
            if message["role"] == "user":
                conversation.add_user(message["content"])
            elif message["role"] == "tool":
                conversation.add_result(_call_of(message), message["content"])
            else:
                ids, thought = self._ids_of(message), _thought_of(message)
                if message.get("tool_calls"):
                    calls = [ToolCall(**call) for call in message["tool_calls"]]
                    conversation.add_calls(message["content"], calls, ids, thought)
                else:
                    conversation.add_answer(message["content"], ids, thought)
        for call in conversation.close_calls(INTERRUPTED):
            if save:
                self.add_result(call, INTERRUPTED)
        return unanswered

    def branch(self) -> "Session":
        """Return an independent copy; this session stays unchanged.

        Raises:
            SessionError: the copy cannot be written.
        """
        begin = self._begin
        state = (
            session_files.read(self.path)
            if begin is None
            else session_files.State(system=begin["system"], reasoning=begin.get("reasoning"))
        )
        other = Session.create(self.model, state.system, self.tokenizer, state.reasoning)
        for message in state.messages:
            other._write(message)
        return other

    def _write(self, entry: dict[str, Any]) -> None:
        """Append a line and sync it to disk.

        Raises:
            SessionError: the line cannot be written.
        """
        entries = [entry] if self._begin is None else [self._begin, entry]
        lines = "".join(json.dumps(e, ensure_ascii=False) + "\n" for e in entries)
        try:
            # A file deleted by someone must not be created again without its first line.
            flags = os.O_WRONLY | os.O_APPEND | (os.O_CREAT | os.O_EXCL if self._begin else 0)
            handle = os.open(self.path, flags, 0o600)
            try:
                data = lines.encode("utf-8", "replace")
                if os.write(handle, data) != len(data):  # `open` cuts off the incomplete line
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
                os.fsync(handle)
            finally:
                os.close(handle)
            if self._begin is not None:  # a new file's name must survive a power cut, too
                sync_folder(self.path.parent)
        except OSError as error:
            raise SessionError(
                f"{self.path} cannot be written ({error.strerror}): this chat is no longer kept"
            ) from error
        self._begin = None


def _thinking(thought: Thought | None) -> dict[str, Any]:
    """Return an answer's fields of thinking; what ended within it says so."""
    if thought is None:
        return {}
    return {"thinking": thought.text} | ({} if thought.is_closed else {"is_cut": True})


def _thought_of(answer: dict[str, Any]) -> Thought | None:
    if "thinking" not in answer:
        return None
    return Thought(answer["thinking"], is_closed=not answer.get("is_cut"))


def _call_of(result: dict[str, Any]) -> ToolCall:
    """Return a call with the id and name of a result; its arguments are not needed."""
    return ToolCall(result["tool_call_id"], result["name"], {})
