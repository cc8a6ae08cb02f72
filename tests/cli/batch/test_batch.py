"""A file of prompts to a file of answers: equal to answering one by one, however often killed."""

import fcntl
import json
import os
import re
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import jsonschema
import pytest

from mistral_chat import LLM, SamplingParams
from mistral_chat.cli import start
from mistral_chat.cli.batch import lines as batch_lines
from mistral_chat.cli.batch import output as batch_output
from mistral_chat.cli.batch import progress as batch_progress
from mistral_chat.cli.main import main, request_of
from mistral_chat.errors import OtherRankFailedError, OutputError
from tests.conftest import Run
from tests.disk import Disk
from tests.warm import Piped

OPENAI = {"method": "POST", "url": "/v1/completions"}
ASKED = [{"role": "user", "content": "Hi"}]


@pytest.fixture(autouse=True)
def _signals() -> Iterator[None]:
    """Restore this process's signal handlers after a run."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def _write(path: Path, *values: Any) -> Path:
    """Write a file of JSON lines; texts and bytes are written as they are."""
    lines = [v if isinstance(v, (str, bytes)) else json.dumps(v) for v in values]
    path.write_bytes(b"".join(x if isinstance(x, bytes) else x.encode() + b"\n" for x in lines))
    return path


def _records(text: str) -> list[dict[str, Any]]:
    assert not text or text.endswith("\n")
    return [json.loads(line) for line in text.splitlines()]


def _run(
    folder: Path, tmp_path: Path, *values: Any, words: tuple[object, ...] = ()
) -> tuple[int, list[dict[str, Any]]]:
    """Answer lines in this process, greedily unless they say otherwise."""
    source = _write(tmp_path / "in", *values)
    target = tmp_path / "out"
    target.unlink(missing_ok=True)
    fixed = ["batch", folder, source, target, "--device=cpu", "--dtype=float32"]
    code = main([str(w) for w in (*fixed, "--temperature=0", "--quiet", *words)])
    return code, _records(target.read_text())


def _texts(records: list[dict[str, Any]]) -> dict[Any, str]:
    texts = {record["id"]: record["text"] for record in records}
    assert len(texts) == len(records)
    return texts


def _words(folder: Path, source: Path, target: Path, *words: object) -> list[str]:
    files = map(str, (folder, source, target))
    return ["batch", *files, "--temperature=0", "--dtype=float32", *map(str, words)]


def _await_lines(path: Path, n: int) -> None:
    limit = time.monotonic() + 60
    while not path.exists() or path.read_bytes().count(b"\n") < n:
        assert time.monotonic() < limit
        time.sleep(0.002)


def test_killed_twice_and_started_again_is_one_by_one(
    tiny_folder: Path, tmp_path: Path, run: Run
) -> None:
    prompts = {n: f"{n} plus {n * n % 17} is" for n in range(1, 201)}
    values = [{"prompt": text, "max_tokens": 2 + n % 7} for n, text in prompts.items()]
    source, target = _write(tmp_path / "in", *values), tmp_path / "out"
    words = _words(tiny_folder, source, target, "--max_batch_size", 6)
    for n_lines in (30, 110):
        # far from its end, however late the kill comes
        with Piped("tests.scripts.scripted", ["-", "0.03", *words]):
            _await_lines(target, n_lines)
        assert target.read_bytes().count(b"\n") < 200
        with target.open("ab") as file:  # as a kill between two writes of one line would
            file.write(b'{"id": 1, "te')
    last = run(*words)
    assert last.code == 0, last.err
    assert re.match(r"mistral-chat: 200 lines answered \(1\d\d of them before", last.err)
    with LLM(tiny_folder, device="cpu", dtype="float32", max_batch_size=1) as llm:
        expected = {
            n: llm.generate(text, SamplingParams(temperature=0, max_tokens=2 + n % 7))[0].text
            for n, text in prompts.items()
        }
    assert _texts(_records(target.read_text())) == expected


def test_seeds_give_the_same_whatever_the_batch_size(tiny_folder: Path, tmp_path: Path) -> None:
    values = [
        {"prompt": "Hello" * (1 + n % 3), "seed": n, "temperature": 0.9, "max_tokens": 3 + n % 5}
        | ({"top_k": 50, "top_p": 0.9, "min_p": 0.001} if n % 2 else {})
        for n in range(20)
    ]
    found = [
        _texts(_run(tiny_folder, tmp_path, *values, words=("--max_batch_size", n))[1])
        for n in (1, 3, 8)
    ]
    assert found[0] == found[1] == found[2]
    assert len(set(found[0].values())) > 15


def test_lines_are_written_as_they_finish(tiny_folder: Path, tmp_path: Path) -> None:
    values = [{"prompt": "a", "max_tokens": n, "id": f"{n} tokens"} for n in (30, 12, 3, 5, 1)]
    code, records = _run(tiny_folder, tmp_path, *values, words=("--max_batch_size", 3))
    # The fourth begins when the third has ended, after 3 steps, and the fifth after 5 more.
    assert [r["id"] for r in records] == [f"{n} tokens" for n in (3, 5, 1, 12, 30)]
    assert code == 0


def test_record_is_the_json_object_with_its_id_first(tiny_folder: Path, tmp_path: Path) -> None:
    value = {"prompt": "Hello", "max_tokens": 3, "seed": 5, "logprobs": 2, "id": "ä\u2028"}
    _, (record,) = _run(tiny_folder, tmp_path, value)
    assert next(iter(record)) == "id"
    assert set(record) == {"id", "text", "finish_reason", "tool_calls", "seed", "usage", "timings",
                           "model", "world_size", "logprobs"}  # fmt: skip
    assert (record["id"], record["seed"], record["finish_reason"]) == ("ä\u2028", 5, "length")
    assert [len(entry["top"]) for entry in record["logprobs"]] == [2, 2, 2]


def test_both_forms_ask_the_same(tiny_folder: Path, tmp_path: Path) -> None:
    chat = [{"role": "user", "content": "Hello"}]
    system = [{"role": "system", "content": "Be brief"}, *chat]
    body = {"max_tokens": 6, "model": "any", "n": 1, "stream": False, "user": None}
    values = [
        {"id": "plain", "prompt": "Hello", "max_tokens": 6},
        {"custom_id": "openai plain", **OPENAI, "body": {"prompt": "Hello", **body}},
        {"id": "chat", "messages": chat, "max_tokens": 6},
        {"custom_id": "openai chat", "url": "/v1/chat/completions",
         "body": {"messages": [{"role": "user", "content": [{"type": "text", "text": "Hello"}]}],
                  "max_completion_tokens": 6, "logprobs": True, "top_logprobs": 1}},
        {"id": "system", "messages": system, "max_tokens": 6},
    ]  # fmt: skip
    plain = _texts(_run(tiny_folder, tmp_path, *values)[1])
    assert plain["plain"] == plain["openai plain"]
    assert plain["chat"] == plain["openai chat"]
    assert len(set(plain.values())) == 3
    words = ("--instruct", "--system", "Be brief")
    chats = _texts(_run(tiny_folder, tmp_path, *values, words=words)[1])
    assert chats["openai plain"] == plain["plain"]  # its url says what it is
    assert {chats[name] for name in ("plain", "chat", "openai chat", "system")} == {plain["system"]}


def test_flags_are_the_defaults_of_lines(tiny_folder: Path, tmp_path: Path) -> None:
    values = [{"prompt": "a"}, {"prompt": "a", "max_tokens": 5}, {"prompt": "a", "stop": ["x"]}]
    _, records = _run(tiny_folder, tmp_path, *values, words=("--max_tokens", 2, "--seed", 9))
    by_id = {record["id"]: record for record in records}
    assert [by_id[n]["usage"]["completion_tokens"] for n in (1, 2, 3)] == [2, 5, 2]
    assert {record["seed"] for record in records} == {9}


def test_stop_text_of_a_line_ends_it_alone(tiny_folder: Path, tmp_path: Path) -> None:
    asked = {"prompt": "Hello", "max_tokens": 12}
    _, (whole,) = _run(tiny_folder, tmp_path, asked)
    stop = whole["text"][4:6]
    cut = asked | {"stop": stop, "id": "cut"}
    _, records = _run(tiny_folder, tmp_path, asked, cut, asked | {"id": "too"})
    texts = _texts(records)
    assert texts[1] == texts["too"] == whole["text"]
    assert texts["cut"] == whole["text"].partition(stop)[0]
    assert records[0]["id"] == "cut"
    assert records[0]["finish_reason"] == "stop"


def _read(*values: Any, words: tuple[str, ...] = ()) -> list[batch_lines.Line]:
    options = request_of(["MODEL", *words])
    lines = [v if isinstance(v, bytes) else json.dumps(v).encode() for v in values]
    return batch_lines.read_lines(b"\n".join(lines), options, None)


@pytest.mark.parametrize(
    ("value", "said"),
    [
        (b"{", "not JSON"),
        (b'{"prompt": "caf\xe9"}', "not UTF-8 text: byte 0xe9"),
        (b'{"prompt": "\\ud83d"}', "half of a surrogate pair"),
        (b"[" * 200000, "not JSON"),
        ([1], "expected a JSON object"),
        ({}, "expected either prompt or messages"),
        ({"prompt": "a", "messages": []}, "expected either prompt or messages"),
        ({"prompt": "a", "tempratur": 1}, 'unknown field "tempratur"'),
        ({"prompt": 1}, "prompt is 1: expected a text"),
        ({"messages": "a"}, "messages are 'a': expected a list of objects"),
        ({"messages": ["a"]}, "message 1 is 'a': expected an object"),
        ({"messages": []}, "messages are empty: expected one at least"),
        ({"prompt": "a", "id": 1.5}, "id is 1.5: expected a text or a whole number"),
        ({"prompt": "a", "id": True}, "id is true: expected a text or a whole number"),
        ({"prompt": "a", "max_tokens": 1.0}, "max_tokens is 1.0: expected a whole number"),
        ({"prompt": "a", "max_tokens": True}, "max_tokens is true: expected a whole number"),
        ({"prompt": "a", "max_tokens": 0}, "max_tokens is 0: expected a whole number of at least"),
        ({"prompt": "a", "temperature": "1"}, 'temperature is "1": expected a number'),
        ({"prompt": "a", "temperature": 10**400}, "expected a number"),
        (b'{"prompt": "a", "temperature": NaN}', "temperature is nan: expected a number"),
        ({"prompt": "a", "top_p": 2}, "top_p is 2.0: expected a number above 0"),
        ({"prompt": "a", "seed": -1}, "seed is -1"),
        ({"prompt": "a", "stop": [1]}, "stop is [1]: expected a text or a list of texts"),
        ({"prompt": "a", "stop": ""}, "stop is ''"),
        ({"prompt": "a", "tools": [{}]}, "tools need messages"),
        ({"prompt": "a", "json_schema": "{}"}, 'json_schema is "{}": expected a schema'),
        ({"prompt": "a", "json_object": 1}, "json_object is 1: expected true or false"),
        ({"prompt": "a", "json_object": True, "json_schema": {}}, "expected one of them"),
        ({"prompt": "a", "json_object": True, "stop": "}"}, "stop and a JSON schema: expected one"),
        ({"messages": ASKED, "json_schema": {}, "tools": [{}]}, "tools and a JSON schema"),
        (
            {"custom_id": "a", "body": {"prompt": "a", "response_format": "text"}},
            'response_format is "text": expected the type text, json_object or json_schema',
        ),
        (
            {"custom_id": "a", "body": {"prompt": "a", "response_format": {"type": "xml"}}},
            'response_format is {"type": "xml"}: expected the type',
        ),
        (
            {"custom_id": "a", "body": {"prompt": "a", "response_format": {"type": "json_schema"}}},
            "response_format has no json_schema.schema, which is an object",
        ),
        (
            {
                "custom_id": "a",
                "body": {"prompt": "a", "response_format": {"type": "text", "x": 1}},
            },
            'unknown field "x" in response_format',
        ),
        ({"messages": ASKED, "reasoning": "low"}, 'reasoning is "low": expected none or high'),
        ({"messages": ASKED, "reasoning": 1}, "reasoning is 1: expected none or high"),
        ({"messages": ASKED, "reasoning": {}}, "reasoning is {}: expected none or high"),
        ({"prompt": "a", "reasoning": "high"}, "reasoning needs messages"),
        (
            {"custom_id": "a", "body": {"messages": ASKED, "reasoning_effort": "x"}},
            'reasoning is "x": expected none or high',
        ),
        ({"custom_id": "a"}, "body is null: expected an object"),
        ({"custom_id": "a", "prompt": "a"}, 'unknown field "prompt" in a line with custom_id'),
        ({"custom_id": 1.5, "body": {}}, "custom_id is 1.5"),
        ({"custom_id": "a", "body": {"prompt": "a", "x": 1}}, 'unknown field "x" in body'),
        ({"custom_id": "a", "body": {"prompt": "a", "n": 2}}, "n is 2: expected 1"),
        ({"custom_id": "a", "url": "/v1/x", "body": {}}, 'url is "/v1/x": expected /v1/chat'),
        ({"custom_id": "a", **OPENAI, "body": {}}, "body has no prompt"),
        ({"custom_id": "a", "method": "GET", "body": {}}, 'method is "GET": expected POST'),
        ({"custom_id": "a", "body": {"prompt": "a", "top_logprobs": 2}}, "top_logprobs needs"),
    ],
)
def test_bad_line_is_named_and_the_rest_is_read(value: Any, said: str) -> None:
    good, bad = _read({"prompt": "b"}, value)
    assert good.question is not None
    assert bad.question is None
    assert bad.error is not None
    assert bad.error.startswith("line 2: ")
    assert said in bad.error


CHAT_BODY = {"messages": ASKED, "max_tokens": 3, "response_format": {"type": "text"}}
# What OpenAI's clients write of fields that nobody set.
NULLS = ("stream_options", "reasoning_effort", "audio", "functions", "seed", "n", "stop", "tools",
         "tool_choice", "logprobs", "prompt", "made_up")  # fmt: skip


@pytest.mark.parametrize("name", NULLS)
def test_null_is_as_absent(name: str) -> None:
    body = CHAT_BODY | {"response_format": {"type": "text", "json_schema": None}}
    bare, line, inside, ours, mixed = _read(
        {"custom_id": "a", "body": CHAT_BODY},
        {"custom_id": "b", "body": CHAT_BODY, name: None},
        {"custom_id": "c", "id": None, "body": body | {name: None}},
        {"id": "d", "messages": ASKED, "max_tokens": 3, "json_object": False, name: None},
        {"id": "e", "messages": ASKED, "max_tokens": 3, "json_object": False, "body": None,
         "custom_id": None},
    )  # fmt: skip
    assert [x.error for x in (bare, line, inside, ours, mixed)] == [None] * 5
    assert [x.id for x in (bare, line, inside, ours, mixed)] == ["a", "b", "c", "d", "e"]
    assert line.question == inside.question == ours.question == mixed.question == bare.question


@pytest.mark.parametrize(
    ("words", "line", "is_json"),
    [
        ((), {}, False),
        ((), {"json_object": True}, True),
        ((), {"json_schema": {}}, True),
        (("--json_object",), {}, True),
        (("--json_schema", "s.json"), {}, True),
        (("--json_schema", "s.json"), {"json_object": False}, False),
        (("--json_object",), {"json_schema": None, "json_object": None}, True),
        (("--json_object",), {"response_format": {"type": "text"}}, False),
        ((), {"response_format": {"type": "json_object"}}, True),
        ((), {"response_format": {"type": "json_schema", "json_schema": {"schema": {}}}}, True),
        ((), {"response_format": None}, False),
    ],
)
def test_line_says_whether_it_is_json_before_the_flags_do(
    words: tuple[str, ...], line: dict[str, Any], is_json: bool
) -> None:
    value = {"prompt": "a"} | line
    (read,) = _read({"body": value} if "response_format" in line else value, words=words)
    assert read.question is not None, read.error
    assert read.question.is_json(by_default=bool(words)) == is_json


def test_reasoning_of_a_line_comes_before_the_flag() -> None:
    body = {"messages": ASKED, "reasoning_effort": "high"}
    lines = _read(
        {"messages": ASKED},
        {"messages": ASKED, "reasoning": "high"},
        {"custom_id": "a", "body": body},
        {"messages": ASKED, "reasoning": None},
        words=("--instruct", "--reasoning", "none"),
    )
    efforts = [line.question.reasoning for line in lines if line.question is not None]
    assert efforts == ["none", "high", "high", "none"]


def test_reasoning_that_the_template_does_not_know_is_the_lines_error(
    tiny_folder: Path, tmp_path: Path
) -> None:
    asked = {"messages": ASKED, "max_tokens": 2}
    code, records = _run(tiny_folder, tmp_path, asked, asked | {"reasoning": "high"})
    assert code == 1
    assert "text" in records[0] or "text" in records[1]
    (error,) = [record["error"] for record in records if "error" in record]
    assert "reasoning high: the v3 SentencePiece template has no such setting" in error


def test_flags_that_a_schema_excludes_are_the_lines_errors() -> None:
    for words, name in ((("--stop", "x"), "stop"), (("--instruct", "--tools", "t.json"), "tools")):
        line = {"messages": [{"role": "user", "content": "a"}], "json_object": True}
        (refused, freed) = _read(line, line | {name: [], "id": "b"}, words=words)
        assert refused.error == f"line 1: {name} and a JSON schema: expected one of them"
        assert freed.error is None


def test_python_functions_are_refused_since_a_batch_runs_none(run: Run, tmp_path: Path) -> None:
    (tmp_path / "tools.py").write_text("")
    done = run("batch", "m", "IN", "OUT", "--instruct", "--tools", tmp_path / "tools.py")
    assert done.code == 2
    assert done.error_lines == [
        f"mistral-chat: error: --tools {tmp_path}/tools.py: batch runs no functions, it reports "
        f"calls: expected a .json file of function schemas"
    ]


def test_ids_are_line_numbers_where_there_are_none() -> None:
    lines = _read(b"\xef\xbb\xbf{", b"", {"prompt": "a"}, b" \r", {"prompt": "b", "id": None})
    assert [(line.number, line.id) for line in lines] == [(1, 1), (3, 3), (5, 5)]
    assert lines[1].error is None


def _schema(n: int) -> dict[str, Any]:
    """A schema with only short texts, so that answers end by themselves."""
    leaves: list[dict[str, Any]] = [
        {"enum": ["red", "grün", 'a"b', 3, None]},
        {"type": "integer", "minimum": -n, "maximum": n},
        {"type": "string", "pattern": "^[a-f]{2,3}-[0-9]$"},
        {"type": "boolean"},
        {"type": "string", "minLength": 1, "maxLength": 1 + n % 4},
    ]
    leaf, other = leaves[n % 5], leaves[(n // 5) % 5]
    return [
        leaf,
        {"type": "array", "items": leaf, "minItems": 1, "maxItems": 1 + n % 3},
        {"type": "object", "properties": {f"p{n}": leaf, "größe": other}, "required": [f"p{n}"],
         "additionalProperties": False},
        {"type": "object", "properties": {"in": {"type": "array", "maxItems": 2,
         "items": {"anyOf": [leaf, other]}}}, "required": ["in"], "additionalProperties": False},
    ][n % 4]  # fmt: skip


def test_every_line_is_valid_against_its_own_schema(tiny_folder: Path, tmp_path: Path) -> None:
    schemas = {n: _schema(n) for n in range(1, 31)}
    sampling = {n: {"temperature": 1.5, "seed": n, "max_tokens": 300} for n in schemas}
    values: list[dict[str, Any]] = []
    for n, schema in schemas.items():
        prompt = {"prompt": "Some JSON: " * (1 + n % 4)} | sampling[n]
        if n % 3:
            values.append({"id": n, "json_schema": schema} | prompt)
        else:
            asked = {"type": "json_schema", "json_schema": {"name": "a", "schema": schema}}
            values.append({"custom_id": n, "body": {"response_format": asked} | prompt})
    # between them, answers that no schema binds
    values[4:4] = [{"id": "free", "prompt": "a", "max_tokens": 30}]
    texts = []
    for at_once in (1, 7):
        words = ("--max_batch_size", at_once)
        code, records = _run(tiny_folder, tmp_path, *values, words=words)
        assert code == 0
        assert {r["finish_reason"] for r in records if r["id"] != "free"} == {"stop"}
        texts.append(_texts(records))
    assert texts[0] == texts[1]
    for n, schema in schemas.items():
        jsonschema.validate(json.loads(texts[0][n]), schema)
    assert len({texts[0][n] for n in schemas}) > 20


def test_flags_give_the_schema_of_lines_that_have_none(tiny_folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "schema.json"
    path.write_text('{"enum": ["of the flag"]}')
    values = [
        {"prompt": "a", "id": "flag"},
        {"prompt": "a", "id": "own", "json_schema": {"enum": ["own"]}},
        {"prompt": "a", "id": "free", "json_object": False, "max_tokens": 3},
        {"custom_id": "text", "body": {"prompt": "a", "response_format": {"type": "text"},
                                       "max_tokens": 3}},
    ]  # fmt: skip
    code, records = _run(tiny_folder, tmp_path, *values, words=("--json_schema", path))
    texts = _texts(records)
    assert code == 0
    assert [json.loads(texts[name]) for name in ("flag", "own")] == ["of the flag", "own"]
    assert texts["free"] == texts["text"]
    assert not texts["free"].lstrip().startswith('"')


@pytest.mark.usefixtures("nothing_loaded")
def test_wrong_schema_of_the_flags_is_named_before_the_model_is_loaded(
    tiny_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = _write(tmp_path / "in", {"prompt": "a"})
    path = tmp_path / "schema.json"
    path.write_text('{"not": {}}')
    words = ["batch", str(tiny_folder), str(source), str(tmp_path / "out")]
    assert main([*words, "--json_schema", str(path)]) == 1
    said = 'answers cannot be kept to this schema: not supported: "not"'
    assert capsys.readouterr().err == f"mistral-chat: error: {path}: {said}\n"
    assert not (tmp_path / "out").exists()


def test_cut_json_and_refused_schemas_are_errors_of_their_lines(
    tiny_folder: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    cut = {"prompt": "a", "json_object": True, "max_tokens": 4}
    values = [
        {"prompt": "a", "json_schema": {"not": {}}, "id": "refused"},
        cut,
        {"prompt": "a", "json_schema": {"type": "text"}},
        {"prompt": "a", "json_schema": {"const": 7}, "id": "whole"},
    ]
    code, records = _run(tiny_folder, tmp_path, *values)
    assert code == 1
    assert "3 of 4 lines have an error" in capfd.readouterr().err
    by_id = {record["id"]: record for record in records}
    assert json.loads(by_id["whole"]["text"]) == 7
    for id_, number in (("refused", 1), (3, 3)):
        assert list(by_id[id_]) == ["id", "error"]
        said = f"line {number}: json_schema: answers cannot be kept to this schema: "
        assert by_id[id_]["error"].startswith(said)
    record = by_id[2]
    assert record["finish_reason"] == "length"
    assert record["text"].lstrip().startswith("{")
    assert record["error"] == (
        "line 2: stopped at --max_tokens 4: the answer is no whole JSON text; give it more room"
    )
    # Again: all are done, and the errors are still counted.
    before = (tmp_path / "out").read_bytes()
    words = ["batch", str(tiny_folder), str(tmp_path / "in"), str(tmp_path / "out"), "--quiet"]
    assert main(words) == 1
    assert "3 of 4 lines have an error" in capfd.readouterr().err
    assert (tmp_path / "out").read_bytes() == before


def test_bad_lines_are_answered_with_their_error(
    tiny_folder: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    values = [
        "oops",
        {"prompt": "a", "max_tokens": 2},
        {"prompt": "a " * 600, "id": "long"},
        {"messages": [{"role": "nobody", "content": "a"}], "id": "role"},
        {"messages": [{"role": "user", "content": [{"type": "image_url"}]}], "id": "picture"},
        {"messages": [{"role": "user", "content": "a"}], "tools": [{"x": 1}], "id": "tool"},
        {"messages": [], "id": "none"},
        {"prompt": "b", "id": 2},
        {"prompt": "c", "id": 1},
        {"prompt": "d", "id": "last", "max_tokens": 2},
    ]
    code, records = _run(tiny_folder, tmp_path, *values)
    assert code == 1
    assert capfd.readouterr().err == (
        "mistral-chat: error: 8 of 10 lines have an error, which their line of OUT says; "
        "--retry_errors tries them again\n"
    )
    assert len(records) == 10
    answered = [r["id"] for r in records if "text" in r]
    assert sorted(answered, key=str) == [2, "last"]
    errors = {r["error"][:7]: r for r in records if "error" in r}
    for number, id_, said in (
        (1, 1, "not JSON"),
        (3, "long", "the prompt has 602 tokens and the context holds 512"),
        (4, "role", "message 1: role is 'nobody': expected system, developer, user"),
        (5, "picture", "message 1: part 1 of content: type is 'image_url': expected text"),
        (6, "tool", "tool 1: not a function schema"),
        (7, "none", "messages are empty"),
        (8, 2, "the id 2 is that of line 2 already"),
        (9, 1, "the id 1 is that of line 1 already"),
    ):
        record = errors[f"line {number}:"]
        assert list(record) == ["id", "error"]
        assert record["id"] == id_
        assert said in record["error"]
    # Again: nothing is left to do, in whatever order the lines of one id are.
    target = tmp_path / "out"
    lines = target.read_bytes().splitlines(keepends=True)
    target.write_bytes(b"".join(reversed(lines)))
    assert main(["batch", str(tiny_folder), str(tmp_path / "in"), str(target), "--quiet"]) == 1
    assert target.read_bytes() == b"".join(reversed(lines))


def test_duplicate_that_was_written_first_does_not_hide_its_owner(
    tiny_folder: Path, tmp_path: Path
) -> None:
    values = [{"prompt": "a", "id": "x", "max_tokens": 1}, {"prompt": "b", "id": "x"}]
    _, records = _run(tiny_folder, tmp_path, *values)
    assert ["error" in r for r in records] == [True, False]
    target = _write(tmp_path / "out", records[0])
    assert main(["batch", str(tiny_folder), str(tmp_path / "in"), str(target), "--quiet"]) == 1
    assert ["error" in r for r in _records(target.read_text())] == [True, False]


DONE = {"id": 1, "text": "kept"}


@pytest.mark.parametrize("torn", [b"", b"{", b'{"id": 2, "text"', b'{"id": 2\0\0\0', b"\0\0"])
def test_torn_line_is_cut_off_and_run_again(tiny_folder: Path, tmp_path: Path, torn: bytes) -> None:
    source = _write(tmp_path / "in", {"prompt": "a"}, {"prompt": "b", "max_tokens": 1})
    target = _write(tmp_path / "out", DONE, torn)
    assert main(["batch", str(tiny_folder), str(source), str(target), "--quiet"]) == 0
    first, second = _records(target.read_text())
    assert first == DONE
    assert second["id"] == 2


@pytest.mark.usefixtures("nothing_loaded")
@pytest.mark.parametrize(
    ("held", "said"),
    [
        ([DONE, {"id": 7, "text": ""}], "line 2: the id 7 is not in IN"),
        ([DONE, DONE], "line 2: the id 1 is there twice"),
        ([DONE, b"my own notes"], "line 2: it is no answer of ours"),
        (["my own notes"], "line 1: it is not JSON"),
        ([{"text": "a"}], "line 1: it has no id"),
        ([{"id": True, "text": "a"}], "line 1: it has no id"),
        ([{"id": 1}], "line 1: it has neither text nor error"),
        ([{"prompt": "a", "id": 1}], "line 1: it has neither text nor error"),
        ([DONE | {"model": "folder/other"}], 'line 1: "folder/other" wrote it, and MODEL is "'),
        ([DONE | {"model": None}], "line 1: null wrote it"),
    ],
)
def test_out_of_something_else_is_refused_and_left(
    tiny_folder: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    held: list[Any],
    said: str,
) -> None:
    source = _write(tmp_path / "in", {"prompt": "a"}, {"prompt": "b"})
    target = _write(tmp_path / "out", *held)
    before = target.read_bytes()
    assert main(["batch", str(tiny_folder), str(source), str(target)]) == 1
    assert said in capsys.readouterr().err
    assert target.read_bytes() == before


def test_answers_of_the_model_in_another_writing_are_kept(
    tiny_folder: Path, tmp_path: Path
) -> None:
    source = _write(tmp_path / "in", {"prompt": "a"})
    target = _write(tmp_path / "out", DONE | {"model": f"../{tiny_folder.name}"})
    before = target.read_bytes()
    assert main(["batch", f"{tiny_folder}/", str(source), str(target), "--quiet"]) == 0
    assert target.read_bytes() == before


def test_errors_are_tried_again_when_asked_for(
    tiny_folder: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    good = {"prompt": "a", "max_tokens": 2}
    cut = {"prompt": "a", "json_object": True, "max_tokens": 4, "id": "cut"}
    bad = ["{", good | {"id": "x"}, good | {"id": "x"}, good | {"id": 1.5}, cut, good]
    _, records = _run(tiny_folder, tmp_path, *bad)
    target = tmp_path / "out"
    kept = [r for r in records if "error" not in r]
    assert sorted(str(r["id"]) for r in kept) == ["6", "x"]
    # IN and its ids are corrected, so the ids in the errors are no longer in it.
    mended = [good | {"id": "one"}, good | {"id": "x"}, good | {"id": "y"}, good | {"id": 4},
              cut | {"json_schema": {"const": 7}, "json_object": None}, good]  # fmt: skip
    source = _write(tmp_path / "in", *mended)
    words = ["batch", str(tiny_folder), str(source), str(target), "--quiet", "--temperature=0"]
    assert main(words) == 1
    assert "(where IN was mended: --retry_errors)" in capfd.readouterr().err
    assert _records(target.read_text()) == records
    target.chmod(0o640)
    with target.open("ab") as file:
        file.write(b'{"id": 6, "te')  # as a kill would leave it
    (tmp_path / ".out.retry_errors").write_text("of a run that was killed")
    assert main([*words, "--retry-errors"]) == 0
    found = _records(target.read_text())
    assert found[: len(kept)] == kept  # untouched, in their order, before what is new
    assert _texts(found).keys() == {"one", "x", "y", 4, "cut", 6}
    assert all("error" not in record for record in found)
    assert target.stat().st_mode & 0o777 == 0o640
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in", "out"]
    before = target.read_bytes()
    assert main([*words, "--retry_errors"]) == 0  # nothing is left to try again
    assert target.read_bytes() == before


@pytest.mark.usefixtures("nothing_loaded")
def test_errors_that_stay_are_written_anew_once(tiny_folder: Path, tmp_path: Path) -> None:
    source = _write(tmp_path / "in", "{", {"prompt": "a", "temperature": "hot"})
    target = tmp_path / "link"
    target.symlink_to("out")
    words = ["batch", str(tiny_folder), str(source), str(target), "--quiet"]
    for more in ([], ["--retry_errors"], ["--retry_errors"], []):
        assert main([*words, *more]) == 1
        assert [r["id"] for r in _records(target.read_text())] == [1, 2]
    assert target.is_symlink()


def test_kill_while_errors_are_taken_out_leaves_the_old_or_the_new_file(tmp_path: Path) -> None:
    """Record each step that reaches the disk; after each of them OUT must be one whole file."""
    source = _write(tmp_path / "in", "{", "{", "{")
    lines = batch_lines.read_lines(source.read_bytes(), request_of(["MODEL"]), None)
    kept = {"id": 2, "text": "kept"}
    target = tmp_path / "out"
    calls = {name: getattr(os, name) for name in ("open", "write", "fsync", "rename", "close")}
    whole = [_write(tmp_path / "old", {"id": 1, "error": "line 1: x"}, kept), _write(
        tmp_path / "new", kept)]  # fmt: skip
    wanted = [path.read_bytes() for path in whole]
    seen: list[bytes] = []
    target.write_bytes(wanted[0])
    with (
        batch_output.Output(str(target), source.stat()) as output,
        pytest.MonkeyPatch.context() as p,
    ):
        for name, call in calls.items():

            def look(*words: Any, call: Any = call, **named: Any) -> Any:
                seen.append(target.read_bytes())
                done = call(*words, **named)
                seen.append(target.read_bytes())
                return done

            p.setattr(os, name, look)
        assert output.resume(lines, "m", retry_errors=True) == ({2}, 0)
    assert set(seen) == set(wanted)
    assert seen.index(wanted[1]) > 4
    assert target.read_bytes() == wanted[1]


def test_record_is_on_the_disk_before_it_counts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Check that all of OUT's bytes are synced, and its name if it is new."""
    disk = Disk(monkeypatch)
    source, target = _write(tmp_path / "in", "{"), tmp_path / "out"
    with batch_output.Output(str(target), source.stat()) as output:
        assert disk.knows_name_of(target)
        for n in range(3):
            output.write({"id": n, "text": "x" * n})
            assert disk.has_all_of(target)
    with batch_output.Output(str(target), source.stat()) as output:
        output.write({"id": 3, "text": ""})
        assert disk.has_all_of(target)


