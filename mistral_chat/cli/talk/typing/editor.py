"""Edit a text in the user's editor, then return it to the prompt.

Knows nothing of what the text is used for.
"""

import os
import shlex
import shutil
import subprocess
import sys
import tempfile
import termios
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from prompt_toolkit.application import get_app, run_in_terminal
from prompt_toolkit.document import Document

from mistral_chat.cli.console import printing
from mistral_chat.cli.talk.typing.folds import Folds

__all__ = ["open_editor"]

EDITORS = ("editor", "nano", "vi", "emacs")


def open_editor(folds: Folds) -> None:
    """Open the prompt's text in $EDITOR; works also while the prompt starts."""
    buffer = get_app().current_buffer

    async def edit() -> None:
        whole = folds.unfold(buffer.text)
        text = await run_in_terminal(lambda: _edited(whole), in_executor=True)
        buffer.document = Document(folds.fold(text))

    get_app().create_background_task(edit())


def _edited(text: str) -> str:
    """Let the user edit a text in their editor; return it unchanged if that fails."""
    given = os.environ.get("VISUAL") or os.environ.get("EDITOR")
    editor = given or next(filter(shutil.which, EDITORS), None)
    if editor is None:
        printing.error(f"no editor: expected $EDITOR, or one of {', '.join(EDITORS)}")
        return text
    try:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "message.md"
            path.write_text(text, encoding="utf-8", newline="")
            with _without_signals():
                code = subprocess.call([*shlex.split(editor), str(path)])
            if code == 0:
                # Show bytes that are not UTF-8 at the prompt instead of losing the rest.
                return path.read_bytes().decode("utf-8", "replace").removesuffix("\n")
        fault = f"ended with code {code}"
    except (OSError, ValueError) as error:  # no such program; an unclosed quote; a full disk
        fault = f"cannot be run ({error})"
    printing.error(
        f"the editor {editor!r} {fault}: the text stays as it was; $EDITOR names another"
    )
    return text


@contextmanager
def _without_signals() -> Iterator[None]:
    """Make Ctrl-C a key for the editor: as a signal it would end the launcher and all ranks."""
    before = termios.tcgetattr(sys.stdin)
    quiet = [*before]
    quiet[3] &= ~termios.ISIG
    termios.tcsetattr(sys.stdin, termios.TCSADRAIN, quiet)
    try:
        yield
    finally:
        termios.tcsetattr(sys.stdin, termios.TCSADRAIN, before)
