"""Answer one prompt with functions: rounds of calls until there is an answer.

Text before a call is not the answer. Whether a call follows is known only at the end, so nothing
is streamed.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import replace

from mistral_chat.chat.answer import Answer, Usage
from mistral_chat.chat.chat import Chat, ChatStream
from mistral_chat.chat.functions import PythonFunctions
from mistral_chat.chat.rounds import Rounds
from mistral_chat.chat.thinking import Thinking, Thought
from mistral_chat.cli.console import render
from mistral_chat.cli.requests import ChatRequest
from mistral_chat.cli.talk.answer_screen import DimRows
from mistral_chat.cli.talk.calls import CallDesk

__all__ = ["answer_with_functions"]

Interruptible = Callable[[Callable[[], None]], AbstractContextManager[Callable[[], None]]]


def answer_with_functions(
    chat: Chat,
    options: ChatRequest,
    stream: ChatStream,
    functions: PythonFunctions,
    interruptible: Interruptible,
) -> tuple[Answer, str | None]:
    """Run what the model calls until it answers.

    Args:
        chat: the chat that was asked.
        options: options of the command line.
        stream: the first answer.
        functions: the functions to run.
        interruptible: a context manager in which Ctrl-C calls the given function.

    Returns:
        the last answer, without the text of calls, with the first one's seed and the token counts
        and thinking of all; and why the model was not asked again, if it has not answered.

    Raises:
        ContextLengthError: the results of functions do not fit.
    """
    stopped = False

    def stop() -> None:
        nonlocal stopped
        stopped = True
        stream.cancel()

    answers: list[Answer] = []
    with interruptible(stop) as poll:

        def is_stopped() -> bool:
            poll()
            return stopped

        desk = CallDesk(functions, yes=True, quiet=options.quiet, is_cancelled=is_stopped)
        rounds = Rounds(chat, options.sampling, desk.run)
        following: ChatStream | None = stream
        while following is not None:
            stream = following
            if stopped:  # Ctrl-C was pressed after the previous answer ended
                stream.cancel()
            rows = DimRows()
            for event in stream:
                if isinstance(event, Thinking) and options.show_thinking:
                    rows.add(event.text)
                poll()
            rows.end()
            assert stream.answer is not None
            answers.append(stream.answer)
            if stream.answer.said and chat.conversation.open_calls and not options.quiet:
                render.note(stream.answer.said.strip())
            for result in rounds.results(stream.answer):
                desk.show(result)
            following = rounds.go_on()
    return _summed(answers, cancelled=rounds.cancelled), rounds.ended


def _summed(answers: list[Answer], *, cancelled: bool) -> Answer:
    usage = Usage(
        sum(answer.usage.prompt_tokens for answer in answers),
        sum(answer.usage.cached_tokens for answer in answers),
        sum(answer.usage.completion_tokens for answer in answers),
    )
    thoughts = [answer.thought for answer in answers if answer.thought is not None]
    thought = None
    if thoughts:
        thought = Thought(
            "\n\n".join(thought.text for thought in thoughts),
            sum(thought.n_tokens for thought in thoughts),
            sum(thought.seconds for thought in thoughts),
            thoughts[-1].is_closed,
        )
    last, seed = answers[-1], answers[0].seed
    summed = replace(last, text=last.said, usage=usage, seed=seed, thought=thought)
    return replace(summed, finish_reason="cancelled") if cancelled else summed
