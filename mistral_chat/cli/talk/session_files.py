"""Read kept chats: where they are, which exist, and the state that a file's lines add up to.

`sessions.py` writes them. Knows nothing of conversations.
"""

import json
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

import platformdirs

from mistral_chat.cli.console.locks import lock
from mistral_chat.cli.requests import LATEST_SESSION
from mistral_chat.errors import SessionError

__all__ = [
    "VERSION",
    "State",
    "Summary",
    "cut_torn_line",
    "find",
    "obstacle_to_writing",
    "read",
    "sessions_folder",
    "summaries",
]

VERSION = 1


def sessions_folder() -> Path:
    """Return the folder of sessions; on Linux in the XDG data directory."""
    return Path(platformdirs.user_data_path("mistral-chat")) / "sessions"


@dataclass(frozen=True, slots=True)
class Summary:
    """A session in a list.

    Args:
        id: its name.
        model: name of the model last used.
        begins: the first message, on one line.
        n_messages: messages of both sides.
        changed: when a message was last added.
    """

    id: str
    model: str
    begins: str
    n_messages: int
    changed: datetime


@dataclass
class State:
    """The state that a file's lines add up to.

    Args:
        model: name of the current model.
        system: system prompt.
        reasoning: the effort asked for; None leaves it to the model.
        messages: as stored in the file.
        replaced: the messages that the last turn replaces.
        n_lines: lines read so far.
    """

    model: str = ""
    system: str | None = None
    reasoning: str | None = None
    messages: list[dict[str, Any]] = field(default_factory=list)
    replaced: list[dict[str, Any]] = field(default_factory=list)
    n_lines: int = 0

    def take_back(self) -> list[dict[str, Any]]:
        """Remove the last turn and return it."""
        said = [i for i, message in enumerate(self.messages) if message["role"] == "user"]
        begin = said[-1] if said else 0
        gone = self.messages[begin:]
        del self.messages[begin:]
        return gone

    def unsay(self) -> None:
        """Remove the last turn, which got no answer; restore the turn that it replaced."""
        self.take_back()
        self.messages += self.replaced
        self.replaced = []

    def drop(self, n: int) -> None:
        """Remove the oldest turns."""
        said = [i for i, message in enumerate(self.messages) if message["role"] == "user"]
        del self.messages[: [*said, len(self.messages)][min(n, len(said))]]


def summaries() -> list[Summary]:
    """Return all sessions, newest first; skip files that are not sessions."""
    found = []
    for path in sessions_folder().glob("*.jsonl"):
        try:
            state = read(path)
            changed = datetime.fromtimestamp(path.stat().st_mtime)
        except (SessionError, OSError):
            continue
        first = next((m["content"] for m in state.messages if m["role"] == "user"), "")
        begins = " ".join(first.split())
        found.append(Summary(path.stem, state.model, begins, len(state.messages), changed))
    return sorted(found, key=lambda s: (s.changed, s.id), reverse=True)


def find(name: str) -> Path:
    """Return the file of a chat.

    Args:
        name: its id, the start of an id, a file, or `latest`.

    Raises:
        SessionError: no such chat, or more than one.
    """
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
        except (OSError, RuntimeError) as error:  # no permission; ~NAME of an unknown user
            raise SessionError(f"{name}: cannot be read ({error})") from error
        raise SessionError(f"{name}: no such file")
    matches = sorted(folder.glob(f"{name}*.jsonl")) if name.replace("-", "").isalnum() else []
    if not matches:
        raise SessionError(f"no chat {name!r} in {folder}: /list shows those there are")
    if len(matches) > 1:
        some = ", ".join(path.stem for path in matches[:4])
        raise SessionError(f"{name!r} begins {len(matches)} chats ({some}): say more of it")
    return matches[0]


def obstacle_to_writing(path: Path) -> str | None:
    """Return why a file cannot be appended to; None if it can."""
    try:
        os.close(os.open(path, os.O_WRONLY | os.O_APPEND))
    except OSError as error:
        return error.strerror
    return None


def cut_torn_line(path: Path) -> None:
    """Remove an unfinished last line, so that the next line starts on its own.

    A file that cannot be written, for example on a read-only disk, is left as it is.
    """
    if obstacle_to_writing(path) is not None:
        return
    try:
        with path.open("rb+") as file:
            # If another process has locked the file, it is still writing that line.
            if lock(file.fileno()) and not (data := file.read()).endswith(b"\n"):
                file.truncate(data.rfind(b"\n") + 1)
                os.fsync(file.fileno())
    except OSError as error:
        raise SessionError(f"{path}: cannot be written ({error.strerror})") from error


def _lines(path: Path) -> Iterator[dict[str, Any]]:
    """Yield the objects of a file, without an unfinished last line."""
    try:
        data = path.read_bytes()
    except OSError as error:
        raise SessionError(f"{path}: cannot be read ({error.strerror})") from error
    for number, line in enumerate(data.split(b"\n")[:-1], 1):
        try:
            entry = json.loads(line)
            json.dumps(entry, ensure_ascii=False).encode()  # a lone surrogate cannot be encoded
        except (ValueError, RecursionError) as error:
            raise SessionError(f"{path}, line {number}: not JSON ({error})") from error
        if not isinstance(entry, dict):
            raise SessionError(f"{path}, line {number}: expected an object")
        yield entry


def _is_message(entry: dict[str, Any]) -> bool:
    if not isinstance(entry.get("content"), str):
        return False
    if entry.get("role") == "tool":
        return all(isinstance(entry.get(name), str) for name in ("tool_call_id", "name"))
    calls, ids = entry.get("tool_calls", []), entry.get("ids") or []
    return (
        entry.get("role") in ("user", "assistant")
        and isinstance(entry.get("thinking", ""), str)
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


def _checked_text(value: Any, name: str, path: Path) -> str | None:
    if value is not None and not isinstance(value, str):
        raise SessionError(f"{path}: its {name} is {value!r}: expected a text")
    return value


def read(path: Path) -> State:
    """Read a session's file and return the state that its lines add up to.

    Raises:
        SessionError: the file cannot be read or is not a session.
    """
    state = State()
    for entry in _lines(path):
        state.n_lines += 1
        if state.n_lines == 1:
            if entry.get("type") != "session" or entry.get("version") != VERSION:
                raise SessionError(f"{path}: no chat of this program (version {VERSION})")
            state.model = str(entry.get("model"))
            state.system = _checked_text(entry.get("system"), "system prompt", path)
            state.reasoning = _checked_text(entry.get("reasoning"), "reasoning", path)
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
        elif kind == "clear":  # written by versions whose /clear did not begin a new chat
            state.messages.clear()
        elif kind == "system":
            state.system = _checked_text(entry.get("content"), "system prompt", path)
        elif kind == "reasoning":
            state.reasoning = _checked_text(entry.get("content"), "reasoning", path)
        else:
            raise SessionError(f"{path}, line {state.n_lines}: found neither message nor mark")
    if state.n_lines == 0:
        raise SessionError(f"{path}: empty: expected a chat")
    return state
