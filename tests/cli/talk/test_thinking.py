"""Thinking, `--reasoning` and SYSTEM_PROMPT.txt with the real command: streams, codes, windows.

The model is a real one whose tokens are chosen in advance (tests/scripts/scripted.py).
"""

import json
import random
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import replace
from datetime import date, timedelta
from pathlib import Path

import pytest
from safetensors.torch import save_file

from mistral_chat.chat.tokenizer import Tokenizer
from mistral_chat.cli.console.printing import wrap
from mistral_chat.cli.main import main
from mistral_chat.cli.system_prompt import default_system
from mistral_chat.cli.talk import answer_screen
from mistral_chat.cli.talk.sessions import Session
from mistral_chat.errors import PromptError
from tests.chat.test_chat import cut
from tests.conftest import (
    ROOMY_SEQ_LEN,
    TINY,
    Finished,
    command_env,
    open_folder,
    random_weights,
    write_params,
)
from tests.scripts.tokenizers import N_SMALL, small_tekken
from tests.terminal import Terminal, chat_terminal
from tests.warm import warm

THOUGHT = "First this.\nThen that, **not** Markdown."
ANSWER = ["[THINK]", THOUGHT, "[/THINK]", "It is **42**."]
CUT = ["[THINK]", "one two three four five six seven eight nine ten"]
Make = Callable[[str], Path]


@pytest.fixture(scope="session")
def folder_of_version(tmp_path_factory: pytest.TempPathFactory) -> Make:
    """Make a tiny model with the tokenizer of a template version; read only."""
    made: dict[str, Path] = {}

    def make(version: str) -> Path:
        if version not in made:
            args = replace(TINY, vocab_size=N_SMALL + 100, max_seq_len=ROOMY_SEQ_LEN)
            folder = made[version] = tmp_path_factory.mktemp("models") / f"tiny-{version}"
            folder.mkdir()
            write_params(folder, args)
            save_file(random_weights(args), folder / "consolidated.safetensors")
            (folder / "tekken.json").write_text(small_tekken(version), encoding="utf-8")
        return made[version]

    return make


@pytest.fixture
def folder(folder_of_version: Make) -> Path:
    return folder_of_version("v15")


def written(path: Path, *answers: list[str]) -> Path:
    (path / "answers.json").write_text(json.dumps(answers))
    return path / "answers.json"


def ask(folder: Path, tmp_path: Path, *words: object, answer: list[str] = ANSWER) -> Finished:
    """Ask one question; the model is made to give this answer."""
    script = ["tests.scripts.scripted", str(written(tmp_path, answer, ANSWER)), "0", str(folder)]
    typed = [*script[1:], "--instruct", "--prompt", "Hi", "--device=cpu", *map(str, words)]
    code, out, err = warm().run(script[0], typed, command_env(), b"", 300)
    return Finished(code, out.decode(), err.decode())


@pytest.mark.parametrize("version", ["v11", "v13", "v15"])
def test_stdout_has_the_answer_alone(folder_of_version: Make, tmp_path: Path, version: str) -> None:
    done = ask(folder_of_version(version), tmp_path)
    assert (done.code, done.out, done.err) == (0, "It is **42**.\n", "")


def test_show_thinking_writes_it_to_stderr(folder: Path, tmp_path: Path) -> None:
    done = ask(folder, tmp_path, "--show_thinking")
    assert (done.code, done.out, done.err) == (0, "It is **42**.\n", THOUGHT + "\n")


def test_json_has_thinking_where_there_is_some(folder: Path, tmp_path: Path) -> None:
    value = json.loads(ask(folder, tmp_path, "--json").out)
    assert (value["text"], value["thinking"]) == ("It is **42**.", THOUGHT)
    assert list(value)[:2] == ["text", "thinking"]
    plain = json.loads(ask(folder, tmp_path, "--json", answer=["Hello"]).out)
    assert plain["text"] == "Hello"
    assert "thinking" not in plain


