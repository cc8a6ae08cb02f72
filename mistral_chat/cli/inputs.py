"""What a command line hands over to be read: texts, stdin, tools, a schema, a chat to go on with.

Read before a process is started, so that a typo costs no loading of torch; rank 0 reads them the
same way again, since it is the one that needs them. What is quickly read is read first.
"""

import sys
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from mistral_chat.cli import printing
from mistral_chat.cli.flags import Options
from mistral_chat.cli.pipes import leave_for_ranks, read_stdin
from mistral_chat.cli.terminal import is_terminal
from mistral_chat.cli.texts import read_text_file, text_of
from mistral_chat.errors import PromptError, UsageError
from mistral_chat.files import read_json, read_small_file

if TYPE_CHECKING:
    from mistral_common.protocol.instruct.tool_calls import Tool

    from mistral_chat.chat.grammar import Grammar

__all__ = ["Inputs", "Offered", "read_inputs", "read_offered"]

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


@dataclass(frozen=True, kw_only=True)
class Inputs:
    """All of it, for the main job.

    Args:
        offered: system prompt, tools and schema.
        prompt: to answer; None is a chat at a terminal.
        files: texts that such a chat begins with.
    """

    offered: Offered
    prompt: str | None
    files: tuple[str, ...] = ()


def read_inputs(options: Options, *, for_ranks: bool = False) -> Inputs:
    """Read everything that the main job's flags name, and stdin.

    The prompt is files, then stdin unless it is a terminal, then the text that is asked. Each part
    loses one line end at its end; parts are joined by a blank line.

    Args:
        options: of the command line.
        for_ranks: this process may start ranks: leave stdin to them as it was.

    Raises:
        PromptError: nothing to answer, or something that cannot be read as what it is to be.
        SessionError: the chat to go on with is not there, or open elsewhere.
        UsageError: flags that need another stdin.
    """
    at_terminal = is_terminal(sys.stdin)
    is_chat = at_terminal and options.prompt is None
    if is_chat and options.json:
        raise PromptError("--json answers one prompt: give a text, or text on stdin")
    if options.resume is not None and not is_chat:
        raise UsageError("--resume goes on with a chat at a terminal: stdin is none")
    _require_text(prompt=[options.prompt])
    files = tuple(read_text_file(path) for path in options.files)
    if options.resume is not None:
        _check_session(options.resume, hold=options.save)
    offered = read_offered(options)
    if is_chat:
        return Inputs(offered=offered, prompt=None, files=files)
    parts = list(files)
    if sys.stdin is not None and not at_terminal:
        parts.append(_read_stdin(options, for_ranks=for_ranks))
    if options.prompt is not None:
        parts.append(options.prompt)
    parts = [part for part in parts if part]
    if not parts:
        where = "is closed" if sys.stdin is None else "is empty"
        raise PromptError(f"nothing to answer: stdin {where} and there is no --prompt")
    return Inputs(offered=offered, prompt="\n\n".join(parts))


def read_offered(options: Options) -> Offered:
    """Read system prompt, tools and schema.

    Raises:
        PromptError: one that cannot be read as that.
    """
    _require_text(system=[options.system], stop=options.sampling.stop)
    system = options.system
    if options.system_file is not None:
        system = read_text_file(options.system_file)
    python = options.tools if options.tools and options.tools.suffix == ".py" else None
    schemas = options.tools if python is None else None
    if python is not None:
        _check_python(python)
    # Whether files are there and JSON is known before what judges them is imported.
    for path in (schemas, options.json_schema):
        if path is not None:
            read_json(path, PromptError)
    tools: Sequence[Tool] = ()
    if schemas is not None:
        from mistral_chat.chat.tools import read_tools

        tools = read_tools(schemas)
    grammar: Grammar | None = None
    if options.json_schema is not None or options.json_object:
        from mistral_chat.chat.grammar import choose_grammar, read_grammar

        path = options.json_schema
        grammar = read_grammar(path) if path else choose_grammar(None, json_object=True)
    return Offered(system=system, tools=tools, grammar=grammar)


def _read_stdin(options: Options, *, for_ranks: bool) -> str:
    def say_that_it_waits() -> None:
        if options.prompt is not None and not options.quiet:
            printing.note(
                "mistral-chat: waiting for stdin to end, which comes before the prompt "
                "(< /dev/null gives none)"
            )

    data = read_stdin(say_that_it_waits)
    text = text_of(data, "stdin")
    if for_ranks:
        leave_for_ranks(data)
    return text


def _require_text(**texts: Sequence[str | None]) -> None:
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


def _check_session(name: str, *, hold: bool) -> None:
    """Refuse a chat that is not there or, where it is to be added to, is open elsewhere."""
    from mistral_chat.cli import session_files

    session_files.find(name)
    from mistral_chat.cli.sessions import Session

    session = Session.open(name, "")
    if hold:
        session.hold()
        session.release()
