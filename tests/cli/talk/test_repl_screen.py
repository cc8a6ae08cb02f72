"""The chat in a window: answers, pastes, interrupts and resizing as the user sees them."""

import json
import re
import termios
import time
from pathlib import Path

import psutil
import pytest

from mistral_chat.chat.conversation import Conversation
from mistral_chat.cli.console.markdown import render
from mistral_chat.cli.talk.sessions import Session
from tests.cli.console.test_markdown import SAMPLE, visible
from tests.terminal import Terminal, chat_terminal

INTERRUPTED = "mistral-chat: interrupted"
LONG = "\n".join(f"{n}. the item number {n} of a list that is long" for n in range(1, 61))


def written(folder: Path, *answers: str) -> Path:
    path = folder / "answers.json"
    path.write_text(json.dumps(answers))
    return path


def rendered(text: str, columns: int) -> list[str]:
    return [line.plain.rstrip() for line in render(visible(text), columns)]


def answer_rows(terminal: Terminal, question: str, after: str = "> ") -> list[str]:
    """Return the rows between the last display of a question and what follows its answer."""
    rows = terminal.rows
    start = max(n for n, row in enumerate(rows) if row.startswith(f"> {question}"))
    end = next(n for n in range(start + 1, len(rows)) if rows[n].startswith(after.rstrip()))
    return rows[start + 1 : end]


def test_answers_are_rendered_as_markdown(roomy_folder: Path, tmp_path: Path) -> None:
    size = (100, 30)
    script = written(tmp_path, SAMPLE, LONG)
    words = [roomy_folder, "--instruct"]
    with chat_terminal(tmp_path, *words, size=size, script=script) as terminal:
        terminal.ask_and_wait("first")
        assert answer_rows(terminal, "first") == rendered(SAMPLE, size[0])
        terminal.ask_and_wait("second")
        assert answer_rows(terminal, "second") == rendered(LONG, size[0])
        assert terminal.text.count("the item number 7 ") == 1
        assert terminal.leave() == 0


@pytest.mark.parametrize(
    ("words", "env"),
    [
        (["--plain"], {}),
        ([], {"NO_COLOR": "1"}),
        ([], {"TERM": "dumb"}),
        (["--json_object"], {}),  # JSON is no Markdown
    ],
)
def test_answers_stay_raw_text(
    roomy_folder: Path, tmp_path: Path, words: list[str], env: dict[str, str]
) -> None:
    text = "# Head\n\n- **a**\n\n\n```\nx\n```" if "--json_object" not in words else '{"*a*": [1]}'
    script = written(tmp_path, text)
    with chat_terminal(
        tmp_path, roomy_folder, "--instruct", *words, script=script, env=env
    ) as terminal:
        terminal.ask("hello")
        # Exactly the text, and one line end: \r is the terminal's.
        expected = (text + "\n").replace("\n", "\r\n").encode()
        terminal.wait_for(lambda _: expected in terminal.raw)
        assert terminal.leave() == 0


def test_answers_of_plain_completion_stay_raw_text(roomy_folder: Path, tmp_path: Path) -> None:
    text = "# Head\n\n- **a**"
    with chat_terminal(tmp_path, roomy_folder, script=written(tmp_path, text)) as terminal:
        terminal.ask("hello")
        terminal.wait_for(lambda _: text.replace("\n", "\r\n").encode() in terminal.raw)
        assert terminal.leave() == 0


def flat(text: str) -> str:
    """Return a screen's text, without its line breaks."""
    return " ".join(text.split())


def paste(lines: list[str]) -> str:
    return f"\x1b[200~{chr(13).join(lines)}\x1b[201~"


