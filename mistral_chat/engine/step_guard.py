"""Keeps steps whole: after a step that was interrupted, no other may run.

If one rank left a step half-way, the others would wait for it and take its next step for the rest
of this one. Knows nothing of what a step does.
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
    """Delay Ctrl-C until the end of the block.

    Does nothing outside the main thread, which is the only one that Ctrl-C interrupts.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    held: list[FrameType | None] = []

    def hold(signum: int, frame: FrameType | None) -> None:  # noqa: ARG001
        held.append(frame)

    before = signal.signal(signal.SIGINT, hold)
    if not callable(before):  # SIG_IGN or SIG_DFL
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
    """Decides whether steps may run, and postpones work to the end of the current one.

    Args:
        n_ranks: that run the steps; on a single rank an interrupted step does no harm.
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
        """Surround a step: delays Ctrl-C, and refuses all later steps if this one fails.

        Raises:
            MistralChatError: why no step may run.
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
        """Raise if no step may run.

        Raises:
            MistralChatError: why.
        """
        if self._refusal is not None:
            raise self._refusal.with_traceback(None)

    def refuse(self, why: MistralChatError) -> None:
        """Refuse all further steps."""
        self._refusal = why

    def postpone(self, call: Callable[[], None]) -> bool:
        """Call something after the step that this thread is in; for signal handlers.

        Returns:
            False if it is in none, so that nothing will be called.
        """
        if self._running_in != threading.get_ident():
            return False
        self._afterwards = call
        return True

    @contextlib.contextmanager
    def between_steps(self, timeout_s: float) -> Iterator[bool]:
        """Keep other threads from running steps; gives False if one runs past the timeout."""
        is_free = self._lock.acquire(timeout=timeout_s)
        try:
            yield is_free
        finally:
            if is_free:
                self._lock.release()

    def disown(self, why: MistralChatError) -> None:
        """In a forked process: refuse all steps; the thread that held the lock is the parent's."""
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
