"""Keeps steps whole: what all ranks run together is never cut in its midst and gone on with.

A step that one rank leaves half-way has the others wait for it, and take the next for its rest.
Knows nothing of what a step does.
"""

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator
from types import FrameType

from mistral_chat.errors import MistralChatError, RankLostError

__all__ = ["StepGuard", "interrupts_held_back"]


@contextlib.contextmanager
def interrupts_held_back() -> Iterator[None]:
    """Have Ctrl-C wait for the end of the block, where its handler then runs.

    Only a program's main thread is ever interrupted.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    held: list[FrameType | None] = []

    def hold(signum: int, frame: FrameType | None) -> None:  # noqa: ARG001
        held.append(frame)

    before = signal.signal(signal.SIGINT, hold)
    if not callable(before):  # ignored, or the end of the process
        signal.signal(signal.SIGINT, before)
        yield
        return
    try:
        yield
    finally:
        if signal.getsignal(signal.SIGINT) is hold:
            signal.signal(signal.SIGINT, before)
        if held:
            before(signal.SIGINT, held[0])


class StepGuard:
    """Says whether steps may run, and what is to be done once the present one is over.

    Args:
        n_ranks: that run them; what one rank leaves half-way harms nobody.
    """

    def __init__(self, n_ranks: int) -> None:
        self._n_ranks = n_ranks
        self._refusal: MistralChatError | None = None
        self._lock = threading.RLock()
        self._running_in: int | None = None  # thread
        self._afterwards: Callable[[], None] | None = None
        self.is_broken = False

    @contextlib.contextmanager
    def whole(self) -> Iterator[None]:
        """Around a step: Ctrl-C waits for its end, and after any other way out there is no next.

        Raises:
            MistralChatError: no step may run any more, and why.
        """
        with self._lock, interrupts_held_back():
            self._running_in = threading.get_ident()
            try:
                self.check()
                try:
                    yield
                except BaseException as error:
                    self._break(error)
                    raise
            finally:
                self._running_in = None
                afterwards, self._afterwards = self._afterwards, None
                if afterwards is not None:
                    afterwards()
            self.check()

    def check(self) -> None:
        """Refuse where no step may run any more.

        Raises:
            MistralChatError: why.
        """
        if self._refusal is not None:
            raise self._refusal.with_traceback(None)

    def refuse(self, why: MistralChatError) -> None:
        """Let no further step run."""
        self._refusal = why

    def postpone(self, call: Callable[[], None]) -> bool:
        """Have something done after the step that this thread is in, as a signal handler may be.

        Returns:
            whether there is such a step.
        """
        if self._running_in != threading.get_ident():
            return False
        self._afterwards = call
        return True

    @contextlib.contextmanager
    def between_steps(self, timeout_s: float) -> Iterator[bool]:
        """A block during which no other thread runs a step; gives False where one does not end."""
        is_free = self._lock.acquire(timeout=timeout_s)
        try:
            yield is_free
        finally:
            if is_free:
                self._lock.release()

    def forsake(self, why: MistralChatError) -> None:
        """In a forked process: the ranks are another's, as are the threads that hold the lock."""
        self._lock = threading.RLock()
        self._running_in = self._afterwards = None
        self._refusal = why

    def _break(self, error: BaseException) -> None:
        if self._n_ranks > 1 and not self.is_broken:
            self.is_broken = True
            name = type(error).__name__
            self.refuse(
                RankLostError(
                    f"{name} cut a step short, so that the ranks no longer agree: close this model "
                    f"and load it again"
                )
            )
