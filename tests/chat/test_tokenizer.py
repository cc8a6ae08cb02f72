"""Text to ids and back, for every tokenizer that mistral-common ships."""

import json
import os
import random
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from mistral_common.protocol.instruct.messages import (
    AssistantMessage,
    SystemMessage,
    UserMessage,
)
from mistral_common.protocol.instruct.request import ChatCompletionRequest
from mistral_common.tokens.tokenizers.mistral import MistralTokenizer

from mistral_chat.chat.tokenizer import Tokenizer
from mistral_chat.errors import PromptError, TokenizerError, one_line
from tests.conftest import TINY, folder_of, open_folder, write_params
from tests.scripts.tokenizers import (
    SENTENCEPIECE,
    TEKKEN,
    THINKING,
    byte_ids,
    encode,
    shipped_file,
    small_tekken,
    tokenizer,
)

ALL = SENTENCEPIECE + TEKKEN
WITH_LARGE = (*ALL, "tekken")
TEXTS = (
    "Hello, world!",
    "  two spaces before, two after  ",
    "\n\n\tindented\n    four\n",
    "def f(x):\n    return {'a': [1, 2]}  # 100%\n",
    "Zoë ate crème brûlée in Łódź",
    "日本語とひらがな、漢字。",
    "Привет, как дела?",
    "مرحبا بالعالم",
    "👩‍👩‍👧‍👦 🇫🇷 👍🏽 🙂",
    "e\u0301 \u200b \u00a0 \u2028 \ufeff \x00 \x1b",
    "𝔘𝔫𝔦𝔠𝔬𝔡𝔢 ∑∫ ½",
)


def stream(made: Tokenizer, ids: list[int], *, continues: bool = False) -> list[str]:
    detokenizer = made.detokenizer(continues=continues)
    return [*(detokenizer.add(i) for i in ids), detokenizer.flush()]


def draw_ids(made: Tokenizer, rng: random.Random, n: int, *, bytes_too: bool) -> list[int]:
    """Draw ids of plain tokens in any order, as a model may."""
    ids: list[int] = []
    while len(ids) < n:
        i = rng.randrange(made.n_words)
        piece = made.raw.id_to_piece(i)
        is_byte = re.fullmatch(r"<0x[0-9A-F]{2}>", piece) is not None
        if not made.is_special(i) and piece != "<unk>" and (bytes_too or not is_byte):
            ids.append(i)
    return ids


@pytest.mark.parametrize("name", WITH_LARGE)
def test_detokenizer_streamed_is_full_decode_for_random_ids(name: str) -> None:
    made, rng = tokenizer(name), random.Random(0)
    for _ in range(150):
        ids = draw_ids(made, rng, 25, bytes_too=name not in SENTENCEPIECE)
        assert "".join(stream(made, ids)) == made.raw.decode(ids)


@pytest.mark.parametrize("name", ALL)
def test_detokenizer_streamed_is_full_decode_for_random_bytes(name: str) -> None:
    made, rng = tokenizer(name), random.Random(1)
    ascii_bytes = [i for n in range(128) for i in byte_ids(made, chr(n))]
    halves = sorted({i for text in TEXTS for i in byte_ids(made, text)})
    for _ in range(150):
        # begins with a word, so that no space is stripped
        ids = encode(made, "x") + [
            rng.choice(halves) if rng.random() < 0.7 else rng.choice(ascii_bytes) for _ in range(12)
        ]
        got = "".join(stream(made, ids))
        whole = b"".join(map(made.token_bytes, ids)).decode(errors="replace")
        assert got == whole.removeprefix(" ")
        # SentencePiece writes more than one U+FFFD for a broken character: not what counts
        assert re.sub("\ufffd+", "\ufffd", got) == re.sub("\ufffd+", "\ufffd", made.raw.decode(ids))


