"""The chat at a pseudo-terminal."""

import sys
from contextlib import AbstractContextManager
from pathlib import Path

import pexpect
import pytest

from tests.conftest import ROOMY_SEQ_LEN, ROOT, command_env
from tests.terminal import typed_at

INTERRUPTED = "mistral-chat: interrupted"


def _terminal(
    data_home: Path, *words: str | Path, torchrun: int = 0
) -> AbstractContextManager["pexpect.spawn[str]"]:
    """Run the command at a terminal of 100 columns; it must have ended at the end."""
    return typed_at(data_home, "mistral_chat", *words, torchrun=torchrun)


def _await_prompt(child: "pexpect.spawn[str]") -> None:
    """Wait until the prompt accepts input: right before, it asks the terminal to mark pastes."""
    child.expect("\x1b\\[\\?2004h")


def _await_answer(child: "pexpect.spawn[str]") -> None:
    """Wait until the prompt has released the terminal and part of the answer is shown."""
    child.expect("\x1b\\[\\?2004l")
    child.expect(r"\w{3}")


def _leave(child: "pexpect.spawn[str]") -> int | None:
    child.sendeof()
    child.expect(pexpect.EOF)
    child.close()
    return child.exitstatus


@pytest.mark.parametrize("n_ranks", [1, 2])
def test_chat_of_three_turns_survives_an_interrupt(
    roomy_folder: Path, tmp_path: Path, n_ranks: int
) -> None:
    words = [roomy_folder, "--instruct", "--stats", "--seed", "5"]
    with _terminal(tmp_path, *words, torchrun=n_ranks if n_ranks > 1 else 0) as child:
        child.expect("parameters on")
        _await_prompt(child)
        child.send("first\r")
        _await_answer(child)
        child.sendintr()
        child.expect(INTERRUPTED)
        child.expect(r"(\d+) tokens")
        n_said = int(child.match.group(1))  # type: ignore[union-attr]
        assert 0 < n_said < ROOMY_SEQ_LEN // 3  # and so there is room for two more
        _await_prompt(child)
        child.send("second\r")
        _await_answer(child)
        child.sendintr()
        # All of the first turn is still in the cache but the last token, which was never run.
        child.expect(r"prompt (\d+) \((\d+) cached\)")
        assert child.match is not None
        prompt, cached = (int(n) for n in child.match.groups())  # type: ignore[union-attr]
        assert cached >= n_said
        assert prompt > cached
        _await_prompt(child)
        child.send("third\r")
        _await_answer(child)
        child.sendintr()
        child.expect(r"prompt \d+ \((\d+) cached\)")
        assert int(child.match.group(1)) > cached  # type: ignore[union-attr]
        _await_prompt(child)
        assert _leave(child) == 0


def test_terminal_is_left_as_it_was(roomy_folder: Path, tmp_path: Path) -> None:
    script = (
        'before=$(stty -a); "$0" -m mistral_chat "$@"; echo "code $?";'
        ' [ "$before" = "$(stty -a)" ] && echo "as before" || echo "changed"'
    )
    child = pexpect.spawn(
        "bash",
        ["-c", script, sys.executable, str(roomy_folder), "--instruct"],
        encoding="utf-8",
        codec_errors="replace",
        timeout=300,
        cwd=str(ROOT),
        env=command_env(TERM="xterm", PROMPT_TOOLKIT_NO_CPR="1", XDG_DATA_HOME=str(tmp_path)),  # type: ignore[arg-type]
    )
    _await_prompt(child)
    child.send("hello\r")
    _await_answer(child)
    child.sendintr()
    child.expect(INTERRUPTED)
    _await_prompt(child)
    child.sendeof()
    child.expect("code 0")
    child.expect("as before")
    child.close(force=True)


def test_prompt_keys_and_commands(tiny_folder: Path, tmp_path: Path) -> None:
    words = [tiny_folder, "--instruct", "--max_tokens", "4", "--stats"]
    with _terminal(tmp_path, *words) as child:
        _await_prompt(child)
        child.send("half a line")
        child.sendintr()  # clears the line
        _await_prompt(child)
        child.send("/hlp\r")
        child.expect(r"unknown command /hlp: did you mean /help\?")
        _await_prompt(child)
        child.send("/help\r")
        child.expect("/clear +begin a new chat")
        _await_prompt(child)
        child.send("\x1b[200~one\ntwo\nthree\x1b[201~\r")  # a paste of three lines
        child.expect(r"prompt (\d+) \(0 cached\)")
        pasted = int(child.match.group(1))  # type: ignore[union-attr]
        # <s> [INST] one \n two \n three [/INST]: the whole paste is one message
        assert pasted >= 8
        _await_prompt(child)
        child.send("/clear\r")
        child.expect("a new chat; /load")
        _await_prompt(child)
        child.send("one\r")
        child.expect(r"prompt (\d+) \((\d+) cached\)")
        assert int(child.match.group(1)) < pasted  # type: ignore[union-attr]
        _await_prompt(child)
        child.send("word " * 600 + "\r")
        child.expect("the context holds 512")
        child.expect("the message was not sent")  # and stands at the prompt again
        child.sendintr()  # clears it
        _await_prompt(child)
        child.send("/exit\r")
        child.expect(pexpect.EOF)
        child.close()
        assert child.exitstatus == 0
    history = tmp_path / "mistral-chat" / "history"
    assert "half a line" not in history.read_text()
    assert history.stat().st_mode & 0o777 == 0o600


