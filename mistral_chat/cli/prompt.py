"""The line that a person types at: several lines, history over sessions, completion, an editor.

prompt_toolkit does the work; this says which keys and what stands at the bottom.
"""

import os
import sys
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import platformdirs
from prompt_toolkit import PromptSession
from prompt_toolkit.application import get_app
from prompt_toolkit.completion import CompleteEvent, Completer, Completion, PathCompleter
from prompt_toolkit.document import Document
from prompt_toolkit.history import FileHistory, History, InMemoryHistory
from prompt_toolkit.input import Input
from prompt_toolkit.input.posix_utils import PosixStdinReader
from prompt_toolkit.input.vt100 import Vt100Input
from prompt_toolkit.key_binding import KeyBindings, KeyPressEvent
from prompt_toolkit.output import create_output

from mistral_chat.cli import render
from mistral_chat.cli.terminal import is_fancy

__all__ = [
    "BLOCK",
    "ask_for_paste",
    "make_prompt",
    "make_question",
    "open_editor",
    "unwrap_block",
]

BLOCK = '"""'
WITH_PATHS = ("/file", "/save", "/load")


WordsAfter = Callable[[str], Iterable[tuple[str, str]]]


class _Completer(Completer):
    """Commands, then words or paths where a command takes one."""

    def __init__(self, commands: Mapping[str, str], words_after: WordsAfter) -> None:
        self._commands = commands
        self._words_after = words_after
        self._paths = PathCompleter(expanduser=True)

    def get_completions(
        self, document: Document, complete_event: CompleteEvent
    ) -> Iterable[Completion]:
        text = document.text_before_cursor
        name, space, rest = text.partition(" ")
        if not text.startswith("/") or "\n" in text:
            return
        if not space:
            for command, meaning in self._commands.items():
                if command.startswith(name):
                    yield Completion(command, -len(name), display_meta=meaning)
            return
        if " " not in rest:
            for word, meaning in self._words_after(name):
                if word.startswith(rest):
                    yield Completion(word, -len(rest), display_meta=meaning)
        if name in WITH_PATHS:
            yield from self._paths.get_completions(Document(rest, len(rest)), complete_event)


def make_prompt(
    commands: Mapping[str, str], words_after: WordsAfter, bottom: Callable[[], str]
) -> PromptSession[str]:
    """The prompt of a chat.

    Args:
        commands: their names and meanings, to complete.
        words_after: gives what a command takes, by its name, to complete.
        bottom: gives the line at the bottom of the window.
    """
    return PromptSession(
        history=_history(),
        key_bindings=_keys(),
        multiline=True,
        completer=_Completer(commands, words_after),
        complete_while_typing=False,
        enable_history_search=False,
        bottom_toolbar=bottom if is_fancy(sys.stderr) else None,
        prompt_continuation="  ",
        input=_keyboard(),
        output=create_output(stdout=sys.stderr),  # stdout carries answers alone
        tempfile_suffix=".md",
    )


def make_question() -> PromptSession[str]:
    """A line to answer a question of the program's on; several lines as in a message."""
    return PromptSession(
        history=InMemoryHistory(),  # a "y" is no message to come back to
        key_bindings=_keys(),
        multiline=True,
        prompt_continuation="  ",
        input=_keyboard(),
        output=create_output(stdout=sys.stderr),
        tempfile_suffix=".md",
    )


def _keyboard() -> Input:
    """Stdin's terminal. Bytes that are no UTF-8 are seen as such, rather than typed as no text."""
    keyboard = Vt100Input(sys.stdin)
    keyboard.stdin_reader = PosixStdinReader(keyboard.fileno(), errors="replace")
    return keyboard


def _keys() -> KeyBindings:
    """Enter sends, Alt-Enter and an open block make a new line, Ctrl-G opens the editor."""
    keys = KeyBindings()

    @keys.add("enter")
    def _(event: KeyPressEvent) -> None:
        buffer = event.current_buffer
        if _in_block(buffer.text):
            buffer.insert_text("\n")
        else:
            buffer.validate_and_handle()

    @keys.add("escape", "enter")
    def _(event: KeyPressEvent) -> None:
        event.current_buffer.insert_text("\n")

    @keys.add("c-g")
    def _(event: KeyPressEvent) -> None:
        event.current_buffer.open_in_editor()

    return keys


def open_editor() -> None:
    """As a prompt begins: open its text in $EDITOR, as Ctrl-G does."""
    get_app().current_buffer.open_in_editor()


def ask_for_paste() -> str:
    """Lines as they are, up to Ctrl-D or Alt-Enter; empty where Ctrl-C dropped them.

    Raises:
        EOFError: the terminal has gone.
    """
    keys = KeyBindings()

    @keys.add("enter")
    def _(event: KeyPressEvent) -> None:
        event.current_buffer.insert_text("\n")

    @keys.add("c-d")
    @keys.add("escape", "enter")
    def _(event: KeyPressEvent) -> None:
        event.current_buffer.validate_and_handle()

    session: PromptSession[str] = PromptSession(
        history=_history(),
        key_bindings=keys,
        multiline=True,
        prompt_continuation="  ",
        input=_keyboard(),
        output=create_output(stdout=sys.stderr),
    )
    try:
        return session.prompt("  ")
    except KeyboardInterrupt:
        return ""


def _in_block(text: str) -> bool:
    """Whether a block of several lines is open."""
    return text.lstrip().startswith(BLOCK) and text.count(BLOCK) % 2 == 1


def unwrap_block(text: str) -> str:
    """What stands between the marks of a block; other texts as they are."""
    stripped = text.strip()
    if stripped.startswith(BLOCK) and stripped.endswith(BLOCK) and len(stripped) >= 2 * len(BLOCK):
        return stripped[len(BLOCK) : -len(BLOCK)].strip("\n")
    return text


def _history() -> History:
    """Earlier messages, in a file that only its owner reads."""
    path = Path(platformdirs.user_data_path("mistral-chat")) / "history"
    try:
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        os.close(os.open(path, os.O_CREAT | os.O_APPEND, 0o600))
    except OSError as error:
        render.note(f"mistral-chat: no history file ({path}: {error.strerror})")
        return InMemoryHistory()
    return FileHistory(path)