@pytest.mark.parametrize("name", ALL)
def test_detokenizer_that_continues_is_full_decode_after_something(name: str) -> None:
    made, rng = tokenizer(name), random.Random(2)
    before = encode(made, "word")
    n = len(made.raw.decode(before))
    for _ in range(150):
        ids = draw_ids(made, rng, 10, bytes_too=name not in SENTENCEPIECE)
        wanted = made.raw.decode(before + ids)
        # a character may be half in `before` only where that ends in half a character
        assert "".join(stream(made, ids, continues=True)) == wanted[n:]


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("name", WITH_LARGE)
def test_detokenizer_gives_valid_text_as_it_was(name: str, text: str) -> None:
    made = tokenizer(name)
    ids = encode(made, text)
    pieces = stream(made, ids)
    assert "".join(pieces) == made.raw.decode(ids) == text
    assert not any("\ufffd" in piece for piece in pieces)
    # what was shown stays: each piece is whole characters of the text, in place
    for n in range(len(pieces)):
        assert text.startswith("".join(pieces[:n]))


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("name", ALL)
def test_detokenizer_waits_for_the_last_byte_of_a_character(name: str, text: str) -> None:
    made = tokenizer(name)
    text = text.lstrip(" ")  # covered by the next test
    pieces = stream(made, byte_ids(made, text))
    assert "".join(pieces) == text
    for character in text:  # nothing, nothing, then the whole character
        for _ in range(len(character.encode()) - 1):
            assert pieces.pop(0) == ""
        assert pieces.pop(0) == character
    assert pieces == [""]


@pytest.mark.parametrize("name", ALL)
def test_detokenizer_keeps_a_space_that_is_a_byte_of_its_own(name: str) -> None:
    made = tokenizer(name)
    ids = byte_ids(made, " x")
    assert "".join(stream(made, ids)) == made.raw.decode(ids) == " x"


@pytest.mark.parametrize("name", ALL)
def test_shipped_tokenizers_do_split_characters(name: str) -> None:
    made = tokenizer(name)
    halves = 0
    for text in TEXTS:
        for i in encode(made, text):
            halves += "\ufffd" in made.token_bytes(i).decode(errors="replace")
    assert halves > 10  # or the tests above show nothing


@pytest.mark.parametrize("name", ALL)
def test_detokenizer_marks_an_unfinished_character_at_the_end(name: str) -> None:
    made = tokenizer(name)
    ids = byte_ids(made, "x🙂")[:-1]
    assert stream(made, ids) == ["x", "", "", "", "\ufffd"]


@pytest.mark.parametrize("name", ALL)
def test_detokenizer_goes_on_after_bytes_that_are_no_text(name: str) -> None:
    made = tokenizer(name)
    broken = byte_ids(made, "🙂")[1:2]
    pieces = stream(made, byte_ids(made, "a") + broken + byte_ids(made, "b🙂"))
    assert "".join(pieces) == "a\ufffdb🙂"


@pytest.mark.parametrize("name", SENTENCEPIECE)
@pytest.mark.parametrize("text", ["Hello", " Hello", "   Hello", " ", "  "])
def test_detokenizer_drops_sentencepieces_own_space_and_no_other(name: str, text: str) -> None:
    made = tokenizer(name)
    ids = encode(made, text)
    assert "".join(stream(made, ids)) == text
    assert "".join(stream(made, ids, continues=True)) == f" {text}"


@pytest.mark.parametrize("name", TEKKEN)
@pytest.mark.parametrize("continues", [False, True])
def test_detokenizer_of_tekken_keeps_all_spaces(name: str, continues: bool) -> None:
    made = tokenizer(name)
    assert "".join(stream(made, encode(made, "  Hello"), continues=continues)) == "  Hello"


