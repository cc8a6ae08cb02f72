"""Talk to Mistral's dense models, sharded over the GPUs of one machine or several.

The public names are imported when first used, so that `import mistral_chat` costs nothing. Nor
does it import anything that Python has not: `python -m mistral_chat` begins here, with the current
folder before the standard library.
"""

from importlib import import_module

TYPE_CHECKING = False
if TYPE_CHECKING:
    from mistral_chat.chat.answer import Answer, Delta
    from mistral_chat.chat.llm import LLM
    from mistral_chat.chat.thinking import Thinking
    from mistral_chat.config import SamplingParams

__version__ = "0.1.0"
__all__ = ["LLM", "Answer", "Delta", "SamplingParams", "Thinking", "__version__"]

_HOMES = {
    "Answer": "mistral_chat.chat.answer",
    "Delta": "mistral_chat.chat.answer",
    "LLM": "mistral_chat.chat.llm",
    "SamplingParams": "mistral_chat.config",
    "Thinking": "mistral_chat.chat.thinking",
}


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)
