"""Chats are kept as they go, restored unchanged, and never lost."""

import json
import os
import re
from collections.abc import Callable
from pathlib import Path

import pytest

from mistral_chat.chat.conversation import Conversation
from mistral_chat.chat.tools import ToolCall
from mistral_chat.cli.requests import SESSION_ID
from mistral_chat.cli.talk import chat_text, settings
from mistral_chat.cli.talk.session_files import sessions_folder, summaries
from mistral_chat.cli.talk.sessions import Session
from mistral_chat.config import SamplingParams
from mistral_chat.errors import MistralChatError, OutputError, SessionError, UsageError
from tests.disk import Disk

AWKWARD = 'quotes " and \\, a line\nbreak, \u2028, ünï 🌍, \x1b[0m'


@pytest.fixture(autouse=True)
def _data_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path))


def said(conversation: Conversation) -> list[tuple[str, str]]:
    return [(m.role, str(m.content)) for m in conversation.messages]


def replayed(name: str, model: str = "m") -> tuple[Conversation, str | None]:
    conversation = Conversation()
    return conversation, Session.open(name, model).replay(conversation)


def make_session(n_turns: int = 2, system: str | None = None) -> Session:
    session = Session.create("m", system)
    for n in range(n_turns):
        session.add_user(f"question {n}")
        session.add_answer(f"answer {n}", (n, n + 1), "stop")
    return session


@pytest.mark.parametrize("system", [None, "Be brief.", AWKWARD])
def test_session_gives_back_what_was_said(system: str | None) -> None:
    session = Session.create("m", system)
    session.add_user(AWKWARD)
    session.add_answer(AWKWARD[::-1], (5, 6, 7), "stop")
    session.add_user("again")
    session.add_answer("yes", None, "length")
    conversation, unanswered = replayed(session.id)
    before = [] if system is None else [("system", system)]
    assert said(conversation) == [
        *before,
        ("user", AWKWARD),
        ("assistant", AWKWARD[::-1]),
        ("user", "again"),
        ("assistant", "yes"),
    ]
    assert unanswered is None
    assert conversation.last_ids is None
    conversation.undo()
    assert conversation.last_ids == (5, 6, 7)


def test_session_of_another_model_gives_back_texts_without_ids() -> None:
    session = make_session()
    conversation, _ = replayed(session.id, "another")
    assert said(conversation)[-1] == ("assistant", "answer 1")
    assert conversation.last_ids is None


# Folders of two models may have one name, and one tokenizer serves many models.
@pytest.mark.parametrize(
    ("first", "then", "same"),
    [
        (("m", "t"), ("m", "t"), True),
        (("m", "t"), ("other", "t"), True),
        (("m", "t"), ("m", "u"), False),
        (("m", None), ("m", "t"), True),  # of before there were fingerprints
        (("m", None), ("other", "t"), False),
    ],
)
def test_session_gives_back_ids_where_the_tokenizer_is_the_same(
    first: tuple[str, str | None], then: tuple[str, str | None], same: bool
) -> None:
    session = Session.create(first[0], None, first[1])
    session.add_user("q")
    session.add_calls("", CALLS, (5, 6))
    for call in CALLS:
        session.add_result(call, "r")
    session.add_answer("a", (1, 2), "stop")
    conversation = Conversation()
    Session.open(session.branch().id, *then).replay(conversation)
    assert conversation._written == ({1: (5, 6), 4: (1, 2)} if same else {})


def test_session_is_private_and_named_for_resume() -> None:
    session = make_session()
    assert re.fullmatch(SESSION_ID, session.id)
    assert session.path.stat().st_mode & 0o777 == 0o600
    assert session.path.parent.stat().st_mode & 0o777 == 0o700
    for line in session.path.read_text().splitlines():
        assert isinstance(json.loads(line), dict)


def test_session_without_a_message_leaves_no_file() -> None:
    Session.create("m", None)
    assert list(sessions_folder().iterdir()) == []


