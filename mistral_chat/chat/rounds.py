"""The rounds of a turn in which the model calls functions: calls, results, next answer.

Decides which calls can run, what the model is told about the others, and when to stop. Knows
nothing of how a call is run or shown.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from mistral_chat.chat.answer import Answer
from mistral_chat.chat.chat import Chat, ChatStream
from mistral_chat.chat.functions import CallsCancelledError
from mistral_chat.chat.tokenizer import Tokenizer
from mistral_chat.chat.tools import UNREADABLE, ToolCall
from mistral_chat.config import SamplingParams

__all__ = ["MAX_ROUNDS", "CallResult", "Rounds"]

MAX_ROUNDS = 16
CANCELLED = "error: the person stopped this call"
TOO_MANY = f"error: not run, since {MAX_ROUNDS} rounds of calls are over"


@dataclass(frozen=True, slots=True)
class CallResult:
    """The result of a call.

    Args:
        call: the call that the model asked for.
        text: what the model is told.
        fault: why it could not run, for the person; None if it ran.
    """

    call: ToolCall
    text: str
    fault: str | None = None


class Rounds:
    """One turn: from the first answer to an answer without calls.

    Args:
        chat: the chat that gives the answers.
        params: sampling settings.
        run: runs a call and returns its result as text, or raises CallsCancelledError.

    `n_rounds` counts the rounds with calls that could run, `cancelled` is whether the person
    stopped one, and `ended` is why the model is not asked again although it has not answered.
    """

    def __init__(self, chat: Chat, params: SamplingParams, run: Callable[[ToolCall], str]) -> None:
        self._chat = chat
        self._params = params
        self._run = run
        self.n_rounds = 0
        self._has_results = False
        self._n_unusable = 0  # consecutive rounds in which nothing could run
        self.cancelled = False
        self.ended: str | None = None

    def results(self, answer: Answer) -> Iterator[CallResult]:
        """Run the calls of an answer that the chat has kept; add each result to the history.

        Args:
            answer: the last answer.
        """
        conversation = self._chat.conversation
        calls = conversation.open_calls
        self._has_results = bool(calls)
        if not calls:
            return
        if self.n_rounds == MAX_ROUNDS:
            self.ended = f"{MAX_ROUNDS} rounds of calls are over; the last calls were not run"
            yield from self._close(TOO_MANY)
            return
        self.n_rounds += 1
        used = answer.usage.prompt_tokens + answer.usage.completion_tokens
        # Use half of the free context; the rest is for JSON escapes and the answer.
        most = (self._chat.engine.max_seq_len - used) // (2 * len(calls))
        n_run = 0
        for call in calls:
            result = self._fault(call)
            if result is None:
                try:
                    text = self._run(call)
                except CallsCancelledError:
                    self.cancelled = True
                    yield from self._close(CANCELLED)
                    return
                n_run += 1
                result = CallResult(call, cut_result(text, self._chat.tokenizer, most))
            conversation.add_result(call, result.text)
            yield result
        self._n_unusable = 0 if n_run else self._n_unusable + 1
        if self._n_unusable == 2:
            self.ended = "the model made unusable calls twice in a row"

    def go_on(self) -> ChatStream | None:
        """Return the model's answer to the results; None if the turn is over.

        Raises:
            ContextLengthError: the results leave no room for an answer.
            PromptError: the template refuses the results.
        """
        if self.cancelled or self.ended or not self._has_results:
            return None
        return self._chat.send_results({}, self._params)

    def _close(self, text: str) -> Iterator[CallResult]:
        for call in self._chat.conversation.close_calls(text):
            yield CallResult(call, text)

    def _fault(self, call: ToolCall) -> CallResult | None:
        names = [tool.function.name for tool in self._chat.conversation.tools]
        known = ", ".join(names)
        if call.name in names:
            return None
        if call.name == UNREADABLE:
            return CallResult(
                call,
                f"error: the call could not be read: expected the name of a function and its "
                f"arguments as a JSON object; the functions are {known}",
                "the model made a call that cannot be read",
            )
        return CallResult(
            call,
            f"error: there is no function {call.name}; the functions are {known}",
            f"the model called {call.name}, which is none of {known}",
        )


def cut_result(text: str, tokenizer: Tokenizer, max_tokens: int) -> str:
    """Cut a result so that it leaves room for an answer; say in it how much was cut."""
    kept = text = text.encode("utf-8", "replace").decode()  # a lone surrogate cannot be encoded
    while kept and (n := len(tokenizer.raw.encode(kept, bos=False, eos=False))) > max_tokens:
        kept = kept[: max(0, min(len(kept) - 1, len(kept) * max_tokens // n))]
    if kept == text:
        return text
    return f"{kept}\n[cut: the first {len(kept):,} of {len(text):,} characters]"
