"""The input line of a chat: several lines, history across sessions, completion.

prompt_toolkit does the work; this defines the keys and the bottom line.
"""

import os
import sys
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import platformdirs
from prompt_toolkit import PromptSession
from prompt_toolkit.application import get_app, get_app_or_none, run_in_terminal
from prompt_toolkit.completion import CompleteEvent, Completer, Completion, PathCompleter
from prompt_toolkit.document import Document
from prompt_toolkit.filters import Condition, is_done
from prompt_toolkit.history import FileHistory, History, InMemoryHistory
from prompt_toolkit.input import Input
from prompt_toolkit.input.posix_utils import PosixStdinReader
from prompt_toolkit.input.vt100 import Vt100Input
from prompt_toolkit.key_binding import KeyBindings, KeyPressEvent
from prompt_toolkit.keys import Keys
from prompt_toolkit.layout import ConditionalContainer, FormattedTextControl, HSplit, Window
from prompt_toolkit.output import create_output

from mistral_chat.cli.console import printing
from mistral_chat.cli.console.terminal import is_fancy, suspend
from mistral_chat.cli.talk.typing.editor import open_editor
from mistral_chat.cli.talk.typing.folds import Folds
from mistral_chat.cli.talk.typing.typed_ahead import BLOCK, in_block

__all__ = ["SEPARATOR", "Line", "Prompt", "Question", "ask_for_paste", "unwrap_block"]

WITH_PATHS = ("/file", "/save", "/load")
SEPARATOR = " · "  # between parts of the bottom line
TAKEN_DOWN_WITHIN_S = 1.0


WordsAfter = Callable[[str], Iterable[tuple[str, str]]]


class _HistoryFile(FileHistory):
    """Earlier messages in a file, or only in memory if it cannot be written."""

    _is_kept = True

    def store_string(self, string: str) -> None:
        if not self._is_kept:
            return
        try:
            super().store_string(string)
        except OSError as error:
            self._is_kept = False
            printing.note(f"mistral-chat: history is no longer kept ({error.strerror})")


class _WholeHistory(History):
    """Earlier messages, with folded pieces in full."""

    def __init__(self, folds: Folds) -> None:
        super().__init__()
        self._kept = _history()
        self._folds = folds

    def load_history_strings(self) -> Iterable[str]:
        return self._kept.load_history_strings()

    def store_string(self, string: str) -> None:
        self._kept.store_string(string)

    def append_string(self, string: str) -> None:
        super().append_string(self._folds.unfold(string))


class _Completer(Completer):
    """Completes commands, then words or paths if a command takes them."""

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


@dataclass(frozen=True, slots=True)
class Line:
    """What was typed at the prompt.

    Args:
        text: the whole text.
        is_command: whether it starts with a slash that was typed or pasted, not with a folded
            piece.
        is_draft_aside: whether a command took the place of the draft that was shown.
    """

    text: str = ""
    is_command: bool = False
    is_draft_aside: bool = False


class Prompt:
    """The prompt of a chat.

    Args:
        commands: name -> meaning, for completion.
        words_after: returns completions of a command's argument, by the command's name.
        bottom: returns the line at the bottom of the window; parts that do not fit are left out.
        open_thinking: prints what the model thought before its last answer.
    """

    def __init__(
        self,
        commands: Mapping[str, str],
        words_after: WordsAfter,
        bottom: Callable[[], str],
        open_thinking: Callable[[], None] = lambda: None,
    ) -> None:
        self._folds = Folds()
        self._draft = ""
        self._why = ""
        self._is_aside = False
        keys = _keys(self._folds)
        keys.add("c-t")(lambda event: _run_above(open_thinking))
        keys.add("/", filter=Condition(self._gives_way))(self._put_aside)
        self._session: PromptSession[str] = PromptSession(
            history=_WholeHistory(self._folds),
            key_bindings=keys,
            multiline=True,
            completer=_Completer(commands, words_after),
            complete_while_typing=False,
            enable_history_search=False,
            input_processors=[self._folds.processor],
            bottom_toolbar=(lambda: _fitted(bottom())) if is_fancy(sys.stderr) else None,
            prompt_continuation="  ",
            input=_keyboard(),
            output=create_output(stdout=sys.stderr),  # stdout is only for answers
        )
        below = Window(FormattedTextControl(self._below), dont_extend_height=True)
        shown = ConditionalContainer(below, Condition(lambda: bool(self._why)) & ~is_done)
        cast(HSplit, self._session.layout.container).children.insert(1, shown)

    def ask(self, draft: str = "", *, why: str = "", in_editor: bool = False) -> Line:
        """Let the user type a line; Ctrl-C gives an empty one.

        Args:
            draft: text to start with.
            why: the reason for the draft, shown below it; such a draft gives way to a command.
            in_editor: whether to open the draft in the editor at once.

        Raises:
            EOFError: the user leaves, or the terminal has gone.
        """
        self._draft, self._why, self._is_aside = self._folds.fold(draft), why, False
        pre_run = (lambda: open_editor(self._folds)) if in_editor else None
        try:
            text = _ask(self._session, "> ", default=self._draft, pre_run=pre_run)
        except KeyboardInterrupt:
            text = ""
        return Line(self._folds.unfold(text), text.startswith("/"), self._is_aside)

    def show(self, message: str) -> Line:
        """Show a message typed before there was a prompt as if it had been typed there."""
        shown = self._folds.shown(self._folds.fold(message))
        printing.note("> " + shown.replace("\n", "\n  "))
        self._session.history.append_string(message)
        return Line(message, message.startswith("/"))

    def _gives_way(self) -> bool:
        text = self._folds.unfold(get_app().current_buffer.text)
        return bool(self._draft and self._why) and text == self._folds.unfold(self._draft)

    def _put_aside(self, event: KeyPressEvent) -> None:
        self._is_aside = True
        self._why = "the message that stood here comes back after this command"
        event.current_buffer.document = Document("/")

    def _below(self) -> str:
        return "\n".join(printing.wrap(printing.clean(self._why), _columns()))