# After a kill at any byte every whole line counts, and the torn one is ignored.
def test_session_cut_at_any_byte_loses_at_most_its_last_line() -> None:
    session = make_session(2, system="s")
    data = session.path.read_bytes()
    whole = [0]
    for line in data.splitlines(keepends=True):
        whole.append(whole[-1] + len(line))
    for cut in range(len(data) + 1):
        session.path.write_bytes(data[:cut])
        n_lines = sum(end <= cut for end in whole[1:])
        if n_lines == 0:
            with pytest.raises(SessionError):
                Session.open(session.id, "m")
            continue
        conversation, unanswered = replayed(session.id)
        n_messages = n_lines - 1
        assert len(said(conversation)) == 1 + n_messages - n_messages % 2
        assert unanswered == (f"question {n_messages // 2}" if n_messages % 2 else None)


def test_session_goes_on_after_a_torn_line() -> None:
    session = make_session(1)
    with session.path.open("ab") as file:
        file.write(b'{"role": "user", "conte')
    again = Session.open(session.id, "m")
    again.replay(Conversation())
    again.add_user("next")
    again.add_answer("fine", None, "stop")
    conversation, unanswered = replayed(session.id)
    assert said(conversation)[-2:] == [("user", "next"), ("assistant", "fine")]
    assert unanswered is None


CHANGES: list[tuple[str, Callable[[Session], None], list[str]]] = [
    ("undo", Session.undo, ["question 0", "answer 0"]),
    ("clear", lambda s: s._write({"type": "clear"}), []),
    ("system", lambda s: s.set_system("new"), ["new", "question 0", "answer 0", "question 1",
                                               "answer 1"]),
]  # fmt: skip


@pytest.mark.parametrize(("name", "change", "expected"), CHANGES)
def test_session_keeps_changes(
    name: str, change: Callable[[Session], None], expected: list[str]
) -> None:
    session = make_session()
    change(session)
    assert [text for _, text in said(replayed(session.id)[0])] == expected, name


def test_session_unanswered_message_comes_back_to_be_asked_again_once() -> None:
    session = make_session(1)
    session.add_user("and then?")
    conversation, unanswered = replayed(session.id)
    assert unanswered == "and then?"
    assert len(conversation.messages) == 2
    assert replayed(session.id)[1] is None


def test_session_branch_goes_on_by_itself() -> None:
    session = make_session(1, system="s")
    other = session.branch()
    other.add_user("left")
    other.add_answer("l", None, "stop")
    session.add_user("right")
    session.add_answer("r", None, "stop")
    assert said(replayed(other.id)[0])[-2] == ("user", "left")
    assert said(replayed(session.id)[0])[-2] == ("user", "right")
    assert said(replayed(other.id)[0])[:3] == said(replayed(session.id)[0])[:3]


def test_summaries_are_latest_first_and_leave_out_what_is_no_session() -> None:
    old, new = make_session(1), make_session(3)
    os.utime(old.path, (1, 1))
    (sessions_folder() / "notes.jsonl").write_text("{}\n")
    (sessions_folder() / "bad.jsonl").write_text("not json\n")
    found = summaries()
    assert [s.id for s in found] == [new.id, old.id]
    assert [s.n_messages for s in found] == [6, 2]
    assert found[0].begins == "question 0"


@pytest.mark.parametrize("kind", ["latest", "id", "beginning", "path"])
def test_session_is_found_by(kind: str) -> None:
    session = make_session(1)
    name = {"latest": "latest", "id": session.id, "beginning": session.id[:-2],
            "path": str(session.path)}[kind]  # fmt: skip
    assert Session.open(name, "m").path == session.path


@pytest.mark.parametrize(
    ("content", "said_so"),
    [
        ("", "empty"),
        ("[]\n", "expected an object"),
        ('{"type": "other"}\n', "no chat of this program"),
        ('{"type": "session", "version": 99}\n', "version 1"),
        ('{"type": "session", "version": 1}\nnonsense\n', "line 2: not JSON"),
        ('{"type": "session", "version": 1}\n{"role": "user"}\n', "line 2"),
    ],
)
def test_session_refuses_files_that_are_none(tmp_path: Path, content: str, said_so: str) -> None:
    path = tmp_path / "file.jsonl"
    path.write_text(content)
    with pytest.raises(SessionError, match=said_so):
        Session.open(str(path), "m")


