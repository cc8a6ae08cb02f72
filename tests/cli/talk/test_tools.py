"""`--tools` with the real command: exact streams and codes of a prompt, and of a chat.

The model is a real one whose tokens are chosen in advance (tests/scripts/scripted.py).
"""

import json
import os
import re
import signal
import time
from collections import deque
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pexpect
import pytest

from mistral_chat.chat.functions import CallsCancelledError, PythonFunctions
from mistral_chat.chat.tools import ToolCall
from mistral_chat.cli.talk.calls import CallDesk
from tests.conftest import Finished, command_env, wait_for_end
from tests.terminal import typed_at
from tests.warm import Piped, warm

FUNCTIONS = '''
import os, sys, time
from pathlib import Path

def weather(city: str, days: int = 1) -> dict:
    """The weather of a place.

    Args:
        city: where.
    """
    print("looking up", city)
    return {"city": city, "rain": [True] * days}

def fails(a: float) -> None:
    """Raise."""
    raise ValueError("too wet")

def slow(marker: str) -> None:
    """Take a minute."""
    Path(marker).write_text(str(os.getpid()))
    time.sleep(60)
'''
SCHEMAS = [{"name": "weather", "parameters": {"type": "object"}}]
PARIS = {"name": "weather", "arguments": {"city": "Paris"}}
DONE = ["It rains."]


def calls(*listed: dict[str, Any]) -> list[str]:
    """Write a v3 answer with calls."""
    return ["[TOOL_CALLS]", json.dumps(listed)]


@pytest.fixture
def functions(tmp_path: Path) -> Path:
    path = tmp_path / "functions.py"
    path.write_text(FUNCTIONS)
    return path


class Script:
    """Run the command with scripted answers."""

    def __init__(self, model: Path, folder: Path) -> None:
        self._model = model
        self._folder = folder

    def words(self, answers: list[list[str]], *words: str | Path) -> list[str]:
        """Return the words after `python -m`."""
        path = self._folder / "answers.json"
        path.write_text(json.dumps(answers))
        script = ["tests.scripts.scripted", str(path), "0", str(self._model), "--instruct"]
        return [*script, *map(str, words)]

    def ask(self, answers: list[list[str]], *words: str | Path) -> Finished:
        module, *rest = self.words(answers, "--prompt", "Hi", *words)
        code, out, err = warm().run(module, rest, command_env(), b"", 300)
        return Finished(code, out.decode(), err.decode())


@pytest.fixture
def script(roomy_folder: Path, tmp_path: Path) -> Script:
    return Script(roomy_folder, tmp_path)


def test_functions_are_run_and_stdout_has_the_answer_alone(script: Script, functions: Path) -> None:
    answers = [["Let me see. ", *calls(PARIS, {"name": "fails", "arguments": {"a": 1}})], DONE]
    done = script.ask(answers, "--tools", functions, "--yes")
    assert (done.code, done.out) == (0, "It rains.\n")
    for line in (
        "Let me see.",
        'calls weather(city="Paris")',
        "  | looking up Paris",
        '  gives {"city":"Paris","rain":[true]}',
        "calls fails(a=1)",
        "  | ValueError: too wet",
        "  gives error: ValueError: too wet",
    ):
        assert line in done.err.splitlines()
    assert "TOOL_CALLS" not in done.err


def test_json_sums_the_tokens_of_all_rounds(script: Script, functions: Path) -> None:
    words = ("--tools", functions, "--yes", "--json", "--quiet", "--seed", "7")
    done = script.ask([calls(PARIS), calls(PARIS), DONE], *words)
    assert (done.code, done.err) == (0, "")
    value = json.loads(done.out)
    assert (value["text"], value["finish_reason"], value["tool_calls"]) == ("It rains.", "stop", [])
    assert value["seed"] == 7
    alone = json.loads(script.ask([calls(PARIS)], *words[:2], *words[3:]).out)
    assert alone["usage"]["prompt_tokens"] * 3 < value["usage"]["prompt_tokens"]
    n_said = 2 * alone["usage"]["completion_tokens"] + 5  # the answer and its end token
    assert value["usage"]["completion_tokens"] == n_said
    cached = value["usage"]["cached_tokens"]
    assert 2 * alone["usage"]["prompt_tokens"] < cached < value["usage"]["prompt_tokens"]


