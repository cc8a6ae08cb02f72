"""The slash commands of a chat.

Knows nothing of the prompt's keys or of how answers are printed.
"""

import difflib
import shlex
import stat
import sys
from collections.abc import Callable, Iterable
from pathlib import Path

from mistral_chat.cli.console import render
from mistral_chat.cli.console.markdown import code_blocks
from mistral_chat.cli.console.printing import clean, columns_of
from mistral_chat.cli.console.texts import read_text_file
from mistral_chat.cli.system_prompt import DEFAULT, default_system
from mistral_chat.cli.talk import chat_text
from mistral_chat.cli.talk.session_files import summaries
from mistral_chat.cli.talk.sessions import Session
from mistral_chat.cli.talk.settings import SETTABLE, sampling_line, set_sampling
from mistral_chat.cli.talk.terminal_chat import TerminalChat
from mistral_chat.cli.talk.typing.draft import Draft
from mistral_chat.cli.talk.typing.prompt import ask_for_paste, unwrap_block
from mistral_chat.errors import MistralChatError, RankLostError, UsageError

__all__ = ["Commands", "LeaveError"]

KEYS = {
    "Ctrl-C": "stop an answer or a call, keep what was said; at the prompt: clear the line",
    "Ctrl-D": "leave",
    "Alt-Enter": 'a new line in a message; so does Enter between """ and """',
    "Enter in an answer": "what was typed is sent after it; Ctrl-C brings it to the prompt",
    "Ctrl-G": "write the message in $EDITOR",
    "Ctrl-O": "open a long paste, which shows as [300 lines]",
    "Ctrl-T": "open what the model thinks, in an answer or after it",
    "Up, Down": "earlier messages; Ctrl-R searches them",
}
ALIASES = {"/?": "/help", "/quit": "/exit", "/q": "/exit", "/bye": "/exit"}
LISTED = 20
LEAST_COLUMNS = 60  # for two columns of help


class LeaveError(Exception):
    """The user wants to leave."""


