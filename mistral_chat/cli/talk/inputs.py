"""What the main job is given to read: a prompt from flags, files and stdin, a chat to go on with.

Read before a process is started, as `offered` is; rank 0 reads it again.
"""

import sys
from dataclasses import dataclass

from mistral_chat.cli.console import printing
from mistral_chat.cli.console.terminal import is_terminal
from mistral_chat.cli.console.texts import read_text_file, text_of
from mistral_chat.cli.offered import Offered, read_offered, require_text
from mistral_chat.cli.pipes import leave_for_ranks, read_stdin
from mistral_chat.cli.requests import ChatRequest
from mistral_chat.errors import PromptError, UsageError

__all__ = ["Inputs", "read_inputs"]


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


def read_inputs(options: ChatRequest, *, for_ranks: bool = False) -> Inputs:
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
    require_text(prompt=[options.prompt])
    files = tuple(read_text_file(path) for path in options.file)
    if options.resume is not None:
        _check_session(options.resume, hold=not options.no_save)
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


def _read_stdin(options: ChatRequest, *, for_ranks: bool) -> str:
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


def _check_session(name: str, *, hold: bool) -> None:
    """Refuse a chat that is not there or, where it is to be added to, is open elsewhere."""
    from mistral_chat.cli.talk import session_files

    session_files.find(name)
    from mistral_chat.cli.talk.sessions import Session

    session = Session.open(name, "")
    if hold:
        session.hold()
        session.release()
