"""Function schemas from a file, and the calls in an answer's tokens."""

import json
import random
import string
from pathlib import Path
from typing import Any

import pytest

from mistral_chat.chat.call_text import read_listed_calls, read_named_call
from mistral_chat.chat.tokenizer import Tokenizer
from mistral_chat.chat.tools import parse_tool_calls, read_tools
from mistral_chat.errors import PromptError
from tests.scripts.tokenizers import byte_ids, encode, tokenizer

JSON_FORM = ("v2", "v3", "v7", "small tekken", "small tekken v7")
WEATHER: dict[str, Any] = {
    "name": "get_weather",
    "description": "Weather of a place",
    "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
}


def call_ids(made: Tokenizer, *parts: str) -> list[int]:
    """Encode texts and marks between them, and the end token."""
    ids: list[int] = []
    for part in parts:
        if part.startswith("[") and part.endswith("]") and part.isupper():
            ids.append(made.raw.get_special_token(part))
        else:
            ids += encode(made, part)
    return [*ids, made.eos_id]


def found(made: Tokenizer, ids: list[int], seed: int = 0) -> list[tuple[str, dict[str, Any]]]:
    calls = parse_tool_calls(made, ids, seed)
    assert calls
    return [(call.name, call.arguments) for call in calls]


def is_valid_id(text: str) -> bool:
    return len(text) == 9 and set(text) <= set(string.ascii_letters + string.digits)


@pytest.mark.parametrize("name", JSON_FORM)
@pytest.mark.parametrize(
    "listed",
    [
        [{"name": "get_weather", "arguments": {"city": "Paris"}}],
        [{"name": "f", "arguments": {}}],
        [{"name": "f"}],
        [{"name": "f", "arguments": {"text": 'a "b" [TOOL_CALLS] {c}\n', "é日🙂": [1, None, 2.5]}}],
        [{"name": "f", "arguments": {"x": 1}}, {"name": "g", "arguments": {"x": {"y": []}}}],
        [{"name": "f", "arguments": {"n": n}} for n in range(4)],
    ],
)
def test_calls_are_read_from_a_json_list(name: str, listed: list[dict[str, Any]]) -> None:
    made = tokenizer(name)
    wanted = [(call["name"], call.get("arguments", {})) for call in listed]
    for ascii_only in (False, True):
        text = json.dumps(listed, ensure_ascii=ascii_only)
        assert found(made, call_ids(made, "[TOOL_CALLS]", text)) == wanted
        assert found(made, call_ids(made, "[TOOL_CALLS]", f" {text}")) == wanted


@pytest.mark.parametrize("name", JSON_FORM)
def test_calls_are_read_from_any_tokenization(name: str) -> None:
    made = tokenizer(name)
    text = '[{"name": "f", "arguments": {"a": "é🙂"}}]'
    assert made.tool_calls_id is not None
    ids = [made.tool_calls_id, *byte_ids(made, text)]
    assert found(made, [*ids, made.eos_id]) == [("f", {"a": "é🙂"})]
    assert found(made, ids) == [("f", {"a": "é🙂"})]  # ended otherwise than by the end token


def test_calls_are_read_after_text() -> None:
    made = tokenizer("v3")
    ids = call_ids(made, "I will look.", "[TOOL_CALLS]", '[{"name": "f", "arguments": {}}]')
    assert found(made, ids) == [("f", {})]


def test_calls_may_have_their_arguments_as_text() -> None:
    made = tokenizer("v3")
    text = json.dumps([{"name": "f", "arguments": '{"a": 1}'}, {"name": "g", "arguments": ""}])
    assert found(made, call_ids(made, "[TOOL_CALLS]", text)) == [("f", {"a": 1}), ("g", {})]


@pytest.mark.parametrize(
    ("parts", "wanted"),
    [
        (("[TOOL_CALLS]", "f", "[ARGS]", '{"a": "é"}'), [("f", {"a": "é"})]),
        (("[TOOL_CALLS]", "get_weather", "[ARGS]", "{}"), [("get_weather", {})]),
        (
            ("[TOOL_CALLS]", "f", "[ARGS]", '{"a": 1}', "[TOOL_CALLS]", "g", "[ARGS]", '{"b": 2}'),
            [("f", {"a": 1}), ("g", {"b": 2})],
        ),
        (("[TOOL_CALLS]", "f", "[CALL_ID]", "abcDEF123", "[ARGS]", "{}"), [("f", {})]),
        (("[TOOL_CALLS]", 'f{"a": 1}'), [("f", {"a": 1})]),
        (
            ("[TOOL_CALLS]", "f", "[ARGS]", '{"a": "[TOOL_CALLS] [ARGS] [CALL_ID]"}'),
            [("f", {"a": "[TOOL_CALLS] [ARGS] [CALL_ID]"})],
        ),
        (("Let me see.", "[TOOL_CALLS]", "f", "[ARGS]", "{}"), [("f", {})]),
    ],
)
def test_calls_are_read_from_names_and_marks(
    parts: tuple[str, ...], wanted: list[tuple[str, dict[str, Any]]]
) -> None:
    made = tokenizer("v11")
    assert found(made, call_ids(made, *parts)) == wanted


