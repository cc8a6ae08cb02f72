"""Input typed during an answer: keys in any pieces give the same messages."""

import random

import pytest

from mistral_chat.cli.talk.typing.typed_ahead import TypedAhead

PASTE, PASTED = "\x1b[200~", "\x1b[201~"
KEYS: list[tuple[str, list[str], str]] = [
    ("ab\x1b[A\x1bOB\x1b[1;5Cc", [], "abc"),  # arrows
    ("one\r", ["one"], ""),
    ("one\ntwo\rthree", ["one", "two"], "three"),
    ("\r\n  \r", [], ""),  # nothing was said
    ("one\x1b\rmore\r", ["one\nmore"], ""),  # Alt-Enter
    ("onf\x7fe\bE\r", ["onE"], ""),
    ("\x7f\x7fa", [], "a"),
    ("gone\x15kept", [], "kept"),
    (f"{PASTE}a\r\n\tb\rc\r{PASTED}", [], "a\n\n\tb\nc\n"),
    (f"see {PASTE}a\rb{PASTED}\r", ["see a\nb"], ""),
    ('"""a\rb"""\rnext', ['"""a\nb"""'], "next"),
    ("\x01\x04\x1a\x9b\x00é中👩‍👧\r", ["é中👩‍👧"], ""),
    ("/undo\rexit\r", ["/undo", "exit"], ""),
]


@pytest.mark.parametrize(("keys", "messages", "rest"), KEYS)
def test_keys_in_any_pieces_make_the_same_messages(
    keys: str, messages: list[str], rest: str
) -> None:
    for n in range(1, len(keys) + 1):
        typed = TypedAhead()
        for at in range(0, len(keys), n):
            typed.take(keys[at : at + n])
        assert (typed.messages, typed.rest) == (messages, rest)


@pytest.mark.parametrize("seed", range(20))
def test_all_that_was_typed_comes_back_as_one_text(seed: int) -> None:
    rng = random.Random(seed)
    parts = [rng.choice(KEYS) for _ in range(6)]
    keys = "".join(f"{keys}\r" for keys, _, _ in parts)
    typed, at = TypedAhead(), 0
    while at < len(keys):
        n = rng.randrange(1, 9)
        typed.take(keys[at : at + n])
        at += n
    said = [text for _, messages, rest in parts for text in (*messages, rest) if text.strip()]
    assert typed.messages == said
    assert typed.take_back() == "\n".join(said)
    assert (typed.messages, typed.rest, typed.take_back()) == ([], "", "")
