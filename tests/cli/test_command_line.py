"""argv gets one meaning, for every command: what is a flag, what is its value, what is neither."""

import subprocess
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal

import pytest

from mistral_chat.cli import requests
from mistral_chat.cli.command_line import Flag, flags_of, read
from mistral_chat.cli.main import COMMANDS, request_of
from mistral_chat.config import EngineConfig, SamplingParams, flag
from mistral_chat.errors import MistralChatError, UsageError


@dataclass(frozen=True, kw_only=True)
class Shared:
    """What other commands take, too.

    Args:
        quiet: says nothing.
    """

    dtype: str | None = flag(None)
    quiet: bool = flag(False)


@dataclass(frozen=True, kw_only=True)
class Asked(Shared):
    """What a command of these tests takes.

    Args:
        size: of it,
            in two lines.
        kind: of it.
    """

    words: tuple[str, ...]
    size: int | None = flag(None, reads=int, expected="a number")
    kind: Literal["a", "b"] = flag("a")
    json: bool = flag(False)
    on: str | None = flag(None, or_else=(r"\d", "none"))
    many: tuple[int, ...] = flag(())


def ask(words: Sequence[str] = (), **given: Any) -> Asked:
    """Usage: ask [WORD]

    {flags}

    The end.
    """
    return Asked(words=tuple(words), **given)


def share(words: Sequence[str] = (), **given: Any) -> Shared:  # noqa: ARG001
    """Usage: share"""
    return Shared(**given)


def asked(*words: str) -> Any:
    return read({"ask": ask, "share": share}, words, "ask")


@pytest.mark.parametrize(
    ("words", "values"),
    [
        ([], {}),
        (["a", "--size", "-3", "b"], {"size": -3, "words": ("a", "b")}),
        (["--json", "--size=2", "--quiet"], {"json": True, "size": 2, "quiet": True}),
        (["--dtype", "--x", "a"], {"dtype": "--x", "words": ("a",)}),
        (["--size", "1", "--size", "2"], {"size": 2}),
        (["a", "--", "--size", "--help"], {"words": ("a", "--size", "--help")}),
        (["-", "", "--", "--", "-"], {"words": ("-", "", "--", "-")}),
        ([""], {"words": ("",)}),
        (["ask"], {"words": ("ask",)}),
        (["--many", "3", "--many=-1", "--many", "3"], {"many": (3, -1, 3)}),
        (["--dtype", "None"], {"dtype": "None"}),
        (["--dtype", "['a', 1]"], {"dtype": "['a', 1]"}),
        (["--dtype="], {"dtype": ""}),
        (["--dtype", "a\n--json"], {"dtype": "a\n--json"}),
        (["--dtype", "--", "--json"], {"dtype": "--", "json": True}),
    ],
)
def test_words_are_given_one_meaning(words: list[str], values: dict[str, Any]) -> None:
    assert asked(*words) == Asked(**{"words": ()} | values)


@pytest.mark.parametrize("words", [["--help"], ["-h"], ["a", "--size", "x", "--help"]])
def test_help_comes_before_values_that_cannot_be(words: list[str]) -> None:
    assert asked(*words).startswith("usage: ask [WORD]\n\n")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--size", "x"], "--size is 'x': expected a number"),
        (["--kind", "c"], "argument --kind: 'c' is none of a, b; see mistral-chat --help"),
        (["--many", "1", "--many", "x"], "argument --many: 'x' is no whole number"),
        (["--json=1"], "--json is a switch and takes no value; found '1'"),
        (["--size"], "--size needs a value; found nothing after it"),
        (["--size", "--json"], "--size needs a value; found the flag --json"),
        (["--siez", "1"], "unknown flag --siez: did you mean --size?"),
        (["--xyzzy", "x"], "unknown flag --xyzzy: see mistral-chat --help"),
        (["-j"], "unknown flag -j"),
        (["--help", "--siez"], "unknown flag --siez"),
        (["share", "--json"], "unknown flag --json"),
        (["share", "--version"], "unknown flag --version"),
        (["--size", "x", "--size", "1"], "--size is 'x': expected a number"),
        (["--words", "x"], "unknown flag --words"),
    ],
)
def test_words_that_cannot_be_are_named(words: list[str], said: str) -> None:
    with pytest.raises(UsageError) as caught:
        asked(*words)
    assert str(caught.value).startswith(said)