@pytest.mark.parametrize("name", [n for n in ALL if n != "v1"])
def test_detokenizer_shows_what_models_write_and_no_other_control_token(name: str) -> None:
    made = tokenizer(name)
    marks = {"[TOOL_CALLS]", "[ARGS]", "[CALL_ID]", "[THINK]", "[/THINK]"}
    marks -= {"[CALL_ID]"} if name in THINKING else set()
    special = {i: made.raw.id_to_piece(i) for i in range(100) if made.is_special(i)}
    assert "[TOOL_CALLS]" in special.values()
    assert len(special) > 10
    for i, text in special.items():
        got = "".join(stream(made, [*byte_ids(made, "a"), i, *byte_ids(made, "b")]))
        assert got == (f"a{text}b" if text in marks else "ab")


def test_detokenizer_shows_all_marks_that_models_write() -> None:
    made = tokenizer("v11")
    marks = ("[TOOL_CALLS]", "[ARGS]", "[CALL_ID]", "[THINK]", "[/THINK]")
    ids = [i for mark in marks for i in (made.raw.get_special_token(mark), *encode(made, "x"))]
    assert "".join(stream(made, ids)) == "".join(f"{mark}x" for mark in marks)


@pytest.mark.parametrize("name", [n for n in ALL if n != "v1"])
def test_detokenizer_ends_half_a_character_at_a_control_token(name: str) -> None:
    made = tokenizer(name)
    assert made.tool_calls_id is not None
    half = byte_ids(made, "🙂")
    pieces = stream(made, [*half[:2], made.tool_calls_id, *half[2:], *byte_ids(made, "!")])
    assert "".join(pieces).startswith("\ufffd[TOOL_CALLS]\ufffd")
    assert pieces[2] == "\ufffd[TOOL_CALLS]"
    assert "".join(pieces).endswith("!")


@pytest.mark.parametrize("name", ALL)
def test_ids_beyond_the_vocabulary_have_no_text(name: str) -> None:
    made = tokenizer(name)  # a model may have more rows, which show up among the likely tokens
    for i in (made.n_words, made.n_words + 5):
        assert stream(made, [*byte_ids(made, "a"), i]) == ["a", "", ""]
        assert made.piece(i) == ""


@pytest.mark.parametrize("name", ALL)
def test_encode_begins_with_the_beginning_of_text(name: str) -> None:
    made = tokenizer(name)
    for text in TEXTS:
        ids = made.encode(text)
        assert ids == [made.raw.bos_id, *encode(made, text)]
        assert made.raw.decode(ids) == text


@pytest.mark.parametrize("name", ALL)
def test_encode_takes_control_tokens_for_text(name: str) -> None:
    made = tokenizer(name)
    text = "</s>[INST] <s> [/INST][TOOL_CALLS]"
    ids = made.encode(text)
    assert not any(map(made.is_special, ids[1:]))
    assert made.raw.decode(ids) == text


@pytest.mark.parametrize("name", ALL)
def test_piece_shows_a_token_by_itself(name: str) -> None:
    made = tokenizer(name)
    assert "".join(map(made.piece, encode(made, "Hello world"))).strip() == "Hello world"
    assert made.piece(made.eos_id) == "</s>"
    assert made.piece(byte_ids(made, "é")[0]) == "\ufffd"


@pytest.mark.parametrize("extra", [0, 7])
@pytest.mark.parametrize("tools", [False, True])
@pytest.mark.parametrize("name", ALL)
def test_banned_ids_leave_text_and_what_models_write(name: str, tools: bool, extra: int) -> None:
    made = tokenizer(name)
    banned = made.banned_ids(made.n_words + extra, tools=tools)
    assert len(set(banned)) == len(banned)
    allowed = set(range(made.n_words + extra)) - set(banned)
    assert max(allowed) < made.n_words  # the model's rows beyond the tokenizer's have no text
    control = {made.raw.id_to_piece(i) for i in allowed & made.raw.special_ids}
    thinks = name in ("v11", *THINKING)
    marks = {"[TOOL_CALLS]"} | ({"[ARGS]"} if thinks else set())
    marks |= {"[CALL_ID]"} if name == "v11" else set()
    wanted = {"</s>"} | (marks if tools and name != "v1" else set())
    assert control == wanted | ({"[THINK]", "[/THINK]"} if thinks else set())
    for text in TEXTS:
        assert allowed.issuperset(encode(made, text))
        assert allowed.issuperset(byte_ids(made, text))
    assert made.raw.vocab().index("<unk>") in banned


