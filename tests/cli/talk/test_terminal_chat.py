"""The chat without a terminal: after any input, the file holds what the model is given.

The model's answers are scripted; engine, templates, commands and files are the real ones.
"""

import base64
import errno
import io
import json
import os
import random
import re
import termios
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from mistral_common.protocol.instruct.messages import UserMessage
from prompt_toolkit.history import FileHistory

from mistral_chat.chat.conversation import Conversation
from mistral_chat.cli.console import printing
from mistral_chat.cli.console.terminal import QuietTerminal
from mistral_chat.cli.requests import ChatRequest
from mistral_chat.cli.talk.commands import ALIASES, Commands, LeaveError
from mistral_chat.cli.talk.session_files import summaries
from mistral_chat.cli.talk.sessions import Session
from mistral_chat.cli.talk.terminal_chat import TerminalChat
from mistral_chat.cli.talk.typing import prompt
from mistral_chat.cli.talk.typing.draft import Draft
from mistral_chat.cli.talk.typing.prompt import unwrap_block
from mistral_chat.config import EngineConfig
from mistral_chat.errors import SessionError
from tests.chat.test_chat import GREEDY, TOOL, Talk
from tests.chat.test_rounds import ask, garble, say

WORDS = ["one", "two words", "", "  spaces ", "é🙂", "a\n\nb", "</s>", "[INST] x"]


@pytest.fixture(autouse=True)
def _data_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path))


class Keys:
    """A terminal where Ctrl-C can be pressed."""

    def __init__(self) -> None:
        self.pressed = False
        self.typed = ""

    def poll(self) -> tuple[bool, str]:
        pressed, self.pressed = self.pressed, False
        typed, self.typed = self.typed, ""
        return pressed, typed


class Desk:
    """A chat, its commands, and a user's actions."""

    def __init__(
        self, name: str = "v3", *, resume: str | None = None, save: bool = True, **options: Any
    ) -> None:
        self.model = Talk(name, **options)
        self.keys = Keys()
        words = ChatRequest(
            engine=EngineConfig(model=Path("m")),
            sampling=GREEDY,
            instruct=self.model.chat.instruct,
            quiet=True,
            resume=resume,
            no_save=not save,
        )
        terminal: Any = self.keys
        self.talk = TerminalChat(self.model.chat, words, 0.0, terminal)
        self.talk.open_session()
        self.commands = Commands(self.talk)

    def answer(self, *parts: Sequence[int]) -> None:
        """Set the model's next answer."""
        self.model.runner.script = deque(id_ for part in parts for id_ in part)

    @property
    def history(self) -> tuple[list[Any], dict[int, tuple[int, ...]]]:
        conversation = self.model.chat.conversation
        return conversation.messages, conversation._written

    @property
    def kept(self) -> tuple[list[Any], dict[int, tuple[int, ...]]]:
        """Return the history that the file gives back."""
        session = self.talk.session
        assert session is not None
        conversation = Conversation()
        assert Session.open(str(session.path), "m").replay(conversation) is None
        return conversation.messages, conversation._written

    @property
    def prompt(self) -> list[int]:
        """Return the tokens that the model is given for a next message."""
        new = [UserMessage(content="next")]
        return self.model.chat.conversation.encode(self.model.tokenizer, new)

    @property
    def kept_prompt(self) -> list[int]:
        """Return those that it is given when the chat is resumed from its file."""
        session = self.talk.session
        assert session is not None
        conversation = Conversation(tools=self.model.chat.conversation.tools)
        Session.open(str(session.path), "m").replay(conversation)
        return conversation.encode(self.model.tokenizer, [UserMessage(content="next")])


