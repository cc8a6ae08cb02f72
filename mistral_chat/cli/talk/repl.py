"""The loop of a chat at a terminal: ask for a line, run it as a command or say it."""

from dataclasses import replace

from mistral_chat.cli.console import render
from mistral_chat.cli.talk.commands import Commands, LeaveError
from mistral_chat.cli.talk.terminal_chat import TerminalChat
from mistral_chat.cli.talk.typing.draft import Draft
from mistral_chat.cli.talk.typing.prompt import Prompt, unwrap_block

__all__ = ["chat_at_terminal"]

LEAVING = ("exit", "quit")  # as a whole message
NOT_SENT = "this message was not sent yet: Enter sends it, Ctrl-C drops it"


def chat_at_terminal(talk: TerminalChat, *, quiet: bool) -> None:
    """Ask and answer until the person leaves.

    Args:
        talk: not begun yet.
        quiet: no greeting.

    Raises:
        SessionError: the chat to go on with is not there.
    """
    commands = Commands(talk)
    if not quiet:
        render.note(talk.greeting)
    talk.open_session()
    talk.take_typed_while_loading()
    prompt = Prompt(commands.meanings, commands.words_after, lambda: talk.bottom_line)
    while True:
        draft, talk.draft = talk.draft, Draft()
        if not draft.text and talk.typed.messages:
            line = prompt.show(talk.typed.messages.pop(0))
        else:
            if not draft.text:
                draft = replace(draft, text=talk.typed.take_rest())
            try:
                line = prompt.ask(draft.text, why=draft.why, in_editor=draft.in_editor)
            except EOFError:
                return
        if draft.replace_last and (line.is_command or not line.text.strip()):
            render.note("the last message stays as it was")
        try:
            if line.is_command:
                commands.run(line.text)
            elif line.text.strip() in LEAVING:
                return
            elif line.text.strip():
                talk.say(unwrap_block(line.text), replace_last=draft.replace_last)
        except LeaveError:
            return
        if line.is_draft_aside and not talk.draft.text:
            talk.draft = replace(draft, why=NOT_SENT)