class Commands:
    """The slash commands of a chat.

    Args:
        talk: the chat that they change.
    """

    def __init__(self, talk: TerminalChat) -> None:
        self._talk = talk
        self._table: dict[str, tuple[str, Callable[[str], None]]] = {
            "/help": ("this list", self._help),
            "/system": (
                "show the system prompt, or set it: /system TEXT, /system - for none, /system "
                "default for the model's own",
                self._system,
            ),
            "/think": (
                "show how much the model is asked to think, or set it: /think high, /think none, "
                "/think - to leave it to the model",
                self._think,
            ),
            "/set": ("change how words are chosen: /set temperature 0.2", self._set),
            "/show": ("settings and session", self._show),
            "/regen": ("answer the last message again", self._regen),
            "/undo": ("take back the last turn", self._undo),
            "/drop": ("take out the oldest turn, or several: /drop 3", self._drop),
            "/edit": ("change the last message in $EDITOR and ask again", self._edit),
            "/branch": ("go on in a copy of this chat", self._branch),
            "/file": ("begin the next message with a file: /file PATH", self._file),
            "/paste": ("one message of several lines, as they are, up to Ctrl-D", self._paste),
            "/copy": ("put the last answer on the clipboard, or its code: /copy code", self._copy),
            "/save": ("write the chat as Markdown: /save PATH", self._save),
            "/load": ("go on with a kept chat: /load ID or PATH", self._load),
            "/list": ("kept chats", self._list),
            "/tokens": ("tokens of this chat, and what is left", self._tokens),
            "/stats": ("figures of the last answer", self._stats),
            "/clear": ("begin a new chat; this one stays kept", self._clear),
            "/exit": ("leave, as Ctrl-D does", self._exit),
        }
        self._take_words = {
            "/system",
            "/think",
            "/set",
            "/drop",
            "/file",
            "/copy",
            "/save",
            "/load",
        }

    @property
    def meanings(self) -> dict[str, str]:
        """Each command's meaning, by name."""
        return {name: meaning for name, (meaning, _) in self._table.items()}

    def words_after(self, name: str) -> Iterable[tuple[str, str]]:
        """Return completions for a command's argument, each with its meaning."""
        if name == "/set":
            return ((setting, str(getattr(self._talk.sampling, setting))) for setting in SETTABLE)
        if name == "/think":
            return ((effort, "") for effort in self._talk.chat.tokenizer.efforts)
        if name == "/load":
            return ((kept.id, chat_text.shorten(kept.begins, 50)) for kept in summaries())
        return ()

    def run(self, line: str) -> None:
        """Run a command line; report errors in it and then change nothing.

        Raises:
            LeaveError: the user wants to leave.
            RankLostError: a rank has failed, so nothing can run any more.
        """
        name = line.split(maxsplit=1)[0]
        rest = line.strip().removeprefix(name).strip()
        name = ALIASES.get(name, name)
        if name not in self._table:
            self._refuse(name, line)
        elif rest and name not in self._take_words:
            render.note(f"{name} takes nothing after it; found {rest!r}")
        else:
            try:
                self._table[name][1](rest)
            except RankLostError:
                raise
            except MistralChatError as error:
                render.error(error)

    def _refuse(self, name: str, line: str) -> None:
        close = difflib.get_close_matches(name.lower(), [*self._table, *ALIASES], n=1)
        hint = f"did you mean {close[0]}?" if close else "/help lists commands"
        said = f"unknown command {chat_text.shorten(name)}: {hint}"
        if "\n" in line.strip():  # a message, such as a path with text below it
            why = f"{said} Enter sends this as a message, Ctrl-C drops it"
            self._talk.draft = Draft.of(line, why=why)
        else:
            render.note(f"{said} (a message may begin with a space and then /)")

    # Each takes the text after its name.

    def _help(self, _: str) -> None:
        named = {
            ", ".join([name, *(a for a, of in ALIASES.items() if of == name)]): meaning
            for name, meaning in self.meanings.items()
        }
        render.note(chat_text.two_columns(named | KEYS, columns_of(sys.stderr), LEAST_COLUMNS))

    def _system(self, rest: str) -> None:
        conversation = self._talk.chat.conversation
        if rest:
            self._require_template("/system")
            system = None if rest == "-" else unwrap_block(rest)
            if rest == DEFAULT:
                system = default_system(self._talk.folder)
            conversation.set_system(system)
            self._talk.write(lambda session: session.set_system(system))
        render.note(f"system prompt: {clean(conversation.system or 'none')}")

    def _think(self, rest: str) -> None:
        self._require_template("/think")
        tokenizer, conversation = self._talk.chat.tokenizer, self._talk.chat.conversation
        if rest or not tokenizer.efforts:
            effort = None if rest == "-" and tokenizer.efforts else rest
            if effort is not None:
                tokenizer.check_effort(effort, "/think")
            conversation.reasoning = effort
            self._talk.write(lambda session: session.set_reasoning(effort))
        render.note(f"reasoning: {conversation.reasoning or 'left to the model'}")

    def _set(self, rest: str) -> None:
        self._talk.sampling = set_sampling(self._talk.sampling, rest)
        render.note(sampling_line(self._talk.sampling))

    def _show(self, _: str) -> None:
        session, system = self._talk.session, self._talk.chat.conversation.system
        render.note(sampling_line(self._talk.sampling))
        render.note(f"system prompt: {clean(system or 'none')}")
        render.note(f"this chat is {f'kept in {session.path}' if session else 'not kept'}")

    def _require_template(self, name: str) -> None:
        if not self._talk.chat.instruct:
            raise UsageError(f"{name} needs --instruct: a plain completion has no template")

    def _last_message(self) -> str | None:
        text = self._talk.chat.conversation.copy().undo()
        if text is None:
            render.note("nothing was said yet")
        return text

    def _undo(self, _: str) -> None:
        text = self._talk.chat.conversation.undo()
        if text is None:
            render.note("there is nothing to take back")
        else:
            self._talk.write(Session.undo)
            self._talk.count_tokens()
            render.note(f"taken back: {chat_text.shorten(text)}")

    def _drop(self, rest: str) -> None:
        conversation = self._talk.chat.conversation
        try:
            n = int(rest or "1")
        except ValueError:
            n = 0
        if n < 1:
            found = chat_text.shorten(rest)
            raise UsageError(f"/drop takes how many of the oldest turns to drop; found {found}")
        if n > conversation.n_turns:
            render.note(f"there are {conversation.n_turns} turns; nothing was dropped")
            return
        conversation.drop(n)
        self._talk.write(lambda session: session.drop(n))
        render.note(f"dropped: the oldest {'turn' if n == 1 else f'{n} turns'}")
        self._tokens("")

    def _regen(self, _: str) -> None:
        if (text := self._last_message()) is not None:
            self._talk.say(text, replace_last=True)

    def _edit(self, _: str) -> None:
        if (text := self._last_message()) is not None:
            self._talk.draft = Draft.of(text, replace_last=True, in_editor=True)

    def _branch(self, _: str) -> None:
        old = self._talk.session
        if old is None:
            render.note("this chat is not kept: there is nothing to branch from")
            return
        new = old.branch()
        new.hold()
        self._talk.move_to(new)
        render.note(f"going on in {new.id}; {old.id} stays as it is")

    def _file(self, rest: str) -> None:
        path = _one_path("/file", rest)
        if _is_endless(path):
            raise UsageError(f"/file takes a file of text; {path} is a pipe or a device")
        self._talk.files.append(read_text_file(path))
        render.note(f"{path} comes before the next message")

    def _paste(self, _: str) -> None:
        render.note("paste or type; Ctrl-D or Alt-Enter sends it, Ctrl-C drops it")
        try:
            text = ask_for_paste()
        except EOFError:
            raise LeaveError from None
        if text.strip():
            self._talk.say(text)
        else:
            render.note("nothing was sent")

    def _copy(self, rest: str) -> None:
        if rest not in ("", "code"):
            raise UsageError(f"/copy takes nothing, or code; found {chat_text.shorten(rest)}")
        answers = self._talk.answers
        if rest:
            blocks = [block for answer in answers for block in code_blocks(answer)]
            what, found = "code", blocks[-1:]
        else:
            what, found = "answer", answers[-1:]
        if found:
            render.tell_terminal(chat_text.clipboard_sequence(found[0]))
            render.note(f"{what} copied")
        else:
            render.note(f"there is no {what} to copy")

    def _save(self, rest: str) -> None:
        path = _one_path("/save", rest)
        if not self._talk.chat.conversation.n_turns:
            render.note("there is nothing to save: nothing was said yet")
            return
        chat_text.write_markdown(path, self._talk.chat.conversation)
        render.note(f"written to {path}")

    def _load(self, rest: str) -> None:
        if not rest:
            raise UsageError("/load takes a chat's id or file: /list shows the kept ones")
        self._require_template("/load")
        self._talk.resume(rest)

    def _list(self, _: str) -> None:
        kept = summaries()
        for summary in kept[:LISTED]:
            render.note(
                f"{summary.id}  {summary.n_messages:3} messages  "
                f"{chat_text.shorten(summary.model)}  "
                f"{chat_text.shorten(summary.begins, 50)}"
            )
        if len(kept) > LISTED:
            render.note(f"and {len(kept) - LISTED} more")
        if not kept:
            render.note("no chat is kept yet")

    def _tokens(self, _: str) -> None:
        most, used = self._talk.chat.engine.max_seq_len, self._talk.count_tokens()
        if not used:
            render.note(f"context {most:,}; nothing said yet")
            return
        render.note(
            f"{used:,} tokens in this chat, marks of the next message included; {most - used:,} of "
            f"{most:,} left"
        )

    def _stats(self, _: str) -> None:
        talk = self._talk
        if talk.answer is None:
            render.note("no answer yet")
            return
        engine = talk.chat.engine
        most, path = engine.max_seq_len, engine.runner.path
        render.note(render.stats_line(talk.answer, most, talk.load_s, path))

    def _clear(self, _: str) -> None:
        before = self._talk.session
        self._talk.begin_anew()
        is_kept = before is not None and before.is_begun
        render.note("a new chat" + (f"; /load {before.id} goes back" if is_kept and before else ""))

    def _exit(self, _: str) -> None:
        raise LeaveError


def _one_path(name: str, rest: str) -> Path:
    try:
        words = shlex.split(rest)
    except ValueError:  # an unclosed quotation mark
        words = []
    if len(words) != 1 or "\0" in rest:
        raise UsageError(f"{name} takes one path")
    try:
        return Path(words[0]).expanduser()
    except RuntimeError as error:  # ~NAME of an unknown user
        raise UsageError(f"{name} {words[0]}: no such home directory") from error


def _is_endless(path: Path) -> bool:
    """Return whether reading a file may never end and could not be interrupted by Ctrl-C."""
    try:
        mode = path.stat().st_mode
    except OSError:  # reading the file reports the error
        return False
    return not (stat.S_ISREG(mode) or stat.S_ISDIR(mode))
