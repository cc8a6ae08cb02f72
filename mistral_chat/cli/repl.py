"""The chat at a terminal: a line with history, streamed answers, Ctrl-C that stops just those."""

import difflib
import os
import sys
from pathlib import Path

import platformdirs
from prompt_toolkit import PromptSession
from prompt_toolkit.history import FileHistory, History, InMemoryHistory
from prompt_toolkit.input import create_input
from prompt_toolkit.output import create_output

from mistral_chat.chat.chat import Answer, Chat, Delta
from mistral_chat.cli import render
from mistral_chat.cli.flags import Options
from mistral_chat.cli.one_shot import report
from mistral_chat.cli.terminal import QuietTerminal
from mistral_chat.errors import PromptError

__all__ = ["chat_at_terminal"]

COMMANDS = {
    "/help": "this list",
    "/clear": "forget the conversation (the system prompt stays)",
    "/exit": "leave, as Ctrl-D does",
}
KEYS = {
    "Ctrl-C": "during an answer: stop it, keep what was said; at the prompt: clear the line",
    "Ctrl-D": "leave",
    "Up, Down": "earlier messages",
}


def chat_at_terminal(chat: Chat, options: Options, load_s: float, terminal: QuietTerminal) -> None:
    """Ask and answer until the person leaves.

    Args:
        chat: to talk to.
        options: of the command line.
        load_s: seconds that loading took.
        terminal: quiet already.
    """
    if not options.quiet:
        render.note(_greeting(chat, options))
    session = _prompt_session()
    typed = ""
    while True:
        try:
            # The prompt goes to stderr: stdout carries answers alone.
            line = session.prompt("> ", default=typed)
        except KeyboardInterrupt:
            typed = ""
            continue
        except EOFError:
            return
        typed = ""
        text = line.strip()
        if not text:
            continue
        if line.startswith("/"):
            if _command(text, chat):
                return
            continue
        typed = _exchange(chat, line, options, load_s, terminal)


def _greeting(chat: Chat, options: Options) -> str:
    runner = chat.engine.runner
    name = options.engine.model.resolve().name if options.engine.model else "dummy weights"
    ranks = runner.group.world_size
    kind = "chat" if chat.instruct else "plain completion: each line is a prompt of its own"
    return (
        f"{name}, {runner.model.args.n_params / 1e9:.2f} B parameters on {ranks} "
        f"{'rank' if ranks == 1 else 'ranks'} ({runner.model.device.type}, "
        f"{str(runner.model.dtype).removeprefix('torch.')}), context {chat.engine.max_seq_len:,}; "
        f"{kind}. /help lists commands, Ctrl-D leaves."
    )


def _prompt_session() -> PromptSession[str]:
    return PromptSession(
        history=_history(),
        input=create_input(sys.stdin),
        output=create_output(stdout=sys.stderr),
    )


def _history() -> History:
    """Earlier messages, in a file that only its owner reads."""
    path = Path(platformdirs.user_data_path("mistral-chat")) / "history"
    try:
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        os.close(os.open(path, os.O_CREAT | os.O_APPEND, 0o600))
    except OSError as error:
        render.note(f"mistral-chat: no history file ({path}: {error.strerror})")
        return InMemoryHistory()
    return FileHistory(path)


def _command(text: str, chat: Chat) -> bool:
    """Run a command; whether to leave."""
    name, _, rest = text.partition(" ")
    if name not in COMMANDS:
        close = difflib.get_close_matches(name, COMMANDS, n=1)
        hint = f"did you mean {close[0]}?" if close else "/help lists commands"
        render.note(f"unknown command {name}: {hint} (a message may begin with a space and then /)")
    elif rest.strip():
        render.note(f"{name} takes nothing after it; found {rest.strip()!r}")
    elif name == "/exit":
        return True
    elif name == "/clear":
        chat.clear()
        render.note("conversation cleared")
    else:
        both = COMMANDS | KEYS
        width = max(map(len, both))
        render.note("\n".join(f"{key:{width}}  {what}" for key, what in both.items()))
    return False


def _exchange(
    chat: Chat, text: str, options: Options, load_s: float, terminal: QuietTerminal
) -> str:
    """Send one message and print its answer; what was typed meanwhile."""
    typed = ""
    try:
        stream = chat.send(text, options.sampling)
    except PromptError as error:
        render.error(f"{error}; the message was not sent")
        return ""
    for event in stream:
        if isinstance(event, Delta):
            render.say(event.text)
        pressed, more = terminal.poll()
        typed = more if pressed else typed + more
        if pressed:
            stream.cancel()
    answer = stream.answer
    assert answer is not None
    render.say("\n")
    report(answer, chat, options, load_s)
    if not answer.text and chat.instruct and not options.quiet:
        render.note(f"mistral-chat: {_why_empty(answer)}; this exchange is not kept")
    return typed.rstrip("\n")


def _why_empty(answer: Answer) -> str:
    if answer.finish_reason == "cancelled":
        return "stopped before the first word"
    return "the model gave an empty answer"