def test_banned_ids_stay_inside_a_smaller_vocabulary() -> None:
    assert max(tokenizer("v3").banned_ids(500, tools=False)) == 499  # of 771 control tokens


@pytest.mark.parametrize(
    ("name", "version"),
    [("v1", "v1 SentencePiece"), ("v3", "v3 SentencePiece"), ("v7", "v7 SentencePiece"),
     ("small tekken", "v3 Tekken"), ("v11", "v11 Tekken")],
)  # fmt: skip
def test_version_names_template_and_kind(name: str, version: str) -> None:
    assert tokenizer(name).version == version


@pytest.mark.parametrize(("vocab_size", "version"), [(32_768, "v3 Sent"), (131_072, "v3 Tekken")])
def test_shipped_is_the_one_of_a_vocabulary(vocab_size: int, version: str) -> None:
    made = Tokenizer.shipped(vocab_size)
    assert made.n_words == vocab_size
    assert made.version.startswith(version)


def test_shipped_refuses_a_vocabulary_that_none_has(monkeypatch: pytest.MonkeyPatch) -> None:
    quick = tokenizer("v3").mistral  # in place of Tekken, which takes seconds to load
    monkeypatch.setattr(MistralTokenizer, "v3", lambda *args, **named: quick)
    with pytest.raises(TokenizerError, match=r"no tokenizer with 999 entries.*32768 or 131072"):
        Tokenizer.shipped(999)


@pytest.mark.parametrize(
    ("names", "wanted"),
    [
        (["tekken.json"], "tekken.json"),
        (["tokenizer.model.v3"], "tokenizer.model.v3"),
        (["tokenizer.model"], "tokenizer.model"),
        (["tokenizer.model.v7m1"], "tokenizer.model.v7m1"),
        (["tokenizer.model", "tokenizer.model.v3"], "tokenizer.model.v3"),
        (["tokenizer.model", "tekken.json"], "tekken.json"),
        (["tekken.json", "params.json", "tokenizer.json", "tokenizer_config.json"], "tekken.json"),
        (["tekken.json", "tokenizer.model.v99", "other.txt"], "tekken.json"),
    ],
)
def test_find_tokenizer_takes_the_one_that_counts(
    tmp_path: Path, names: list[str], wanted: str
) -> None:
    for name in names:
        (tmp_path / name).write_bytes(
            small_tekken("v3").encode() if name == "tekken.json" else b"anything"
        )
    assert folder_of(tmp_path).tokenizer_file == tmp_path / wanted


@pytest.mark.parametrize(
    "names",
    [
        ["tokenizer.model.v2", "tokenizer.model.v3"],
        ["tekken.json", "tokenizer.model.v3"],
        ["tokenizer.model", "tekken.json", "tokenizer.model.v3"],
    ],
)
def test_find_tokenizer_refuses_to_choose(tmp_path: Path, names: list[str]) -> None:
    for name in names:
        (tmp_path / name).write_bytes(
            small_tekken("v3").encode() if name == "tekken.json" else b"anything"
        )
    with pytest.raises(TokenizerError, match="found 2 tokenizers") as caught:
        _ = folder_of(tmp_path).tokenizer_file
    for name in names:
        assert name in str(caught.value) or name == "tokenizer.model"


@pytest.mark.parametrize("names", [[], ["params.json", "tokenizer.json"]])
def test_find_tokenizer_says_what_it_expected(tmp_path: Path, names: list[str]) -> None:
    for name in names:
        (tmp_path / name).write_text("{}")
    with pytest.raises(TokenizerError, match=r"tokenizer is missing; expected tekken.json"):
        _ = folder_of(tmp_path).tokenizer_file


