"""The loop of a chat at a terminal: read a line, then run it as a command or send it."""

from dataclasses import replace

from mistral_chat.cli.console import render
from mistral_chat.cli.talk.commands import Commands, LeaveError
from mistral_chat.cli.talk.terminal_chat import TerminalChat
from mistral_chat.cli.talk.typing.draft import Draft
from mistral_chat.cli.talk.typing.prompt import Prompt, unwrap_block

__all__ = ["chat_at_terminal"]

LEAVING = ("exit", "quit")  # if they are the whole message
OFFER = (
    "mistral-chat: the model comes with a system prompt, SYSTEM_PROMPT.txt, which is not used: "
    "/system default does, or --system default from the start"
)
NOT_SENT = "this message was not sent yet: Enter sends it, Ctrl-C drops it"


def chat_at_terminal(talk: TerminalChat, *, quiet: bool) -> None:
    """Read and answer messages until the user leaves.

    Args:
        talk: a chat that has not begun.
        quiet: whether to omit the greeting.

    Raises:
        SessionError: the chat to resume does not exist.
    """
    commands = Commands(talk)
    if not quiet:
        render.note(talk.greeting)
    talk.open_session()
    if talk.offers_system and not quiet:
        render.note(OFFER)
    talk.take_typed_while_loading()
    prompt = Prompt(
        commands.meanings,
        commands.words_after,
        lambda: talk.bottom_line,
        open_thinking=talk.show_thinking,
    )
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