@pytest.mark.parametrize("name", ["latest", "20260101-000000-abcd", "../secrets", "no/such.jsonl"])
def test_session_that_is_not_there_is_refused(name: str) -> None:
    with pytest.raises(SessionError):
        Session.open(name, "m")


def test_session_ambiguous_beginning_is_refused() -> None:
    for name in ("20260101-000000-aaaa", "20260101-000000-aabb"):
        make_session(1).path.rename(sessions_folder() / f"{name}.jsonl")
    with pytest.raises(SessionError, match="begins 2 chats"):
        Session.open("20260101-000000-aa", "m")
    assert Session.open("20260101-000000-aab", "m").id == "20260101-000000-aabb"


def test_session_says_once_that_it_can_no_longer_be_written() -> None:
    session = make_session(1)
    session.path.unlink()
    session.path.mkdir()  # a directory takes no lines, whoever writes
    with pytest.raises(SessionError, match="no longer kept"):
        session.add_user("lost")


@pytest.mark.parametrize(
    ("words", "name", "value"),
    [
        ("temperature 0.2", "temperature", 0.2),
        ("--top-p=0.5", "top_p", 0.5),
        ("top_k 40", "top_k", 40),
        ("max_tokens 7", "max_tokens", 7),
        ("max_tokens default", "max_tokens", None),
        ("seed 3", "seed", 3),
        ("stop END", "stop", ("a", "END")),
        ("stop none", "stop", ()),
    ],
)
def test_set_sampling_changes_one_setting(words: str, name: str, value: object) -> None:
    before = SamplingParams(max_tokens=5, stop=("a",), temperature=0.9)
    after = settings.set_sampling(before, words)
    assert getattr(after, name) == value
    assert f"{name} " in settings.sampling_line(after)


@pytest.mark.parametrize(
    "words",
    ["", "temperature", "temprature 1", "temperature hot", "top_k 1.5", "top_p 2", "seed -1"],
)
def test_set_sampling_refuses(words: str) -> None:
    with pytest.raises(UsageError):
        settings.set_sampling(SamplingParams(), words)


def test_write_markdown_overwrites_nothing(tmp_path: Path) -> None:
    conversation = Conversation("s")
    conversation.add_user("question")
    conversation.add_answer("answer", None)
    path = tmp_path / "chat.md"
    chat_text.write_markdown(path, conversation)
    text = path.read_text()
    assert text.index("## System") < text.index("## You") < text.index("question")
    assert text.index("question") < text.index("## Model") < text.index("answer")
    with pytest.raises(OutputError, match="there already"):
        chat_text.write_markdown(path, conversation)
    with pytest.raises(MistralChatError):
        chat_text.write_markdown(tmp_path / "no" / "folder.md", conversation)


def test_conversation_system_prompt_can_change_without_losing_ids() -> None:
    conversation = Conversation()
    conversation.add_user("q")
    conversation.add_answer("a", (1, 2))
    for system in ("new", "other", None, "again"):
        conversation.set_system(system)
        assert conversation.system == system
        assert conversation.last_ids == (1, 2)
    assert conversation.undo() == "q"
    assert conversation.undo() is None
    assert conversation.system == "again"


