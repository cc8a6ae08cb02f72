"""The entry: which command, which rank, and which code to end with.

Flags are checked before anything heavy is imported; errors become one line and a code here and
nowhere else.
"""

import atexit
import contextlib
import os
import signal
import sys
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from mistral_chat import __version__
from mistral_chat.cli import flags, printing, start
from mistral_chat.cli.begun import Begun, say_what_starts
from mistral_chat.cli.interrupts import noting_interrupts, require_no_interrupt
from mistral_chat.cli.pipes import keep_pipes
from mistral_chat.engine.launch import (
    is_launched,
    launched_rank,
    launched_ranks,
    set_up_environment,
)
from mistral_chat.errors import MistralChatError, OutputError, UsageError, shown

if TYPE_CHECKING:
    from mistral_chat.cli.inputs import Inputs

__all__ = ["main"]

FAILED, WRONG_USAGE, INTERRUPTED = 1, 2, 130
RANK_0_SPEAKS_S = 5.0


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; the code to end with.

    A rank that a launcher started ends its process here: gloo's threads now and then outlive the
    interpreter and abort it (torch 2.13).
    """
    code = _run(argv)
    if "torch.distributed" in sys.modules and is_launched():
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(OSError, ValueError):
                if stream is not None:
                    stream.flush()
        os._exit(code)
    return code


def _run(argv: Sequence[str] | None) -> int:
    begun = Begun.now()
    set_up_environment()
    words = list(sys.argv[1:] if argv is None else argv)
    for stream in (sys.stdout, sys.stderr):
        if stream is not None:
            stream.reconfigure(encoding="utf-8", errors="replace")  # type: ignore[union-attr]
    with noting_interrupts() as was_interrupted:
        try:
            return _leave(_command(words, begun))
        except KeyboardInterrupt:
            return INTERRUPTED
        except Exception as error:
            if was_interrupted():
                return INTERRUPTED
            if isinstance(error, BrokenPipeError):
                return _leave(0)
            if not isinstance(error, MistralChatError):
                raise
            _say_once(error)
            return WRONG_USAGE if isinstance(error, UsageError) else FAILED


def _leave(code: int) -> int:
    """Flush what was printed; a reader that has gone is no failure."""
    try:
        if sys.stdout is not None:
            sys.stdout.flush()
    except BrokenPipeError:
        # The interpreter flushes again at its end, and would complain then.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return code


def _say_once(error: MistralChatError) -> None:
    """Every rank reads the same flags; rank 0 says what is wrong with them.

    The others leave it the time to: the first rank that ends has torchrun end all.
    """
    try:
        speaks = launched_rank() in (None, 0)
    except UsageError:  # the launcher's variables are what is wrong
        speaks = True
    if speaks:
        printing.error(error)
    else:
        time.sleep(RANK_0_SPEAKS_S)


def _command(words: list[str], begun: Begun) -> int:
    if launched_rank() is None:
        words = keep_pipes(words, _say_that_it_waits("--quiet" not in words))
    command = words[0] if words and words[0] in flags.COMMANDS else None
    if command == "bench":
        from mistral_chat.cli import bench

        return bench.run(words[1:], begun)
    if command == "demo":
        return _demo(words[1:], begun)
    if command == "download":
        from mistral_chat.cli import download

        return download.run(words[1:])
    if command == "inspect":
        from mistral_chat.cli import inspect

        return inspect.run(words[1:])
    if command == "batch":
        from mistral_chat.cli import batch

        return batch.run(words[1:], begun)
    _refuse_misspelt_command(words)
    normalized = flags.normalize(words)
    if not words or flags.wants_help(normalized):
        return _help(None, code=0 if words else WRONG_USAGE)
    if "--version" in normalized:
        return _print_version()
    return _main_job(flags.parse(normalized), words, begun)


def _refuse_misspelt_command(words: Sequence[str]) -> None:
    if words and not words[0].startswith("-"):
        from mistral_chat.cli.suggestions import near_command

        if near := near_command(words[0], flags.COMMANDS):
            raise UsageError(
                f"{shown(words[0])} is neither a command nor a folder: did you mean "
                f"mistral-chat {near}?"
            )


def _say_that_it_waits(speaks: bool) -> Callable[[str], None]:
    def say(pipe: str) -> None:
        if speaks:
            printing.note(f"mistral-chat: waiting for {shown(pipe)} to end, which is a pipe")

    return say


def _help(command: str | None, code: int = 0) -> int:
    if launched_rank() in (None, 0):
        print(flags.help_text(command), end="", file=sys.stderr if code else sys.stdout)
    return code


def _print_version() -> int:
    if launched_rank() in (None, 0):
        print(f"mistral-chat {__version__}")
    return 0


def _demo(words: list[str], begun: Begun) -> int:
    only_path = "--path" in words
    words = [word for word in words if word != "--path"]
    normalized = flags.normalize(words)
    if flags.wants_help(normalized):
        return _help("demo")
    options = flags.parse(["MODEL", "--instruct", *normalized])

    from mistral_chat.cli.embedded import embedded_model
    from mistral_chat.engine.launch import visible_gpus

    show_bar = not options.quiet and launched_rank() in (None, 0)
    folder = embedded_model(on_progress=_demo_progress(options.quiet), show_bar=show_bar)
    if only_path:
        print(folder)
        return 0
    own = [str(folder), "--instruct"]
    if options.nproc_per_node is None and launched_rank() is None:
        # Two ranks of one GPU cannot speak through NCCL; two of a CPU can through gloo.
        on_gpus = options.engine.device != "cpu" and visible_gpus()
        own.append(f"--nproc_per_node={min(2, on_gpus) if on_gpus else 2}")
    words = [*own, *words]
    return _main_job(flags.parse(flags.normalize(words)), words, begun)


def _demo_progress(quiet: bool) -> Callable[[str], None]:
    def show(line: str) -> None:
        if not quiet and launched_rank() in (None, 0):
            printing.note(f"mistral-chat: {line}")

    return show


def _main_job(options: flags.Options, words: list[str], begun: Begun) -> int:
    if rank := launched_rank():
        start.launch(options, words)
        return start.follow(options.engine)
    if sys.stdout is None:
        raise OutputError("stdout is closed: expected somewhere to write the answer to")
    from mistral_chat.cli.suggestions import require_model

    require_model(options.engine.model)
    say_what_starts(options, begun)
    from mistral_chat.cli.checks import check_model
    from mistral_chat.cli.inputs import read_inputs

    if not begun.by_us:
        n_ranks = (options.nproc_per_node or 1) if rank is None else launched_ranks()
        check_model(options.engine, n_ranks)
    inputs = read_inputs(options, for_ranks=rank is None)
    with begun.handed_on():
        code = start.launch(options, words)
    if code is not None:
        return code
    with contextlib.ExitStack() as held:
        return _lead(options, inputs, begun, held)


def _lead(
    options: flags.Options, inputs: "Inputs", begun: Begun, held: contextlib.ExitStack
) -> int:
    """Rank 0: load, then answer or chat; what is held is let go afterwards."""
    from mistral_chat.cli.going_on import typed_command
    from mistral_chat.cli.terminal import QuietTerminal
    from mistral_chat.cli.terminal_state import TerminalState

    typed = typed_command(launched=launched_rank() is not None)
    before = TerminalState()
    # What is typed from now on waits for the prompt, unseen.
    is_chat = inputs.prompt is None
    terminal = held.enter_context(QuietTerminal(signals=True)) if is_chat else None

    from mistral_chat.chat.chat import Chat
    from mistral_chat.chat.functions import PythonFunctions
    from mistral_chat.cli import one_shot
    from mistral_chat.cli.calls import print_line
    from mistral_chat.cli.repl import chat_at_terminal
    from mistral_chat.cli.terminal_chat import TerminalChat
    from mistral_chat.engine.engine import Engine
    from mistral_chat.engine.group import PeerFailedError
    from mistral_chat.engine.launch import current_group

    functions: PythonFunctions | None = None
    tools = inputs.offered.tools
    if options.tools is not None and options.tools.suffix == ".py":
        on_printed = (lambda line: None) if options.quiet else print_line
        functions = PythonFunctions(
            options.tools, options.tool_timeout, on_printed, options.tools_env
        )
        atexit.register(functions.close)  # should this process be killed, it ends them, too
        tools = functions.tools
    group = current_group()
    talk: TerminalChat | None = None

    def say_how_to_go_on() -> None:
        if talk is not None:
            talk.say_how_to_go_on(typed)

    end_process = start.end_with(group, last_words=say_how_to_go_on, terminal=before)
    start.end_on_signals(lambda code: end_process("", code), signal.SIGTERM, signal.SIGHUP)
    try:
        loaded = start.load(
            options.engine, group, begun.at, quiet=options.quiet, stats=options.stats
        )
    except PeerFailedError:
        return FAILED
    with start.parting(group):
        chat = Chat(
            Engine(loaded.runner),
            loaded.tokenizer,
            instruct=options.instruct,
            system=inputs.offered.system,
            tools=tools,
            grammar=inputs.offered.grammar,
        )
        require_no_interrupt()
        if inputs.prompt is not None:
            run = functions if options.yes else None
            return one_shot.answer_once(chat, options, inputs.prompt, loaded.load_s, run)
        assert terminal is not None
        terminal.hold_signals()
        talk = TerminalChat(chat, options, loaded.load_s, terminal, functions)
        talk.files = list(inputs.files)
        for path in options.files if not options.quiet else ():
            printing.note(f"{path} comes before the next message")
        try:
            chat_at_terminal(talk, quiet=options.quiet)
        finally:
            say_how_to_go_on()
    return 0
