"""What stands at the next prompt of a chat.

Knows nothing of prompts.
"""

from dataclasses import dataclass

from mistral_chat.cli.talk.typing.typed_ahead import BLOCK

__all__ = ["Draft"]


@dataclass(frozen=True, slots=True)
class Draft:
    """What stands at the next prompt.

    Args:
        text: as it is to be typed.
        replace_last: it is to stand in place of the last exchange.
        in_editor: it is to be opened in the editor.
        why: it stands there, for the person; such a draft waits while a command is run.
    """

    text: str = ""
    replace_last: bool = False
    in_editor: bool = False
    why: str = ""

    @classmethod
    def of(
        cls, message: str, *, replace_last: bool = False, in_editor: bool = False, why: str = ""
    ) -> "Draft":
        """A message that was not sent yet, typed so that it is not taken for a command."""
        text = f"{BLOCK}{message}{BLOCK}" if message.startswith("/") else message
        return cls(text, replace_last, in_editor, why)