@pytest.mark.parametrize("kind", ["json", "py"])
def test_calls_that_nobody_may_run_are_the_answer(
    script: Script, functions: Path, tmp_path: Path, kind: str
) -> None:
    if kind == "json":
        functions = tmp_path / "functions.json"
        functions.write_text(json.dumps(SCHEMAS))
    done = script.ask([calls(PARIS), DONE], "--tools", functions, "--json", "--quiet")
    assert (done.code, done.err) == (0, "")
    value = json.loads(done.out)
    assert value["finish_reason"] == "tool_calls"
    (call,) = value["tool_calls"]
    assert re.fullmatch("[a-zA-Z0-9]{9}", call.pop("id"))
    assert call == PARIS
    done = script.ask([calls(PARIS), DONE], "--tools", functions)
    assert (done.code, done.out) == (0, "[TOOL_CALLS]" + calls(PARIS)[1] + "\n")
    assert "the model asks to call weather" in done.err


@pytest.mark.parametrize(
    ("answers", "said"),
    [
        ([calls(PARIS)] * 20, "16 rounds of calls are over; the last calls were not run"),
        ([["[TOOL_CALLS]", "what"]] * 2, "the model made unusable calls twice in a row"),
        ([calls({"name": "nowhere"})] * 2, "the model made unusable calls twice in a row"),
    ],
)
def test_calls_without_an_answer_are_a_failure(
    script: Script, functions: Path, answers: list[list[str]], said: str
) -> None:
    done = script.ask(answers, "--tools", functions, "--yes", "--quiet")
    assert (done.code, done.out) == (1, "\n")
    assert done.error_lines == [
        f"mistral-chat: error: {said}: there is no answer; a clearer prompt may help"
    ]


def test_results_that_do_not_fit_are_a_failure(script: Script, functions: Path) -> None:
    many = calls(*[PARIS | {"arguments": {"city": "x" * 30, "days": 9}}] * 8)
    words = ("--tools", functions, "--yes", "--quiet", "--max_seq_len", "900")
    done = script.ask([many, DONE], *words)
    assert (done.code, done.out) == (1, "")
    assert len(done.error_lines) == 1
    assert "the context holds 900" in done.err


def test_call_that_takes_too_long_is_stopped(
    script: Script, functions: Path, tmp_path: Path
) -> None:
    call = {"name": "slow", "arguments": {"marker": str(tmp_path / "marker")}}
    # The file's import has no more time than that, either.
    words = ("--tools", functions, "--yes", "--tool_timeout", "4")
    done = script.ask([calls(call), DONE], *words)
    assert (done.code, done.out) == (0, "It rains.\n")
    assert "gives error: no result after 4 s" in done.err


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("def f(a): 'd'", "f: the parameter a has no type"),
        ("import nowhere_at_all", "cannot be imported at line 1"),
        ("x = 1", "found no public function"),
    ],
)
def test_file_that_cannot_be_used_ends_before_loading(
    script: Script, tmp_path: Path, text: str, said: str
) -> None:
    path = tmp_path / "broken.py"
    path.write_text(text)
    done = script.ask([DONE], "--tools", path)
    assert (done.code, done.out) == (1, "")
    assert len(done.error_lines) == len(done.err.splitlines()) == 1
    assert f"{path}: {said}" in done.err


def wait_for(path: Path) -> int:
    deadline = time.monotonic() + 60
    while not (path.exists() and path.read_text()):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    return int(path.read_text())


def test_interrupt_during_a_call_ends_with_130(
    script: Script, functions: Path, tmp_path: Path
) -> None:
    marker = tmp_path / "marker"
    call = {"name": "slow", "arguments": {"marker": str(marker)}}
    words = script.words([calls(call), DONE], "--prompt", "Hi", "--tools", functions, "--yes")
    with Piped(words[0], words[1:]) as child:
        pid = wait_for(marker)
        os.kill(child.pid, signal.SIGINT)
        code, out, err = child.finish()
    assert (code, out) == (130, b"\n")
    assert b"interrupted" in err
    wait_for_end(pid)


