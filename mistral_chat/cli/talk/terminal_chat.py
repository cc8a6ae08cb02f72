"""A chat at a terminal: messages, streamed answers, calls, and the session that keeps them.

Ctrl-C only stops what is running. Knows nothing of the prompt's keys or of commands.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

from mistral_common.protocol.instruct.messages import AssistantMessage, UserMessage

from mistral_chat.chat.chat import Answer, Chat, ChatStream, Delta
from mistral_chat.chat.conversation import text_of
from mistral_chat.chat.functions import PythonFunctions
from mistral_chat.chat.rounds import Rounds
from mistral_chat.chat.thinking import Thinking
from mistral_chat.cli.begun import name_of
from mistral_chat.cli.console import render
from mistral_chat.cli.console.terminal import QuietTerminal
from mistral_chat.cli.requests import ChatRequest
from mistral_chat.cli.system_prompt import has_default
from mistral_chat.cli.talk.answer_screen import AnswerScreen, note_dim
from mistral_chat.cli.talk.calls import CallDesk
from mistral_chat.cli.talk.chat_text import last_turn, shorten, thinking_of_last_turn
from mistral_chat.cli.talk.going_on import command_to_go_on
from mistral_chat.cli.talk.one_shot import report, report_figures
from mistral_chat.cli.talk.session_files import sessions_folder
from mistral_chat.cli.talk.sessions import Session
from mistral_chat.cli.talk.typing.draft import Draft
from mistral_chat.cli.talk.typing.prompt import SEPARATOR
from mistral_chat.cli.talk.typing.typed_ahead import TypedAhead, pastes_marked
from mistral_chat.errors import ContextLengthError, PromptError, SessionError, UsageError

__all__ = ["TerminalChat"]

UNANSWERED = "this message had no answer yet: Enter asks again, Ctrl-C drops it"
NEARLY_FULL = 0.9
CTRL_T = "\x14"
LEAST_ANSWER = 256  # tokens to reserve for an answer, or an eighth of the context if that is less


class TerminalChat:
    """The state of a chat at a terminal.

    Args:
        chat: the chat to talk to.
        options: options of the command line.
        load_s: seconds that loading took.
        terminal: already in quiet mode.
        functions: functions that the model may call; None asks the user for results.

    `sampling` applies to later answers, `files` are texts put before the next message, `answer` is
    the last answer, `draft` is shown at the next prompt, and `typed` holds what was typed while
    there was no prompt.
    """

    def __init__(
        self,
        chat: Chat,
        options: ChatRequest,
        load_s: float,
        terminal: QuietTerminal,
        functions: PythonFunctions | None = None,
    ) -> None:
        self.chat = chat
        self.load_s = load_s
        self.sampling = options.sampling
        self.files: list[str] = []
        self.answer: Answer | None = None
        self.draft = Draft()
        self.typed = TypedAhead()
        self.session: Session | None = None
        self._options = options
        self._terminal = terminal
        self._used = 0  # context tokens when last counted
        self._warned_full = False
        self._desk = CallDesk(
            functions, yes=options.yes, quiet=options.quiet, is_cancelled=self._is_interrupted
        )
        self._pressed = False  # whether Ctrl-C was pressed since the last answer began
        self._opens = False  # whether Ctrl-T was, which opens the thinking
        self._model = name_of(options.engine.model)

    # The session.

    def open_session(self) -> None:
        """Resume the chat that the command line names, or begin a new one.

        Raises:
            SessionError: the chat to resume does not exist.
        """
        options = self._options
        if options.resume is not None:
            conversation = self.chat.conversation
            system, reasoning = conversation.system, conversation.reasoning
            self.resume(options.resume)
            if system not in (None, conversation.system):  # the command line's wins
                conversation.set_system(system)
                self.write(lambda session: session.set_system(system))
            if reasoning not in (None, conversation.reasoning):
                conversation.reasoning = reasoning
                self.write(lambda session: session.set_reasoning(reasoning))
        else:
            self._begin_session()

    def begin_anew(self) -> None:
        """Begin a new chat with the same system prompt; the current one stays on disk."""
        self.chat.clear()
        self.files = []
        self.answer = None
        self.count_tokens()
        self._begin_session()

    def _begin_session(self) -> None:
        session = None
        if self.chat.instruct and not self._options.no_save:
            try:
                session = Session.create(
                    self._model,
                    self.chat.conversation.system,
                    self.chat.tokenizer.fingerprint,
                    self.chat.conversation.reasoning,
                )
            except SessionError as error:
                render.error(error)
        self.move_to(session)

    def resume(self, name: str) -> None:
        """Resume a kept chat.

        Args:
            name: a name for `Session.open`.

        Raises:
            SessionError: no such chat, it cannot be read, or another process has it open.
        """
        session = Session.open(name, self._model, self.chat.tokenizer.fingerprint)
        save = not self._options.no_save
        if save and (obstacle := session.obstacle):
            render.error(f"{session.path} cannot be written ({obstacle}): this chat is not kept")
            save = False
        if self.session is not None and session.path.resolve() == self.session.path.resolve():
            session = self.session
        if save:
            session.hold()
        try:
            unanswered = session.replay(self.chat.conversation, save=save)
        except SessionError:
            if session is not self.session:
                session.release()
            raise
        self.move_to(session if save else None)
        effort = self.chat.conversation.reasoning
        if effort not in (None, *self.chat.tokenizer.efforts):
            self.chat.conversation.reasoning = None
            render.note(f"this model's template has no reasoning {effort}, which the chat had")
        self.answer = None
        self.draft = Draft.of(unanswered or "", why=UNANSWERED if unanswered else "")
        self.count_tokens()
        n = len(self.chat.conversation.messages) - (self.chat.conversation.system is not None)
        render.note(f"chat {session.id}, {n} messages" + (
            "; its last message had no answer and stands at the prompt" if unanswered else ""
        ))  # fmt: skip
        for line in last_turn(self.chat.conversation):
            render.note(line)

    def say_how_to_go_on(self, typed: Sequence[str]) -> None:
        """Print the command that resumes this chat, once, if the chat is kept.

        Args:
            typed: the words that started the chat.
        """
        session, self.session = self.session, None
        if session is not None and session.is_begun and not self._options.quiet:
            is_found = session.path.resolve().parent == sessions_folder().resolve()
            name = session.id if is_found else str(session.path.resolve())
            command = command_to_go_on(typed, name)
            render.note(f"mistral-chat: to go on with this chat: {command}", whole=True)

    def move_to(self, session: Session | None) -> None:
        """Keep what follows in another session, or in none."""
        if self.session is not None and self.session is not session:
            self.session.release()
        self.session = session

    def write(self, write: Callable[[Session], None]) -> None:
        """Write to the session; if that fails, report it once and go on without a session."""
        if self.session is None:
            return
        try:
            write(self.session)
            self.session.hold()  # the first line creates the file
        except SessionError as error:
            self.move_to(None)
            render.error(error)

    # Messages.

    def say(self, text: str, *, replace_last: bool = False) -> None:
        """Send a message and print its answer.

        A message that cannot be sent returns to the prompt with the reason. Messages typed during
        the answer are sent next, unless Ctrl-C stopped the answer; then they are put at the
        prompt.

        Args:
            text: the message; `files` are put before it unless it replaces the last message.
            replace_last: whether the answered message replaces the last turn.
        """
        chat, options = self.chat, self._options
        message = text if replace_last else "\n\n".join([*self.files, text])
        before = chat.conversation.copy()
        try:
            stream = chat.send(message, self.sampling, replace_last=replace_last)
        except (PromptError, UsageError) as error:  # such as /set stop with a schema
            why = f"mistral-chat: {error}; the message was not sent{self._room(message, error)}"
            self.draft = Draft.of(text, replace_last=replace_last, why=why)
            return
        files = self.files
        if not replace_last:
            self.files = []
        if chat.instruct:
            self.write(lambda session: session.add_user(message, replaces=replace_last))
        answer = self._print_answer(stream, message)
        rounds = Rounds(chat, self.sampling, self._desk.run)
        try:
            while following := self._run_calls(rounds, answer):
                if options.stats:
                    report_figures(answer, chat, options, self.load_s)
                answer = self._print_answer(following, None)
        except PromptError as error:  # such as results that fill the context
            chat.conversation = before
            self.write(Session.drop_last)
            why = f"mistral-chat: {error}; this turn is taken back"
            self.files, self.draft = files, Draft.of(text, replace_last=replace_last, why=why)
            self.count_tokens()
            return
        if rounds.ended:
            render.note(f"mistral-chat: {rounds.ended}")
        elif rounds.cancelled:
            if not options.quiet:
                render.note("mistral-chat: interrupted")
        else:
            report(answer, chat, replace(options, sampling=self.sampling), self.load_s)
            if not answer.said and chat.instruct and not options.quiet:
                kept = "the calls are kept" if rounds.n_rounds else "this turn is not kept"
                if answer.thought is not None and chat.tokenizer.takes_thinking:
                    kept = "it is kept"
                render.note(f"mistral-chat: {_why_empty(answer)}; {kept}")
        self._warn_when_nearly_full(answer)
        if self._pressed:
            self.draft = Draft(self.typed.take_back())

    def _print_answer(self, stream: ChatStream, message: str | None) -> Answer:
        """Print an answer as it arrives, and save it.

        Args:
            stream: the answer.
            message: the message that it answers; None for results of calls.
        """
        chat = self.chat
        # Answers to a schema and plain completions are not Markdown.
        plain = self._options.plain or not chat.instruct or chat.grammar is not None
        screen = AnswerScreen(
            plain=plain, is_open=self._options.show_thinking, quiet=self._options.quiet
        )
        self._pressed = self._opens = False
        with pastes_marked():
            for event in stream:
                if isinstance(event, (Thinking, Delta)):
                    screen.add(event)
                n_suspended = QuietTerminal.n_suspended
                if self._poll():
                    stream.cancel()
                if QuietTerminal.n_suspended != n_suspended:
                    screen.draw_anew()
                if self._opens and screen.open_thinking():
                    self._opens = False
                screen.show_below(self._typed_lines())
            answer = stream.answer
            assert answer is not None
            self.answer = answer
            screen.finish(answer)
        if self._opens:  # pressed while the answer was shown
            self.show_thinking()
        if stream.is_kept:
            ids, reason = chat.conversation.last_ids, answer.finish_reason
            thought = answer.thought if chat.tokenizer.takes_thinking else None
            if calls := chat.conversation.open_calls:
                self.write(lambda session: session.add_calls(answer.said, calls, ids, thought))
            else:
                self.write(lambda session: session.add_answer(answer.said, ids, reason, thought))
        elif chat.instruct and message is not None:
            self.write(Session.drop_last)
        return answer

    def show_thinking(self) -> None:
        """Print what the model thought in the last turn, before calls and before the answer."""
        kept = thinking_of_last_turn(self.chat.conversation)
        if thinking := kept or (self.answer.thinking if self.answer is not None else ""):
            note_dim(thinking.split("\n"))
        else:
            render.note("the model did not think before its last answer")

    def _run_calls(self, rounds: Rounds, answer: Answer) -> ChatStream | None:
        """Run the calls of an answer, save their results, and let the model continue."""
        for result in rounds.results(answer):
            self.write(partial(Session.add_result, call=result.call, text=result.text))
            self._desk.show(result)
        return rounds.go_on()

    def _poll(self) -> bool:
        """Return whether Ctrl-C was pressed; keep other typed text for later."""
        pressed, typed = self._terminal.poll()
        self._opens |= CTRL_T in typed
        self.typed.take(typed)
        self._pressed |= pressed
        return pressed

    def take_typed_while_loading(self) -> None:
        """Put what was typed while loading at the prompt instead of sending it."""
        self._poll()
        self.typed.rest = self.typed.take_back()

    def _typed_lines(self) -> list[str]:
        """Return the lines that show the user what was typed."""
        waiting = [f"queued: {shorten(message)}" for message in self.typed.messages]
        if len(waiting) > 2:
            waiting = [f"queued: {len(waiting)} messages"]
        return [*waiting, f"> {shorten(self.typed.rest[-50:])}"] if self.typed.rest else waiting

    def _is_interrupted(self) -> bool:
        """Return whether to stop calls; includes a Ctrl-C pressed just as the answer ended."""
        return self._poll() or self._pressed

    @property
    def answers(self) -> list[str]:
        """The model's texts in this chat; in plain completion only the last one."""
        if not self.chat.instruct:
            return [self.answer.said] if self.answer is not None and self.answer.said else []
        said = self.chat.conversation.messages
        return [text for m in said if isinstance(m, AssistantMessage) and (text := text_of(m))]

    # The context.

    def count_tokens(self) -> int:
        """Count the tokens of the conversation in the template; 0 if nothing was said."""
        chat = self.chat
        if not chat.instruct or not chat.conversation.n_turns:
            self._used = 0
        else:
            # The template cannot end without a next message; the shortest is one token.
            ids = chat.conversation.encode(chat.tokenizer, [UserMessage(content=".")])
            self._used = len(ids) - 1
        return self._used

    def _room(self, message: str, error: PromptError | UsageError) -> str:
        """Return a hint that names the command to make room for a message; empty if none does."""
        if not isinstance(error, ContextLengthError) or not self.chat.instruct:
            return ""
        n_answer = min(LEAST_ANSWER, self.chat.engine.max_seq_len // 8)
        n = self.chat.turns_to_drop(message, n_answer)
        return f". /drop {n} takes out what was said first and makes room" if n else ""

    def _warn_when_nearly_full(self, answer: Answer) -> None:
        used = self._used = answer.usage.prompt_tokens + answer.usage.completion_tokens
        most = self.chat.engine.max_seq_len
        if not self.chat.instruct or used < NEARLY_FULL * most:
            self._warned_full = False
        elif not self._warned_full and not self._options.quiet:
            self._warned_full = True
            render.note(
                f"mistral-chat: {used:,} of {most:,} tokens of context are used. Nothing is "
                f"dropped by itself: /drop takes out the oldest turn, /undo the last, "
                f"/clear all"
            )

    # The chat's state, in one line.

    @property
    def greeting(self) -> str:
        """Model, ranks and context, shown before the first prompt."""
        chat, runner = self.chat, self.chat.engine.runner
        kind = "chat" if chat.instruct else "plain completion: each line is a prompt of its own"
        return (
            f"{self._model}, {runner.model.args.n_params / 1e9:.2f} B parameters on "
            f"{self._ranks} ({runner.model.device.type}, "
            f"{str(runner.model.dtype).removeprefix('torch.')}), context "
            f"{chat.engine.max_seq_len:,}; {kind}. /help lists commands, Ctrl-D leaves."
        )

    @property
    def offers_system(self) -> bool:
        """Whether the model comes with a system prompt, and the chat has none."""
        has_none = self.chat.instruct and self.chat.conversation.system is None
        return has_none and has_default(self.folder)

    @property
    def folder(self) -> Path | None:
        """The model's folder; None for dummy weights."""
        return self._options.engine.model

    @property
    def bottom_line(self) -> str:
        """The line under the prompt."""
        most = self.chat.engine.max_seq_len
        parts = [self._model, self._ranks]
        if self._used:
            parts.append(f"context {self._used:,} used, {most - self._used:,} left")
        else:
            parts.append(f"context {most:,}")
        if self.answer is not None and self.answer.decode_tokens_per_s is not None:
            parts.append(f"{self.answer.decode_tokens_per_s:.1f} tokens/s")
        if self.files:
            parts.append(f"{len(self.files)} file(s) before the next message")
        if self.typed.messages:
            parts.append(f"{len(self.typed.messages)} queued, sent after this")
        return SEPARATOR.join(parts)

    @property
    def _ranks(self) -> str:
        n = self.chat.engine.runner.group.world_size
        return f"{n} {'rank' if n == 1 else 'ranks'}"


def _why_empty(answer: Answer) -> str:
    if answer.call_at is not None:
        return "a call was cut short"
    if answer.thought is not None:
        return "the answer ended within its thinking"
    if answer.finish_reason == "cancelled":
        return "stopped before the first word"
    return "the model gave an empty answer"
