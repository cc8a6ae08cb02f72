"""Every error that a person or a script is meant to see.

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
    └── EmbeddedModelError      the embedded model cannot be fetched or converted

A message says what was found, what was expected and what to do, in one line.
"""

__all__ = [
    "CheckpointError",
    "ContextLengthError",
    "DeviceError",
    "DownloadError",
    "EmbeddedModelError",
    "MistralChatError",
    "NotEnoughMemoryError",
    "OutputError",
    "PromptError",
    "RankLostError",
    "SessionError",
    "TokenizerError",
    "ToolError",
    "UsageError",
]


class MistralChatError(Exception):
    """Root of all errors raised on purpose."""


class UsageError(MistralChatError):
    """Wrong usage: an unknown flag, a value out of range, flags that exclude each other."""


class PromptError(MistralChatError):
    """A prompt, file or conversation that cannot be answered as it is."""


class ContextLengthError(PromptError):
    """The prompt does not fit the context.

    Args:
        prompt_tokens: tokens of the encoded prompt.
        max_seq_len: tokens that the context holds, answer included.
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
    """A tokenizer file that is missing, ambiguous or broken, or a request that it refuses."""


class DownloadError(MistralChatError):
    """A repository that cannot be fetched, or holds no model that can be run."""


class ToolError(MistralChatError):
    """Calls of functions that came to no answer."""


class OutputError(MistralChatError):
    """Stdout is closed, or what is behind it takes no more."""


class SessionError(MistralChatError):
    """A kept chat that is not there, cannot be read, or can no longer be written."""


class DeviceError(MistralChatError):
    """A device, data type or number of ranks that this machine or model does not have."""


class NotEnoughMemoryError(MistralChatError):
    """Weights, cache or workspace do not fit the memory that is free."""


class RankLostError(MistralChatError):
    """Another rank ended or failed, so this one cannot go on."""


class EmbeddedModelError(MistralChatError):
    """The embedded model could not be fetched, checked or converted."""
