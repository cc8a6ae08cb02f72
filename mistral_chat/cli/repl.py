"""The loop of a chat at a terminal: ask for a line, run it as a command or say it."""

from mistral_chat.cli import render
from mistral_chat.cli.commands import Commands, LeaveError
from mistral_chat.cli.prompt import make_prompt, open_editor, unwrap_block
from mistral_chat.cli.terminal_chat import Draft, TerminalChat

__all__ = ["chat_at_terminal"]


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
    prompt = make_prompt(commands.meanings, commands.words_after, lambda: talk.bottom_line)
    while True:
        draft, talk.draft = talk.draft, Draft()
        try:
            line = prompt.prompt(
                "> ", default=draft.text, pre_run=open_editor if draft.in_editor else None
            )
        except KeyboardInterrupt:
            line = ""
        except EOFError:
            return
        is_command = line.startswith("/")
        if draft.replace_last and (is_command or not line.strip()):
            render.note("the last message stays as it was")
        if not line.strip():
            continue
        unsent, talk.unsent = talk.unsent, None
        if not is_command:
            talk.say(unwrap_block(line), replace_last=draft.replace_last)
            continue
        try:
            commands.run(line.strip())
        except LeaveError:
            return
        if unsent is not None and not talk.draft.text:
            talk.draft = unsent
