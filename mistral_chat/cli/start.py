"""Starting a model and parting from it: what the main job, batch and bench do alike.

Which ranks there are, what the others do, tokenizer and weights of rank 0, and how all end. Knows
nothing of prompts and answers.
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
from mistral_chat.engine import parent
from mistral_chat.engine.launch import launched_rank, launched_ranks_here
from mistral_chat.errors import MistralChatError, RankLostError, UsageError

if TYPE_CHECKING:
    from mistral_chat.chat.tokenizer import Tokenizer
    from mistral_chat.cli.console.terminal_state import TerminalState
    from mistral_chat.config import EngineConfig
    from mistral_chat.engine.group import Group
    from mistral_chat.engine.runner import Runner

__all__ = [
    "Loaded",
    "end_on_signals",
    "end_with",
    "follow",
    "launch",
    "load",
    "parting",
    "put_back_at_end",
    "ranks_to_start",
    "tokenizer_of",
]

ONE_SPEAKS_S = 2.0


def launch(request: ModelRequest, words: Sequence[str]) -> int | None:
    """Start the ranks that are asked for, where no launcher has.

    Args:
        request: as read.
        words: the command line that each of them is given.

    Returns:
        the code to end with; None where this process is a rank itself.

    Raises:
        UsageError: torchrun started another number of ranks than is asked for.
        MistralChatError: the folder cannot be a model's, so that nothing need be started.
    """
    if launched_rank() is None:
        n_ranks = ranks_to_start(request)
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
    from mistral_chat.engine.launcher import run_ranks

    terminal = TerminalState()
    ended = run_ranks(n_ranks, words)
    if not ended.orderly or terminal.is_changed():
        terminal.put_back()
    if ended.message:
        print(f"mistral-chat: error: {ended.message}", file=sys.stderr, flush=True)
    return ended.code


def ranks_to_start(options: ModelRequest) -> int:
    """Ranks on this machine: as asked for, else every GPU that the model can use, else one.

    Raises:
        MistralChatError: the folder cannot be a model's, so that nothing need be started.
    """
    from mistral_chat.engine.launch import visible_gpus
    from mistral_chat.model.args import read_args

    n_heads = 1
    if options.engine.model is not None:
        n_heads = read_args(options.engine.model).n_heads
    elif options.engine.shape is not None:
        n_heads = int(options.engine.shape.get("n_heads", 1))
    if options.nproc_per_node is not None:
        return options.nproc_per_node
    if options.engine.device == "cpu":
        return 1
    return max(1, min(visible_gpus(), n_heads))


def follow(config: "EngineConfig") -> int:
    """Any rank but 0: serve rank 0 until it ends; the code to end with."""
    if signal.getsignal(signal.SIGINT) != signal.SIG_IGN:  # as our own launcher has it
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # end at once and without a word
    from mistral_chat.cli.console.terminal_state import TerminalState

    terminal = TerminalState()
    if launched_rank() == 1:  # no launcher but ours does it for a rank 0 that was killed
        put_back_at_end(terminal)
    from mistral_chat.engine.group import PeerFailedError
    from mistral_chat.engine.launch import current_group
    from mistral_chat.engine.worker import serve

    def on_lost(message: str) -> None:  # noqa: ARG001
        if launched_rank() == 1:
            terminal.put_back()
        os._exit(FAILED)

    try:
        group = current_group()
        group.set_on_lost(on_lost)
        for number in (signal.SIGTERM, signal.SIGHUP):  # gloo waits without hearing Python's
            if signal.getsignal(number) != signal.SIG_IGN:
                signal.signal(number, signal.SIG_DFL)
        serve(config, group)
    except PeerFailedError:
        return FAILED
    except MistralChatError as error:  # this rank is the one to say it
        printing.error(error)
        return code_of(error)
    return 0


def put_back_at_end(terminal: "TerminalState") -> None:
    """Have a rank leave the terminal as it was when the launcher or a signal ends it.

    Until there is a group, and with it more to do: importing torch takes seconds.

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
    """Have rank 0 put the terminal back and end when another rank, or the launcher, does.

    Args:
        group: all ranks.
        clean_up: what to take off the screen first; called from any thread.
        last_words: says what a person can do after that; called from any thread.
        terminal: as it was before this process changed it; None is as it is now.

    Returns:
        ends the process in the same way, with a message (or none) and a code.
    """
    from mistral_chat.cli.console.terminal_state import TerminalState

    before = terminal or TerminalState()
    ending: list[int] = []  # the thread that ends the process

    def end_process(message: str, code: int = FAILED) -> NoReturn:
        ending.append(threading.get_ident())
        if ending[0] != threading.get_ident():
            time.sleep(ONE_SPEAKS_S)  # one is speaking already
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
    group.set_on_lost(end_process)
    return end_process


def end_on_signals(end: Callable[[int], object], *numbers: signal.Signals) -> None:
    """Have signals end the process; SIGHUP that is ignored, as under nohup, stays so.

    Args:
        end: ends it with a code.
        numbers: of the signals.
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
    config: "EngineConfig", group: "Group", started: float, *, quiet: bool, stats: bool = False
) -> Loaded:
    """Load tokenizer and weights on rank 0, with a bar at a terminal.

    Args:
        config: what to load; the same on every rank.
        group: all ranks.
        started: when the command was, in `time.monotonic()`.
        quiet: no bar and no notice.
        stats: say what the start took.

    Raises:
        PeerFailedError: another rank cannot, and says why itself.
        MistralChatError: this rank cannot; the others end without a word.
    """
    from mistral_chat.chat.tokenizer_file import find_tokenizer
    from mistral_chat.cli.console import render
    from mistral_chat.engine.group import PeerFailedError
    from mistral_chat.engine.start_up import load_runner
    from mistral_chat.model.args import read_args

    tokenizers: list[Tokenizer] = []
    try:
        if config.model is not None:  # before weights are read, which may take minutes
            read_args(config.model, config.load_format)
            find_tokenizer(config.model)
        with render.loading_bar(quiet=quiet) as on_loading:
            runner = load_runner(
                config, group, on_loading, lambda: tokenizers.append(tokenizer_of(config))
            )
        require_no_interrupt()
    except PeerFailedError:
        raise
    except (MistralChatError, KeyboardInterrupt):
        group.expect_end()
        raise
    load_s = time.monotonic() - started
    if runner.notice and not quiet:
        render.note(f"mistral-chat: {runner.notice}")
    if stats and not quiet:
        render.note(f"mistral-chat: {render.start_line(runner, load_s)}")
    return Loaded(runner=runner, tokenizer=tokenizers[0], load_s=load_s)


def tokenizer_of(config: "EngineConfig") -> "Tokenizer":
    """The model's tokenizer; for dummy weights the shipped one of the vocabulary's size.

    Raises:
        TokenizerError: there is none, or it cannot be used.
    """
    from mistral_chat.chat.tokenizer import Tokenizer
    from mistral_chat.model.args import read_args

    if config.model is not None:
        args = read_args(config.model, config.load_format)
        return Tokenizer.from_folder(config.model, args.vocab_size)
    return Tokenizer.shipped(int((config.shape or {}).get("vocab_size", 0)))


@contextmanager
def parting(group: "Group") -> Iterator[None]:
    """End the other ranks with a block, in peace unless what failed may be theirs."""
    try:
        yield
    except RankLostError:
        group.expect_end()
        raise
    except (MistralChatError, BrokenPipeError):
        _part(group)
        raise
    except Exception:
        group.await_verdict()
        group.expect_end()
        raise
    _part(group)


def _part(group: "Group") -> None:
    group.send(None)
    group.close()
