"""Starting a model and ending it, as the main job, batch and bench do.

Checks the folder, starts ranks, loads tokenizer and weights on rank 0, serves it on the others, and
ends all of them. Knows nothing of prompts and answers.
"""

import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType
from typing import TYPE_CHECKING, NoReturn

from mistral_chat.cli.codes import FAILED, code_of
from mistral_chat.cli.console import printing
from mistral_chat.cli.interrupts import require_no_interrupt
from mistral_chat.cli.requests import ModelRequest
from mistral_chat.engine.ranks import parent
from mistral_chat.engine.ranks.launch import launched_rank, launched_ranks, launched_ranks_here
from mistral_chat.errors import MistralChatError, OtherRankFailedError, RankLostError, UsageError

if TYPE_CHECKING:
    from mistral_chat.chat.tokenizer import Tokenizer
    from mistral_chat.cli.console.terminal_state import TerminalState
    from mistral_chat.config import EngineConfig
    from mistral_chat.engine.ranks.group import Group
    from mistral_chat.engine.runner import Runner
    from mistral_chat.model.folder import ModelFolder

__all__ = [
    "Loaded",
    "check",
    "end_on_signals",
    "end_with",
    "follow",
    "launch",
    "load",
    "parting",
    "put_back_at_end",
]

ONE_SPEAKS_S = 2.0


def check(
    request: ModelRequest, n_ranks: int | None = None, *, needs_text: bool = True
) -> "ModelFolder":
    """Check all that the model's folder must hold, before ranks are started or torch is imported.

    Args:
        request: as read.
        n_ranks: how many share the model; None is those that are asked for, or launched.
        needs_text: a tokenizer is needed, too.

    Raises:
        MistralChatError: as `ModelFolder.checked`.
    """
    from mistral_chat.model.folder import ModelFolder

    if n_ranks is None:
        n_ranks = (request.nproc_per_node or 1) if launched_rank() is None else launched_ranks()
    return ModelFolder.checked(request.engine, n_ranks, needs_text=needs_text)


def launch(request: ModelRequest, words: Sequence[str], n_heads: int = 1) -> int | None:
    """Start the ranks that are asked for, unless a launcher already has.

    Args:
        request: as read.
        words: the command line that each rank is given.
        n_heads: most ranks that the model can use; unused in ranks that a launcher has started.

    Returns:
        the code to end with; None where this process is a rank itself.

    Raises:
        UsageError: torchrun started another number of ranks than is asked for.
    """
    if launched_rank() is None:
        n_ranks = _ranks_to_start(request, n_heads)
        if n_ranks > 1:
            return _run_ranks(n_ranks, words)
    elif request.nproc_per_node not in (None, launched_ranks_here()):
        raise UsageError(
            f"--nproc_per_node is {request.nproc_per_node}, but torchrun started "
            f"{launched_ranks_here()} ranks on this node: leave the flag out"
        )
    return None


def _run_ranks(n_ranks: int, words: Sequence[str]) -> int:
    """Start ranks and wait for them; the code to end with."""
    from mistral_chat.cli.console.terminal_state import TerminalState
    from mistral_chat.engine.ranks.launcher import run_ranks

    terminal = TerminalState()
    ended = run_ranks(n_ranks, words)
    if not ended.orderly or terminal.is_changed():
        terminal.put_back()
    if ended.message:
        print(f"mistral-chat: error: {ended.message}", file=sys.stderr, flush=True)
    return ended.code


def _ranks_to_start(request: ModelRequest, n_heads: int) -> int:
    """Ranks on this machine: as asked for, else every GPU that the model can use, else one."""
    from mistral_chat.engine.ranks.launch import visible_gpus

    if request.nproc_per_node is not None:
        return request.nproc_per_node
    if request.engine.device == "cpu":
        return 1
    return max(1, min(visible_gpus(), n_heads))


def follow(config: "EngineConfig") -> int:
    """Serve rank 0 from any other rank until it ends; the code to end with."""
    if signal.getsignal(signal.SIGINT) != signal.SIG_IGN:  # as our own launcher has it
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # end at once and without a word
    from mistral_chat.cli.console.terminal_state import TerminalState

    terminal = TerminalState()
    if launched_rank() == 1:  # no launcher but ours does it for a rank 0 that was killed
        put_back_at_end(terminal)
    from mistral_chat.engine.ranks.launch import current_group
    from mistral_chat.engine.worker import serve

    def on_lost(message: str) -> None:  # noqa: ARG001
        if launched_rank() == 1:
            terminal.put_back()
        os._exit(FAILED)

    try:
        group = current_group()
        group.lifeline.on_lost = on_lost
        for number in (signal.SIGTERM, signal.SIGHUP):  # gloo waits without hearing Python's
            if signal.getsignal(number) != signal.SIG_IGN:
                signal.signal(number, signal.SIG_DFL)
        serve(config, group)
    except OtherRankFailedError:
        return FAILED
    except MistralChatError as error:  # this rank is the one to say it
        printing.error(error)
        return code_of(error)
    return 0


