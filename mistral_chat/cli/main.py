"""The entry: which command, which rank, and which code to end with.

Flags are checked before anything heavy is imported; errors become one line and a code here and
nowhere else.
"""

import contextlib
import os
import sys
import time
from collections.abc import Callable, Sequence

from mistral_chat import __version__
from mistral_chat.cli import flags
from mistral_chat.cli.begun import Begun
from mistral_chat.cli.codes import INTERRUPTED, WRONG_USAGE, code_of
from mistral_chat.cli.console import printing
from mistral_chat.cli.interrupts import noting_interrupts
from mistral_chat.cli.pipes import keep_pipes
from mistral_chat.engine.launch import (
    is_launched,
    launched_rank,
    set_up_environment,
)
from mistral_chat.errors import MistralChatError, UsageError, shown

__all__ = ["main"]

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
            return code_of(error)


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

    The others leave it the time to: the first rank that ends has torchrun end all. One that is
    still there after that is wrong alone, such as for want of a file on its machine, and says so.
    """
    try:
        speaks = launched_rank() in (None, 0)
    except UsageError:  # the launcher's variables are what is wrong
        speaks = True
    if not speaks:
        time.sleep(RANK_0_SPEAKS_S)
    printing.error(error)


def _command(words: list[str], begun: Begun) -> int:
    if launched_rank() is None:
        words = keep_pipes(words, _say_that_it_waits("--quiet" not in words))
    command = words[0] if words and words[0] in flags.COMMANDS else None
    if command == "bench":
        from mistral_chat.cli.bench import run as bench

        return bench.run(words[1:], begun)
    if command == "demo":
        return _demo(words[1:], begun)
    if command == "download":
        from mistral_chat.cli.hub import download

        return download.run(words[1:])
    if command == "inspect":
        from mistral_chat.cli.inspect import run as inspect

        return inspect.run(words[1:])
    if command == "batch":
        from mistral_chat.cli.batch import run as batch

        return batch.run(words[1:], begun)
    _refuse_misspelt_command(words)
    normalized = flags.normalize(words)
    if not words or flags.wants_help(normalized):
        return _help(None, code=0 if words else WRONG_USAGE)
    if "--version" in normalized:
        return _print_version()
    from mistral_chat.cli.talk import run as talk

    return talk.run(flags.parse(normalized), words, begun)


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

    from mistral_chat.cli.hub.embedded import embedded_model
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
    from mistral_chat.cli.talk import run as talk

    return talk.run(flags.parse(flags.normalize(words)), words, begun)


def _demo_progress(quiet: bool) -> Callable[[str], None]:
    def show(line: str) -> None:
        if not quiet and launched_rank() in (None, 0):
            printing.note(f"mistral-chat: {line}")

    return show
