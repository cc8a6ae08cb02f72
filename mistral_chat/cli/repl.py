"""The chat at a terminal: messages, commands, streamed answers, and a session that is kept.

Ctrl-C stops what runs and nothing else. Knows nothing of ranks or files of models.
"""

import difflib
import shlex
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

from mistral_common.protocol.instruct.messages import UserMessage

from mistral_chat.chat.chat import Answer, Chat, ChatStream, Delta
from mistral_chat.chat.functions import PythonFunctions
from mistral_chat.chat.rounds import Rounds
from mistral_chat.cli import commands, render
from mistral_chat.cli.answer_view import make_view
from mistral_chat.cli.calls import CallDesk
from mistral_chat.cli.flags import Options
from mistral_chat.cli.one_shot import read_text_file, report, report_figures
from mistral_chat.cli.prompt import ask_for_paste, make_prompt, unwrap_block
from mistral_chat.cli.sessions import Session, summaries
from mistral_chat.cli.terminal import QuietTerminal
from mistral_chat.errors import (
    MistralChatError,
    PromptError,
    RankLostError,
    SessionError,
    UsageError,
)

__all__ = ["chat_at_terminal"]

KEYS = {
    "Ctrl-C": "stop an answer or a call, keep what was said; at the prompt: clear the line",
    "Ctrl-D": "leave",
    "Alt-Enter": 'a new line in a message; so does Enter between """ and """',
    "Ctrl-G": "write the message in $EDITOR",
    "Up, Down": "earlier messages; Ctrl-R searches them",
}
NEARLY_FULL = 0.9


def chat_at_terminal(
    chat: Chat,
    options: Options,
    load_s: float,
    terminal: QuietTerminal,
    functions: PythonFunctions | None = None,
) -> None:
    """Ask and answer until the person leaves.

    Args:
        chat: to talk to.
        options: of the command line.
        load_s: seconds that loading took.
        terminal: quiet already.
        functions: that the model may have called.

    Raises:
        SessionError: the chat to go on with is not there.
    """
    Repl(chat, options, load_s, terminal, functions).run()


class _LeaveError(Exception):
    """The person has left."""