def test_answer_cut_short_in_its_thinking_says_so(folder: Path, tmp_path: Path) -> None:
    done = ask(folder, tmp_path, "--max_tokens", 5, answer=CUT)
    assert (done.code, done.out) == (0, "\n")
    assert done.err == "mistral-chat: stopped at --max_tokens 5, within the thinking\n"
    value = json.loads(ask(folder, tmp_path, "--max_tokens", 5, "--json", answer=CUT).out)
    assert (value["text"], value["finish_reason"]) == ("", "length")
    assert THOUGHT != value["thinking"] != ""


def test_schema_is_for_the_answer_after_the_thinking(folder: Path, tmp_path: Path) -> None:
    answer = ["[THINK]", "what a schema", "[/THINK]", '{"a": 1}']
    value = json.loads(ask(folder, tmp_path, "--json_object", "--json", answer=answer).out)
    assert (value["thinking"], json.loads(value["text"])) == ("what a schema", {"a": 1})
    done = ask(folder, tmp_path, "--json_object", "--max_tokens", 4, answer=CUT)
    assert done.code == 1
    assert "the answer is no whole JSON text" in done.err


def test_functions_and_thinking(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "f.py").write_text("def now() -> str:\n    '''The time.'''\n    return 'noon'\n")
    call = ["[THINK]", "ask the clock", "[/THINK]", "[TOOL_CALLS]", "now", "[ARGS]", "{}"]
    words = ["--tools", tmp_path / "f.py", "--yes"]
    done = ask(folder, tmp_path, *words, "--json", "--show_thinking", answer=call)
    value = json.loads(done.out)
    assert (value["text"], value["thinking"]) == ("It is **42**.", f"ask the clock\n\n{THOUGHT}")
    lines = done.err.splitlines()
    assert lines == ["ask the clock", "calls now()", "  gives noon", *THOUGHT.split("\n")]


