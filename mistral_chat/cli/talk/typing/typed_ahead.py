"""What is typed while there is no prompt: complete messages, which wait, and an unfinished one.

Interprets keys as far as a line without an editor needs. Knows nothing of terminals or chats.
"""

import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from mistral_chat.cli.console import printing
from mistral_chat.cli.console.terminal import is_fancy

__all__ = ["BLOCK", "TypedAhead", "in_block", "pastes_marked"]

BLOCK = '"""'
# Have the terminal mark pastes, as the prompt does, so that newlines in them do not send. This
# also sets line wrapping, the default, to tell it from a prompt's sequence.
MARK_PASTES, LEAVE_PASTES = "\x1b[?2004;7h", "\x1b[?2004l"
_PASTE, _PASTED = "\x1b[200~", "\x1b[201~"
# A complete key that sends an escape sequence: ESC [ ... letter, ESC O letter, ESC letter.
_KEY = re.compile(r"\x1b(?:\[[0-?]*[ -/]*[@-~]|O[ -~]|[^\[O])")
_BEGUN = re.compile(r"\x1b(?:\[[0-?]*[ -/]*|O)?\Z")  # an incomplete key


def in_block(text: str) -> bool:
    """Return whether a multi-line block is open."""
    return text.lstrip().startswith(BLOCK) and text.count(BLOCK) % 2 == 1


@contextmanager
def pastes_marked() -> Iterator[None]:
    """Have the terminal mark the start and end of pastes."""
    if not is_fancy(sys.stderr):
        yield
        return

    def leave() -> None:
        printing.tell_terminal(LEAVE_PASTES)

    printing.tell_terminal(MARK_PASTES)
    try:
        with printing.drawn(leave):
            yield
    finally:
        leave()


class TypedAhead:
    """Messages completed with Enter, and the text typed after them.

    `messages` wait to be sent, oldest first; `rest` is still being typed.
    """

    def __init__(self) -> None:
        self.messages: list[str] = []
        self.rest = ""
        self._begun = ""  # start of an incomplete key
        self._in_paste = False

    def take(self, text: str) -> None:
        """Take what was read from the terminal, in pieces of any size."""
        text = self._begun + text
        found = _BEGUN.search(text)
        self._begun = found[0] if found else ""
        at, end = 0, len(text) - len(self._begun)
        while at < end:
            key = _KEY.match(text, at)
            at = key.end() if key else at + 1
            self._press(key[0] if key else text[at - 1])

    def take_back(self) -> str:
        """Remove and return everything that was typed, as one text."""
        text = "\n".join([*self.messages, self.rest] if self.rest else self.messages)
        self.messages, self.rest = [], ""
        return text

    def take_rest(self) -> str:
        """Remove and return the unfinished message, to continue it at a prompt."""
        rest, self.rest = self.rest, ""
        return rest

    def _press(self, key: str) -> None:
        if key in (_PASTE, _PASTED):
            self._in_paste = key == _PASTE
        elif key in ("\r", "\n"):
            self._enter()
        elif key in ("\x1b\r", "\x1b\n"):  # Alt-Enter
            self.rest += "\n"
        elif key == "\t" and self._in_paste:
            self.rest += key
        elif key in ("\x7f", "\b"):
            self.rest = self.rest[:-1]
        elif key == "\x15":  # Ctrl-U
            self.rest = self.rest[: self.rest.rfind("\n") + 1]
        elif len(key) == 1 and key >= " " and not "\x7f" <= key < "\xa0":
            self.rest += key

    def _enter(self) -> None:
        if self._in_paste or in_block(self.rest):
            self.rest += "\n"
            return
        if self.rest.strip():
            self.messages.append(self.rest)
        self.rest = ""