class Repl:
    """One chat at a terminal.

    Args:
        chat: to talk to.
        options: of the command line.
        load_s: seconds that loading took.
        terminal: quiet already.
        functions: that the model may have called; None has the person say what calls give.
    """

    def __init__(
        self,
        chat: Chat,
        options: Options,
        load_s: float,
        terminal: QuietTerminal,
        functions: PythonFunctions | None = None,
    ) -> None:
        self._chat = chat
        self._options = options
        self._load_s = load_s
        self._terminal = terminal
        self._sampling = options.sampling
        self._files: list[str] = []  # texts that the next message begins with
        self._answer: Answer | None = None
        self._typed = ""
        self._warned_full = False
        self._desk = CallDesk(
            functions, yes=options.yes, quiet=options.quiet, is_cancelled=self._is_interrupted
        )
        self._pressed = False  # Ctrl-C, since the last answer began
        self._model = (
            options.engine.model.resolve().name if options.engine.model else "dummy weights"
        )
        self._session: Session | None = None
        self._commands: dict[str, tuple[str, Callable[[str], None]]] = {
            "/help": ("this list", self._help),
            "/system": ("show the system prompt, or set it: /system TEXT, /system -", self._system),
            "/set": ("change how words are chosen: /set temperature 0.2", self._set),
            "/show": ("settings and session", self._show),
            "/regen": ("answer the last message again", self._regen),
            "/undo": ("take back the last exchange", self._undo),
            "/edit": ("take back the last message and change it", self._edit),
            "/branch": ("go on in a copy of this chat", self._branch),
            "/file": ("begin the next message with a file: /file PATH", self._file),
            "/paste": ("one message of several lines, as they are, up to Ctrl-D", self._paste),
            "/copy": ("put the last answer on the terminal's clipboard", self._copy),
            "/save": ("write the chat as Markdown: /save PATH", self._save),
            "/load": ("go on with a kept chat: /load ID or PATH", self._load),
            "/list": ("kept chats", self._list),
            "/tokens": ("tokens of this chat, and what is left", self._tokens),
            "/stats": ("figures of the last answer", self._stats),
            "/clear": ("forget the conversation (the system prompt stays)", self._clear),
            "/exit": ("leave, as Ctrl-D does", self._exit),
        }

    def run(self) -> None:
        """Until the person leaves."""
        meanings = {name: meaning for name, (meaning, _) in self._commands.items()}
        if not self._options.quiet:
            render.note(self._greeting())
        self._open_session()
        prompt = make_prompt(meanings, self._bottom)
        while True:
            try:
                line = prompt.prompt("> ", default=self._typed)
            except KeyboardInterrupt:
                self._typed = ""
                continue
            except EOFError:
                return
            self._typed = ""
            if not line.strip():
                continue
            try:
                if line.startswith("/"):
                    self._run_command(line.strip())
                else:
                    self._say(unwrap_block(line))
            except _LeaveError:
                return

    # The session.

    def _open_session(self) -> None:
        options = self._options
        if options.resume is not None:
            self._resume(options.resume)
        elif self._chat.instruct and options.save:
            self._keep(lambda: Session.create(self._model, self._chat.conversation.system))

    def _keep(self, make: Callable[[], Session]) -> None:
        try:
            self._session = make()
        except SessionError as error:
            self._session = None
            render.error(error)

    def _resume(self, name: str) -> None:
        session = Session.open(name, self._model)
        unanswered = session.replay(self._chat.conversation)
        self._session = session if self._options.save else None
        self._answer = None
        self._typed = unanswered or ""
        n = len(self._chat.conversation.messages) - (self._chat.conversation.system is not None)
        render.note(f"chat {session.id}, {n} messages" + (
            "; its last message had no answer and stands at the prompt" if unanswered else ""
        ))  # fmt: skip
        for line in commands.last_exchange(self._chat.conversation):
            render.note(line)

    def _written(self, write: Callable[[Session], None]) -> None:
        """Write to the session; where that fails, say so once and go on without."""
        if self._session is None:
            return
        try:
            write(self._session)
        except SessionError as error:
            self._session = None
            render.error(error)

    # Messages.

    def _say(self, text: str) -> None:
        """Send one message and print its answer."""
        chat, options = self._chat, self._options
        message = "\n\n".join([*self._files, text])
        try:
            stream = chat.send(message, self._sampling)
        except (PromptError, UsageError) as error:  # such as /set stop beside a schema
            render.error(f"{error}; the message was not sent")
            return
        self._files = []
        if chat.instruct:
            self._written(lambda session: session.add_user(message))
        answer = self._print_answer(stream, message)
        rounds = Rounds(chat, self._sampling, self._desk.run)
        try:
            while following := self._run_calls(rounds, answer):
                if options.stats:
                    report_figures(answer, chat, options, self._load_s)
                answer = self._print_answer(following, None)
        except PromptError as error:  # such as results that fill the context
            render.error(f"{error}; this exchange is taken back")
            chat.conversation.undo()
            self._written(Session.undo)
            return
        if rounds.ended:
            render.note(f"mistral-chat: {rounds.ended}")
        elif rounds.cancelled:
            if not options.quiet:
                render.note("mistral-chat: interrupted")
        else:
            report(answer, chat, replace(options, sampling=self._sampling), self._load_s)
            if not answer.said and chat.instruct and not options.quiet:
                kept = "the calls are kept" if rounds.n_rounds else "this exchange is not kept"
                render.note(f"mistral-chat: {_why_empty(answer)}; {kept}")
        self._warn_when_nearly_full(answer)

    def _print_answer(self, stream: ChatStream, message: str | None) -> Answer:
        """Print an answer as it comes, and keep it.

        Args:
            stream: of the answer.
            message: that it answers; None are results of calls.
        """
        chat = self._chat
        n_before = len(chat.conversation.messages)
        # What a schema or a plain completion gives is no Markdown.
        plain = self._options.plain or not chat.instruct or chat.grammar is not None
        view = make_view(plain=plain)
        self._pressed = False
        for event in stream:
            if isinstance(event, Delta) and not event.is_call:
                view.add(event.text)
            if self._poll():
                stream.cancel()
        self._typed = self._typed.rstrip("\n")
        answer = stream.answer
        assert answer is not None
        self._answer = answer
        if answer.said or answer.call_at is None:
            view.finish()
        if len(chat.conversation.messages) > n_before:
            ids, reason = chat.conversation.last_ids, answer.finish_reason
            if calls := chat.conversation.open_calls:
                self._written(lambda session: session.add_calls(answer.said, calls, ids))
            else:
                self._written(lambda session: session.add_answer(answer.said, ids, reason))
        elif chat.instruct and message is not None:
            self._written(Session.drop_user)
        return answer

    def _run_calls(self, rounds: Rounds, answer: Answer) -> ChatStream | None:
        """Run the calls of an answer, keep their results, and have the model go on."""
        for result in rounds.results(answer):
            self._written(partial(Session.add_result, call=result.call, text=result.text))
            self._desk.show(result)
        return rounds.go_on()

    def _poll(self) -> bool:
        """Whether Ctrl-C was pressed; what else was typed stands at the next prompt."""
        pressed, more = self._terminal.poll()
        self._typed = more if pressed else self._typed + more
        self._pressed |= pressed
        return pressed

    def _is_interrupted(self) -> bool:
        """Whether calls must not run: Ctrl-C counts, too, when the answer had just ended."""
        return self._poll() or self._pressed

    def _warn_when_nearly_full(self, answer: Answer) -> None:
        used = answer.usage.prompt_tokens + answer.usage.completion_tokens
        most = self._chat.engine.max_seq_len
        if not self._chat.instruct or used < NEARLY_FULL * most:
            self._warned_full = False
        elif not self._warned_full and not self._options.quiet:
            self._warned_full = True
            render.note(
                f"mistral-chat: {used:,} of {most:,} tokens of context are used. Nothing is "
                f"dropped by itself: /undo takes back exchanges, /clear begins anew"
            )

    def _greeting(self) -> str:
        chat, runner = self._chat, self._chat.engine.runner
        ranks = runner.group.world_size
        kind = "chat" if chat.instruct else "plain completion: each line is a prompt of its own"
        return (
            f"{self._model}, {runner.model.args.n_params / 1e9:.2f} B parameters on {ranks} "
            f"{'rank' if ranks == 1 else 'ranks'} ({runner.model.device.type}, "
            f"{str(runner.model.dtype).removeprefix('torch.')}), context "
            f"{chat.engine.max_seq_len:,}; {kind}. /help lists commands, Ctrl-D leaves."
        )

    def _bottom(self) -> str:
        """The line under the prompt."""
        most = self._chat.engine.max_seq_len
        ranks = self._chat.engine.runner.group.world_size
        parts = [self._model, f"{ranks} {'rank' if ranks == 1 else 'ranks'}"]
        answer = self._answer
        if answer is not None:
            used = answer.usage.prompt_tokens + answer.usage.completion_tokens
            parts.append(f"context {used:,} used, {most - used:,} left")
            if answer.decode_tokens_per_s is not None:
                parts.append(f"{answer.decode_tokens_per_s:.1f} tokens/s")
        else:
            parts.append(f"context {most:,}")
        if self._files:
            parts.append(f"{len(self._files)} file(s) before the next message")
        return " · ".join(parts)

    # Commands. Each takes what stands after its name.

    def _run_command(self, text: str) -> None:
        name, _, rest = text.partition(" ")
        rest = rest.strip()
        if name not in self._commands:
            close = difflib.get_close_matches(name, self._commands, n=1)
            hint = f"did you mean {close[0]}?" if close else "/help lists commands"
            render.note(
                f"unknown command {name}: {hint} (a message may begin with a space and then /)"
            )
        elif rest and name not in commands.TAKE_WORDS:
            render.note(f"{name} takes nothing after it; found {rest!r}")
        else:
            try:
                self._commands[name][1](rest)
            except RankLostError:
                raise  # nothing can be run any more
            except MistralChatError as error:
                render.error(error)

    def _help(self, _: str) -> None:
        both = {name: meaning for name, (meaning, _) in self._commands.items()} | KEYS
        width = max(map(len, both))
        render.note("\n".join(f"{key:{width}}  {what}" for key, what in both.items()))

    def _system(self, rest: str) -> None:
        conversation = self._chat.conversation
        if rest:
            system = None if rest == "-" else unwrap_block(rest)
            conversation.set_system(system)
            self._written(lambda session: session.set_system(system))
        render.note(f"system prompt: {conversation.system or 'none'}")

    def _set(self, rest: str) -> None:
        self._sampling = commands.set_sampling(self._sampling, rest)
        render.note(commands.sampling_line(self._sampling))

    def _show(self, _: str) -> None:
        render.note(commands.sampling_line(self._sampling))
        render.note(f"system prompt: {self._chat.conversation.system or 'none'}")
        kept = f"kept in {self._session.path}" if self._session else "not kept"
        render.note(f"this chat is {kept}")

    def _taken_back(self) -> str | None:
        text = self._chat.conversation.undo()
        if text is None:
            render.note("there is nothing to take back")
        else:
            self._written(Session.undo)
        return text

    def _undo(self, _: str) -> None:
        if (text := self._taken_back()) is not None:
            render.note(f"taken back: {commands.shorten(text)}")

    def _regen(self, _: str) -> None:
        if (text := self._taken_back()) is not None:
            self._say(text)

    def _edit(self, _: str) -> None:
        if (text := self._taken_back()) is not None:
            self._typed = text  # stands at the prompt; Ctrl-G there opens the editor

    def _branch(self, _: str) -> None:
        if self._session is None:
            render.note("this chat is not kept: there is nothing to branch from")
            return
        old = self._session
        self._session = old.branch()
        render.note(f"going on in {self._session.id}; {old.id} stays as it is")

    def _file(self, rest: str) -> None:
        words = shlex.split(rest) if rest else []
        if len(words) != 1:
            raise UsageError("/file takes one path")
        self._files.append(read_text_file(Path(words[0]).expanduser()))
        render.note(f"{words[0]} comes before the next message")

    def _paste(self, _: str) -> None:
        render.note("paste or type; Ctrl-D or Alt-Enter sends it, Ctrl-C drops it")
        try:
            text = ask_for_paste()
        except EOFError:
            raise _LeaveError from None
        if text.strip():
            self._say(text)
        else:
            render.note("nothing was sent")

    def _copy(self, _: str) -> None:
        if self._answer is None or not self._answer.said:
            render.note("there is no answer to copy")
        else:
            render.note(commands.clipboard_sequence(self._answer.said) + "answer copied")

    def _save(self, rest: str) -> None:
        words = shlex.split(rest) if rest else []
        if len(words) != 1:
            raise UsageError("/save takes one path")
        path = Path(words[0]).expanduser()
        commands.write_markdown(path, self._chat.conversation)
        render.note(f"written to {path}")

    def _load(self, rest: str) -> None:
        if not rest:
            raise UsageError("/load takes a chat's id or file: /list shows the kept ones")
        self._resume(rest)

    def _list(self, _: str) -> None:
        kept = summaries()
        for summary in kept[:20]:
            render.note(
                f"{summary.id}  {summary.n_messages:3} messages  {summary.model}  "
                f"{commands.shorten(summary.begins, 50)}"
            )
        if len(kept) > 20:
            render.note(f"and {len(kept) - 20} more")
        if not kept:
            render.note("no chat is kept yet")

    def _tokens(self, _: str) -> None:
        chat = self._chat
        if not chat.instruct or not commands.n_said(chat.conversation):
            render.note(f"context {chat.engine.max_seq_len:,}; nothing said yet")
            return
        # The template has no end without a next message; the least of them is one token.
        n = len(chat.conversation.encode(chat.tokenizer, [UserMessage(content=".")])) - 1
        most = chat.engine.max_seq_len
        render.note(
            f"{n:,} tokens in this chat, marks of the next message included; {most - n:,} of "
            f"{most:,} left"
        )

    def _stats(self, _: str) -> None:
        if self._answer is None:
            render.note("no answer yet")
            return
        engine = self._chat.engine
        line = render.stats_line(self._answer, engine.max_seq_len, self._load_s, engine.runner.path)
        render.note(line)

    def _clear(self, _: str) -> None:
        self._chat.clear()
        self._written(Session.clear)
        self._files = []
        self._answer = None
        render.note("conversation cleared")

    def _exit(self, _: str) -> None:
        raise _LeaveError


def _why_empty(answer: Answer) -> str:
    if answer.call_at is not None:
        return "a call was cut short"
    if answer.finish_reason == "cancelled":
        return "stopped before the first word"
    return "the model gave an empty answer"