@pytest.mark.parametrize(
    ("given", "kept"),
    [
        ("abcDEF123", True),
        ("000000000", True),
        ("abcDEF12", False),
        ("abcDEF1234", False),
        ("abc-EF123", False),
        ("abcDEF12é", False),
        ("", False),
    ],
)
@pytest.mark.parametrize("name", ["v3", "v11"])
def test_call_ids_are_nine_letters_and_digits(name: str, given: str, kept: bool) -> None:
    made = tokenizer(name)
    if name == "v3":
        text = json.dumps([{"name": "f", "arguments": {}, "id": given}])
        ids = call_ids(made, "[TOOL_CALLS]", text)
    else:
        ids = call_ids(made, "[TOOL_CALLS]", "f", "[CALL_ID]", given, "[ARGS]", "{}")
    calls = parse_tool_calls(made, ids, seed=5)
    assert calls
    assert is_valid_id(calls[0].id)
    assert (calls[0].id == given) is kept


def test_call_ids_made_here_follow_the_seed_and_differ_in_an_answer() -> None:
    made = tokenizer("v3")
    text = json.dumps([{"name": "f", "arguments": {}}] * 5)
    ids = call_ids(made, "[TOOL_CALLS]", text)

    def call_ids_of(seed: int) -> list[str]:
        calls = parse_tool_calls(made, ids, seed)
        assert calls
        return [call.id for call in calls]

    first = call_ids_of(1)
    assert first == call_ids_of(1)
    assert set(first).isdisjoint(call_ids_of(2))
    assert len(set(first)) == 5
    assert all(map(is_valid_id, first))


@pytest.mark.parametrize(
    "text",
    [
        "",
        " ",
        "[",
        '[{"name": "f", "arguments": {}},',
        '[{"name": "f", "arguments": {"a": 1}]',
        '[{"name": "f", "arguments": {}} {"name": "g", "arguments": {}}]',
        '[{"name": "f", "arguments": {}}] [{"name": "g", "arguments": {}',
        '{"name": "f", "parameters": {"a": 1}}',
        '{"name": "f", "args": {"a": 1}}',
        '{"name": "f", "arguments": null, "parameters": {"a": 1}}',
        '{"name": "f", "arguments": {}, "parameters": {"a": 1}}',
        '{"name": "f", "arguments": {"a": 1}, "arguments": {}}',
        "[]",
        "[3]",
        "{}",
        '[{"arguments": {}}]',
        '[{"name": 3, "arguments": {}}]',
        '[{"name": "f", "arguments": [1]}]',
        '[{"name": "f", "arguments": "not json"}]',
        '[{"name": "f", "arguments": "[1]"}]',
        '[{"name": "f", "arguments": {}}, {"name": "g", "arguments": 7}]',
        "not json at all",
    ],
)
@pytest.mark.parametrize("name", ["v3", "v11"])
def test_calls_that_cannot_be_read_are_none(name: str, text: str) -> None:
    made = tokenizer(name)
    assert parse_tool_calls(made, call_ids(made, "[TOOL_CALLS]", text), 0) is None


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ('[{"name": "f", "arguments": {"a": 1}}] and more', [("f", {"a": 1})]),
        ('[{"name": "f", "arguments": {"a": 1}}]]\n[Note: two]', [("f", {"a": 1})]),
        ('[{"name": "f", "arguments": {"a": 1}}', [("f", {"a": 1})]),
        ('[{"name": "f", "arguments": {}}, {"name": "g", "arguments": {"b": []}} ',
         [("f", {}), ("g", {"b": []})]),
        ('[{"name": "f", "arguments": null}]', [("f", {})]),
        ('[{"name": "f", "arguments": "null"}]', [("f", {})]),
        ('{"name": "f", "arguments": {"a": 1}} Done.', [("f", {"a": 1})]),
        ('{"name": "f"} {"name": "g"}', [("f", {}), ("g", {})]),
        ('[{"name": "f"}] [{"name": "g", "arguments": {"a": 1}}]', [("f", {}), ("g", {"a": 1})]),
        ('{"type": "function", "name": "f", "arguments": {"a": 1}, "x": 2}', [("f", {"a": 1})]),
    ],
)  # fmt: skip
@pytest.mark.parametrize("name", ["v3", "v11"])
def test_calls_are_read_from_a_list_that_is_not_quite_one(
    name: str, text: str, wanted: list[tuple[str, dict[str, Any]]]
) -> None:
    made = tokenizer(name)
    assert found(made, call_ids(made, "[TOOL_CALLS]", text)) == wanted


