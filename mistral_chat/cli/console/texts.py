"""Texts that a person hands over in files or on stdin, as parts of a prompt.

Imports nothing heavy. Knows nothing of how parts are put together.
"""

from pathlib import Path

from mistral_chat.errors import PromptError
from mistral_chat.files import decode_text, read_text

__all__ = ["read_text_file", "text_of"]


def read_text_file(path: Path) -> str:
    """A file's text, or a pipe's, without the line end at its end.

    Raises:
        PromptError: it cannot be read, is no UTF-8, or longer than any context.
    """
    return _without_line_end(read_text(path, PromptError, pipes=True))


def text_of(data: bytes, where: str) -> str:
    """The text of bytes that were read already, without the line end at its end.

    Raises:
        PromptError: no UTF-8; `where` is named.
    """
    return _without_line_end(decode_text(data, where, PromptError))


def _without_line_end(text: str) -> str:
    return text.removesuffix("\n").removesuffix("\r")