def test_long_pastes_are_marks_that_open_and_go_whole(roomy_folder: Path, tmp_path: Path) -> None:
    lines = [f"line {n} /undo 中文" for n in range(300)]
    script = written(tmp_path, "one", "two", "three")
    env = editor(tmp_path, f"cp $1 {tmp_path}/given; printf ' and more' >> $1")
    with chat_terminal(tmp_path, roomy_folder, "--instruct", script=script, env=env) as terminal:
        # Several, with text around them, and one key that takes a whole one away.
        terminal.wait_for_prompt()
        terminal.send(f"a{paste(lines)}b{paste(['x'] * 20)}\x7f{paste(['/y'] * 20)}c")
        terminal.wait_for("> a[300 lines]b[20 lines]c")
        terminal.send("\x1b[D\x1b[D\x1b[D_")  # the cursor steps over it
        terminal.wait_for("> a[300 lines]_b[20 lines]c")
        terminal.send("\r")
        terminal.wait_for_answer()
        terminal.wait_for_prompt()
        assert "line 299" not in terminal.text
        # The history has it whole; a long text with a slash first is no command.
        terminal.send(paste(["/usr/bin"] * 12))
        terminal.wait_for("> [12 lines]")
        terminal.send("\x0f")  # Ctrl-O opens it
        terminal.wait_for(lambda text: text.count("/usr/bin") == 12)
        terminal.child.sendintr()
        terminal.wait_for_prompt()
        terminal.send(paste(["/usr/bin"] * 12))
        terminal.wait_for(lambda text: text.endswith("> [12 lines]"))
        terminal.send("\x07")  # the editor has it whole, too
        terminal.wait_for(lambda text: len(re.findall("lines]", text)) >= 3)
        terminal.wait_for(lambda _: (tmp_path / "given").exists())
        terminal.send("\r")
        terminal.wait_for("two")
        assert terminal.leave() == 0
    first = "\n".join(lines)
    second = "\n".join(["/y"] * 20)
    third = "\n".join(["/usr/bin"] * 12)
    assert messages(tmp_path)[0] == f"a{first}_b{second}c"
    assert messages(tmp_path)[2].startswith(third)
    assert (tmp_path / "given").read_text().rstrip("\n") == third
    kept = (tmp_path / "mistral-chat" / "history").read_text()
    assert "line 299" in kept


def test_what_is_typed_during_an_answer_waits_its_turn(roomy_folder: Path, tmp_path: Path) -> None:
    script = written(tmp_path, LONG, "**two**", "**three**", LONG, "**five**")
    words = [roomy_folder, "--instruct"]
    with chat_terminal(tmp_path, *words, size=(80, 40), script=script, gap_s=0.01) as terminal:
        terminal.ask("first")
        terminal.wait_for(" 2. ")
        terminal.child.send(f"{paste(['second', 'of two lines'])}\r/tokens\rthird\rhalf")
        terminal.wait_for("queued: 3 messages")
        terminal.wait_for("> half")
        terminal.wait_for("60. the item")
        terminal.wait_for("three")
        terminal.wait_for("> half")
        terminal.wait_for_prompt()
        assert answer_rows(terminal, "second") == ["  of two lines", "two"]
        assert answer_rows(terminal, "third") == ["three"]
        assert "tokens in this chat" in terminal.text
        assert terminal.text.endswith("> half")
        assert terminal.text.count("half") == 1  # what stood below the answer has gone
        # Ctrl-C during an answer puts it at the prompt.
        terminal.send("\r")
        terminal.wait_for_answer()
        terminal.wait_for(lambda text: text.count(" 2. ") == 2)
        terminal.child.send("fifth\rand more")
        terminal.wait_for("queued: fifth")
        terminal.child.sendintr()
        terminal.wait_for(lambda text: text.endswith("> fifth\n  and more"))
        terminal.send("\r")
        terminal.wait_for_answer()
        terminal.wait_for("five")
        terminal.ask("quit")
        while terminal.read(1):
            pass
        terminal.child.close()
        assert terminal.child.exitstatus == 0
        (path,) = (tmp_path / "mistral-chat" / "sessions").iterdir()
        command = f"{script} 0.01 {roomy_folder} --instruct --resume {path.stem}"
        assert "mistral-chat: to go on with this chat: " in terminal.text
        # A row may end at any of its spaces, which the screen then does not show.
        shown = "".join(terminal.text.split())
        assert f"-m tests.scripts.scripted {command}".replace(" ", "") in shown
    assert messages(tmp_path)[0::2] == [
        "first", "second\nof two lines", "third", "half", "fifth\nand more"
    ]  # fmt: skip


