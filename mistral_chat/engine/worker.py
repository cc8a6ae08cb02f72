"""What ranks other than 0 do, and the session that holds all ranks of a Python program together.

`main` is what a rank that an `LLM` started runs, after `engine/rank.py`.
"""

import atexit
import contextlib
import ctypes
import json
import os
import signal
import subprocess
import sys
import traceback
import weakref
from dataclasses import asdict
from pathlib import Path

import torch

from mistral_chat.config import EngineConfig
from mistral_chat.engine.ranks.group import Group, Place
from mistral_chat.engine.ranks.launch import (
    current_group,
    launched_rank,
    launched_ranks_here,
    spawn_ranks,
)
from mistral_chat.engine.start_up import load_runner
from mistral_chat.engine.step_guard import StepGuard, interrupts_held_back
from mistral_chat.errors import (
    MistralChatError,
    OtherRankFailedError,
    RankLostError,
    UsageError,
    one_line,
)

__all__ = ["Session", "serve"]

END_TIMEOUT_S = 10.0


def serve(config: EngineConfig, group: Group) -> None:
    """Load this rank's share and run rank 0's steps until it ends the loop.

    Raises:
        MistralChatError: why the model cannot be loaded; this rank must report it.
        OtherRankFailedError: another rank reports why.
    """
    # Rank 0 handles Ctrl-C; if it ends, the lifeline ends this process, too.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        load_runner(config, group).follow()
    except MistralChatError:
        raise
    except torch.OutOfMemoryError as error:
        group.lifeline.fail(f"out of memory: {str(error).splitlines()[0]}")
        raise OtherRankFailedError("told rank 0") from error
    except Exception as error:
        group.lifeline.await_verdict()
        traceback.print_exc()
        group.lifeline.fail(f"{type(error).__name__}: {(str(error) or '-').splitlines()[0]}")
        raise OtherRankFailedError("told rank 0") from error
    group.close()


class Session:
    """The ranks that a program's `LLM` runs on.

    Args:
        config: what they load.
        nproc_per_node: how many; None is torchrun's number, else one.

    Raises:
        UsageError: a number that is not torchrun's, or not at least 1.
    """

    def __init__(self, config: EngineConfig, nproc_per_node: int | None) -> None:
        self._workers: list[subprocess.Popen[bytes]] = []
        self._closed = False
        if nproc_per_node is not None and nproc_per_node < 1:
            raise UsageError(f"nproc_per_node is {nproc_per_node}: expected at least 1")
        if launched_rank() is not None:
            if nproc_per_node not in (None, launched_ranks_here()):
                raise UsageError(
                    f"nproc_per_node is {nproc_per_node}, but the launcher started "
                    f"{launched_ranks_here()} ranks on this node"
                )
            self.group = current_group()
        elif (nproc_per_node or 1) == 1:
            self.group = Group(Place())  # not `current_group`: it is closed with this session
        else:
            assert nproc_per_node is not None
            self.group, self._workers = spawn_ranks(nproc_per_node, _to_json(config))
        self.guard = StepGuard(self.group.world_size)  # replaced by the runner's
        _sessions.add(self)
        # gloo's threads must not outlive the interpreter of a program that never closes this.
        atexit.register(self.close)

    def close(self) -> None:
        """End the other ranks' loop, and wait for the processes that this one started.

        In a signal handler that interrupts a step this happens after the step.
        """
        if self._closed or self.guard.postpone(self.close):
            return
        with interrupts_held_back(), self.guard.between_steps(END_TIMEOUT_S) as is_between:
            if self._closed:
                return
            if self.guard.is_broken or not is_between:
                self.abandon()
                return
            try:
                self._part()
            except RankLostError:
                self.abandon()

    def _part(self) -> None:
        self._forget()
        self.group.send(None)
        self.group.close()
        for worker in self._workers:
            with contextlib.suppress(subprocess.TimeoutExpired):
                worker.wait(END_TIMEOUT_S)
        self._kill()

    def abandon(self) -> None:
        """End the other ranks after a failure, without waiting for their step."""
        with interrupts_held_back():
            self._forget()
            self.group.lifeline.expect_end()
            self._kill()
            self.group.close()  # so that another may be opened

    def _forget(self) -> None:
        self._closed = True
        atexit.unregister(self.close)
        self.guard.refuse(UsageError("this LLM is closed: make another"))

    def _kill(self) -> None:
        for worker in self._workers:
            worker.kill()
            worker.wait()
        self._workers = []

    def disown(self) -> None:
        """In a forked process: leave the ranks to the parent, whose threads were not forked."""
        if self._closed:
            return
        self._closed = True
        atexit.unregister(self.close)
        for worker in self._workers:
            worker.returncode = 0  # not this process's child
        for kept in (self.group, self.group.__dict__):
            # Destroying them would wait for threads that were not forked.
            ctypes.pythonapi.Py_IncRef(ctypes.py_object(kept))
        self.guard.disown(
            UsageError(
                f"this LLM belongs to process {os.getppid()}, which forked this one: make another "
                f"here, or start processes by spawning them"
            )
        )


_sessions: "weakref.WeakSet[Session]" = weakref.WeakSet()


def _disown_sessions() -> None:
    for session in list(_sessions):
        session.disown()


os.register_at_fork(after_in_child=_disown_sessions)


def _to_json(config: EngineConfig) -> str:
    return json.dumps(asdict(config) | {"model": str(config.model) if config.model else None})


def _from_json(text: str) -> EngineConfig:
    values = json.loads(text)
    if values["model"] is not None:
        values["model"] = Path(values["model"])
    return EngineConfig(**values)


def main() -> None:
    """Run a rank that an `LLM` started."""
    try:
        serve(_from_json(sys.argv[1]), current_group())
    except OtherRankFailedError:
        sys.exit(1)
    except MistralChatError as error:
        print(f"mistral-chat: error: {one_line(error)}", file=sys.stderr)
        sys.exit(1)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)  # gloo's threads sometimes outlive the interpreter and abort it (torch 2.13)
