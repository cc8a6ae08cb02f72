"""One prompt, one answer: from a flag, files and a pipe, to stdout as text or as JSON."""

import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

from mistral_chat.chat.answer import Answer, Delta
from mistral_chat.chat.chat import Chat
from mistral_chat.chat.functions import PythonFunctions
from mistral_chat.cli import render
from mistral_chat.cli.flags import Options
from mistral_chat.cli.one_shot_calls import answer_with_functions
from mistral_chat.cli.terminal import QuietTerminal, in_foreground, is_terminal
from mistral_chat.cli.texts import read_text_file, text_of
from mistral_chat.errors import OutputError, PromptError, ToolError

__all__ = ["answer_once", "read_prompt", "report", "report_figures"]

INTERRUPTED = 130


def read_prompt(options: Options) -> str | None:
    """The prompt: files, then stdin unless it is a terminal, then --prompt.

    Each part loses one line end at its end; parts are joined by a blank line.

    Returns:
        the prompt; None where stdin is a terminal and there is no --prompt: a chat.

    Raises:
        PromptError: nothing to answer, or a part that cannot be read as UTF-8.
    """
    texts = (("prompt", options.prompt), ("system", options.system))
    for name, text in (*texts, *(("stop", stop) for stop in options.sampling.stop)):
        if text and any("\udc80" <= character <= "\udcff" for character in text):
            raise PromptError(f"--{name} is not UTF-8 text: expected UTF-8 on the command line")
    at_terminal = is_terminal(sys.stdin)
    if at_terminal and options.prompt is None:
        if options.json:
            raise PromptError("--json answers one prompt: give --prompt, or text on stdin")
        if options.files:
            raise PromptError("--file is put before a prompt: give --prompt, or text on stdin")
        return None
    parts = [read_text_file(path) for path in options.files]
    if sys.stdin is not None and not at_terminal:
        parts.append(text_of(sys.stdin.buffer.read(), "stdin"))
    if options.prompt is not None:
        parts.append(options.prompt)
    parts = [part for part in parts if part]
    if not parts:
        where = "is closed" if sys.stdin is None else "is empty"
        raise PromptError(f"nothing to answer: stdin {where} and there is no --prompt")
    return "\n\n".join(parts)


def answer_once(
    chat: Chat,
    options: Options,
    prompt: str,
    load_s: float,
    functions: PythonFunctions | None = None,
) -> int:
    """Answer and print; the code to end with.

    Args:
        chat: to ask.
        options: of the command line.
        prompt: what to ask.
        load_s: seconds that loading took.
        functions: to run as the model calls them; what it calls is answered for it without asking.

    Raises:
        ContextLengthError: the prompt, or what functions gave, does not fit.
        OutputError: an answer that was to be JSON was cut; what was written stays.
        ToolError: calls, and no answer.
        BrokenPipeError: the reader of stdout has gone.
    """
    stream = chat.send(prompt, options.sampling)
    ended: str | None = None
    if functions is not None:
        answer, ended = answer_with_functions(chat, options, stream, functions, interruptible)
        if not options.json:
            render.say(answer.said)
    else:
        with interruptible(stream.cancel) as poll:
            for event in stream:
                if isinstance(event, Delta) and not options.json:
                    render.say(event.text)
                poll()
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


def report(answer: Answer, chat: Chat, options: Options, load_s: float) -> None:
    """What stderr says after an answer."""
    if options.quiet:
        return
    max_seq_len = chat.engine.max_seq_len
    notice = render.notice_of(answer, options.sampling, max_seq_len)
    if notice:
        render.note(f"mistral-chat: {notice}", dim=True)
    report_figures(answer, chat, options, load_s)


def report_figures(answer: Answer, chat: Chat, options: Options, load_s: float) -> None:
    """Figures of one answer, where they were asked for."""
    if options.stats:
        path = chat.engine.runner.path
        line = render.stats_line(answer, chat.engine.max_seq_len, load_s, path)
        render.note(f"mistral-chat: {line}", dim=True)


@contextmanager
def interruptible(cancel: Callable[[], None]) -> Iterator[Callable[[], None]]:
    """Have Ctrl-C, as a signal or as a key, end what runs; gives what looks for the key.

    Args:
        cancel: ends it, and keeps what was said.
    """

    def on_signal(signum: int, frame: FrameType | None) -> None:  # noqa: ARG001
        cancel()
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # a second one does not wait

    before = signal.signal(signal.SIGINT, on_signal)
    try:
        # A background job may not touch its terminal, and has no Ctrl-C to read.
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
