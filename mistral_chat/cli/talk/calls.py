"""Show the model's function calls to the user, ask whether they may run, show the results.

Used by a chat at a terminal and by a single prompt. Knows nothing of rounds or answers.
"""

from collections.abc import Callable

from mistral_chat.chat.functions import CallsCancelledError, PythonFunctions
from mistral_chat.chat.rounds import CallResult
from mistral_chat.chat.tools import ToolCall
from mistral_chat.cli.console import render
from mistral_chat.cli.talk.chat_text import call_line, shorten, visible
from mistral_chat.cli.talk.typing.prompt import Question, unwrap_block

__all__ = ["CallDesk", "print_line"]

REFUSED = "error: the person refused this call"


def print_line(line: str) -> None:
    """Show a line that the user's function printed."""
    render.note(f"  | {line}")


class CallDesk:
    """Shows calls, asks about them and runs them.

    Args:
        functions: functions of a Python file; None asks the user for the result of each call.
        yes: run calls without asking.
        quiet: hide calls that need no question.
        is_cancelled: returns whether Ctrl-C was pressed since it was last called.
    """

    def __init__(
        self,
        functions: PythonFunctions | None,
        *,
        yes: bool,
        quiet: bool,
        is_cancelled: Callable[[], bool],
    ) -> None:
        self._functions = functions
        self._yes = yes
        self._quiet = quiet
        self._is_cancelled = is_cancelled
        self._always: set[str] = set()
        self._question: Question | None = None

    def run(self, call: ToolCall) -> str:
        """Show a call, ask about it if needed, and run it.

        Raises:
            CallsCancelledError: Ctrl-C or Ctrl-D at a question, or Ctrl-C during the call.
        """
        asks = self._functions is None or not (self._yes or call.name in self._always)
        if asks or not self._quiet:
            render.note(f"calls {call_line(call)}")
        if self._is_cancelled():  # pressed while the answer ended
            raise CallsCancelledError
        if self._functions is None:
            return unwrap_block(self._ask(f"result of {call.name}> "))
        if asks and not self._may_run(call):
            return REFUSED
        return self._functions.call(call, self._is_cancelled)

    def show(self, result: CallResult) -> None:
        """Show the result of a call."""
        if result.fault is not None:
            if not self._quiet:
                render.note(f"calls {shorten(call_line(result.call), 200)}")
                render.note(f"mistral-chat: {result.fault}")
        elif not self._quiet and self._functions is not None:
            render.note(f"  gives {shorten(visible(shorten(result.text, 200)), 200)}")

    def _may_run(self, call: ToolCall) -> bool:
        while True:
            said = self._ask(f"run it? y, n, always (any {call.name} of this chat): ")
            said = said.strip().lower()
            if said in ("always", "a"):
                self._always.add(call.name)
            if said in ("y", "yes", "always", "a"):
                return True
            if said in ("n", "no"):
                return False

    def _ask(self, text: str) -> str:
        if self._question is None:
            self._question = Question()
        try:
            return self._question.ask(text)
        except (KeyboardInterrupt, EOFError):
            raise CallsCancelledError from None