def test_what_is_typed_while_loading_stands_at_the_prompt(
    roomy_folder: Path, tmp_path: Path
) -> None:
    with chat_terminal(tmp_path, roomy_folder, "--instruct", size=(40, 24)) as terminal:
        # The command has the terminal by now, or the test would not see what it is for.
        fd = terminal.child.child_fd
        deadline = time.monotonic() + 60
        while termios.tcgetattr(fd)[3] & termios.ECHO:
            assert time.monotonic() < deadline
            time.sleep(0.01)
        terminal.child.send("one\rtwo\r")
        terminal.wait_for("> one\n  two")
        terminal.wait_for_prompt()
        rows = terminal.rows
        assert [row for row in rows if "one" in row] == ["> one"]
        # The greeting breaks between words.
        assert "lists commands, Ctrl-D leaves." in flat(terminal.text)
        terminal.child.sendintr()
        assert terminal.leave() == 0
        assert "to go on" not in terminal.text  # nothing was kept
    assert not [*(tmp_path / "mistral-chat" / "sessions").iterdir()]


def messages(data_home: Path) -> list[str]:
    """Return the texts of the only kept chat."""
    (path,) = (data_home / "mistral-chat" / "sessions").iterdir()
    entries = [json.loads(line) for line in path.read_text().splitlines()]
    return [entry["content"] for entry in entries if "role" in entry]


def history(data_home: Path) -> list[str]:
    """Return what the model would be given of the only kept chat."""
    (path,) = (data_home / "mistral-chat" / "sessions").iterdir()
    conversation = Conversation()
    assert Session.open(str(path), "m").replay(conversation) is None
    return [str(message.content) for message in conversation.messages]


def test_typed_bytes_that_are_no_utf8_are_seen_and_end_nothing(
    roomy_folder: Path, tmp_path: Path
) -> None:
    script = written(tmp_path, "one")
    with chat_terminal(tmp_path, roomy_folder, "--instruct", script=script) as terminal:
        terminal.wait_for_prompt()
        terminal.child.send(b"caf\xe9 \xc3\xa9")
        terminal.wait_for("> caf\ufffd é")
        terminal.send("\r")
        terminal.wait_for("one")
        assert terminal.leave() == 0
    assert messages(tmp_path) == ["caf\ufffd é", "one"]


@pytest.mark.parametrize("end", ["\x04", "\x1b\r"])
def test_paste_command_takes_lines_as_they_are(
    roomy_folder: Path, tmp_path: Path, end: str
) -> None:
    script = written(tmp_path, "one", "two")
    with chat_terminal(tmp_path, roomy_folder, "--instruct", script=script) as terminal:
        terminal.ask_and_wait("/paste")
        terminal.send('/undo\rsecond line\r"""\r  last')
        terminal.wait_for("  last")
        terminal.send(end)
        terminal.wait_for_answer()
        terminal.wait_for("one")
        terminal.ask_and_wait("/paste")
        terminal.send("dropped\x03")
        terminal.wait_for("nothing was sent")
        terminal.ask("after")
        terminal.wait_for("two")
        assert terminal.leave() == 0
    assert messages(tmp_path) == ['/undo\nsecond line\n"""\n  last', "one", "after", "two"]


def test_interrupt_in_every_state(roomy_folder: Path, tmp_path: Path) -> None:
    script = written(tmp_path, "never seen", LONG, "```python\nx = 1\n" * 40, "the end")
    words = [roomy_folder, "--instruct"]
    with chat_terminal(tmp_path, *words, size=(80, 12), script=script, gap_s=0.02) as terminal:
        # At the prompt: the line is cleared.
        terminal.wait_for_prompt()
        terminal.send("half a line")
        terminal.wait_for("> half a line")
        terminal.child.sendintr()
        terminal.wait_for(lambda text: "\n> half" in text and text.endswith("\n>"))
        # While a long prompt is run: nothing is said, nothing kept.
        terminal.send(f"\x1b[200~{'word ' * 7000}\x1b[201~\r")
        terminal.wait_for_answer()
        terminal.child.sendintr()
        terminal.wait_for("this turn is not kept")
        # While an answer is said: what stands there is the rendering of what was kept.
        for question, mark in (("list", " 3. "), ("code", "x = 1")):
            terminal.ask(question)
            terminal.wait_for(mark)
            terminal.child.sendintr()
            terminal.wait_for_prompt()
            said = messages(tmp_path)[-1]
            shown = answer_rows(terminal, question, after=INTERRUPTED)
            assert shown == rendered(said, 80)
            assert 0 < len(said) < 800
        terminal.ask("last")
        terminal.wait_for("the end")
        assert terminal.leave() == 0