def act(desk: Desk, rng: random.Random) -> str:
    """Do something at random, and return its description."""
    model, talk = desk.model, desk.talk
    answers = [say(model, rng.choice(WORDS)) for _ in range(3)]
    if model.chat.conversation.tools and rng.random() < 0.4:
        answers.insert(0, rng.choice([ask(model, [("f", {})] * 2, "Hm."), garble(model)]))
        text = rng.choice(["22", "é", "word " * 300])
        talk._desk.run = lambda call: text  # type: ignore[method-assign]
    if model.tokenizer.has_think_marks and rng.random() < 0.6:
        begin, end = model.tokenizer.begin_think_id, model.tokenizer.end_think_id
        assert begin is not None
        assert end is not None
        thought = [begin, *model.ids(rng.choice(["Hm.", "so\n\nso", "word " * 300])), end]
        answers.insert(0, [*thought[: rng.choice([len(thought)] * 3 + [2])], *answers.pop(0)])
    desk.answer(*answers)
    desk.keys.pressed = rng.random() < 0.1
    ids = [kept.id for kept in summaries()]
    message = rng.choice([*WORDS[:2], "hello", "word " * 120, "word " * 2000])
    what = rng.choice(
        ["say"] * 4
        + ["/regen", "in place", "/undo", "/drop", f"/drop {rng.randrange(4)}", "/branch", "/clear",
           "/system -", "/think high", "/think -",
           f"/system {message}", f"/load {rng.choice(ids or ['x'])}", "/tokens"]
    )  # fmt: skip
    if what == "say":
        talk.say(message)
    elif what == "in place":
        if model.chat.conversation.n_turns:
            talk.say(message, replace_last=True)
    else:
        desk.commands.run(what)
    return what


# No chat is lost: whatever was done, a killed chat resumes with the same history, token for token.
@pytest.mark.parametrize("seed", range(12))
@pytest.mark.parametrize(
    ("name", "tools"),
    [
        ("v3", False),
        ("v3", True),
        ("v7", True),
        ("v11", True),
        ("v13", True),
        ("v15", False),
        ("v15", True),
    ],
)
def test_file_gives_back_the_history_after_every_command(name: str, tools: bool, seed: int) -> None:
    rng = random.Random(seed)
    desk = Desk(
        name,
        max_seq_len=600,
        tools=[TOOL] if tools else [],
        system="Be brief." if seed % 2 else None,
    )
    done = []
    for _ in range(30):
        done.append(act(desk, rng))
        session = desk.talk.session
        assert session is not None, done
        if session.path.exists():
            assert desk.kept == desk.history, done
            assert desk.kept_prompt == desk.prompt, done
        else:
            assert len(desk.history[0]) == (desk.model.chat.conversation.system is not None), done


# After a kill during an answer everything before is kept, and the message is asked again.
@pytest.mark.parametrize("replace_last", [False, True])
def test_file_has_all_but_the_answer_while_it_is_said(replace_last: bool) -> None:
    desk = Desk()
    for n in range(2):
        desk.answer(say(desk.model, f"answer {n}"))
        desk.talk.say(f"question {n}")
    before = desk.history[0][:]
    session = desk.talk.session
    assert session is not None
    seen = []

    def look(n_scored: int) -> None:  # noqa: ARG001
        copy = session.path.with_name("copy.jsonl")
        copy.write_bytes(session.path.read_bytes())
        conversation = Conversation()
        seen.append((Session.open(str(copy), "m").replay(conversation), conversation.messages))

    desk.model.runner.on_scored = look
    desk.answer(say(desk.model, "the last answer"))
    desk.talk.say("another", replace_last=replace_last)
    assert len(seen) > 3
    assert all(found == ("another", before) for found in seen)


@pytest.mark.parametrize("way", ["new", "resumed", "branch"])
def test_chat_that_is_open_is_opened_by_no_other(
    way: str, capsys: pytest.CaptureFixture[str]
) -> None:
    first = Desk()
    first.answer(say(first.model, "one"), say(first.model, "two"))
    first.talk.say("first")
    assert first.talk.session is not None
    if way == "resumed":
        first.talk.session.release()
        first = Desk(resume="latest")
    elif way == "branch":
        left = first.talk.session
        first.commands.run("/branch")
        Desk(resume=left.id)
    session = first.talk.session
    assert session is not None

    def resume_meanwhile(n_scored: int) -> None:  # noqa: ARG001
        with pytest.raises(SessionError, match="open in another process"):
            Desk(resume=session.id)

    first.model.runner.on_scored = resume_meanwhile
    first.answer(say(first.model, "two"))
    first.talk.say("second")
    assert first.kept == first.history
    other = Desk()
    other.commands.run(f"/load {session.id}")
    assert "open in another process" in capsys.readouterr().err
    assert other.history[0] == []
    first.commands.run(f"/load {session.id}")  # its own, it may
    assert first.talk.session is session
    session.release()
    other.commands.run(f"/load {session.id}")
    assert other.history == first.history


