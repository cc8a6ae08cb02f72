"""The text to show at the next prompt of a chat.

Knows nothing of prompts.
"""

from dataclasses import dataclass

from mistral_chat.cli.talk.typing.typed_ahead import BLOCK

__all__ = ["Draft"]


@dataclass(frozen=True, slots=True)
class Draft:
    """A text to show at the next prompt.

    Args:
        text: the text to edit.
        replace_last: whether it will replace the last turn.
        in_editor: whether to open it in the editor.
        why: why it is shown, for the user; a draft with a reason waits while a command runs.
    """

    text: str = ""
    replace_last: bool = False
    in_editor: bool = False
    why: str = ""

    @classmethod
    def of(
        cls, message: str, *, replace_last: bool = False, in_editor: bool = False, why: str = ""
    ) -> "Draft":
        """Make a draft of an unsent message, escaped so that it is not read as a command."""
        text = f"{BLOCK}{message}{BLOCK}" if message.startswith("/") else message
        return cls(text, replace_last, in_editor, why)
