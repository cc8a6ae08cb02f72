"""The line that a person types at: several lines, history over sessions, completion, an editor.

prompt_toolkit does the work; this says which keys and what stands at the bottom.
"""

import os
import shlex
import shutil
import subprocess
import sys
import tempfile
import termios
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import platformdirs
from prompt_toolkit import PromptSession
from prompt_toolkit.application import get_app, run_in_terminal
from prompt_toolkit.completion import CompleteEvent, Completer, Completion, PathCompleter
from prompt_toolkit.document import Document
from prompt_toolkit.history import FileHistory, History, InMemoryHistory
from prompt_toolkit.input import Input
from prompt_toolkit.input.posix_utils import PosixStdinReader
from prompt_toolkit.input.vt100 import Vt100Input
from prompt_toolkit.key_binding import KeyBindings, KeyPressEvent
from prompt_toolkit.output import create_output

from mistral_chat.cli import render
from mistral_chat.cli.terminal import is_fancy, suspend

__all__ = [
    "BLOCK",
    "ask_for_paste",
    "make_prompt",
    "make_question",
    "open_editor",
    "unwrap_block",
]

BLOCK = '"""'
EDITORS = ("editor", "nano", "vi", "emacs")
WITH_PATHS = ("/file", "/save", "/load")


WordsAfter = Callable[[str], Iterable[tuple[str, str]]]


class _HistoryFile(FileHistory):
    """Earlier messages in a file; where it takes no more, they are kept until the end alone."""

    _is_kept = True

    def store_string(self, string: str) -> None:
        if not self._is_kept:
            return
        try:
            super().store_string(string)
        except OSError as error:
            self._is_kept = False
            render.note(f"mistral-chat: history is no longer kept ({error.strerror})")


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
    def _(event: KeyPressEvent) -> None:  # noqa: ARG001
        open_editor()

    _add_suspend(keys)
    return keys


def _add_suspend(keys: KeyBindings) -> None:
    """Ctrl-Z leaves for the shell, where there is one; the prompt is drawn again after that."""

    @keys.add("c-z")
    def _(event: KeyPressEvent) -> None:  # noqa: ARG001
        run_in_terminal(suspend)


def open_editor() -> None:
    """Open the text of the prompt that is there in $EDITOR; also as the prompt begins."""
    buffer = get_app().current_buffer

    async def edit() -> None:
        text = await run_in_terminal(lambda: _edited(buffer.text), in_executor=True)
        buffer.document = Document(text)

    get_app().create_background_task(edit())


def _edited(text: str) -> str:
    """What a person makes of a text in their editor; the text itself where that fails."""
    given = os.environ.get("VISUAL") or os.environ.get("EDITOR")
    editor = given or next(filter(shutil.which, EDITORS), None)
    if editor is None:
        render.error(f"no editor: expected $EDITOR, or one of {', '.join(EDITORS)}")
        return text
    try:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "message.md"
            path.write_text(text, encoding="utf-8", newline="")
            with _without_signals():
                code = subprocess.call([*shlex.split(editor), str(path)])
            if code == 0:
                # What is no UTF-8 is seen at the prompt, and the rest is not lost.
                return path.read_bytes().decode("utf-8", "replace").removesuffix("\n")
        fault = f"ended with code {code}"
    except (OSError, ValueError) as error:  # not there; an open quotation mark; a full disk
        fault = f"cannot be run ({error})"
    render.error(f"the editor {editor!r} {fault}: the text stays as it was; $EDITOR names another")
    return text


@contextmanager
def _without_signals() -> Iterator[None]:
    """Ctrl-C is a key of the editor's: as a signal it would end a launcher, and with it all."""
    before = termios.tcgetattr(sys.stdin)
    quiet = [*before]
    quiet[3] &= ~termios.ISIG
    termios.tcsetattr(sys.stdin, termios.TCSADRAIN, quiet)
    try:
        yield
    finally:
        termios.tcsetattr(sys.stdin, termios.TCSADRAIN, before)


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

    _add_suspend(keys)
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
    return _HistoryFile(str(path))
