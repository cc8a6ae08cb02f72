"""All errors that a person or a script is meant to see.

    MistralChatError
    ├── UsageError              wrong flags or values; the command line ends with code 2
    ├── PromptError             an input text that cannot be used
    │   └── ContextLengthError  more tokens than the context holds
    ├── CheckpointError         params.json or weights: missing, broken, not supported
    ├── TokenizerError          the tokenizer's file or what it refuses
    ├── DownloadError           a repository that cannot be fetched, or holds no model
    ├── ToolError               calls of functions that came to no answer
    ├── OutputError             stdout takes nothing
    ├── SessionError            a kept chat that cannot be found, read or written
    ├── DeviceError             a device or rank layout that is not there
    ├── NotEnoughMemoryError    weights or cache do not fit
    ├── RankLostError           another rank ended
    │   └── OtherRankFailedError  another rank failed and says why; this one ends silently
    └── EmbeddedModelError      the embedded model cannot be fetched or converted

A message says in one line what was found, what was expected and what to do.
"""

import re

__all__ = [
    "CheckpointError",
    "ContextLengthError",
    "DeviceError",
    "DownloadError",
    "EmbeddedModelError",
    "MistralChatError",
    "NotEnoughMemoryError",
    "OtherRankFailedError",
    "OutputError",
    "PromptError",
    "RankLostError",
    "SessionError",
    "TokenizerError",
    "ToolError",
    "UsageError",
    "named",
    "one_line",
    "shown",
]

MOST_CHARACTERS = 300
_PLAIN = re.compile(r"[\w.+-]{1,80}", re.ASCII)
_CONTROLS = re.compile(r"[\x00-\x1f\x7f-\x9f\u200e\u200f\u2028-\u202e\u2066-\u2069\ufeff]")


def shown(value: object, most: int = 60) -> str:
    """Quote a value from a file or a person in a message.

    Args:
        value: any value; a long one is cut in the middle.
        most: longest result, in characters.
    """
    if isinstance(value, int) and abs(value) >= 10**MOST_CHARACTERS:
        return "a number of more than 300 digits"  # Python refuses to print some of these
    return _cut(repr(value), most)


def named(name: str) -> str:
    """Put a name from a file into a message: bare, or quoted if it has unusual characters."""
    return name if _PLAIN.fullmatch(name) else shown(name)


def one_line(text: object, most: int = MOST_CHARACTERS) -> str:
    """Make a message safe for a terminal: one line of limited length, without control characters.

    Args:
        text: an error or a text, which may quote a hostile file.
        most: longest result, in characters; it is cut in the middle, as the end says what to do.
    """
    return _cut(_CONTROLS.sub("\ufffd", " ".join(str(text).split())), most)


def _cut(text: str, most: int) -> str:
    if len(text) <= most:
        return text
    tail = (most - 3) // 3
    return f"{text[: most - 3 - tail]}...{text[-tail:]}"


class MistralChatError(Exception):
    """Base class of all errors raised on purpose."""


class UsageError(MistralChatError):
    """Wrong usage: an unknown flag, a value out of range, or flags that exclude each other."""


class PromptError(MistralChatError):
    """A prompt, file or conversation that cannot be answered."""


class ContextLengthError(PromptError):
    """The prompt does not fit the context.

    Args:
        prompt_tokens: tokens of the encoded prompt.
        max_seq_len: size of the context in tokens, including the answer.
    """

    def __init__(self, prompt_tokens: int, max_seq_len: int) -> None:
        self.prompt_tokens = prompt_tokens
        self.max_seq_len = max_seq_len
        super().__init__(
            f"the prompt has {prompt_tokens:,} tokens and the context holds {max_seq_len:,}, "
            f"at least one of them for the answer: shorten the prompt by "
            f"{prompt_tokens - max_seq_len + 1:,} tokens or raise --max_seq_len"
        )


class CheckpointError(MistralChatError):
    """A model folder whose params.json or weights cannot be used."""


class TokenizerError(MistralChatError):
    """A missing, ambiguous or broken tokenizer file, or a request that the tokenizer refuses."""


class DownloadError(MistralChatError):
    """A repository that cannot be fetched, or contains no supported model."""


class ToolError(MistralChatError):
    """Function calls that did not lead to an answer."""


class OutputError(MistralChatError):
    """Stdout is closed, or cannot be written."""


class SessionError(MistralChatError):
    """A kept chat that does not exist, cannot be read, or can no longer be written."""


class DeviceError(MistralChatError):
    """A device, data type or number of ranks that this machine or model does not support."""


class NotEnoughMemoryError(MistralChatError):
    """Weights, cache or workspace do not fit into the free memory."""


class RankLostError(MistralChatError):
    """Another rank ended or failed, so this one cannot continue."""


class OtherRankFailedError(RankLostError):
    """Another rank has failed and says why; this one ends silently."""


class EmbeddedModelError(MistralChatError):
    """The embedded model could not be fetched, checked or converted."""
