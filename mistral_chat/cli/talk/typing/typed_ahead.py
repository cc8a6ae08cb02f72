"""What is typed while nothing asks for it: whole messages, which wait their turn, and the rest.

Reads keys as far as a line without an editor needs them. Knows nothing of terminals or chats.
"""

import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from mistral_chat.cli.console import printing
from mistral_chat.cli.console.terminal import is_fancy

__all__ = ["BLOCK", "TypedAhead", "in_block", "pastes_marked"]

BLOCK = '"""'
# Has a terminal mark pastes, as the prompt does, so that their line ends are none of a person's.
# With it goes what is the case anyway, that lines wrap: who reads along can tell it from a prompt.
MARK_PASTES, LEAVE_PASTES = "\x1b[?2004;7h", "\x1b[?2004l"
_PASTE, _PASTED = "\x1b[200~", "\x1b[201~"
# A key that sends more than a letter, whole: ESC [ ... letter, ESC O letter, ESC letter.
_KEY = re.compile(r"\x1b(?:\[[0-?]*[ -/]*[@-~]|O[ -~]|[^\[O])")
_BEGUN = re.compile(r"\x1b(?:\[[0-?]*[ -/]*|O)?\Z")  # the rest of it is on its way


def in_block(text: str) -> bool:
    """Whether a block of several lines is open."""
    return text.lstrip().startswith(BLOCK) and text.count(BLOCK) % 2 == 1


@contextmanager
def pastes_marked() -> Iterator[None]:
    """Have the terminal mark where a paste begins and ends."""
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
    """Messages that Enter has ended, and what was typed behind them.

    `messages` wait to be sent, the oldest first; `rest` is still being typed.
    """

    def __init__(self) -> None:
        self.messages: list[str] = []
        self.rest = ""
        self._begun = ""  # of a key
        self._in_paste = False

    def take(self, text: str) -> None:
        """Take what the terminal has read, in whatever pieces."""
        text = self._begun + text
        found = _BEGUN.search(text)
        self._begun = found[0] if found else ""
        at, end = 0, len(text) - len(self._begun)
        while at < end:
            key = _KEY.match(text, at)
            at = key.end() if key else at + 1
            self._press(key[0] if key else text[at - 1])

    def take_back(self) -> str:
        """All that was typed, as one text; nothing waits any more."""
        text = "\n".join([*self.messages, self.rest] if self.rest else self.messages)
        self.messages, self.rest = [], ""
        return text

    def take_rest(self) -> str:
        """What is still being typed; it goes on at a prompt."""
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