def test_resize_while_streaming_goes_on_at_the_new_width(
    roomy_folder: Path, tmp_path: Path
) -> None:
    paragraph = " ".join(f"word{n}" for n in range(120))
    text = f"# Head\n\n{paragraph}\n\n{LONG}\n\n{paragraph}"
    script = written(tmp_path, text)
    words = [roomy_folder, "--instruct"]
    with chat_terminal(tmp_path, *words, size=(100, 20), script=script, gap_s=0.004) as terminal:
        terminal.ask("go")
        terminal.wait_for("word40")
        terminal.resize(40, 20)  # lines that may be drawn again no longer fit
        terminal.wait_for(" 9. ")
        terminal.resize(120, 30)
        terminal.wait_for("60. the item")
        terminal.resize(60, 30)
        terminal.wait_for("word119")
        terminal.wait_for_prompt()
        rows = terminal.rows
        whole = rendered(text, 60)
        bottom = next(n for n, row in reversed([*enumerate(rows)]) if row == ">")
        last_paragraph = whole[max(n for n, row in enumerate(whole) if not row) + 1 :]
        assert rows[bottom - len(last_paragraph) : bottom] == last_paragraph
        # Each item once: those were finished, and no change of width brings them back but on
        # the clean screen that the first one asks for.
        for n in range(12, 40):
            assert sum(row.startswith(f"{n}. the") for row in rows) == 1, n
        assert terminal.leave() == 0


def test_undo_regen_and_branch_go_on_where_they_should(roomy_folder: Path, tmp_path: Path) -> None:
    script = written(tmp_path, "**one**", "**two**", "**again**", "**left**")
    words = [roomy_folder, "--instruct", "--stats"]
    with chat_terminal(tmp_path, *words, size=(200, 40), script=script) as terminal:
        terminal.ask_and_wait("first")
        terminal.ask_and_wait("second")
        terminal.ask_and_wait("/regen")
        prompt, cached = map(int, re.findall(r"prompt (\d+) \((\d+) cached\)", terminal.text)[-1])
        assert cached == prompt - 1  # all but the token that is always run
        assert answer_rows(terminal, "/regen", after="mistral-chat:") == ["again"]
        terminal.ask_and_wait("/undo")
        terminal.wait_for("taken back: second")
        terminal.ask_and_wait("/branch")
        terminal.wait_for("stays as it is")
        terminal.ask_and_wait("third")
        assert answer_rows(terminal, "third", after="mistral-chat:") == ["left"]
        assert terminal.leave() == 0
    folder = tmp_path / "mistral-chat" / "sessions"
    texts = sorted(path.read_text() for path in folder.iterdir())
    assert [("again" in text, "left" in text) for text in texts].count((True, True)) == 0
    assert len(texts) == 2


def editor(folder: Path, script: str) -> dict[str, str]:
    """Use a shell script as the editor; it gets the file as $1."""
    program = folder / "editor"
    program.write_text(f"#!/bin/sh\n{script}\n")
    program.chmod(0o700)
    return {"EDITOR": str(program), "VISUAL": str(program)}


def test_edit_opens_the_editor_and_asks_in_place_of_the_last_message(
    roomy_folder: Path, tmp_path: Path
) -> None:
    script = written(tmp_path, "**one**", "**two**", "**three**")
    env = editor(tmp_path, f"cp $1 {tmp_path}/given; printf 'from the editor' > $1")
    with chat_terminal(tmp_path, roomy_folder, "--instruct", script=script, env=env) as terminal:
        terminal.ask("/edit")
        terminal.wait_for("nothing was said yet")
        terminal.ask_and_wait("first")
        terminal.ask_and_wait("second")
        terminal.ask("/edit")
        terminal.wait_for("> from the editor")
        assert (tmp_path / "given").read_text().rstrip("\n") == "second"
        terminal.child.sendintr()  # leaves all as it was
        terminal.wait_for("the last message stays as it was")
        assert history(tmp_path) == ["first", "**one**", "second", "**two**"]
        terminal.ask("/edit")
        terminal.wait_for(lambda text: text.count("> from the editor") == 2)
        terminal.send("\r")
        terminal.wait_for("three")
        assert terminal.leave() == 0
    assert history(tmp_path) == ["first", "**one**", "from the editor", "**three**"]