def test_stdout_of_a_chat_holds_answers_alone(tiny_folder: Path, tmp_path: Path) -> None:
    answers = tmp_path / "answers"
    script = f'"$0" -m mistral_chat "$@" > {answers}'
    child = pexpect.spawn(
        "bash",
        ["-c", script, sys.executable, str(tiny_folder), "--temperature", "0", "--max_tokens", "3"],
        encoding="utf-8",
        codec_errors="replace",
        timeout=300,
        cwd=str(ROOT),
        env=command_env(TERM="xterm", PROMPT_TOOLKIT_NO_CPR="1", XDG_DATA_HOME=str(tmp_path)),  # type: ignore[arg-type]
    )
    for _ in range(2):
        _await_prompt(child)
        child.send("Hello\r")
        child.expect("stopped at")
    _await_prompt(child)
    child.sendeof()
    child.expect(pexpect.EOF)
    first, second, nothing = answers.read_text().split("\n")
    assert first == second != ""
    assert nothing == ""


def test_commands_change_the_chat(tiny_folder: Path, tmp_path: Path) -> None:
    note = tmp_path / "note.txt"
    note.write_text("from the file")
    saved = tmp_path / "chat.md"
    with _terminal(
        tmp_path, tiny_folder, "--instruct", "--max_tokens", "3", "--seed", "3"
    ) as child:

        def type_line(line: str, *expected: str) -> None:
            _await_prompt(child)
            child.send(line + "\r")
            for pattern in expected:
                child.expect(pattern)

        type_line("/undo", "nothing to take back")
        type_line("/system Be brief.", "system prompt: Be brief.")
        type_line("/set temperature 0", "temperature 0.0")
        type_line("/set temperature warm", "error: /set temperature")
        type_line("first", "stopped at")
        type_line(f"/file {note}", r"comes\s+before\s+the\s+next\s+message")
        type_line("second", "stopped at")
        type_line("/tokens", r"\d+ tokens in this chat, .* \d+ of 512 left")
        type_line("/stats", r"3 tokens, .* tokens/s")
        type_line(f"/save {saved}", "written to")
        type_line("/regen", "stopped at")
        type_line("/undo", "taken back: from the file second")
        type_line("/undo", "taken back: first")
        type_line("/copy", "there is no answer to copy")
        type_line("/show", "system prompt: Be brief.", r"kept in\s+\S*jsonl")
        type_line("/list", r"\d{8}-\d{6}-[0-9a-f]{4}")
        type_line("/file", "error: /file takes one path")
        type_line('"""', "")
        child.send('two\rlines"""\r')
        child.expect("stopped at")
        _await_prompt(child)
        assert _leave(child) == 0
    text = saved.read_text()
    assert "from the file\n\nsecond" in text
    assert text.count("## Model") == 2
    sessions = list((tmp_path / "mistral-chat" / "sessions").iterdir())
    assert len(sessions) == 1
    assert "two\\nlines" in sessions[0].read_text()


def test_chat_goes_on_after_kill_9(tiny_folder: Path, tmp_path: Path) -> None:
    words = [tiny_folder, "--instruct", "--max_tokens", "3", "--temperature", "0"]
    with _terminal(tmp_path, *words) as child:
        _await_prompt(child)
        child.send("a first question\r")
        child.expect("stopped at")
        _await_prompt(child)
        child.kill(9)
        child.expect(pexpect.EOF)
    with _terminal(tmp_path, *words, "--resume") as child:
        child.expect("2 messages")
        child.expect("> a first question")
        _await_prompt(child)
        child.send("/tokens\r")
        child.expect(r"\d+ tokens in this chat")
        _await_prompt(child)
        assert _leave(child) == 0
    files = list((tmp_path / "mistral-chat" / "sessions").iterdir())
    assert len(files) == 1
    with _terminal(tmp_path, *words, "--no_save") as child:
        _await_prompt(child)
        child.send("of this no trace\r")
        child.expect("stopped at")
        _await_prompt(child)
        child.send("/show\r")
        child.expect("not kept")
        _await_prompt(child)
        assert _leave(child) == 0
    assert list((tmp_path / "mistral-chat" / "sessions").iterdir()) == files
    assert "no trace" not in files[0].read_text()


def test_resume_of_a_chat_that_is_not_there_ends_before_loading(
    tiny_folder: Path, tmp_path: Path
) -> None:
    with _terminal(tmp_path, tiny_folder, "--instruct", "--resume") as child:
        child.expect("error: no chat is kept")
        child.expect(pexpect.EOF)
        child.close()
        assert child.exitstatus == 1