@pytest.mark.parametrize(
    ("parts", "wanted"),
    [
        (("f", "[ARGS]"), ("f", {})),
        (("f", "[ARGS]", " "), ("f", {})),
        (("f", "[CALL_ID]", "abcDEF123", "[ARGS]"), ("f", {})),
        (("f", "[ARGS]", "null"), ("f", {})),
        (("f", "[ARGS]", '{"a": 1} and more'), ("f", {"a": 1})),
        (('f{"a": 1}} and more',), ("f", {"a": 1})),
    ],
)
def test_named_calls_are_read_where_nothing_or_text_follows(
    parts: tuple[str, ...], wanted: tuple[str, dict[str, Any]]
) -> None:
    made = tokenizer("v11")
    assert found(made, call_ids(made, "[TOOL_CALLS]", *parts)) == [wanted]


@pytest.mark.parametrize(
    "parts",
    [
        ("f", "[ARGS]", "not json"),
        ("f", "[ARGS]", '{"a": 1}{"b": 2}'),
        ("f", "[ARGS]", '{"a": 1, "a": 2}'),
        ("f", "[ARGS]", '{"a": '),
        ("f", "[ARGS]", "[1, 2]"),
        ("[ARGS]", "{}"),
        ("f",),
        ("f", "[ARGS]", "{}", "[TOOL_CALLS]", "g", "[ARGS]", "{"),
    ],
)
def test_named_calls_that_cannot_be_read_are_none(parts: tuple[str, ...]) -> None:
    made = tokenizer("v11")
    assert parse_tool_calls(made, call_ids(made, "[TOOL_CALLS]", *parts), 0) is None


@pytest.mark.parametrize("name", ["v1", *JSON_FORM, "v11"])
@pytest.mark.parametrize(
    "text", ["", "Hello", '[TOOL_CALLS][{"name": "f", "arguments": {}}]', '[{"name": "f"}]']
)
def test_calls_are_never_found_in_text_alone(name: str, text: str) -> None:
    made = tokenizer(name)
    assert parse_tool_calls(made, [*encode(made, text), made.eos_id], 0) is None
    assert parse_tool_calls(made, encode(made, text), 0) is None


def write(folder: Path, value: Any) -> Path:
    path = folder / "tools.json"
    path.write_text(value if isinstance(value, str) else json.dumps(value), encoding="utf-8")
    return path


@pytest.mark.parametrize(
    "value",
    [
        [WEATHER],
        [{"type": "function", "function": WEATHER}],
        [{"function": WEATHER}],
        [{"type": "function", **WEATHER}],  # OpenAI's flat form
        [{"type": "function", **WEATHER, "strict": None}],
    ],
)
def test_read_tools_takes_functions_bare_or_wrapped(tmp_path: Path, value: Any) -> None:
    (tool,) = read_tools(write(tmp_path, value))
    assert tool.function.name == "get_weather"
    assert tool.function.description == "Weather of a place"
    assert tool.function.parameters == WEATHER["parameters"]


@pytest.mark.parametrize("left_out", [{}, {"parameters": None, "description": None}])
def test_read_tools_takes_a_function_without_parameters(
    tmp_path: Path, left_out: dict[str, None]
) -> None:
    (tool,) = read_tools(write(tmp_path, [{"function": {"name": "now", **left_out}}]))
    assert tool.function.description == ""
    assert tool.function.parameters == {"type": "object", "properties": {}}


def test_read_tools_keeps_the_order(tmp_path: Path) -> None:
    tools = read_tools(write(tmp_path, [WEATHER | {"name": name} for name in ("c", "a", "b")]))
    assert [tool.function.name for tool in tools] == ["c", "a", "b"]