# The model may finish its call while the person stops it.
@pytest.mark.parametrize("yes", [True, False])
def test_call_that_was_interrupted_before_it_ran_never_runs(functions: Path, yes: bool) -> None:
    with PythonFunctions(functions, 20) as offered:
        desk = CallDesk(offered, yes=yes, quiet=True, is_cancelled=lambda: True)
        with pytest.raises(CallsCancelledError):
            desk.run(ToolCall("a" * 9, "weather", {"city": "Paris"}))
        desk = CallDesk(offered, yes=True, quiet=True, is_cancelled=lambda: False)
        result = desk.run(ToolCall("a" * 9, "weather", {"city": "Paris"}))
        assert result == '{"city":"Paris","rain":[true]}'


# At a terminal.


def type_line(child: Any, line: str, *expected: str) -> None:
    """Type at a prompt or a question, and wait for the expected text."""
    child.expect("\x1b\\[\\?2004h")
    child.send(line)
    for pattern in expected:
        child.expect(pattern)


def leave(child: Any) -> None:
    type_line(child, "\x04")
    child.expect(pexpect.EOF)
    child.close()
    assert child.exitstatus == 0


def kept(data_home: Path) -> list[dict[str, Any]]:
    (path,) = (data_home / "mistral-chat" / "sessions").iterdir()
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_calls_are_shown_asked_about_and_answered(
    script: Script, functions: Path, tmp_path: Path
) -> None:
    rome = PARIS | {"arguments": {"city": "Rome"}}
    answers = [
        calls(PARIS, rome), DONE,
        calls(PARIS), calls(PARIS), ["Dry."],
        ["[TOOL_CALLS]", "what"], calls({"name": "nowhere"}),
        ["And now?"],
    ]  # fmt: skip
    saved = tmp_path / "chat.md"
    words = script.words(answers, "--tools", functions)
    with typed_at(tmp_path, *words) as child:
        type_line(child, "first\r", r'calls weather\(city="Paris"\)')
        type_line(child, "what?\r")
        type_line(child, "y\r", r"\| looking up Paris", r'gives \{"city":"Paris","rain":\[true\]\}')
        child.expect(r'calls weather\(city="Rome"\)')
        type_line(child, "n\r", "It rains")
        type_line(child, "second\r", r'calls weather\(city="Paris"\)')
        type_line(child, "always\r", "looking up", "calls", "looking up", r"Dry\.")
        type_line(child, "third\r", "cannot be read", "which is none of", "unusable calls twice")
        type_line(child, "/undo\r", "taken back: third")
        type_line(child, f"/save {saved}\r", "written to")
        type_line(child, "fourth\r", "And now")
        assert "TOOL_CALLS]" not in (child.before or "")
        leave(child)
    results = [entry["content"] for entry in kept(tmp_path) if entry.get("role") == "tool"]
    assert results[0] == '{"city":"Paris","rain":[true]}'
    assert results[1] == "error: the person refused this call"
    assert len(results) == 6
    text = saved.read_text()
    assert text.count("## Result of weather") == 4
    assert "third" not in text