@pytest.mark.parametrize(
    ("words", "on", "others"),
    [
        (["--on"], "none", ()),
        (["--on", "7", "a"], "7", ("a",)),
        (["--on", "a"], "none", ("a",)),
        (["--on=a"], "a", ()),
    ],
)
def test_value_may_be_left_out(words: list[str], on: str, others: tuple[str, ...]) -> None:
    assert asked(*words) == Asked(words=others, on=on)


@pytest.mark.parametrize("text", ["1", "²", "-1", "2.0", "", "x"])
def test_whole_numbers_have_a_least(text: str) -> None:
    with pytest.raises(UsageError) as caught:
        request_of(["bench", "MODEL", f"--shard_of={text}"])
    assert str(caught.value) == f"--shard_of is {text!r}: expected a whole number of at least 2"
    assert request_of(["bench", "MODEL", "--shard_of=2"]).shard_of == 2


def test_help_is_what_docstrings_say() -> None:
    assert asked("--help") == (
        "usage: ask [WORD]\n\n"
        "  --quiet                 says nothing\n"
        "  --size N                of it, in two lines\n"
        "  --kind NAME             a | b (a): of it\n\n"
        "about:\n"
        "  --help, -h              this text\n"
        "  --version               print the version\n"
        "  and of the main job: --dtype --json --on --many\n\n"
        "The end.\n"
    )


def _every_flag() -> list[tuple[str, Flag]]:
    return [
        (name, flag)
        for name, command in COMMANDS.items()
        for flag in flags_of(command.__annotations__["return"]).values()
    ]


def test_no_flag_is_declared_twice() -> None:
    classes = [kind for kind in vars(requests).values() if isinstance(kind, type)]
    own = {
        kind: [f.name for f in fields(kind) if f.name in kind.__annotations__ and f.metadata]
        for kind in classes
        if hasattr(kind, "__dataclass_fields__") and kind is not Flag
    }
    assert {SamplingParams, EngineConfig} < own.keys()
    declared = Counter(name for names in own.values() for name in names)
    assert set(declared) == {flag.name for _, flag in _every_flag()}
    assert [name for name, n in declared.items() if n > 1] == []


@pytest.mark.parametrize("command", COMMANDS)
def test_every_flag_has_a_line_of_help(command: str) -> None:
    words = [] if command == "chat" else [command]
    text = request_of([*words, "--help"])
    for name in flags_of(COMMANDS[command].__annotations__["return"]):
        assert text.count(f" --{name}") >= 1
    assert "{" not in text.replace('[{"role": ..., "content": ...}]', "").replace('{"id":', "")
    assert all(len(line) <= 100 for line in text.splitlines())


PLACES = {"batch": ["batch", "MODEL", "in", "out"], "chat": ["MODEL"], "demo": ["demo"],
          "download": ["download", "a/b"], "quantize": ["quantize", "MODEL", "DIR"]}  # fmt: skip


@pytest.mark.parametrize(
    ("command", "name"),
    [
        (command, flag.name)
        for command, flag in _every_flag()
        if flag.kind in (int, float) or flag.choices or flag.reads
    ],
)
def test_value_of_the_wrong_kind_is_one_line(command: str, name: str) -> None:
    words = PLACES.get(command, [command, "MODEL"])
    for text in ("", "x\ny", "[1]", "None"):
        if (name, text) in {("revision", "x\ny"), ("revision", "[1]"), ("revision", "None")}:
            continue  # is one
        with pytest.raises(MistralChatError, match=rf"^(argument )?--{name}\b") as caught:
            request_of([*words, f"--{name}={text}"])
        assert isinstance(caught.value, UsageError)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "words",
    [["--help"], ["demo", "-h"], ["batch", "--help"], ["bench", "--help"], ["inspect", "--help"],
     ["download", "--help"], ["quantize", "--help"], ["--version"], ["MODEL", "--promt", "x"], []],
)  # fmt: skip
def test_help_and_misspelt_flags_import_neither_fire_nor_torch(words: list[str]) -> None:
    code = (
        "import sys; from mistral_chat.cli.main import main; main(sys.argv[1:]); "
        "print(*({'fire', 'torch', 'argparse'} & set(sys.modules)), file=sys.stderr)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, *words], capture_output=True, text=True, check=True
    )
    assert done.stderr.splitlines()[-1] == ""


def test_fire_prints_and_pages_nothing(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("PAGER", f"touch {tmp_path}/paged; cat")
    for words in (["MODEL"], ["MODEL", "--", "--help"], ["MODEL", "--prompt", "--trace"]):
        assert isinstance(request_of(words), requests.ChatRequest)
    assert capfd.readouterr() == ("", "")
    assert not (tmp_path / "paged").exists()
