"""Chats kept on disk as they go: one JSON object a line, written through before anything follows.

A session is a file that is only ever added to: its first line says what it is, then come messages,
and what was undone. `kill -9` loses at most the answer being written. Read by people, too; private
to their owner. Knows nothing of terminals or models.
"""

import errno
import json
import os
import secrets
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

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
    """A chat's file, added to as the chat goes.

    Args:
        path: of a file that `create` or `open` has looked at.
        model: the name of the model of now.
        tokenizer: fingerprint of its tokenizer: ids of answers that another one wrote are of no
            use to it. None, and files of before there were any, go by the model's name.
    """

    def __init__(self, path: Path, model: str, tokenizer: str | None = None) -> None:
        self.path = path
        self.model = model
        self.tokenizer = tokenizer

    @property
    def id(self) -> str:
        """What `--resume` and `/load` take."""
        return self.path.stem

    @property
    def is_begun(self) -> bool:
        """Whether there is a file: something was said."""
        return self._begin is None

    @classmethod
    def create(cls, model: str, system: str | None, tokenizer: str | None = None) -> "Session":
        """Begin a new one; its file comes with the first message.

        Raises:
            SessionError: the folder cannot be made.
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
        }  # fmt: skip
        return session

    _begin: dict[str, Any] | None = None
    _held: int | None = None  # the locked file

    @classmethod
    def open(cls, name: str, model: str, tokenizer: str | None = None) -> "Session":
        """An earlier one.

        Args:
            name: its id, the beginning of one, a file, or `latest`.
            model: of now.
            tokenizer: of now.

        Raises:
            SessionError: there is none, more than one, or the file is no session.
        """
        path = session_files.find(name)
        session_files.read(path)
        session_files.cut_torn_line(path)
        return cls(path, model, tokenizer)

    @property
    def obstacle(self) -> str | None:
        """Why the chat cannot be kept, such as a disk that is read-only; None where it can."""
        if self._begin is not None:
            return None
        return session_files.obstacle_to_writing(self.path)

    def hold(self) -> None:
        """Keep other processes from going on with it, until `release`; does nothing without a file.

        Two that add to one file, each after its own history, would make a chat of neither.

        Raises:
            SessionError: another one goes on with it.
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
        """Let others go on with it."""
        if self._held is not None:
            os.close(self._held)
            self._held = None

    def add_user(self, text: str, *, replaces: bool = False) -> None:
        """Keep what the person said, before it is answered.

        Args:
            text: the message.
            replaces: it stands in place of the last exchange, once it is answered.
        """
        mark = {"replaces": True} if replaces else {}
        self._write({"role": "user", "content": text} | mark)

    def add_answer(self, text: str, ids: tuple[int, ...] | None, finish_reason: str) -> None:
        """Keep what the model said."""
        self._write(
            {
                "role": "assistant",
                "content": text,
                "finish_reason": finish_reason,
                **self._made(ids),
            }
        )

    def add_calls(self, text: str, calls: Sequence[ToolCall], ids: tuple[int, ...] | None) -> None:
        """Keep that the model asks for calls, before any is run."""
        listed = [{"id": c.id, "name": c.name, "arguments": c.arguments} for c in calls]
        self._write(
            {"role": "assistant", "content": text, "tool_calls": listed,
             "finish_reason": "tool_calls", **self._made(ids)}
        )  # fmt: skip

    def _made(self, ids: tuple[int, ...] | None) -> dict[str, Any]:
        """Who made an answer, and as which tokens."""
        made: dict[str, Any] = {"model": self.model, "ids": ids}
        return made if self.tokenizer is None else {"tokenizer": self.tokenizer, **made}

    def _ids_of(self, answer: dict[str, Any]) -> Sequence[int] | None:
        """The tokens of an answer, where they are the same to the model of now."""
        known = "tokenizer" in answer and self.tokenizer is not None
        own = (
            (answer["tokenizer"] == self.tokenizer) if known else answer.get("model") == self.model
        )
        ids: Sequence[int] | None = answer.get("ids") if own else None
        return ids

    def add_result(self, call: ToolCall, text: str) -> None:
        """Keep what came of a call."""
        self._write({"role": "tool", "tool_call_id": call.id, "name": call.name, "content": text})

    def drop_last(self) -> None:
        """The last exchange came to no answer and is not part of the chat."""
        self._write({"type": "unsaid"})

    def undo(self) -> None:
        """Keep that the last exchange was taken back."""
        self._write({"type": "undo"})

    def drop(self, n: int) -> None:
        """Keep that the oldest exchanges were taken out."""
        self._write({"type": "drop", "exchanges": n})

    def set_system(self, system: str | None) -> None:
        """Keep another system prompt."""
        self._write({"type": "system", "content": system})

    def replay(self, conversation: "Conversation", *, save: bool = True) -> str | None:
        """Bring a conversation to where the session is.

        Args:
            conversation: is overwritten, its tools stay.
            save: keep what becomes of messages and calls that were never answered.

        Returns:
            a message that never got its answer, to be asked again; it is not in the conversation.
            Calls that never got their result get one that says so.
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
        for message in state.messages:
            if message["role"] == "user":
                conversation.add_user(message["content"])
            elif message["role"] == "tool":
                conversation.add_result(_call_of(message), message["content"])
            else:
                ids = self._ids_of(message)
                if message.get("tool_calls"):
                    calls = [ToolCall(**call) for call in message["tool_calls"]]
                    conversation.add_calls(message["content"], calls, ids)
                else:
                    conversation.add_answer(message["content"], ids)
        for call in conversation.close_calls(INTERRUPTED):
            if save:
                self.add_result(call, INTERRUPTED)
        return unanswered

    def branch(self) -> "Session":
        """A copy that goes on by itself; this one stays as it is.

        Raises:
            SessionError: it cannot be written.
        """
        begin = self._begin
        state = (
            session_files.read(self.path)
            if begin is None
            else session_files.State(system=begin["system"])
        )
        other = Session.create(self.model, state.system, self.tokenizer)
        for message in state.messages:
            other._write(message)
        return other

    def _write(self, entry: dict[str, Any]) -> None:
        """Add a line and have it on the disk.

        Raises:
            SessionError: it cannot be written.
        """
        entries = [entry] if self._begin is None else [self._begin, entry]
        lines = "".join(json.dumps(e, ensure_ascii=False) + "\n" for e in entries)
        try:
            # A file that somebody has taken away must not come back without its first line.
            flags = os.O_WRONLY | os.O_APPEND | (os.O_CREAT | os.O_EXCL if self._begin else 0)
            handle = os.open(self.path, flags, 0o600)
            try:
                data = lines.encode("utf-8", "replace")
                if os.write(handle, data) != len(data):  # `open` cuts off what there is of it
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
                os.fsync(handle)
            finally:
                os.close(handle)
            if self._begin is not None:  # a name that is new must outlive a power cut, too
                sync_folder(self.path.parent)
        except OSError as error:
            raise SessionError(
                f"{self.path} cannot be written ({error.strerror}): this chat is no longer kept"
            ) from error
        self._begin = None


def _call_of(result: dict[str, Any]) -> ToolCall:
    """The call that a result belongs to; its arguments stand with the call itself."""
    return ToolCall(result["tool_call_id"], result["name"], {})