@pytest.mark.parametrize("name", ["tekken.json", "tokenizer.model.v3"])
@pytest.mark.parametrize(
    "content",
    [b"", b"{}", b"[]", b"\x00\x01\x02 not a model", b'{"config": {"version": "v3"}}',
     b'{"config": {"version": "v99"}, "vocab": []}', b'{"config": 3}'],
)  # fmt: skip
def test_tokenizer_names_a_file_that_it_cannot_read(
    tmp_path: Path, name: str, content: bytes
) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(TokenizerError) as caught:
        Tokenizer(tmp_path / name)
    assert name in str(caught.value)
    assert "\n" not in str(caught.value)  # errors are one line


def _tekken(**config: Any) -> bytes:
    value = json.loads(small_tekken("v3"))
    value["config"] |= config
    return json.dumps(value).encode()


def _ranks(*ranks: Any) -> bytes:
    value = json.loads(small_tekken("v3"))
    for entry, rank in zip(value["special_tokens"], ranks, strict=False):
        entry["rank"] = rank
    return json.dumps(value).encode()


LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n"


# Each of these once filled the memory, hung, ended in a Rust panic or was accepted.
@pytest.mark.parametrize(
    ("content", "said"),
    [
        (_tekken(default_num_special_tokens=10**12), "default_num_special_tokens is 1000000000000"),
        (_tekken(default_vocab_size=10**12), "default_vocab_size is 1000000000000"),
        (_tekken(num_vocab_tokens="many"), "num_vocab_tokens is 'many'"),
        (_tekken(default_num_special_tokens=-1), "default_num_special_tokens is -1"),
        (_tekken(default_vocab_size=300), "room for 256 bytes"),
        (_tekken(pattern=""), "pattern '' finds pieces of no letters"),
        (_tekken(pattern="a*"), "pattern 'a*' finds pieces of no letters"),
        (_tekken(pattern="(?=.)"), "finds pieces of no letters"),
        (_tekken(pattern=None), "pattern is None"),
        (_tekken(pattern="("), "not a tokenizer that mistral-common can read"),
        (_tekken(version="\x1b]0;x\x07"), "not a tokenizer that mistral-common can read"),
        (_ranks("0"), "ranks of special_tokens"),
        (_ranks(1), "ranks of special_tokens"),
        (_ranks(0, 10**12), "ranks of special_tokens"),
        (b'{"config": ' + b"[" * 100_000, "nested too deeply"),
        (b'{"config": {"num_vocab_tokens": ' + b"9" * 5000 + b"}}", "not a tokenizer"),
        (LFS, "Git LFS pointer"),
    ],
)
def test_tokenizer_refuses_a_tekken_that_would_do_harm(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], content: bytes, said: str
) -> None:
    (tmp_path / "tekken.json").write_bytes(content)
    with pytest.raises(TokenizerError) as caught:
        Tokenizer(tmp_path / "tekken.json")
    assert said in str(caught.value)
    assert "\x1b" not in one_line(caught.value)
    assert capfd.readouterr().err == ""  # a panic would say so


