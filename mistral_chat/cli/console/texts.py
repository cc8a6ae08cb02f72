"""Read texts from files or stdin, as parts of a prompt.

Imports nothing heavy. Knows nothing of how parts are joined.
"""

from pathlib import Path

from mistral_chat.errors import PromptError
from mistral_chat.files import decode_text, read_text

__all__ = ["read_text_file", "text_of"]


def read_text_file(path: Path) -> str:
    """Read a file or pipe as text, without its last newline.

    Raises:
        PromptError: it cannot be read, is not UTF-8, or is longer than any context.
    """
    return _without_line_end(read_text(path, PromptError, pipes=True))


def text_of(data: bytes, where: str) -> str:
    """Decode bytes as text, without the last newline.

    Raises:
        PromptError: not UTF-8; `where` is named.
    """
    return _without_line_end(decode_text(data, where, PromptError))


def _without_line_end(text: str) -> str:
    return text.removesuffix("\n").removesuffix("\r")