def test_unanswered_message_stays_in_the_file_where_nothing_is_to_be_saved() -> None:
    desk = Desk()
    desk.answer(say(desk.model, "one"))
    desk.talk.say("first")
    session = desk.talk.session
    assert session is not None
    session.add_user("second")
    session.release()
    data = session.path.read_bytes()
    for _ in range(2):
        reader = Desk(resume="latest", save=False)
        assert reader.talk.draft.text == "second"
        assert reader.history == desk.history
    assert session.path.read_bytes() == data


def test_branch_before_the_first_message_keeps_the_system_prompt() -> None:
    desk = Desk(system="Be brief.")
    desk.commands.run("/branch")
    desk.answer(say(desk.model, "one"))
    desk.talk.say("first")
    assert desk.kept == desk.history
    assert desk.history[0][0].content == "Be brief."


@pytest.mark.parametrize(
    "line",
    ["/file ~nobody-of-this-name/x", "/save ~nobody-of-this-name/x", "/load ~nobody-of-this-name/x",
     "/file a\0b", "/save a\0b", "/load ./a\0b", f"/file {'x' * 5000}", f"/load ./{'x' * 5000}",
     "/file /", "/file /dev/zero", "/save /", "/load /", f"/drop {'9' * 5000}", "/drop 0",
     "/drop -1", "/drop x", "/set temperature nan", "/set top_p nan", "/set min_p inf",
     "/set temperature 1e999", f"/set seed {'9' * 5000}", f"/set max_tokens {'9' * 5000}",
     "/set stop", "/file", "/file 'a", "/load"],
)  # fmt: skip
def test_command_that_cannot_be_is_one_line(line: str, capsys: pytest.CaptureFixture[str]) -> None:
    desk = Desk()
    desk.answer(say(desk.model, "one"))
    desk.talk.say("first")
    before = desk.history[0][:]
    capsys.readouterr()
    desk.commands.run(line)
    said = capsys.readouterr().err
    assert said.startswith("mistral-chat: error: ")
    assert said.count("\n") == 1
    assert (desk.history[0], desk.talk.files, desk.talk.sampling) == (before, [], GREEDY)


def test_file_that_is_a_pipe_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    os.mkfifo(tmp_path / "pipe")
    Desk().commands.run(f"/file {tmp_path / 'pipe'}")
    assert "is a pipe or a device" in capsys.readouterr().err