class Question:
    """An input line for the program's own questions; accepts several lines, like a message."""

    def __init__(self) -> None:
        self._session: PromptSession[str] = PromptSession(
            history=InMemoryHistory(),  # a "y" is not worth keeping in the history
            key_bindings=_keys(Folds()),
            multiline=True,
            prompt_continuation="  ",
            input=_keyboard(),
            output=create_output(stdout=sys.stderr),
        )

    def ask(self, text: str) -> str:
        """Ask and return the answer.

        Raises:
            KeyboardInterrupt: Ctrl-C.
            EOFError: Ctrl-D, or the terminal has gone.
        """
        return _ask(self._session, printing.clean(text))


class _EndedError(Exception):
    """The process ends while a prompt is shown."""


def _ask(
    session: PromptSession[str],
    text: str,
    *,
    default: str = "",
    pre_run: Callable[[], None] | None = None,
) -> str:
    with printing.drawn(_take_down):
        try:
            return session.prompt(text, default=default, pre_run=pre_run)
        except _EndedError:
            threading.Event().wait()  # another thread is about to end the process
            raise


def _take_down() -> None:
    """End the prompt that is shown: keep the typed text on the screen, remove the bar."""
    app = get_app_or_none()
    if app is None or not app.is_running or app.loop is None:
        return

    def leave() -> None:
        if app.future is not None and not app.future.done():
            app.exit(exception=_EndedError())

    if threading.current_thread() is threading.main_thread():  # in a signal handler
        leave()
        app.renderer.render(app, app.layout, is_done=True)
        return
    app.loop.call_soon_threadsafe(leave)
    deadline = time.monotonic() + TAKEN_DOWN_WITHIN_S
    while app.is_running and time.monotonic() < deadline:
        time.sleep(0.01)


def _columns() -> int:
    return get_app().output.get_size().columns


def _fitted(line: str) -> str:
    """Cut a line to as many of its parts as fit the window."""
    while printing.width_of(line) > _columns() and SEPARATOR in line:
        line = line.rpartition(SEPARATOR)[0]
    return printing.clean(line)


def _keyboard() -> Input:
    """Open stdin's terminal so that bytes that are not UTF-8 become U+FFFD."""
    keyboard = Vt100Input(sys.stdin)
    keyboard.stdin_reader = PosixStdinReader(keyboard.fileno(), errors="replace")
    return keyboard


def _keys(folds: Folds) -> KeyBindings:
    """Bind Enter to send, Alt-Enter (Enter in an open block) to newline, Ctrl-G to the editor."""
    keys = KeyBindings()

    @keys.add("enter")
    def _(event: KeyPressEvent) -> None:
        buffer = event.current_buffer
        if in_block(folds.unfold(buffer.text)):
            buffer.insert_text("\n")
        else:
            buffer.validate_and_handle()

    @keys.add("escape", "enter")
    def _(event: KeyPressEvent) -> None:
        event.current_buffer.insert_text("\n")

    @keys.add(Keys.BracketedPaste)
    def _(event: KeyPressEvent) -> None:
        text = event.data.replace("\r\n", "\n").replace("\r", "\n")
        event.current_buffer.insert_text(folds.fold(text))

    @keys.add("c-o")
    def _(event: KeyPressEvent) -> None:
        buffer = event.current_buffer
        at = len(folds.unfold(buffer.text[: buffer.cursor_position]))
        buffer.document = Document(folds.unfold(buffer.text), at)

    @keys.add("c-g")
    def _(event: KeyPressEvent) -> None:  # noqa: ARG001
        open_editor(folds)

    _add_suspend(keys)
    return keys


def _run_above(print_lines: Callable[[], None]) -> None:
    """Print above the prompt, and draw it again below."""
    run_in_terminal(print_lines)


def _add_suspend(keys: KeyBindings) -> None:
    """Let Ctrl-Z return to the shell, if there is one, and redraw the prompt afterwards."""

    @keys.add("c-z")
    def _(event: KeyPressEvent) -> None:  # noqa: ARG001
        run_in_terminal(suspend)


def ask_for_paste() -> str:
    """Read lines as they are until Ctrl-D or Alt-Enter; Ctrl-C gives an empty text.

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
        return _ask(session, "  ")
    except KeyboardInterrupt:
        return ""


def unwrap_block(text: str) -> str:
    """Return the text between the marks of a block; other texts unchanged."""
    stripped = text.strip()
    if stripped.startswith(BLOCK) and stripped.endswith(BLOCK) and len(stripped) >= 2 * len(BLOCK):
        return stripped[len(BLOCK) : -len(BLOCK)].strip("\n")
    return text


def _history() -> History:
    """Return the history of messages, in a file that only its owner can read."""
    path = Path(platformdirs.user_data_path("mistral-chat")) / "history"
    try:
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        os.close(os.open(path, os.O_CREAT | os.O_APPEND, 0o600))
    except OSError as error:
        printing.note(f"mistral-chat: no history file ({path}: {error.strerror})")
        return InMemoryHistory()
    return _HistoryFile(str(path))