@pytest.mark.parametrize(
    ("program", "said"),
    [
        ("/no/such editor", "the editor '/no/such editor' cannot be run"),
        ("'", "cannot be run (No closing quotation)"),
        ("false", "the editor 'false' ended with code 1"),
    ],
)
def test_editor_that_fails_is_named_and_the_text_stays(
    roomy_folder: Path, tmp_path: Path, program: str, said: str
) -> None:
    env = {"EDITOR": program, "VISUAL": ""}
    with chat_terminal(tmp_path, roomy_folder, "--instruct", size=(120, 24), env=env) as terminal:
        terminal.wait_for_prompt()
        terminal.send("half a line\x07")
        terminal.wait_for(said)
        terminal.wait_for(lambda text: text.endswith("> half a line"))
        terminal.child.sendintr()
        assert terminal.leave() == 0


def test_editor_that_writes_no_utf8_loses_nothing_else(roomy_folder: Path, tmp_path: Path) -> None:
    env = editor(tmp_path, "printf 'caf\\351 noir' > $1")
    with chat_terminal(tmp_path, roomy_folder, "--instruct", env=env) as terminal:
        terminal.wait_for_prompt()
        terminal.send("\x07")
        terminal.wait_for("> caf\ufffd noir")
        terminal.child.sendintr()
        assert terminal.leave() == 0


# As a signal it would go to the launcher of the ranks, too, which ends all of them.
def test_interrupt_in_the_editor_is_a_key_of_the_editors(
    roomy_folder: Path, tmp_path: Path
) -> None:
    key = "$(dd bs=1 count=1 2> /dev/null | od -An -tx1)"
    env = editor(tmp_path, f"stty -icanon; echo ready; printf '%s' \"key{key}\" > $1")
    with chat_terminal(tmp_path, roomy_folder, "--instruct", env=env) as terminal:
        terminal.wait_for_prompt()
        terminal.send("\x07")
        terminal.wait_for("ready")
        terminal.child.sendintr()
        terminal.wait_for("> key 03")
        terminal.child.sendintr()
        assert terminal.leave() == 0


def test_regen_that_is_stopped_before_its_first_word_keeps_the_old_answer(
    roomy_folder: Path, tmp_path: Path
) -> None:
    script = written(tmp_path, "**one**", LONG, "after")
    words = [roomy_folder, "--instruct"]
    with chat_terminal(tmp_path, *words, script=script, gap_s=0.3) as terminal:
        terminal.ask_and_wait("first")
        terminal.ask("/regen")
        terminal.child.sendintr()
        terminal.wait_for("this turn is not kept")
        terminal.ask_and_wait("/tokens")
        assert terminal.leave() == 0
    assert history(tmp_path) == ["first", "**one**"]


def test_message_that_does_not_fit_can_be_made_room_for(roomy_folder: Path, tmp_path: Path) -> None:
    long = "word " * 100
    script = written(tmp_path, "one", "two", "three", "four")
    words = [roomy_folder, "--instruct", "--max_seq_len", "350"]
    with chat_terminal(tmp_path, *words, size=(200, 40), script=script) as terminal:
        for question in ("first", "second"):
            terminal.ask_and_wait(f"{question} {long}")
        terminal.ask(f"third {long}")
        terminal.wait_for("Nothing is dropped by itself: /drop takes out")
        terminal.ask(f"fourth {long}")
        terminal.wait_for(lambda text: "the message was not sent. /drop 2 takes out" in flat(text))
        # The draft stands there; a command is not glued to it, and it comes back after that.
        terminal.ask("/drop 5")
        terminal.wait_for("> /drop 5")
        terminal.wait_for("there are 3 turns; nothing was dropped")
        terminal.wait_for("this message was not sent yet")
        terminal.ask("/drop 2")
        terminal.wait_for("> /drop 2")
        terminal.wait_for("dropped: the oldest 2 turns")
        terminal.wait_for_prompt()
        terminal.send("\r")
        terminal.wait_for_answer()
        terminal.wait_for("\nfour\n")
        # However long it is, the reason is to be seen below it.
        terminal.wait_for_prompt()
        terminal.send(paste([f"too long by itself {n}" for n in range(300)]))
        terminal.wait_for("> [300 lines]")
        terminal.send("\x0f\r")
        terminal.wait_for_answer()
        terminal.wait_for_prompt()
        terminal.wait_for(lambda text: text.endswith("the message was not sent"))
        terminal.send("\x0f")
        terminal.wait_for("too long by itself 299")
        terminal.wait_for(lambda text: text.endswith("the message was not sent"))
        terminal.child.sendintr()
        assert terminal.leave() == 0
    begins = [message.split()[0] for message in history(tmp_path)]
    assert begins == ["third", "three", "fourth", "four"]