@pytest.mark.usefixtures("nothing_loaded")
@pytest.mark.parametrize("version", ["v3", "v13"])
def test_reasoning_is_refused_before_anything_is_loaded(
    folder_of_version: Make, tiny_folder: Path, version: str, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tiny_folder if version == "v3" else folder_of_version(version)
    words = [str(folder), "--instruct", "--prompt", "Hi", "--reasoning", "high"]
    assert main([*words, "--nproc_per_node", "2"]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("mistral-chat: error: --reasoning high: ")
    assert "has no such setting" in line


def test_reasoning_reaches_the_prompt(folder: Path, tmp_path: Path) -> None:
    counts = {}
    for effort in ("none", "high"):
        done = ask(folder, tmp_path, "--reasoning", effort, "--json")
        counts[effort] = json.loads(done.out)["usage"]["prompt_tokens"]
    made = Tokenizer.from_folder(open_folder(folder))
    lengths = {e: len(made.raw.encode(e, bos=False, eos=False)) for e in counts}
    assert counts["none"] - counts["high"] == lengths["none"] - lengths["high"]


@pytest.mark.parametrize("columns", [20, 33, 80])
@pytest.mark.parametrize("at_terminal", [True, False])
def test_any_pieces_of_thinking_give_the_rows_of_the_whole(
    monkeypatch: pytest.MonkeyPatch, at_terminal: bool, columns: int
) -> None:
    monkeypatch.setattr(answer_screen, "is_terminal", lambda stream: at_terminal)
    monkeypatch.setattr(answer_screen, "columns_of", lambda stream: columns)
    text = (
        "A line of words, and one_word_that_is_longer_than_the_window of them.\n\n"
        "  indented as code that goes on for some time\n\t日本語とひらがな 漢字 mixed in\nend"
    )
    rng = random.Random(columns)
    wanted = text.split("\n")
    if at_terminal:
        wanted = [row for line in wanted for row in wrap(line, columns)]
    for _ in range(50):
        shown: list[str] = []
        rows = answer_screen.DimRows(shown.extend)
        for piece in cut(text, rng):
            rows.add(piece)
        rows.end()
        assert shown == wanted


# The system prompt beside the weights.


@pytest.fixture
def prompted(folder: Path, tmp_path: Path) -> Path:
    """A model with a system prompt."""
    copy = tmp_path / "Mistral-Test-1"
    copy.mkdir()
    for path in folder.iterdir():
        (copy / path.name).symlink_to(path)
    text = 'You are {name}. {today}, not {yesterday}. {"json": {}} {other} {name}\n'
    (copy / "SYSTEM_PROMPT.txt").write_text(text)
    return copy


def test_default_system_prompt_is_filled_in(prompted: Path) -> None:
    wanted = (
        'You are Mistral-Test-1. 2026-03-01, not 2026-02-28. {"json": {}} {other} Mistral-Test-1'
    )
    assert default_system(prompted, date(2026, 3, 1)) == wanted
    home = prompted.parent / "models--mistralai--Mistral-Medium-3.5-128B" / "snapshots"
    home.mkdir(parents=True)
    (home / "abc").symlink_to(prompted)
    assert default_system(home / "abc").startswith("You are Mistral-Medium-3.5-128B. ")
    with pytest.raises(PromptError, match=r"--system default: dummy weights has no SYSTEM"):
        default_system(None)


@pytest.mark.usefixtures("nothing_loaded")
def test_default_system_prompt_that_is_missing_is_said_before_ranks(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [str(folder), "--instruct", "--prompt", "Hi", "--system", "default"]
    assert main([*words, "--nproc_per_node", "2"]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"mistral-chat: error: --system default: {folder} has no SYSTEM_PROMPT")


def test_default_system_prompt_is_offered_and_never_silent(prompted: Path, tmp_path: Path) -> None:
    offer = (
        "mistral-chat: the model comes with a system prompt, SYSTEM_PROMPT.txt, which is not "
        "used: --system default does\n"
    )
    counts = {}
    for words, err in (
        ((), offer),
        (("--quiet",), ""),
        (("--system", "Be brief."), ""),
        (("--system", "default"), ""),
    ):
        done = ask(prompted, tmp_path, "--json", *words)
        assert (done.code, done.err) == (0, err)
        counts[words] = json.loads(done.out)["usage"]["prompt_tokens"]
    assert counts[()] == counts["--quiet",] < counts["--system", "Be brief."]
    assert counts["--system", "Be brief."] < counts["--system", "default"]


def test_chat_uses_the_default_system_prompt_when_asked(prompted: Path, tmp_path: Path) -> None:
    today = date.today()
    script = written(tmp_path, ["Hello"])
    with chat_terminal(
        tmp_path, prompted, "--instruct", "--device=cpu", size=(200, 24), script=script
    ) as terminal:
        terminal.wait_for("SYSTEM_PROMPT.txt, which is not used: /system default does")
        terminal.ask_and_wait("/system default")
        terminal.wait_for("You are Mistral-Test-1. ")
        assert any(
            f"{day}, not {day - timedelta(days=1)}" in terminal.text
            for day in (today, date.today())
        )
        assert terminal.leave() == 0


# A chat in a window.


def chat(
    folder: Path,
    tmp_path: Path,
    *words: str,
    size: tuple[int, int] = (80, 24),
    answers: tuple[list[str], ...] = (ANSWER,),
    gap_s: float = 0.0,
) -> AbstractContextManager[Terminal]:
    """Open a chat whose model gives these answers."""
    script = written(tmp_path, *answers)
    words = ("--instruct", "--device=cpu", *words)
    return chat_terminal(tmp_path, folder, *words, size=size, script=script, gap_s=gap_s)


def after(terminal: Terminal, question: str) -> list[str]:
    """The rows between the last display of a question and the next prompt."""
    rows = terminal.rows
    start = max(n for n, row in enumerate(rows) if row.startswith(f"> {question}"))
    end = next(n for n in range(start + 1, len(rows)) if rows[n].startswith(">"))
    return rows[start + 1 : end]


def test_thinking_is_folded_to_a_line_that_a_key_opens(folder: Path, tmp_path: Path) -> None:
    with chat(folder, tmp_path) as terminal:
        terminal.ask_and_wait("why")
        first, *rest = after(terminal, "why")
        assert first.startswith("thought for ")
        assert first.endswith(" tokens; Ctrl-T opens it")
        assert rest == ["It is 42."]
        assert "Then that" not in terminal.text
        terminal.send("\x14")
        terminal.wait_for("Then that, **not** Markdown.")
        assert terminal.leave() == 0


@pytest.mark.parametrize("words", [["--plain"], []])
def test_show_thinking_prints_it_whole(folder: Path, tmp_path: Path, words: list[str]) -> None:
    with chat(folder, tmp_path, "--show_thinking", *words) as terminal:
        terminal.ask_and_wait("why")
        *thought, line, said = after(terminal, "why")
        assert thought == THOUGHT.split("\n")
        assert line.startswith("thought for ")
        assert line.endswith(" tokens")
        assert said == ("It is **42**." if words else "It is 42.")
        assert terminal.leave() == 0


def test_raw_text_has_the_thinking_folded_too(folder: Path, tmp_path: Path) -> None:
    with chat(folder, tmp_path, "--plain", "--stats", size=(400, 24)) as terminal:
        terminal.ask_and_wait("why")
        begins, folded, said, stats = after(terminal, "why")
        assert begins == "thinking ...; Ctrl-T opens it"
        assert folded.startswith("thought for ")
        assert said == "It is **42**."
        assert " of them thinking, " in stats
        assert terminal.leave() == 0


def test_thinking_counts_while_it_lasts_and_opens_in_it(folder: Path, tmp_path: Path) -> None:
    long = " ".join(f"thought-{n}" for n in range(60))
    answer = ["[THINK]", long, "[/THINK]", "It is **42**."]
    with chat(folder, tmp_path, answers=(answer,), gap_s=0.02) as terminal:
        terminal.ask("why")
        terminal.wait_for("thinking: ")
        assert "thought-3 " not in terminal.text
        terminal.send("\x14")
        terminal.wait_for("thought-3 ")
        terminal.wait_for_prompt()
        rows = after(terminal, "why")
        assert " ".join(rows[:-2]).split() == long.split()
        assert rows[-2].startswith("thought for ")
        assert rows[-1] == "It is 42."
        assert "thinking: " not in terminal.text
        assert terminal.leave() == 0


def test_interrupt_in_the_thinking_keeps_it(folder: Path, tmp_path: Path) -> None:
    long = "word " * 200
    with chat(folder, tmp_path, answers=(["[THINK]", long], ANSWER), gap_s=0.05) as terminal:
        terminal.ask("why")
        terminal.wait_for("thinking: ")
        terminal.child.sendintr()
        terminal.wait_for("the answer ended within its thinking; it is kept")
        terminal.wait_for_prompt()
        terminal.ask_and_wait("/think high")
        terminal.wait_for("reasoning: high")
        terminal.ask_and_wait("go on")
        assert terminal.leave() == 0
    (path,) = (tmp_path / "mistral-chat" / "sessions").glob("*.jsonl")
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    cut, whole = [line for line in lines if line.get("role") == "assistant"]
    assert cut["thinking"].startswith("word")
    assert (cut["content"], cut["finish_reason"], cut["is_cut"]) == ("", "cancelled", True)
    assert (whole["content"], whole["thinking"]) == ("It is **42**.", THOUGHT)
    assert {"type": "reasoning", "content": "high"} in lines
    # Resumed, it gives the model the same tokens.
    from mistral_chat.chat.conversation import Conversation

    made = Tokenizer.from_folder(open_folder(folder))
    conversation = Conversation()
    Session.open(str(path), folder.name, made.fingerprint).replay(conversation, save=False)
    assert conversation.reasoning == "high"
    assert conversation.last_ids == tuple(whole["ids"])


def test_think_is_refused_where_the_template_does_not_know_it(
    folder_of_version: Make, tmp_path: Path
) -> None:
    with chat(folder_of_version("v13"), tmp_path, size=(160, 24)) as terminal:
        terminal.ask_and_wait("/think high")
        terminal.wait_for("error: /think high: the v13 Tekken template has no such setting")
        terminal.ask_and_wait("/think")
        terminal.wait_for("error: /think: the v13 Tekken template has no such setting")
        assert terminal.leave() == 0