def put_back_at_end(terminal: "TerminalState") -> None:
    """Restore the terminal when the launcher or a signal ends this rank.

    Covers the seconds of importing torch, before there is a group and `end_with` takes over.

    Args:
        terminal: as it was before a rank changed it.
    """

    def put_back() -> None:
        if terminal.is_changed():
            terminal.put_back()

    def end(code: int) -> NoReturn:
        put_back()
        os._exit(code)

    parent.set_on_gone(put_back)
    end_on_signals(end, signal.SIGTERM, signal.SIGHUP)


def end_with(
    group: "Group",
    clean_up: Callable[[], None] = lambda: None,
    last_words: Callable[[], None] = lambda: None,
    terminal: "TerminalState | None" = None,
) -> Callable[[str, int], NoReturn]:
    """Make rank 0 restore the terminal and end when another rank or the launcher ends.

    Args:
        group: all ranks.
        clean_up: removes what is drawn on the screen; called first, from any thread.
        last_words: says what a person can do next; called last, from any thread.
        terminal: as it was before this process changed it; None is as it is now.

    Returns:
        a function that ends the process in the same way, with a message (or "") and a code.
    """
    from mistral_chat.cli.console.terminal_state import TerminalState

    before = terminal or TerminalState()
    ending: list[int] = []  # the thread that ends the process

    def end_process(message: str, code: int = FAILED) -> NoReturn:
        ending.append(threading.get_ident())
        if ending[0] != threading.get_ident():
            time.sleep(ONE_SPEAKS_S)  # another thread is already printing
        if len(ending) > 1:
            os._exit(code)
        printing.take_down_drawn()
        clean_up()
        before.put_back()
        if message:
            printing.error(parent.GONE if parent.is_gone() else message)
        last_words()
        if before.is_changed():
            before.put_back()
        os._exit(code)

    parent.set_on_gone(lambda: end_process(parent.GONE))
    group.lifeline.on_lost = end_process
    return end_process


def end_on_signals(end: Callable[[int], object], *numbers: signal.Signals) -> None:
    """Make signals end the process; a SIGHUP that is ignored, as under nohup, stays ignored.

    Args:
        end: called with the code to end with.
        numbers: the signals.
    """

    def on_signal(signum: int, frame: FrameType | None) -> None:  # noqa: ARG001
        end(128 + signum)

    for number in numbers:
        if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, on_signal)


@dataclass(frozen=True, kw_only=True)
class Loaded:
    """A model on rank 0.

    Args:
        runner: its share of the weights, and the way to the other ranks.
        tokenizer: the model's.
        load_s: seconds from the command's start.
    """

    runner: "Runner"
    tokenizer: "Tokenizer"
    load_s: float


def load(
    config: "EngineConfig",
    folder: "ModelFolder",
    group: "Group",
    started: float,
    *,
    quiet: bool,
    stats: bool = False,
) -> Loaded:
    """Load tokenizer and weights on rank 0, with a bar at a terminal.

    Args:
        config: what to load; the same on every rank.
        folder: the config's, checked.
        group: all ranks.
        started: when the command was started, in `time.monotonic()`.
        quiet: no bar and no notice.
        stats: say what the start took.

    Raises:
        OtherRankFailedError: another rank cannot load, and says why itself.
        MistralChatError: this rank cannot load; the others end silently.
    """
    from mistral_chat.chat.tokenizer import Tokenizer
    from mistral_chat.cli.console import render
    from mistral_chat.engine.start_up import load_runner

    tokenizers: list[Tokenizer] = []

    def read_tokenizer() -> None:
        tokenizers.append(Tokenizer.from_folder(folder))

    try:
        with render.loading_bar(quiet=quiet) as on_loading:
            runner = load_runner(config, group, on_loading, read_tokenizer, folder=folder)
        require_no_interrupt()
    except OtherRankFailedError:
        raise
    except (MistralChatError, KeyboardInterrupt):
        group.lifeline.expect_end()
        raise
    load_s = time.monotonic() - started
    if not quiet:
        pictures = "pictures are not understood: the text side of this model runs"
        for notice in (runner.notice, pictures if folder.args.vision_encoder else None):
            if notice:
                render.note(f"mistral-chat: {notice}")
    if stats and not quiet:
        render.note(f"mistral-chat: {render.start_line(runner, load_s)}")
    return Loaded(runner=runner, tokenizer=tokenizers[0], load_s=load_s)


@contextmanager
def parting(group: "Group") -> Iterator[None]:
    """End the other ranks at the end of a block: in order, unless they may be why it failed."""
    try:
        yield
    except RankLostError:
        group.lifeline.expect_end()
        raise
    except (MistralChatError, BrokenPipeError):
        _part(group)
        raise
    except Exception:
        group.lifeline.await_verdict()
        group.lifeline.expect_end()
        raise
    _part(group)


def _part(group: "Group") -> None:
    group.send(None)
    group.close()
