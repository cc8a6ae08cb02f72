"""Chats kept on disk as they go: one JSON object a line, written through before anything follows.

A session is a file that is only ever added to: its first line says what it is, then come messages,
and what was undone. `kill -9` loses at most the answer being written. Read by people, too; private
to their owner. Knows nothing of terminals or models.
"""

import errno
import fcntl
import json
import os
import secrets
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

import platformdirs

from mistral_chat.chat.conversation import Conversation
from mistral_chat.chat.tools import ToolCall
from mistral_chat.cli.flags import LATEST_SESSION
from mistral_chat.errors import SessionError

__all__ = ["Session", "Summary", "sessions_folder", "summaries"]

VERSION = 1
INTERRUPTED = "error: the chat ended before there was a result"


def sessions_folder() -> Path:
    """Where sessions are kept: in the data directory of the XDG standard, on Linux."""
    return Path(platformdirs.user_data_path("mistral-chat")) / "sessions"


@dataclass(frozen=True, slots=True)
class Summary:
    """One session of a list.

    Args:
        id: its name.
        model: whom it was held with, last.
        begins: the first message, on one line.
        n_messages: of both sides.
        changed: when something was last said.
    """

    id: str
    model: str
    begins: str
    n_messages: int
    changed: datetime


@dataclass
class _State:
    """What a file's lines add up to.

    Args:
        model: of now.
        system: prompt.
        messages: as they stand in the file.
        replaced: what the last exchange stands in place of.
        n_lines: read so far.
    """

    model: str = ""
    system: str | None = None
    messages: list[dict[str, Any]] = field(default_factory=list)
    replaced: list[dict[str, Any]] = field(default_factory=list)
    n_lines: int = 0

    def take_back(self) -> list[dict[str, Any]]:
        """Remove the last exchange, and give it."""
        said = [i for i, message in enumerate(self.messages) if message["role"] == "user"]
        begin = said[-1] if said else 0
        gone = self.messages[begin:]
        del self.messages[begin:]
        return gone

    def unsay(self) -> None:
        """Remove the last exchange, which came to nothing; what it was to replace comes back."""
        self.take_back()
        self.messages += self.replaced
        self.replaced = []

    def drop(self, n: int) -> None:
        """Remove the oldest exchanges."""
        said = [i for i, message in enumerate(self.messages) if message["role"] == "user"]
        del self.messages[: [*said, len(self.messages)][min(n, len(said))]]


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

    @classmethod
    def create(cls, model: str, system: str | None, tokenizer: str | None = None) -> "Session":
        """Begin a new one; its file comes with the first message.

        Raises:
            SessionError: the folder cannot be made.
        """
        folder = sessions_folder()
        try:
            folder.mkdir(parents=True, exist_ok=True, mode=0o700)
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
            "type": "session", "version": VERSION, "created": now.isoformat(timespec="seconds"),
            "model": model, "system": system,
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
        path = _find(name)
        _read(path)
        _cut_torn_line(path)
        return cls(path, model, tokenizer)

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
        if not _lock(handle):
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

    def clear(self) -> None:
        """Keep that the chat began anew."""
        self._write({"type": "clear"})

    def set_system(self, system: str | None) -> None:
        """Keep another system prompt."""
        self._write({"type": "system", "content": system})

    def replay(self, conversation: Conversation, *, save: bool = True) -> str | None:
        """Bring a conversation to where the session is.

        Args:
            conversation: is overwritten, its tools stay.
            save: keep what becomes of messages and calls that were never answered.

        Returns:
            a message that never got its answer, to be asked again; it is not in the conversation.
            Calls that never got their result get one that says so.
        """
        state = _read(self.path)
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
        state = _read(self.path) if begin is None else _State(system=begin["system"])
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
        except OSError as error:
            raise SessionError(
                f"{self.path} cannot be written ({error.strerror}): this chat is no longer kept"
            ) from error
        self._begin = None


def summaries() -> list[Summary]:
    """All sessions, the latest first. Files that are none are left out."""
    found = []
    for path in sessions_folder().glob("*.jsonl"):
        try:
            state = _read(path)
            changed = datetime.fromtimestamp(path.stat().st_mtime)
        except (SessionError, OSError):
            continue
        first = next((m["content"] for m in state.messages if m["role"] == "user"), "")
        begins = " ".join(first.split())
        found.append(Summary(path.stem, state.model, begins, len(state.messages), changed))
    return sorted(found, key=lambda s: (s.changed, s.id), reverse=True)


