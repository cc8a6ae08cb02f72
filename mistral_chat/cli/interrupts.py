"""Ctrl-C until a chat or an answer handles it: nothing may swallow it.

Python drops an interrupt that comes while it runs a finalizer, and extension modules drop some
that come while they are imported.
"""

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

__all__ = ["noting_interrupts", "require_no_interrupt"]

_was_pressed = False


@contextmanager
def noting_interrupts() -> Iterator[Callable[[], bool]]:
    """Note that Ctrl-C was pressed: what it breaks off may fail with an error of its own.

    Such as an extension module that is being imported. Whoever answers has a handler of his own.
    """
    global _was_pressed
    _was_pressed = False

    def on_signal(signum: int, frame: FrameType | None) -> None:  # noqa: ARG001
        global _was_pressed
        _was_pressed = True
        raise KeyboardInterrupt

    # Ignored where a shell started this in the background; another's where a program called it.
    is_ours = signal.getsignal(signal.SIGINT) is signal.default_int_handler
    if is_ours:
        signal.signal(signal.SIGINT, on_signal)
    try:
        yield lambda: _was_pressed
    finally:
        if is_ours and signal.getsignal(signal.SIGINT) is on_signal:
            signal.signal(signal.SIGINT, signal.default_int_handler)


def require_no_interrupt() -> None:
    """Raise an interrupt that came and got lost.

    Raises:
        KeyboardInterrupt: Ctrl-C was pressed.
    """
    if _was_pressed:
        raise KeyboardInterrupt