@pytest.mark.parametrize(
    ("value", "named"),
    [
        ("", "is not JSON"),
        ("{", "is not JSON"),
        ({}, "expected a JSON list"),
        ([], "expected a JSON list"),
        ([WEATHER, 3], "tool 2: not a function schema"),
        ([WEATHER, {"parameters": {}}], "tool 2: not a function schema: .*name"),
        ([{"function": None}], "tool 1: not a function schema"),
        ([{"type": "web_search", **WEATHER}], "tool 1: not a function schema: type"),
        ([WEATHER | {"parameters": "city"}], "tool 1: not a function schema: .*parameters"),
        ([WEATHER | {"name": "get weather"}], "tool 1: .*name: found 'get weather', expected"),
        ([WEATHER | {"parameters": {"type": "number?"}}], r"tool 1: .*parameters at \$.type: "),
        ([WEATHER | {"description": "\ud83d"}], "tool 1: .*half of a surrogate pair"),
        ("[" * 100_000, "nested too deeply"),
    ],
)
def test_read_tools_names_file_and_tool_that_it_cannot_use(
    tmp_path: Path, value: Any, named: str
) -> None:
    path = write(tmp_path, value)
    with pytest.raises(PromptError, match=named) as caught:
        read_tools(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)  # errors are one line


def test_read_tools_names_a_file_that_is_missing_or_no_json(tmp_path: Path) -> None:
    with pytest.raises(PromptError, match=r"missing.json does not exist"):
        read_tools(tmp_path / "missing.json")
    with pytest.raises(PromptError, match=r"tools.txt: expected a .json file"):
        read_tools(tmp_path / "tools.txt")
    (tmp_path / "latin.json").write_bytes(b'[{"name": "\xe9"}]')
    with pytest.raises(PromptError, match=r"latin.json"):
        read_tools(tmp_path / "latin.json")


ARGUMENTS: list[Any] = [{"a": 1}, {"city": 'St. "X"', "n": [1, {"b": None}]}, {"é🙂": "]}, {"}]


def _damage(text: str, rng: random.Random) -> str:
    at = rng.randrange(len(text) + 1)
    kind = rng.randrange(6)
    if kind == 0:
        return text[:at]  # cut short
    if kind == 1:
        return text[:at] + text[at + rng.randrange(1, 4) :]  # something left out
    if kind == 2:
        return text[:at] + rng.choice('[]{},:" x\\') + text[at:]
    if kind == 3:
        return text + rng.choice([" Done.", "\n]", "}", " [note]", "\n\n{see}", '["'])
    if kind == 4:
        key = rng.choice(['"arguments"', '"name"', '"id"'])
        return text.replace(key, rng.choice(['"parameters"', '"args"', '"input"']), 1)
    return text.replace(": ", rng.choice([":", " : ", ":null,"]), rng.randrange(1, 3))


def test_damaged_calls_are_what_was_written_or_none() -> None:
    """A call never loses its arguments, and no call is invented."""
    rng = random.Random(15)
    n_read = 0
    for _ in range(6000):
        listed = [
            {"name": f"f{n}", "arguments": rng.choice(ARGUMENTS)}
            for n in range(rng.randrange(1, 4))
        ]
        text = json.dumps(listed, ensure_ascii=rng.random() < 0.5)
        for _ in range(rng.randrange(1, 3)):
            text = _damage(text, rng)
        read = read_listed_calls(text)
        n_read += read is not None
        for _, arguments, _ in read or ():
            assert arguments, text
    assert 500 < n_read < 5500  # both happen


def test_calls_cut_short_are_those_that_were_whole() -> None:
    listed = [{"name": f"f{n}", "arguments": each} for n, each in enumerate(ARGUMENTS)]
    entries = [json.dumps(call) for call in listed]
    text = f"[{', '.join(entries)}]"
    ends = [len("[" + ", ".join(entries[:n])) for n in range(1, len(entries) + 1)]
    whole = [(call["name"], call["arguments"], None) for call in listed]
    for end in range(len(text) + 1):
        read = read_listed_calls(text[:end])
        n_whole = sum(each <= end for each in ends)
        is_read = end in ends or end == len(text)  # after a comma another call was to come
        assert read == (whole[:n_whole] if is_read else None)
    body = json.dumps(ARGUMENTS[1])
    for end in range(len(body)):
        assert read_named_call("f", body[:end]) == (None if end else ("f", {}))
    assert read_named_call("f", body) == ("f", ARGUMENTS[1])
