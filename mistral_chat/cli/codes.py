"""What a process ends with."""

from mistral_chat.errors import MistralChatError, UsageError

__all__ = ["FAILED", "INTERRUPTED", "WRONG_USAGE", "code_of"]

FAILED, WRONG_USAGE, INTERRUPTED = 1, 2, 130


def code_of(error: MistralChatError) -> int:
    """The code of a command that this error ended."""
    return WRONG_USAGE if isinstance(error, UsageError) else FAILED
