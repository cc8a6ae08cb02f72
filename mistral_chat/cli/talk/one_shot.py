"""Answer one prompt and print the answer to stdout, as text or as JSON."""

import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

from mistral_chat.chat.answer import Answer, Delta
from mistral_chat.chat.chat import Chat
from mistral_chat.chat.functions import PythonFunctions
from mistral_chat.chat.thinking import Thinking
from mistral_chat.cli.codes import INTERRUPTED
from mistral_chat.cli.console import render
from mistral_chat.cli.console.terminal import QuietTerminal, in_foreground, is_terminal
from mistral_chat.cli.requests import ChatRequest
from mistral_chat.cli.talk.answer_screen import DimRows
from mistral_chat.cli.talk.one_shot_calls import answer_with_functions
from mistral_chat.errors import OutputError, ToolError

__all__ = ["answer_once", "report", "report_figures"]


def answer_once(
    chat: Chat,
    options: ChatRequest,
    prompt: str,
    load_s: float,
    functions: PythonFunctions | None = None,
) -> int:
    """Answer a prompt and print the answer; return the exit code.

    Args:
        chat: the chat to ask.
        options: options of the command line.
        prompt: the text to answer.
        load_s: seconds that loading took.
        functions: run without asking when the model calls them; None only prints the calls.

    Raises:
        ContextLengthError: the prompt, or the results of functions, do not fit.
        OutputError: an answer that had to be JSON was cut short; it was printed nonetheless.
        ToolError: calls, but no answer.
        BrokenPipeError: the reader of stdout has gone.
    """
    stream = chat.send(prompt, options.sampling)
    ended: str | None = None
    if functions is not None:
        answer, ended = answer_with_functions(chat, options, stream, functions, interruptible)
        if not options.json:
            render.say(answer.said)
    else:
        rows = DimRows()
        with interruptible(stream.cancel) as poll:
            for event in stream:
                if isinstance(event, Thinking) and options.show_thinking:
                    rows.add(event.text)
                elif isinstance(event, Delta) and not options.json:
                    rows.end()
                    render.say(event.text)
                poll()
        rows.end()
        assert stream.answer is not None
        answer = stream.answer
    if options.json:
        model = str(options.engine.model or options.engine.shape)
        world_size = chat.engine.runner.group.world_size
        text = render.answer_json(answer, model=model, world_size=world_size, load_s=load_s)
        render.say(text + "\n")
    else:
        render.say("\n")
    if chat.grammar is not None and answer.finish_reason == "length":
        report_figures(answer, chat, options, load_s)
        cut = render.notice_of(answer, options.sampling, chat.engine.max_seq_len)
        raise OutputError(f"{cut}: the answer is no whole JSON text; give it more room")
    if ended is not None:
        raise ToolError(f"{ended}: there is no answer; a clearer prompt may help")
    report(answer, chat, options, load_s)
    return INTERRUPTED if answer.finish_reason == "cancelled" else 0


def report(answer: Answer, chat: Chat, options: ChatRequest, load_s: float) -> None:
    """Print to stderr why an answer ended, if that needs saying, and its figures."""
    if options.quiet:
        return
    max_seq_len = chat.engine.max_seq_len
    notice = render.notice_of(answer, options.sampling, max_seq_len)
    if notice:
        render.note(f"mistral-chat: {notice}", dim=True)
    report_figures(answer, chat, options, load_s)


def report_figures(answer: Answer, chat: Chat, options: ChatRequest, load_s: float) -> None:
    """Print the figures of an answer, if requested."""
    if options.stats:
        path = chat.engine.runner.path
        line = render.stats_line(answer, chat.engine.max_seq_len, load_s, path)
        render.note(f"mistral-chat: {line}", dim=True)


@contextmanager
def interruptible(cancel: Callable[[], None]) -> Iterator[Callable[[], None]]:
    """Let Ctrl-C, as a signal or as a key, cancel what runs; yield a function that reads the key.

    Args:
        cancel: stops the answer and keeps its text so far.
    """

    def on_signal(signum: int, frame: FrameType | None) -> None:  # noqa: ARG001
        cancel()
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # a second Ctrl-C ends the process at once

    before = signal.signal(signal.SIGINT, on_signal)
    try:
        # A background job must not touch its terminal, and gets no Ctrl-C from it.
        if is_terminal(sys.stdin) and in_foreground():
            with QuietTerminal() as terminal:

                def poll() -> None:
                    if terminal.poll()[0]:
                        cancel()

                yield poll
        else:
            yield lambda: None
    finally:
        signal.signal(signal.SIGINT, before)