def test_output_that_was_replaced_meanwhile_is_not_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, target = _write(tmp_path / "in", "{"), _write(tmp_path / "out", DONE)

    def lock_late(_: int) -> bool:
        target.rename(tmp_path / "gone")
        _write(target, DONE)
        return True

    monkeypatch.setattr(batch_output, "lock", lock_late)
    with pytest.raises(OutputError, match="another run has just replaced it"):
        batch_output.Output(str(target), source.stat())


@pytest.mark.usefixtures("nothing_loaded")
@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        (["in", "in"], 2, "the same file"),
        (["in", "link"], 2, "the same file"),
        (["in", "."], 1, "cannot be written (Is a directory)"),
        (["in", "no/out"], 1, "cannot be written (No such file or directory)"),
        (["in", "in/out"], 1, "cannot be written (Not a directory)"),
        (["no", "out"], 1, "no: cannot be read (No such file or directory)"),
        (["empty", "out"], 1, "nothing to answer"),
        (["in"], 2, "expected MODEL IN.jsonl OUT.jsonl"),
        (["in", "out", "more"], 2, "expected MODEL IN.jsonl OUT.jsonl"),
        (["in", "out", "--prompt", "x"], 2, "unknown flag --prompt"),
        (["in", "out", "--max_batch_size", "0"], 2, "--max_batch_size is '0'"),
        (["in", "out", "--top_p", "7"], 2, "--top_p is 7.0"),
        (["in", "locked"], 1, "another run is writing it"),
        (["in", "-", "--retry_errors"], 2, "--retry_errors and OUT is -"),
    ],
)
def test_what_cannot_be_is_refused_before_the_model_is_loaded(
    tiny_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    words: list[str],
    code: int,
    said: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    _write(Path("in"), {"prompt": "a"})
    Path("link").symlink_to("in")
    Path("empty").write_text(" \n\n")
    with Path("locked").open("w") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        assert main(["batch", str(tiny_folder), *words]) == code
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("mistral-chat: error: ")
    assert said in line


def test_full_disk_is_named(tiny_folder: Path, tmp_path: Path, run: Run) -> None:
    source = _write(tmp_path / "in", {"prompt": "a", "max_tokens": 1})
    done = run("batch", tiny_folder, source, "/dev/full")
    assert done.code == 1
    (line,) = done.err.splitlines()
    assert "/dev/full: cannot be written (No space left on device)" in line


def test_two_ranks_answer_the_same_and_find_nothing_left(
    tiny_folder: Path, tmp_path: Path, run: Run
) -> None:
    values: list[Any] = [{"prompt": f"Hello {n}", "max_tokens": 1 + n % 4} for n in range(11)]
    values.append({"prompt": "Hello", "json_schema": {"enum": ["red", "green"]}})
    _, expected = _run(tiny_folder, tmp_path, *values)
    words = [tiny_folder, tmp_path / "in", tmp_path / "two", "--temperature", 0]
    done = run("batch", *words, "--nproc_per_node", 2)
    assert done.code == 0, done.err
    assert done.err.count("\n") == 1
    records = _records((tmp_path / "two").read_text())
    assert {record["world_size"] for record in records} == {2}
    assert _texts(records) == _texts(expected)
    again = run("batch", *words, torchrun=2)
    assert again.code == 0, again.err
    assert "mistral-chat: 12 lines answered (12 of them before)\n" in again.err


def test_rank_that_cannot_load_says_so_itself(
    tiny_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    load = Mock(side_effect=OtherRankFailedError("rank 1 has failed"))
    monkeypatch.setattr(start, "load", load)
    source = _write(tmp_path / "in", {"prompt": "a"})
    words = ["batch", str(tiny_folder), str(source), str(tmp_path / "out"), "--device=cpu"]
    assert main(words) == 1
    assert capfd.readouterr() == ("", "")
    assert load.call_count == 1
    assert (tmp_path / "out").read_bytes() == b""


def test_stdin_to_stdout(tiny_folder: Path, run: Run) -> None:
    lines = [json.dumps({"prompt": "a", "max_tokens": n}) for n in (3, 2)]
    done = run("batch", tiny_folder, "-", "-", stdin="\n".join(lines))
    assert done.code == 0
    assert [record["id"] for record in _records(done.out)] == [2, 1]
    (line,) = done.err.splitlines()
    assert line.startswith("mistral-chat: 2 lines answered, 5 tokens, ")


@pytest.mark.parametrize(
    ("n_ranks", "number", "code"),
    [(1, signal.SIGINT, 130), (1, signal.SIGTERM, 143), (2, signal.SIGINT, 130)],
)
def test_signal_ends_at_once_and_keeps_finished_lines(
    tiny_folder: Path, tmp_path: Path, n_ranks: int, number: int, code: int
) -> None:
    values = [{"prompt": "a", "max_tokens": 2}, *[{"prompt": "b", "max_tokens": 480}] * 200]
    source, target = _write(tmp_path / "in", *values), tmp_path / "out"
    words = _words(tiny_folder, source, target, "--nproc_per_node", n_ranks)
    with Piped("mistral_chat", words) as process:
        _await_lines(target, 1)
        os.killpg(process.pid, number)
        asked = time.monotonic()
        ended, _, err = process.finish()
    assert ended == code
    assert time.monotonic() - asked < 60
    assert err.startswith(b"mistral-chat: interrupted: ")
    assert err.count(b"\n") == 1
    assert _records(target.read_text())[0]["id"] == 1


def test_progress_is_for_terminals(
    tiny_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr("mistral_chat.cli.console.terminal.is_fancy", lambda stream: True)
    monkeypatch.setattr(batch_progress, "SHOW_EVERY_S", 0)
    source = _write(tmp_path / "in", *[{"prompt": "a", "max_tokens": 2}] * 3, "oops")
    words = ["batch", str(tiny_folder), str(source), str(tmp_path / "out")]
    assert main(words) == 1
    err = capfd.readouterr().err
    shown = err.split("\r")
    assert any(s.startswith("3/4, ") and "tokens/s" in s and " left, 1 with" in s for s in shown)
    bars = [match for s in shown if (match := re.search(r"^3/4, .* (━+)(─+)\x1b\[K$", s))]
    assert bars
    assert all(len(m[1]) == 3 * (len(m[1]) + len(m[2])) // 4 for m in bars)
    assert shown[-1].startswith("\x1b[Kmistral-chat: error: 1 of 4 lines have an error")


@pytest.mark.parametrize("columns", [0, 5, 30, 45, 60, 200])
def test_progress_never_wraps(monkeypatch: pytest.MonkeyPatch, columns: int) -> None:
    monkeypatch.setattr(os, "get_terminal_size", lambda fd: os.terminal_size((columns, 24)))
    progress = batch_progress.Progress(9, 3, 0, quiet=False, can_retry=True)
    for text in ("", "x" * 30, "x" * 300):
        line = progress._fitted(text)
        assert len(line) <= max(0, columns - 1)
        bar = line.removeprefix(text).strip()
        assert len(bar) in (0, *range(8, 31)) or not line.startswith(text)
        assert bar.count("━") == len(bar) * 3 // 9 or not line.startswith(text)


def test_help_is_printed_and_loads_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["batch", "--help"]) == 0
    out = capsys.readouterr().out
    assert out == request_of(["batch", "--help"])
    assert out.startswith("usage: mistral-chat batch MODEL IN.jsonl OUT.jsonl [flags]\n")
    assert "\n  max_tokens temperature top_p top_k min_p seed stop logprobs    in place" in out
