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
from mistral_chat.engine.launch import is_launched, launched_rank, set_up_environment
from mistral_chat.errors import MistralChatError, OutputError, UsageError

if TYPE_CHECKING:
    from mistral_common.protocol.instruct.tool_calls import Tool

__all__ = ["main"]

FAILED, WRONG_USAGE, INTERRUPTED = 1, 2, 130


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
    started = time.monotonic()
    set_up_environment()
    words = list(sys.argv[1:] if argv is None else argv)
    for stream in (sys.stdout, sys.stderr):
        if stream is not None:
            stream.reconfigure(encoding="utf-8", errors="replace")  # type: ignore[union-attr]
    try:
        return _leave(_command(words, started))
    except BrokenPipeError:
        return _leave(0)
    except UsageError as error:
        _say_once(error)
        return WRONG_USAGE
    except MistralChatError as error:
        _say_once(error)
        return FAILED
    except KeyboardInterrupt:
        return INTERRUPTED


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
    """Every rank reads the same flags; rank 0 says what is wrong with them."""
    try:
        speaks = launched_rank() in (None, 0)
    except UsageError:  # the launcher's variables are what is wrong
        speaks = True
    if speaks:
        printing.error(error)


def _command(words: list[str], started: float) -> int:
    command = words[0] if words and words[0] in flags.COMMANDS else None
    if command == "bench":
        from mistral_chat.cli import bench

        return bench.run(words[1:], started)
    if command == "demo":
        return _demo(words[1:], started)
    if command == "download":
        from mistral_chat.cli import download

        return download.run(words[1:])
    if command == "inspect":
        from mistral_chat.cli import inspect

        return inspect.run(words[1:])
    if command == "batch":
        from mistral_chat.cli import batch

        return batch.run(words[1:], started)
    normalized = flags.normalize(words)
    if not words or flags.wants_help(normalized):
        return _help(None, code=0 if words else WRONG_USAGE)
    if "--version" in normalized:
        return _print_version()
    return _main_job(flags.parse(normalized), words, started)


def _help(command: str | None, code: int = 0) -> int:
    if launched_rank() in (None, 0):
        print(flags.help_text(command), end="", file=sys.stderr if code else sys.stdout)
    return code


def _print_version() -> int:
    if launched_rank() in (None, 0):
        print(f"mistral-chat {__version__}")
    return 0


def _demo(words: list[str], started: float) -> int:
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
    words = [str(folder), "--instruct", *words]
    if options.nproc_per_node is None and launched_rank() is None:
        # Two ranks of one GPU cannot speak through NCCL; two of a CPU can through gloo.
        on_gpus = options.engine.device != "cpu" and visible_gpus()
        words.append(f"--nproc_per_node={min(2, on_gpus) if on_gpus else 2}")
    return _main_job(flags.parse(flags.normalize(words)), words, started)


def _demo_progress(quiet: bool) -> Callable[[str], None]:
    def show(line: str) -> None:
        if not quiet and launched_rank() in (None, 0):
            printing.note(f"mistral-chat: {line}")

    return show


def _main_job(options: flags.Options, words: list[str], started: float) -> int:
    code = start.launch(options, words)
    if code is not None:
        return code
    if launched_rank():
        return start.follow(options.engine)
    with contextlib.ExitStack() as held:
        return _lead(options, started, held)


def _lead(options: flags.Options, started: float, held: contextlib.ExitStack) -> int:
    """Rank 0: read the prompt, load, answer; what is held is let go afterwards."""
    from mistral_chat.cli import one_shot, texts
    from mistral_chat.cli.going_on import typed_command
    from mistral_chat.cli.terminal import QuietTerminal
    from mistral_chat.cli.terminal_state import TerminalState

    if sys.stdout is None:
        raise OutputError("stdout is closed: expected somewhere to write the answer to")
    prompt = one_shot.read_prompt(options)
    typed = typed_command(launched=launched_rank() is not None)
    before = TerminalState()
    # What is typed from now on waits for the prompt, unseen.
    terminal = held.enter_context(QuietTerminal(signals=True)) if prompt is None else None
    if options.resume is not None:
        from mistral_chat.cli.sessions import Session

        if prompt is not None:
            raise UsageError("--resume goes on with a chat at a terminal: stdin is none")
        session = Session.open(options.resume, "")
        if options.save:
            session.hold()  # a chat that is not there, or open elsewhere, needs no model
            session.release()
    system = options.system
    if options.system_file is not None:
        system = texts.read_text_file(options.system_file)

    from mistral_chat.chat.chat import Chat
    from mistral_chat.chat.functions import PythonFunctions
    from mistral_chat.chat.grammar import choose_grammar, read_grammar
    from mistral_chat.chat.tools import read_tools
    from mistral_chat.cli.calls import print_line
    from mistral_chat.cli.repl import chat_at_terminal
    from mistral_chat.cli.terminal_chat import TerminalChat
    from mistral_chat.engine.engine import Engine
    from mistral_chat.engine.group import PeerFailedError
    from mistral_chat.engine.launch import current_group

    functions: PythonFunctions | None = None
    tools: list[Tool] = []
    if options.tools is not None and options.tools.suffix == ".py":
        on_printed = (lambda line: None) if options.quiet else print_line
        functions = PythonFunctions(
            options.tools, options.tool_timeout, on_printed, options.tools_env
        )
        atexit.register(functions.close)  # should this process be killed, it ends them, too
        tools = functions.tools
    elif options.tools is not None:
        tools = read_tools(options.tools)
    grammar = choose_grammar(None, options.json_object)
    if options.json_schema is not None:
        grammar = read_grammar(options.json_schema)
    group = current_group()
    talk: TerminalChat | None = None

    def say_how_to_go_on() -> None:
        if talk is not None:
            talk.say_how_to_go_on(typed)

    end_process = start.end_with(group, last_words=say_how_to_go_on, terminal=before)
    start.end_on_signals(lambda code: end_process("", code), signal.SIGTERM, signal.SIGHUP)
    try:
        loaded = start.load(
            options.engine, group, started, quiet=options.quiet, stats=options.stats
        )
    except PeerFailedError:
        return FAILED
    with start.parting(group):
        chat = Chat(
            Engine(loaded.runner),
            loaded.tokenizer,
            instruct=options.instruct,
            system=system,
            tools=tools,
            grammar=grammar,
        )
        if prompt is not None:
            run = functions if options.yes else None
            return one_shot.answer_once(chat, options, prompt, loaded.load_s, run)
        assert terminal is not None
        terminal.hold_signals()
        talk = TerminalChat(chat, options, loaded.load_s, terminal, functions)
        try:
            chat_at_terminal(talk, quiet=options.quiet)
        finally:
            say_how_to_go_on()
    return 0