def _find(name: str) -> Path:
    folder = sessions_folder()
    if name == LATEST_SESSION:
        known = summaries()
        if not known:
            raise SessionError(f"no chat is kept in {folder}: nothing to go on with")
        return folder / f"{known[0].id}.jsonl"
    if "/" in name or name.endswith(".jsonl"):
        try:
            path = Path(name).expanduser()
            if path.is_file():
                return path
        except (OSError, RuntimeError) as error:  # no permission; ~NAME, and nobody has that name
            raise SessionError(f"{name}: cannot be read ({error})") from error
        raise SessionError(f"{name}: no such file")
    matches = sorted(folder.glob(f"{name}*.jsonl")) if name.replace("-", "").isalnum() else []
    if not matches:
        raise SessionError(f"no chat {name!r} in {folder}: /list shows those there are")
    if len(matches) > 1:
        some = ", ".join(path.stem for path in matches[:4])
        raise SessionError(f"{name!r} begins {len(matches)} chats ({some}): say more of it")
    return matches[0]


def _cut_torn_line(path: Path) -> None:
    """Take away the end of a line that was never finished, so that the next one stands alone."""
    try:
        with path.open("rb+") as file:
            # Where another process holds the file, such a line is on its way.
            if _lock(file.fileno()) and not (data := file.read()).endswith(b"\n"):
                file.truncate(data.rfind(b"\n") + 1)
                os.fsync(file.fileno())
    except OSError as error:
        raise SessionError(f"{path}: cannot be written ({error.strerror})") from error


def _lock(handle: int) -> bool:
    """Lock a file until it is closed; False where another process has."""
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return True  # some file systems of clusters know no locks, and chats are kept there, too
    return True


def _lines(path: Path) -> Iterator[dict[str, Any]]:
    """The objects of a file; a last line that was never finished is left out."""
    try:
        data = path.read_bytes()
    except OSError as error:
        raise SessionError(f"{path}: cannot be read ({error.strerror})") from error
    for number, line in enumerate(data.split(b"\n")[:-1], 1):
        try:
            entry = json.loads(line)
            json.dumps(entry, ensure_ascii=False).encode()  # half a surrogate pair is no text
        except (ValueError, RecursionError) as error:
            raise SessionError(f"{path}, line {number}: not JSON ({error})") from error
        if not isinstance(entry, dict):
            raise SessionError(f"{path}, line {number}: expected an object")
        yield entry


def _call_of(result: dict[str, Any]) -> ToolCall:
    """The call that a result belongs to; its arguments stand with the call itself."""
    return ToolCall(result["tool_call_id"], result["name"], {})


def _is_message(entry: dict[str, Any]) -> bool:
    if not isinstance(entry.get("content"), str):
        return False
    if entry.get("role") == "tool":
        return all(isinstance(entry.get(name), str) for name in ("tool_call_id", "name"))
    calls, ids = entry.get("tool_calls", []), entry.get("ids") or []
    return (
        entry.get("role") in ("user", "assistant")
        and isinstance(ids, list)
        and all(type(id_) is int for id_ in ids)
        and isinstance(calls, list)
        and all(map(_is_call, calls))
    )


def _is_call(value: Any) -> bool:
    kinds = {"id": str, "name": str, "arguments": dict}
    return (
        isinstance(value, dict)
        and value.keys() == kinds.keys()
        and all(isinstance(value[name], kind) for name, kind in kinds.items())
    )


def _checked_system(value: Any, path: Path) -> str | None:
    if value is not None and not isinstance(value, str):
        raise SessionError(f"{path}: its system prompt is {value!r}: expected a text")
    return value


def _read(path: Path) -> _State:
    """What the lines of a session's file add up to.

    Raises:
        SessionError: the file cannot be read or is no session.
    """
    state = _State()
    for entry in _lines(path):
        state.n_lines += 1
        if state.n_lines == 1:
            if entry.get("type") != "session" or entry.get("version") != VERSION:
                raise SessionError(f"{path}: no chat of this program (version {VERSION})")
            state.model = str(entry.get("model"))
            state.system = _checked_system(entry.get("system"), path)
            continue
        kind = entry.get("type")
        if _is_message(entry):
            if entry.get("role") == "user":
                state.replaced = state.take_back() if entry.pop("replaces", False) else []
            state.messages.append(entry)
            state.model = str(entry.get("model", state.model))
        elif kind == "undo":
            state.take_back()
        elif kind == "unsaid":
            state.unsay()
        elif kind == "drop" and isinstance(entry.get("exchanges"), int):
            state.drop(max(0, entry["exchanges"]))
        elif kind == "clear":
            state.messages.clear()
        elif kind == "system":
            state.system = _checked_system(entry.get("content"), path)
        else:
            raise SessionError(f"{path}, line {state.n_lines}: found neither message nor mark")
    if state.n_lines == 0:
        raise SessionError(f"{path}: empty: expected a chat")
    return state
