"""The main job: one answer or a chat, from a parsed command line.

Checks whatever needs no torch first; then starts ranks, or acts as one.
"""

import atexit
import signal
import sys
from contextlib import ExitStack
from typing import TYPE_CHECKING

from mistral_chat.chat.template import check_effort_of_file
from mistral_chat.cli import start
from mistral_chat.cli.begun import Begun, say_what_starts
from mistral_chat.cli.codes import FAILED
from mistral_chat.cli.console import printing
from mistral_chat.cli.interrupts import require_no_interrupt
from mistral_chat.cli.offered import say_of_default
from mistral_chat.cli.requests import ChatRequest
from mistral_chat.engine.ranks.launch import launched_rank
from mistral_chat.errors import OtherRankFailedError, OutputError

if TYPE_CHECKING:
    from mistral_chat.cli.talk.inputs import Inputs
    from mistral_chat.model.folder import ModelFolder

__all__ = ["run"]


def run(options: ChatRequest, words: list[str], begun: Begun) -> int:
    """Answer one prompt or chat, whichever flags and stdin ask for; the code to end with.

    Args:
        options: options of the command line.
        words: the command line itself, for the ranks to be started.
        begun: when the command began.
    """
    if rank := launched_rank():
        start.launch(options, words)
        return start.follow(options.engine)
    if sys.stdout is None:
        raise OutputError("stdout is closed: expected somewhere to write the answer to")
    from mistral_chat.cli.suggestions import require_model

    require_model(options.engine.model)
    say_what_starts(options, begun, quiet=options.quiet)
    from mistral_chat.cli.talk.inputs import read_inputs

    folder = start.check(options)
    if options.reasoning is not None:
        check_effort_of_file(options.reasoning, folder.tokenizer_file)
    inputs = read_inputs(options, for_ranks=rank is None)
    with begun.handed_on():
        code = start.launch(options, words, folder.args.n_heads)
    if code is not None:
        return code
    with ExitStack() as held:
        return _lead(options, folder, inputs, begun, held)


def _lead(
    options: ChatRequest, folder: "ModelFolder", inputs: "Inputs", begun: Begun, held: ExitStack
) -> int:
    """Load and then answer or chat, on rank 0; register in `held` what to clean up."""
    from mistral_chat.cli.console.terminal import QuietTerminal
    from mistral_chat.cli.console.terminal_state import TerminalState
    from mistral_chat.cli.talk.going_on import typed_command

    typed = typed_command(launched=launched_rank() is not None)
    before = TerminalState()
    # From now on typed text is kept for the prompt, without echo.
    is_chat = inputs.prompt is None
    if is_chat:
        start.put_back_at_end(before)
    terminal = held.enter_context(QuietTerminal(signals=True)) if is_chat else None

    from mistral_chat.chat.chat import Chat
    from mistral_chat.chat.functions import TIMEOUT_S, PythonFunctions
    from mistral_chat.cli.talk import one_shot
    from mistral_chat.cli.talk.calls import print_line
    from mistral_chat.cli.talk.repl import chat_at_terminal
    from mistral_chat.cli.talk.terminal_chat import TerminalChat
    from mistral_chat.engine.engine import Engine
    from mistral_chat.engine.ranks.launch import current_group

    functions: PythonFunctions | None = None
    tools = inputs.offered.tools
    if options.tools is not None and options.has_python:
        on_printed = (lambda line: None) if options.quiet else print_line
        functions = PythonFunctions(
            options.tools, options.tool_timeout or TIMEOUT_S, on_printed, options.tools_env
        )
        atexit.register(functions.close)  # ends the functions' process if a signal ends this one
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
            options.engine, folder, group, begun.at, quiet=options.quiet, stats=options.stats
        )
    except OtherRankFailedError:
        return FAILED
    with start.parting(group):
        chat = Chat(
            Engine(loaded.runner),
            loaded.tokenizer,
            instruct=options.instruct,
            system=inputs.offered.system,
            tools=tools,
            grammar=inputs.offered.grammar,
            reasoning=options.reasoning,
        )
        require_no_interrupt()
        if inputs.prompt is not None:
            run = functions if options.yes else None
            say_of_default(options)
            return one_shot.answer_once(chat, options, inputs.prompt, loaded.load_s, run)
        assert terminal is not None
        terminal.hold_signals()
        talk = TerminalChat(chat, options, loaded.load_s, terminal, functions)
        talk.files = list(inputs.files)
        for path in options.file if not options.quiet else ():
            printing.note(f"{path} comes before the next message")
        try:
            chat_at_terminal(talk, quiet=options.quiet)
        finally:
            say_how_to_go_on()
    return 0
