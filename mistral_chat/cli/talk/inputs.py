"""The main job's input: a prompt from flags, files and stdin, or a chat to resume.

Read before any process is started, like `offered`; rank 0 reads it again.
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
    """Everything that the main job reads.

    Args:
        offered: system prompt, tools and schema.
        prompt: the prompt to answer; None is a chat at a terminal.
        files: texts put before the first message of such a chat.
    """

    offered: Offered
    prompt: str | None
    files: tuple[str, ...] = ()


def read_inputs(options: ChatRequest, *, for_ranks: bool = False) -> Inputs:
    """Read everything that the main job's flags name, and stdin.

    The prompt is the files, then stdin unless it is a terminal, then `--prompt`. One trailing
    newline of each part is dropped, and a blank line joins the parts.

    Args:
        options: options of the command line.
        for_ranks: whether this process may start ranks, which then need stdin unread.

    Raises:
        PromptError: nothing to answer, or an input that cannot be read.
        SessionError: the chat to resume does not exist, or is open elsewhere.
        UsageError: the flags need another kind of stdin.
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
    """Refuse a chat that does not exist or, if it is to be written, is open elsewhere."""
    from mistral_chat.cli.talk import session_files

    session_files.find(name)
    from mistral_chat.cli.talk.sessions import Session

    session = Session.open(name, "")
    if hold:
        session.hold()
        session.release()