@pytest.mark.parametrize(
    "line",
    [
        "[" * 100_000,
        json.dumps({"role": "user", "content": "\ud83d"}),
        json.dumps({"type": "system", "content": 5}),
        json.dumps({"role": "assistant", "content": "x", "model": "m", "ids": "abc"}),
        json.dumps({"role": "assistant", "content": "x", "model": "m", "ids": [1, "a"]}),
    ],
)
def test_broken_chat_is_refused_and_the_one_that_is_on_goes_on(
    tmp_path: Path, line: str, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "broken.jsonl"
    path.write_text('{"type": "session", "version": 1}\n' + line + "\n")
    desk = Desk()
    desk.answer(say(desk.model, "one"))
    desk.talk.say("first")
    desk.commands.run(f"/load {path}")
    assert f"mistral-chat: error: {path}" in capsys.readouterr().err
    assert len(desk.history[0]) == 2
    assert desk.kept == desk.history


def test_chat_whose_file_is_taken_away_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    desk = Desk()
    desk.answer(say(desk.model, "one"), say(desk.model, "two"))
    desk.talk.say("first")
    assert desk.talk.session is not None
    path = desk.talk.session.path
    path.unlink()
    desk.talk.say("second")
    assert "this chat is no longer kept" in capsys.readouterr().err
    assert not path.exists()  # without its first line it would be no chat
    assert desk.talk.session is None


def test_history_file_that_takes_no_more_says_so_once(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    history = prompt._history()

    def refuse(self: FileHistory, string: str) -> None:  # noqa: ARG001
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(FileHistory, "store_string", refuse)
    for text in ("one", "two"):
        history.append_string(text)
    assert capsys.readouterr().err.count("history is no longer kept (No space left") == 1
    assert history.get_strings()[-2:] == ["one", "two"]


def test_what_was_said_earlier_is_shown_without_what_a_terminal_obeys(
    capsys: pytest.CaptureFixture[str],
) -> None:
    session = Session.create("m\x1b[5m", "s\x1b]0;title\x07")
    session.add_user("q\x9b2J")
    session.add_answer("a\x1b[2J👩‍👧 \x7f", None, "stop")
    desk = Desk(resume="latest")
    for line in ("/list", "/show", "/system", "/undo"):
        desk.commands.run(line)
    said = capsys.readouterr().err
    assert "a␛[2J👩‍👧 ␡" in said
    assert not any((c < " " and c != "\n") or "\x7f" <= c < "\xa0" for c in said)


def test_system_prompt_of_the_command_line_wins_over_the_kept_one() -> None:
    desk = Desk(system="kept")
    desk.answer(say(desk.model, "one"))
    desk.talk.say("first")
    assert desk.talk.session is not None
    desk.talk.session.release()
    again = Desk(resume="latest", system="given")
    assert [str(message.content) for message in again.history[0]] == ["given", "first", "one"]
    assert again.kept == again.history


def test_plain_completion_refuses_what_only_a_chat_has(
    capsys: pytest.CaptureFixture[str],
) -> None:
    desk = Desk()
    desk.answer(say(desk.model, "one"))
    desk.talk.say("first")
    assert desk.talk.session is not None
    desk.talk.session.release()
    capsys.readouterr()
    plain = Desk(instruct=False)
    for line in (f"/load {desk.talk.session.id}", "/system Be brief."):
        plain.commands.run(line)
        assert "needs --instruct" in capsys.readouterr().err
    assert plain.history == ([], {})
    assert plain.talk.session is None


def test_terminal_gives_keys_as_they_are_typed(monkeypatch: pytest.MonkeyPatch) -> None:
    mine, theirs = os.openpty()
    with os.fdopen(mine, "wb", buffering=0) as keys, os.fdopen(theirs) as stdin:
        monkeypatch.setattr("sys.stdin", stdin)
        with QuietTerminal() as terminal:
            keys.write("one\x1b[A é中\r\x7f".encode())
            assert terminal.poll() == (False, "one\x1b[A é中\n\x7f")
            keys.write(b"stays\x03 after")
            assert terminal.poll() == (True, "stays after")
        with QuietTerminal(signals=True) as terminal:  # what is typed while a model loads
            local = termios.tcgetattr(stdin)[3]
            assert local & (termios.ECHO | termios.ICANON | termios.ISIG) == termios.ISIG
            terminal.hold_signals()
            assert not termios.tcgetattr(stdin)[3] & termios.ISIG
        assert termios.tcgetattr(stdin)[3] & termios.ECHO


def test_message_whose_results_fill_the_context_stands_at_the_prompt_again(
    tmp_path: Path,
) -> None:
    note = tmp_path / "note"
    note.write_text("from the file")
    desk = Desk(max_seq_len=110, tools=[TOOL])
    desk.commands.run(f"/file {note}")
    desk.talk._desk.run = lambda call: "word " * 300  # type: ignore[method-assign]
    desk.answer(ask(desk.model, [("f", {})]))
    desk.talk.say("Is it so?")
    assert "this turn is taken back" in desk.talk.draft.why
    assert desk.kept == desk.history == ([], {})
    assert (desk.talk.draft.text, desk.talk.files) == ("Is it so?", ["from the file"])


def test_turn_comes_back_where_results_fill_the_context_of_the_one_in_its_place() -> None:
    desk = Desk(max_seq_len=110, tools=[TOOL])
    desk.answer(say(desk.model, "one"))
    desk.talk.say("first")
    before = desk.kept
    desk.talk._desk.run = lambda call: "word " * 300  # type: ignore[method-assign]
    desk.answer(ask(desk.model, [("f", {})]))
    desk.talk.say("Is it so?", replace_last=True)
    assert desk.kept == desk.history == before
    assert replace(desk.talk.draft, why="") == Draft("Is it so?", replace_last=True)
    desk.answer(say(desk.model, "two"))
    desk.talk.say("Is it so?", replace_last=True)
    assert desk.kept == desk.history
    assert [str(message.content) for message in desk.history[0]] == ["Is it so?", "two"]


OSC52 = re.compile("\x1b]52;c;([^\x07]*)\x07")


def copied(desk: Desk, command: str, capsys: pytest.CaptureFixture[str]) -> str | None:
    """Return what a command puts on the terminal's clipboard."""
    sent: list[str] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(printing, "tell_terminal", sent.append)
        patch.setattr("mistral_chat.cli.console.render.tell_terminal", sent.append)
        desk.commands.run(command)
    found = OSC52.search("".join(sent))
    said = capsys.readouterr().err
    assert ("copied" in said) == (found is not None)
    return base64.b64decode(found[1]).decode() if found else None


def test_copy_takes_what_is_in_the_chat(capsys: pytest.CaptureFixture[str]) -> None:
    desk = Desk(max_seq_len=600)
    assert copied(desk, "/copy", capsys) is None
    code = "text\n```py\na = 1\n```\nand\n\n- ~~~\n  b\n  c\n  ~~~\n"
    for n, said in enumerate([code, "no block", "```\nx\n```"]):
        desk.answer(say(desk.model, said))
        desk.talk.say(f"question {n}")
    capsys.readouterr()
    assert copied(desk, "/copy", capsys) == "```\nx\n```"
    assert copied(desk, "/copy code", capsys) == "x"
    desk.commands.run("/undo")
    assert copied(desk, "/copy", capsys) == "no block"
    assert copied(desk, "/copy code", capsys) == "b\nc"  # of the last answer that has any
    desk.commands.run("/undo")
    assert desk.talk.session is not None
    desk.talk.session.release()
    assert copied(Desk(resume="latest"), "/copy", capsys) == code
    desk.commands.run("/undo")
    assert copied(desk, "/copy", capsys) is None
    assert copied(desk, "/copy code", capsys) is None
    desk.commands.run("/copy all")
    assert "/copy takes nothing, or code; found all" in capsys.readouterr().err


@pytest.mark.parametrize("system", [None, "Be brief."])
def test_clear_begins_a_new_chat_and_leaves_the_kept_one_alone(system: str | None) -> None:
    desk = Desk(system=system)
    desk.commands.run("/clear")  # of a chat in which nothing was said
    desk.answer(say(desk.model, "one"))
    desk.talk.say("first")
    old = desk.talk.session
    assert old is not None
    data, before = old.path.read_bytes(), desk.history
    desk.commands.run("/clear")
    assert desk.history[0] == before[0][:1] * (system is not None)
    assert old.path.read_bytes() == data
    other = Desk(resume=old.id)  # nobody holds it
    assert other.history == before
    desk.answer(say(desk.model, "two"))
    desk.talk.say("second")
    assert desk.kept == desk.history
    assert old.path.read_bytes() == data
    assert len(summaries()) == 2
    unkept = Desk(resume=desk.talk.session.id if desk.talk.session else "", save=False)
    unkept.commands.run("/clear")
    assert unkept.talk.session is None


def test_save_of_an_empty_chat_writes_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    desk = Desk(system="Be brief.")
    desk.commands.run(f"/save {tmp_path / 'chat.md'}")
    assert "nothing to save" in capsys.readouterr().err
    assert not (tmp_path / "chat.md").exists()


@pytest.mark.parametrize(
    ("typed", "said"),
    [
        ("/qiut", "did you mean /quit?"),
        ("/hepl", "did you mean /help?"),
        ("/Exit", "did you mean /exit?"),
        ("/cler", "did you mean /clear?"),
        ("/xyzzy", "/help lists commands"),
    ],
)
def test_misspelt_command_gets_a_suggestion(
    typed: str, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    desk = Desk()
    desk.commands.run(typed)
    assert f"unknown command {typed}: {said}" in capsys.readouterr().err
    assert desk.talk.draft.text == ""
    # Of several lines it may be a message: it stays, and Enter sends it as one.
    desk.commands.run(f"{typed}\nand more")
    assert unwrap_block(desk.talk.draft.text) == f"{typed}\nand more"
    assert f"unknown command {typed}: {said}" in desk.talk.draft.why


@pytest.mark.parametrize("name", ["/exit", "/quit", "/q", "/bye"])
def test_commands_that_leave(name: str) -> None:
    with pytest.raises(LeaveError):
        Desk().commands.run(name)


@pytest.mark.parametrize("columns", [20, 33, 59, 60, 80, 200])
def test_help_breaks_between_words(
    columns: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    desk = Desk()
    desk.commands.run("/?")
    whole = capsys.readouterr().err
    monkeypatch.setattr("mistral_chat.cli.talk.commands.columns_of", lambda stream: columns)
    desk.commands.run("/help")
    shown = capsys.readouterr().err
    assert shown.split() == whole.split()
    assert max(map(len, shown.splitlines())) <= columns
    for name in (*desk.commands.meanings, *ALIASES):
        assert re.search(rf"(?:^|, ){re.escape(name)}(?:,| |$)", shown, re.MULTILINE), name


def test_refused_message_stands_at_the_prompt_with_the_reason() -> None:
    desk = Desk(max_seq_len=300)
    for n in range(2):
        desk.answer(say(desk.model, "word " * 40))
        desk.talk.say(f"question {n}")
    before = desk.kept
    desk.talk.say("word " * 230)
    assert desk.talk.draft.text == "word " * 230
    assert "the message was not sent. /drop 2 takes out" in desk.talk.draft.why
    assert desk.kept == desk.history == before
    desk.talk.draft = Draft()
    desk.talk.say("word " * 400)  # no command helps
    assert desk.talk.draft.why.endswith("the message was not sent")


def test_bottom_line_follows_what_is_taken_out() -> None:
    desk = Desk(max_seq_len=600)

    def used() -> int:
        found = re.search(r"context ([\d,]+) used, ([\d,]+) left", desk.talk.bottom_line)
        assert found is not None, desk.talk.bottom_line
        n, left = (int(number.replace(",", "")) for number in found.groups())
        assert n + left == 600
        return n

    assert desk.talk.bottom_line.endswith("context 600")
    figures = []
    for n in range(3):
        desk.answer(say(desk.model, "some answer"))
        desk.talk.say(f"question {n}")
        figures.append(used())
    assert figures == sorted(figures)
    desk.commands.run("/undo")
    assert used() == pytest.approx(figures[1], abs=2)
    desk.commands.run("/drop")
    assert used() == pytest.approx(figures[0], abs=2)
    assert desk.talk.session is not None
    desk.commands.run(f"/load {desk.talk.session.id}")
    assert used() == pytest.approx(figures[0], abs=2)
    desk.commands.run("/clear")
    assert desk.talk.bottom_line.endswith("context 600")


@pytest.mark.parametrize("text", ["/undo", "/a\nb\n\n/c", "/etc/hosts says what?", "plain"])
def test_message_that_stands_at_the_prompt_again_is_no_command(text: str) -> None:
    typed = Draft.of(text).text
    assert not typed.startswith("/")
    assert unwrap_block(typed) == text


def test_file_that_no_context_holds_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    desk = Desk()
    for size, n_files in ((1 << 20, 1), ((64 << 20) + 1, 1)):
        with (tmp_path / "long").open("wb") as file:
            file.write(b"x" * min(size, 1 << 20))
            file.truncate(size)
        desk.commands.run(f"/file {tmp_path / 'long'}")
        assert len(desk.talk.files) == n_files
    assert "long has 67,108,865 bytes: expected at most 67,108,864" in capsys.readouterr().err


@pytest.fixture
def read_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """Make the data directory's disk refuse all writes from now on."""
    opened, opened_file, mkdir = os.open, io.open, os.mkdir

    def check(path: Any) -> None:
        if Path(os.fsdecode(path)).is_relative_to(tmp_path):
            raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(path))

    def open_to_read(path: Any, flags: int, *more: Any, **named: Any) -> int:
        if flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
            check(path)
        return opened(path, flags, *more, **named)

    def open_file_to_read(path: Any, mode: str = "r", *more: Any, **named: Any) -> Any:
        if set(mode) & set("wax+"):
            check(path)
        return opened_file(path, mode, *more, **named)

    def make_none(path: Any, *more: Any, **named: Any) -> None:
        if not os.path.isdir(path):  # noqa: PTH112
            check(path)
        mkdir(path, *more, **named)

    def begin() -> None:
        monkeypatch.setattr(os, "open", open_to_read)
        monkeypatch.setattr(io, "open", open_file_to_read)  # which pathlib opens with
        monkeypatch.setattr(os, "mkdir", make_none)

    return begin


@pytest.mark.parametrize("ends", [b"", b'{"role": "user", "conte', b"unanswered"])
def test_chat_on_a_read_only_disk_is_opened_and_said_once_not_to_be_kept(
    read_only: Callable[[], None], capsys: pytest.CaptureFixture[str], ends: bytes
) -> None:
    first = Desk()
    first.answer(say(first.model, "one"))
    first.talk.say("hello")
    assert first.talk.session is not None
    path = first.talk.session.path
    first.talk.move_to(None)
    if ends == b"unanswered":
        Session.open(str(path), "m").add_user("and?")
    else:
        path.write_bytes(path.read_bytes() + ends)
    before = path.read_bytes()
    read_only()
    desk = Desk(resume="latest")
    for text in ("two", "three"):
        desk.answer(say(desk.model, text))
        desk.talk.say("more")
    assert [str(m.content) for m in desk.history[0]] == [
        "hello", "one", "more", "two", "more", "three"
    ]  # fmt: skip
    if ends == b"unanswered":
        assert "its last message had no answer" in capsys.readouterr().err
    else:
        errors = [x for x in capsys.readouterr().err.splitlines() if "error" in x]
        assert len(errors) == 1
        assert "Read-only file system): this chat is not kept" in errors[0]
    assert path.read_bytes() == before


@pytest.mark.parametrize("is_first", [True, False])
def test_new_chat_on_a_read_only_disk_goes_on_and_says_so_once(
    read_only: Callable[[], None], capsys: pytest.CaptureFixture[str], is_first: bool
) -> None:
    if not is_first:
        Session.create("m", None)  # the folder is there
    read_only()
    desk = Desk()
    for text in ("two", "three"):
        desk.answer(say(desk.model, text))
        desk.talk.say("more")
    assert len(desk.history[0]) == 4
    errors = [x for x in capsys.readouterr().err.splitlines() if "error" in x]
    assert len(errors) == 1
    assert "Read-only file system" in errors[0]


def test_chat_goes_on_with_a_model_whose_template_knows_less(
    capsys: pytest.CaptureFixture[str],
) -> None:
    desk = Desk("v15")
    begin, end = desk.model.tokenizer.begin_think_id, desk.model.tokenizer.end_think_id
    assert begin is not None
    assert end is not None
    desk.commands.run("/think high")
    desk.answer([begin, *desk.model.ids("Hm."), end, *say(desk.model, "one")])
    desk.talk.say("first")
    desk.answer([begin, *desk.model.ids("cut"), desk.model.tokenizer.eos_id])
    desk.talk.say("second")
    assert desk.kept_prompt == desk.prompt
    session = desk.talk.session
    assert session is not None
    session.release()
    capsys.readouterr()
    other = Desk("v7", resume=session.id)
    said = capsys.readouterr().err
    assert "this model's template has no reasoning high" in said
    assert "(an answer that ended within its thinking)" in said
    shown = other.model.tokenizer.raw.decode(other.prompt)
    assert "one" in shown
    assert "Hm." not in shown
    other.answer(say(other.model, "three"))
    other.talk.say("third")
    assert other.talk.answers == ["one", "three"]
    # The file still has what the first model thought, for a model that takes it.
    assert other.talk.session is not None
    other.talk.session.release()
    again = Desk("v15", resume=session.id)
    assert "Hm." in again.model.tokenizer.raw.decode(again.prompt)
    assert again.model.chat.conversation.reasoning == "high"


def test_markdown_file_has_the_thinking_folded(tmp_path: Path) -> None:
    desk = Desk("v13")
    begin, end = desk.model.tokenizer.begin_think_id, desk.model.tokenizer.end_think_id
    assert begin is not None
    assert end is not None
    desk.answer([begin, *desk.model.ids("Hm."), end, *say(desk.model, "one")])
    desk.talk.say("first")
    desk.commands.run(f"/save {tmp_path / 'chat.md'}")
    text = (tmp_path / "chat.md").read_text()
    assert "<details><summary>Thinking</summary>\n\nHm.\n\n</details>\n\none\n" in text


def test_thinking_opened_is_that_of_the_whole_turn(capsys: pytest.CaptureFixture[str]) -> None:
    desk = Desk("v13", tools=[TOOL])
    begin, end = desk.model.tokenizer.begin_think_id, desk.model.tokenizer.end_think_id
    assert begin is not None
    assert end is not None
    desk.talk._desk.run = lambda call: "22"  # type: ignore[method-assign]
    script = [begin, *desk.model.ids("call it"), end, *ask(desk.model, [("f", {})])]
    desk.answer(script, [begin, *desk.model.ids("read it"), end, *say(desk.model, "22")])
    desk.talk.say("first")
    capsys.readouterr()
    desk.talk.show_thinking()
    assert capsys.readouterr().err == "call it\n\nread it\n"
    desk.commands.run("/undo")
    desk.talk.answer = None
    capsys.readouterr()
    desk.talk.show_thinking()
    assert capsys.readouterr().err == "the model did not think before its last answer\n"