def test_session_line_that_the_disk_takes_half_of_is_an_error_and_cut_off(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    session = make_session(1)
    write = os.write
    with monkeypatch.context() as patched:
        patched.setattr(os, "write", lambda handle, data: write(handle, data[: len(data) // 2]))
        with pytest.raises(SessionError, match="No space left"):
            session.add_user("lost")
    again = Session.open(session.id, "m")
    again.add_user("next")
    conversation, unanswered = replayed(session.id)
    assert said(conversation) == [("user", "question 0"), ("assistant", "answer 0")]
    assert unanswered == "next"


CALLS = [ToolCall("aaaaaaaa1", "f", {"a": [1, None, AWKWARD]}), ToolCall("aaaaaaaa2", "g", {})]


def make_session_of_calls() -> Session:
    session = make_session(1)
    session.add_user("with calls")
    session.add_calls("Let me see.", CALLS, (5, 6))
    for call in CALLS:
        session.add_result(call, f"result of {call.name}, {AWKWARD}")
    session.add_answer("done", (7,), "stop")
    return session


def test_session_gives_back_calls_and_results() -> None:
    conversation, unanswered = replayed(make_session_of_calls().id)
    wanted = Conversation()
    wanted.add_user("question 0")
    wanted.add_answer("answer 0", (0, 1))
    wanted.add_user("with calls")
    wanted.add_calls("Let me see.", CALLS, (5, 6))
    for call in CALLS:
        wanted.add_result(call, f"result of {call.name}, {AWKWARD}")
    wanted.add_answer("done", (7,))
    assert (conversation.messages, unanswered) == (wanted.messages, None)
    assert conversation._written == wanted._written
    assert conversation.undo() == "with calls"
    assert said(conversation) == [("user", "question 0"), ("assistant", "answer 0")]


# After a kill at any point the file's history is one that every template takes.
def test_session_of_calls_cut_at_any_line_goes_on() -> None:
    session = make_session_of_calls()
    lines = session.path.read_bytes().splitlines(keepends=True)
    for n_lines in range(4, len(lines) + 1):
        session.path.write_bytes(b"".join(lines[:n_lines]) + b'{"role": "tool", "content": "to')
        conversation, unanswered = replayed(session.id)
        assert not conversation.open_calls
        roles = [message.role for message in conversation.messages]
        n_calls = 2 if n_lines >= 5 else 0
        assert roles.count("tool") == n_calls
        assert unanswered == ("with calls" if n_lines == 4 else None)
        again, _ = replayed(session.id)  # and what was added then is kept
        assert again.messages == conversation.messages
        taken_back = Session.open(session.id, "m")
        if n_calls:
            taken_back.undo()
        assert said(replayed(session.id)[0])[-1] == ("assistant", "answer 0")


def test_session_of_calls_can_be_branched_and_taken_back() -> None:
    session = make_session_of_calls()
    branch = session.branch()
    session.undo()
    assert said(replayed(session.id)[0])[-1] == ("assistant", "answer 0")
    roles = [message.role for message in replayed(branch.id)[0].messages]
    assert roles[2:] == ["user", "assistant", "tool", "tool", "assistant"]


@pytest.mark.parametrize(
    "line",
    [
        '{"role": "tool", "content": "x"}',
        '{"role": "tool", "content": "x", "tool_call_id": 3, "name": "f"}',
        '{"role": "assistant", "content": "", "tool_calls": [{"id": "a"}]}',
        '{"role": "assistant", "content": "", "tool_calls": [3]}',
        '{"role": "assistant", "content": "", "tool_calls": 3}',
        '{"role": "assistant", "content": "", '
        '"tool_calls": [{"id": "a", "name": "f", "arguments": []}]}',
    ],
)
def test_session_refuses_calls_that_are_none(tmp_path: Path, line: str) -> None:
    path = tmp_path / "file.jsonl"
    path.write_text('{"type": "session", "version": 1}\n' + line + "\n")
    with pytest.raises(SessionError, match="line 2"):
        Session.open(str(path), "m")


def test_write_markdown_shows_calls_and_results(tmp_path: Path) -> None:
    conversation = Conversation()
    conversation.add_user("question")
    conversation.add_calls("Let me see.", CALLS, None)
    conversation.add_result(CALLS[0], "# no heading\n```\nfenced\n```")
    conversation.add_result(CALLS[1], "two")
    conversation.add_answer("answer", None)
    path = tmp_path / "chat.md"
    chat_text.write_markdown(path, conversation)
    text = path.read_text(encoding="utf-8")
    assert "## Model\n\nLet me see.\n\ncalls `f(a=[1, null, " in text
    assert "calls `g()`" in text
    assert "## Result of f\n\n````\n# no heading\n```\nfenced\n```\n````\n" in text
    assert text.index("## Result of g") < text.index("answer")
    lines = list(chat_text.last_turn(conversation))
    assert lines[0] == "> question"
    assert lines[-1] == "answer"


@pytest.mark.parametrize(
    ("arguments", "shown"),
    [
        ({}, "f()"),
        ({"city": "Paris", "days": 2}, 'f(city="Paris", days=2)'),
        ({"a": None, "b": [True, 1.5], "c": {"d": "é日"}},
         'f(a=null, b=[true, 1.5], c={"d": "é日"})'),
        ({"a": "\x1b[2J\x9b\u202e\n"}, 'f(a="\\u001b[2J\\u009b\\u202e\\n")'),
    ],
)  # fmt: skip
def test_call_line_hides_nothing(arguments: dict[str, object], shown: str) -> None:
    assert chat_text.call_line(ToolCall("aaaaaaaaa", "f", arguments)) == shown


def test_session_drops_the_oldest_turns() -> None:
    session = make_session(4, "Be brief.")
    session.drop(1)
    session.drop(2)
    session.add_user("next")
    session.add_answer("fine", (9,), "stop")
    assert said(replayed(session.id)[0]) == [
        ("system", "Be brief."),
        ("user", "question 3"),
        ("assistant", "answer 3"),
        ("user", "next"),
        ("assistant", "fine"),
    ]
    session.drop(7)
    assert said(replayed(session.id)[0]) == [("system", "Be brief.")]


def test_session_replaces_the_last_turn_once_there_is_an_answer() -> None:
    session = make_session(2)
    session.add_user("another", replaces=True)
    session.add_answer("better", (8,), "stop")
    wanted = [
        ("user", "question 0"),
        ("assistant", "answer 0"),
        ("user", "another"),
        ("assistant", "better"),
    ]
    assert said(replayed(session.id)[0]) == wanted
    assert said(replayed(session.branch().id)[0]) == wanted
    session.undo()
    assert said(replayed(session.id)[0]) == wanted[:2]


@pytest.mark.parametrize("ends", ["killed", "nothing was said"])
def test_session_keeps_the_last_turn_where_nothing_took_its_place(ends: str) -> None:
    session = make_session_of_calls()
    before = replayed(session.id)[0].messages
    session.add_user("another", replaces=True)
    if ends == "nothing was said":
        session.drop_last()
    conversation, unanswered = replayed(session.id)
    assert conversation.messages == before
    assert unanswered == ("another" if ends == "killed" else None)
    assert replayed(session.id)[0].messages == before  # also the next time


STEPS: list[tuple[str, Callable[[Session], None]]] = [
    ("user", lambda s: s.add_user("q")),
    ("answer", lambda s: s.add_answer("a", (1, 2), "stop")),
    ("calls", lambda s: s.add_calls("", CALLS, None)),
    ("result", lambda s: s.add_result(CALLS[0], "r")),
    ("unsaid", Session.drop_last),
    ("undo", Session.undo),
    ("drop", lambda s: s.drop(1)),
    ("system", lambda s: s.set_system("new")),
]


@pytest.mark.parametrize(("name", "step"), STEPS)
def test_session_has_every_line_on_the_disk_before_anything_follows(
    monkeypatch: pytest.MonkeyPatch, name: str, step: Callable[[Session], None]
) -> None:
    disk = Disk(monkeypatch)
    session = make_session(1)
    step(session)
    assert disk.has_all_of(session.path), name
    again = Session.open(session.id, "m")
    step(again)
    assert disk.has_all_of(session.path), name


def test_session_that_is_new_has_its_name_on_the_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    disk = Disk(monkeypatch)
    session = Session.create("m", None)
    for folder in (sessions_folder(), sessions_folder().parent):
        assert folder.is_relative_to(tmp_path)
        assert disk.knows_name_of(folder)  # made for the first chat
    session.add_user("q")
    assert disk.knows_name_of(session.path)
    other = session.branch()
    assert disk.knows_name_of(other.path)
    assert disk.has_all_of(other.path)
