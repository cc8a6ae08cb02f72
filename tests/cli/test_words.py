"""What every command reads its words with: a command's own flags, told from those of others."""

from typing import Any

import pytest
from mistral_chat.cli.words import OwnFlag, normalize, read_own, whole_from

from mistral_chat.errors import UsageError

OWN = {"size": OwnFlag(int, "a number"), "least": whole_from(2), "json": OwnFlag(name="as_json")}
SHARED = {"dtype": True, "quiet": False}


@pytest.mark.parametrize(
    ("words", "values", "rest"),
    [
        ([], {}, []),
        (["a", "--size", "-3", "b"], {"size": -3}, ["a", "b"]),
        (["--json", "--least=2", "--quiet"], {"as_json": True, "least": 2}, ["--quiet"]),
        (["--dtype", "--x", "a"], {}, ["--dtype=--x", "a"]),
        (["--size", "1", "--size", "2"], {"size": 2}, []),
        (["a", "--", "--size", "--help"], {}, ["a", "--", "--size", "--help"]),
    ],
)
def test_own_flags_are_read_and_the_others_left(
    words: list[str], values: dict[str, Any], rest: list[str]
) -> None:
    assert read_own(words, OWN, SHARED) == (values, rest)


@pytest.mark.parametrize("words", [["--help"], ["-h"], ["a", "--size", "x", "--help"]])
def test_help_comes_before_values_that_cannot_be(words: list[str]) -> None:
    assert read_own(words, OWN)[0] is None


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--size", "x"], "--size is 'x': expected a number"),
        (["--least", "1"], "--least is '1': expected a whole number of at least 2"),
        (["--least", "²"], "--least is '²': expected a whole number of at least 2"),
        (["--json=1"], "--json is a switch and takes no value; found '1'"),
        (["--size"], "--size needs a value; found nothing after it"),
        (["--size", "--json"], "--size needs a value; found the flag --json"),
        (["--siez", "1"], "unknown flag --siez: did you mean --size?"),
        (["--dtype", "x"], "unknown flag --dtype"),
    ],
)
def test_words_that_cannot_be_are_named(words: list[str], said: str) -> None:
    with pytest.raises(UsageError) as caught:
        read_own(words, OWN)
    assert str(caught.value).startswith(said)


@pytest.mark.parametrize(
    ("words", "normal"),
    [
        (["--on"], ["--on=none"]),
        (["--on", "7", "a"], ["--on=7", "a"]),
        (["--on", "a"], ["--on=none", "a"]),
        (["--on=a"], ["--on=a"]),
    ],
)
def test_value_may_be_left_out(words: list[str], normal: list[str]) -> None:
    assert normalize(words, {"on": True}, {"on": (r"\d", "none")}) == normal