@pytest.mark.parametrize("name", ["tekken.json", "tokenizer.model.v3"])
def test_no_kind_of_file_in_the_place_of_a_tokenizer_hangs(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    os.mkfifo(path)
    with pytest.raises(TokenizerError, match="no regular file"):
        Tokenizer(path)
    with pytest.raises(TokenizerError, match="tokenizer is missing"):
        _ = folder_of(tmp_path).tokenizer_file
    path.unlink()
    path.symlink_to("/dev/zero")
    with pytest.raises(TokenizerError, match="no regular file"):
        Tokenizer(path)
    path.unlink()
    path.touch()
    os.truncate(path, 1 << 40)
    with pytest.raises(TokenizerError, match="expected at most"):
        Tokenizer(path)


def test_from_folder_refuses_the_tokenizer_of_another_model(tmp_path: Path) -> None:
    (tmp_path / "tekken.json").write_text(small_tekken("v3"))
    made = Tokenizer.from_folder(folder_of(tmp_path, replace(TINY, vocab_size=10_000)))
    smaller = replace(TINY, vocab_size=made.n_words - 1)
    with pytest.raises(
        TokenizerError, match=r"has .* tokens, the model .*: expected the tokenizer"
    ):
        Tokenizer.from_folder(folder_of(tmp_path, smaller))


@pytest.mark.parametrize("name", ["config.json", "generation_config.json"])
def test_end_ids_of_a_folder_are_ends_and_not_banned(tmp_path: Path, name: str) -> None:
    (tmp_path / "tekken.json").write_text(small_tekken("v3"))
    write_params(tmp_path, TINY, vocab_size=10_000)
    plain = Tokenizer.from_folder(open_folder(tmp_path))
    (tmp_path / name).write_text(json.dumps({"eos_token_id": [plain.eos_id, 9_999, 4]}))
    made = Tokenizer.from_folder(open_folder(tmp_path))
    assert plain.end_ids == {plain.eos_id}
    assert made.end_ids == {plain.eos_id, 9_999, 4}
    banned = set(plain.banned_ids(10_000, tools=False))
    assert {9_999, 4} <= banned
    assert set(made.banned_ids(10_000, tools=False)) == banned - {9_999, 4}
    (tmp_path / name).write_text(json.dumps({"eos_token_id": made.tool_calls_id}))
    with pytest.raises(TokenizerError, match=r"is \[TOOL_CALLS\], which begins a part"):
        Tokenizer.from_folder(open_folder(tmp_path))


def test_tokenizer_from_folder_is_the_folders_own(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.model.v3").write_bytes(shipped_file("v3").read_bytes())
    (tmp_path / "tokenizer.model").write_bytes(b"not this one")
    made = Tokenizer.from_folder(folder_of(tmp_path))
    assert made.encode("Hello") == tokenizer("v3").encode("Hello")


def request(*messages: Any) -> ChatCompletionRequest[Any]:
    return ChatCompletionRequest(messages=list(messages))


@pytest.mark.parametrize("name", ALL)
def test_encode_chat_is_mistral_commons(name: str) -> None:
    made = tokenizer(name)
    asked = request(
        SystemMessage(content="Be brief."),
        UserMessage(content="Hi"),
        AssistantMessage(content="Hello!"),
        UserMessage(content="Bye"),
    )
    wanted: MistralTokenizer[Any, Any, Any, Any, Any] = made.mistral
    assert made.encode_chat(asked) == wanted.encode_chat_completion(asked).tokens
    assert made.encode_chat(asked)[0] == made.raw.bos_id


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize(
    "messages",
    [
        (AssistantMessage(content="I begin"),),
        (UserMessage(content="a"), AssistantMessage(content="and end")),
        (),
    ],
)
def test_encode_chat_says_what_the_template_refuses(name: str, messages: tuple[Any, ...]) -> None:
    made = tokenizer(name)
    with pytest.raises(PromptError, match=f"the {made.version} template refuses") as caught:
        made.encode_chat(request(*messages))
    assert "\n" not in str(caught.value)  # errors are one line


# Input that is not UTF-8 arrives like this; Tekken writes U+FFFD for it.
@pytest.mark.parametrize("name", SENTENCEPIECE)
def test_half_of_a_surrogate_pair_is_refused(name: str) -> None:
    made = tokenizer(name)
    with pytest.raises(PromptError, match="half of a surrogate pair"):
        made.encode("caf\udce9")
    with pytest.raises(PromptError, match="half of a surrogate pair"):
        made.encode_chat(ChatCompletionRequest(messages=[UserMessage(content="caf\udce9")]))


def test_tokenizer_whose_name_hides_its_version_is_refused(tmp_path: Path) -> None:
    from tests.conftest import shipped_tokenizer

    (tmp_path / "tokenizer.model").write_bytes(shipped_tokenizer().read_bytes())
    with pytest.raises(TokenizerError, match=r"rename it"):
        Tokenizer.from_folder(folder_of(tmp_path))