def test_always_is_for_one_function_and_every_other_is_asked_about(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    ran: list[str] = []
    functions: Any = SimpleNamespace(call=lambda call, _: ran.append(call.name) or "done")
    desk = CallDesk(functions, yes=False, quiet=True, is_cancelled=lambda: False)
    said: deque[str] = deque()
    asked: list[str] = []

    def ask(text: str) -> str:
        asked.append(text)
        return said.popleft()

    monkeypatch.setattr(desk, "_ask", ask)

    def call(name: str, *answers: str) -> str:
        said.extend(answers)
        result = desk.run(ToolCall("a" * 9, name, {}))
        assert not said
        return result

    assert call("f", "always") == "done"
    assert call("f") == "done"  # not asked
    for name in ("g", "f2", "F", "ff"):
        assert call(name, "n") == "error: the person refused this call"
    assert call("g", "y") == "done"
    assert call("g", "n") == "error: the person refused this call"  # y is for one call
    assert call("g", "a") == "done"
    assert call("f") == call("g") == "done"
    assert call("h", "n") == "error: the person refused this call"
    assert ran == ["f", "f", "g", "g", "f", "g"]
    assert [text for text in asked if "any f of this chat" not in text] == asked[1:]
    other = CallDesk(functions, yes=False, quiet=True, is_cancelled=lambda: False)
    monkeypatch.setattr(other, "_ask", lambda _: "n")
    assert other.run(ToolCall("a" * 9, "f", {})) == "error: the person refused this call"


@pytest.mark.parametrize("n_ranks", [1, 2])
def test_interrupt_during_a_call_ends_the_turn_and_nothing_else(
    script: Script, functions: Path, tmp_path: Path, n_ranks: int
) -> None:
    marker = tmp_path / "marker"
    slow = {"name": "slow", "arguments": {"marker": str(marker)}}
    answers = [calls(slow, PARIS), ["Next."], calls(PARIS), ["Last."]]
    words = script.words(answers, "--tools", functions, "--nproc_per_node", str(n_ranks))
    with typed_at(tmp_path, *words, torchrun=n_ranks if n_ranks > 1 else 0) as child:
        type_line(child, "first\r", "calls slow")
        type_line(child, "y\r")
        pid = wait_for(marker)
        child.send("typed ahead")
        time.sleep(0.3)
        child.sendintr()
        child.expect("gives error: the person stopped this call")
        child.expect("mistral-chat: interrupted")
        wait_for_end(pid)
        type_line(child, "second\r", r"Next\.")
        type_line(child, "third\r", "calls weather")
        type_line(child, "\x03", "mistral-chat: interrupted")  # at the question: the same
        type_line(child, "/regen\r", r"Last\.")
        leave(child)
    roles = [entry["role"] for entry in kept(tmp_path) if "role" in entry]
    assert roles[:6] == ["user", "assistant", "tool", "tool", "user", "assistant"]


def test_end_of_input_at_the_question_ends_the_turn_alone(
    script: Script, functions: Path, tmp_path: Path
) -> None:
    words = script.words([calls(PARIS), DONE], "--tools", functions)
    with typed_at(tmp_path, *words) as child:
        type_line(child, "first\r", "calls weather")
        type_line(child, "\x04", "mistral-chat: interrupted")
        type_line(child, "second\r", "It rains")
        leave(child)


def test_person_types_the_results_of_schemas(script: Script, tmp_path: Path) -> None:
    path = tmp_path / "functions.json"
    path.write_text(json.dumps(SCHEMAS))
    answers = [calls(PARIS), DONE, calls(PARIS), ["Dry."]]
    with typed_at(tmp_path, *script.words(answers, "--tools", path)) as child:
        type_line(child, "first\r", r'calls weather\(city="Paris"\)')
        child.expect("\x1b\\[\\?2004h")
        child.expect("result of weather>")
        child.send("rain\x1b\rand more rain\r")
        child.expect(r"It rains\.")
        type_line(child, "second\r", "calls weather")
        type_line(child, '"""\rsun\r"""\r', r"Dry\.")
        leave(child)
    results = [entry["content"] for entry in kept(tmp_path) if entry.get("role") == "tool"]
    assert results == ["rain\nand more rain", "sun"]


def test_chat_killed_between_call_and_result_goes_on(
    script: Script, functions: Path, tmp_path: Path
) -> None:
    marker = tmp_path / "marker"
    slow = {"name": "slow", "arguments": {"marker": str(marker)}}
    words = script.words([calls(PARIS, slow)], "--tools", functions, "--yes")
    with typed_at(tmp_path, *words) as child:
        type_line(child, "first\r", "calls slow")
        pid = wait_for(marker)
        child.kill(signal.SIGKILL)
        child.expect(pexpect.EOF)
    wait_for_end(pid)  # what it had started has gone with it
    assert [entry.get("role") for entry in kept(tmp_path)] == [None, "user", "assistant", "tool"]
    words = script.words([DONE], "--tools", functions, "--resume")
    with typed_at(tmp_path, *words) as child:
        child.expect("4 messages")
        child.expect("> first")
        child.expect("calls weather")
        type_line(child, "second\r", "It rains")
        type_line(child, "/undo\r", "taken back: second")
        type_line(child, "/undo\r", "taken back: first")
        type_line(child, "/undo\r", "nothing to take back")
        leave(child)
    assert kept(tmp_path)[4]["content"] == "error: the chat ended before there was a result"