def test_words_after_commands_are_completed(roomy_folder: Path, tmp_path: Path) -> None:
    script = written(tmp_path, "one")
    with chat_terminal(tmp_path, roomy_folder, "--instruct", script=script) as terminal:
        terminal.ask_and_wait("a first question")
        terminal.send("/set tempe\t")
        terminal.wait_for("/set temperature")
        terminal.send(" 0.25\r")
        terminal.wait_for("temperature 0.25")
        terminal.wait_for_prompt()
        (path,) = (tmp_path / "mistral-chat" / "sessions").iterdir()
        terminal.send("/load 2\t")
        terminal.wait_for(f"/load {path.stem}")
        terminal.send("\r")
        terminal.wait_for("2 messages")
        assert terminal.leave() == 0


def test_resume_after_kill_9_in_an_answer_asks_again(roomy_folder: Path, tmp_path: Path) -> None:
    script = written(tmp_path, "**one**", LONG)
    words = [roomy_folder, "--instruct"]
    with chat_terminal(tmp_path, *words, size=(120, 24), script=script, gap_s=0.02) as terminal:
        terminal.ask_and_wait("first")
        terminal.ask("second")
        terminal.wait_for(" 2. ")
        terminal.child.kill(9)
    script = written(tmp_path, "**two**")
    with chat_terminal(tmp_path, *words, "--resume", size=(120, 24), script=script) as terminal:
        terminal.wait_for("its last message had no answer and stands at the prompt")
        terminal.wait_for("> second")
        terminal.ask_and_wait("")  # it stands there: Enter sends it
        assert answer_rows(terminal, "second") == ["two"]
        assert terminal.leave() == 0
    # The file is only ever added to: between the two a line takes the unanswered one back.
    assert messages(tmp_path) == ["first", "**one**", "second", "second", "**two**"]


def test_100_turns_grow_nothing_but_the_context(roomy_folder: Path, tmp_path: Path) -> None:
    n_turns = 100
    answers = [f"- **{n}**\n- `b`" for n in range(n_turns)]
    script = written(tmp_path, *answers)
    cpu_s, sizes = [], []
    with chat_terminal(tmp_path, roomy_folder, "--instruct", script=script) as terminal:
        terminal.wait_for_prompt()
        process = psutil.Process(terminal.child.pid)
        for n in range(n_turns):
            terminal.ask_and_wait(f"turn {n}")
            used = process.cpu_times()
            cpu_s.append(used.user + used.system)
            sizes.append(process.memory_info().rss)
            # The emulator's own rows are no part of what is measured.
            terminal.screen.history.top.clear()
        assert terminal.leave() == 0
    assert len(messages(tmp_path)) == 2 * n_turns
    grown = sizes[-1] - sizes[40]
    assert grown < 3 * 2**20, f"{grown / 2**20:.1f} MiB in 60 turns"
    # Of the processor, since other processes' work may begin half-way.
    early, late = ((cpu_s[end] - cpu_s[end - 30]) / 30 for end in (40, -1))
    # 3,000 tokens of context cost the tiny model a few ms; the rest would be the chat's own.
    assert late < 2 * early + 0.05, f"{early * 1e3:.0f} ms a turn, then {late * 1e3:.0f} ms"
