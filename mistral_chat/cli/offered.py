"""What answers are given and kept to, whatever the prompt: system prompt, tools, a schema.

Read before a process is started, so that a typo costs no loading of torch; rank 0 reads them the
same way again, since it is the one that needs them. What is quickly read is read first.
"""

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from mistral_chat.cli.console.printing import note
from mistral_chat.cli.console.texts import read_text_file
from mistral_chat.cli.requests import AnswersRequest
from mistral_chat.cli.system_prompt import DEFAULT, default_system, has_default
from mistral_chat.errors import PromptError
from mistral_chat.files import read_json, read_small_file

if TYPE_CHECKING:
    from mistral_common.protocol.instruct.tool_calls import Tool

    from mistral_chat.chat.schema.grammar import Grammar

__all__ = ["Offered", "read_offered", "require_text", "say_of_default"]

MOST_PYTHON_BYTES = 4 << 20  # it is compiled, at a second or two a megabyte


@dataclass(frozen=True, kw_only=True)
class Offered:
    """What answers are given and kept to, whatever the prompt.

    Args:
        system: prompt.
        tools: function schemas of a file of them; those of a Python file come from running it.
        grammar: what answers are valid against.
    """

    system: str | None = None
    tools: Sequence["Tool"] = ()
    grammar: "Grammar | None" = None


def read_offered(request: AnswersRequest) -> Offered:
    """Read system prompt, tools and schema.

    Raises:
        PromptError: one that cannot be read as that.
    """
    require_text(system=[request.system], stop=request.sampling.stop)
    system = request.system
    if system == DEFAULT:
        system = default_system(request.engine.model)
    if request.system_file is not None:
        system = read_text_file(request.system_file)
    python, schemas = (request.tools, None) if request.has_python else (None, request.tools)
    if python is not None:
        _check_python(python)
    # Whether files are there and JSON is known before what judges them is imported.
    for path in (schemas, request.json_schema):
        if path is not None:
            read_json(path, PromptError)
    tools: Sequence[Tool] = ()
    if schemas is not None:
        from mistral_chat.chat.tools import read_tools

        tools = read_tools(schemas)
    grammar: Grammar | None = None
    if request.json_schema is not None or request.json_object:
        from mistral_chat.chat.schema.grammar import choose_grammar, read_grammar

        path = request.json_schema
        grammar = read_grammar(path) if path else choose_grammar(None, json_object=True)
    return Offered(system=system, tools=tools, grammar=grammar)


def say_of_default(request: AnswersRequest) -> None:
    """Say that the model has a system prompt of its own, if answers are given without any."""
    is_without = request.system is None and request.system_file is None
    if request.instruct and is_without and not request.quiet and has_default(request.engine.model):
        note(
            "mistral-chat: the model comes with a system prompt, SYSTEM_PROMPT.txt, which is not "
            "used: --system default does"
        )


def require_text(**texts: Sequence[str | None]) -> None:
    """Refuse flags whose bytes are no UTF-8; Python has them as halves of surrogate pairs."""
    for name, given in texts.items():
        for text in given:
            if text and any("\ud800" <= character <= "\udfff" for character in text):
                raise PromptError(f"--{name} is not UTF-8 text: expected UTF-8 on the command line")


def _check_python(path: Path) -> None:
    """Refuse a file that no Python reads; nothing of it is run."""
    source = read_small_file(path, PromptError, MOST_PYTHON_BYTES)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # who runs it says them
            compile(source, str(path), "exec", dont_inherit=True)
    except SyntaxError as error:
        raise PromptError(f"{path}: line {error.lineno} is no Python ({error.msg})") from error
    except (ValueError, RecursionError, MemoryError) as error:
        raise PromptError(f"{path} is no Python that can be read ({error})") from error
