"""Ends a rank when the process that started it ends, in whatever way.

A launcher that is killed cannot end its ranks, which would go on reading the terminal and holding
the GPUs. Imports nothing heavy, so that a rank can call this first.
"""

import contextlib
import ctypes
import os
import select
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

__all__ = ["GONE", "end_with", "end_with_launcher", "is_gone", "set_on_gone"]

GONE = "the launcher ended unexpectedly; all ranks end"
POLL_S = 0.25
_SET_PARENT_DEATH_SIGNAL = 1  # linux/prctl.h

_parent: int | None = None
_on_gone: Callable[[], None] | None = None


def end_with_launcher(launcher: int | None = None) -> None:
    """End this rank when its launcher ends.

    Rank 0 watches from a thread, since it may have a terminal to restore; the kernel kills the
    others.

    Args:
        launcher: id of the process that started this rank; None takes torchrun's, if there is one.
    """
    if launcher is None:
        # A shell that starts ranks in the background and exits is not a launcher that died.
        if "TORCHELASTIC_RUN_ID" not in os.environ or "RANK" not in os.environ:
            return
        launcher = os.getppid()
        if _adopts_orphans(launcher):
            _end()
    if os.environ.get("RANK") == "0":
        end_with(launcher)
    else:
        prctl = ctypes.CDLL(None, use_errno=True).prctl
        prctl(_SET_PARENT_DEATH_SIGNAL, signal.SIGKILL, 0, 0, 0)
        if os.getppid() != launcher:  # it ended before that
            os._exit(1)


def end_with(parent: int) -> None:
    """End this process when its parent ends.

    The kernel's signal will not do: it is sent when the thread ends that started this process.
    """
    global _parent
    if _parent is not None:
        return
    _parent = parent
    if is_gone():
        _end()
    threading.Thread(target=_watch, args=(parent,), name="parent", daemon=True).start()


def set_on_gone(on_gone: Callable[[], None]) -> None:
    """Call `on_gone`, from a thread, when the parent has ended; it must end the process."""
    global _on_gone
    _on_gone = on_gone


def is_gone() -> bool:
    """Whether the parent has ended."""
    return _parent is not None and os.getppid() != _parent


def _watch(parent: int) -> None:
    with contextlib.suppress(OSError):  # kernels before 5.3 have none
        handle = os.pidfd_open(parent)
        if not is_gone():  # else its id may be another process's by now
            select.select([handle], [], [])
        os.close(handle)
    while not is_gone():
        time.sleep(POLL_S)
    if _on_gone is not None:
        _on_gone()
    _end()


def _end() -> NoReturn:
    """End silently, except on rank 0, which reports it for all."""
    if os.environ.get("RANK", "0") == "0" and sys.stderr is not None:
        with contextlib.suppress(OSError, ValueError):
            print(f"mistral-chat: error: {GONE}", file=sys.stderr, flush=True)
    os._exit(1)


def _adopts_orphans(process: int) -> bool:
    """Whether a process is init; a container's first process may be Python, which is a launcher."""
    if process != 1:
        return False
    try:
        command = Path("/proc/1/cmdline").read_bytes()
    except OSError:
        return True
    return b"python" not in command and b"torch" not in command
