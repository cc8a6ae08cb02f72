"""`--json_schema` and `--json_object` on the real command: what is printed, which code, when."""

import json
from pathlib import Path

import jsonschema
import pytest

from mistral_chat.cli.main import main, request_of
from mistral_chat.errors import UsageError
from tests.conftest import Run

SCHEMA = {
    "type": "object",
    "properties": {
        "city": {"type": "string", "minLength": 1, "maxLength": 12},
        "population": {"type": "integer", "minimum": 0},
        "tags": {"type": "array", "items": {"enum": ["port", "capital"]}, "maxItems": 2},
    },
    "required": ["city", "population"],
    "additionalProperties": False,
}
HOT = ("--prompt", "A city:", "--temperature", "1.5", "--seed", "4")


@pytest.fixture
def schema_file(tmp_path: Path) -> Path:
    path = tmp_path / "city.json"
    path.write_text(json.dumps(SCHEMA))
    return path


def test_answer_of_two_ranks_is_valid(run: Run, tiny_folder: Path, schema_file: Path) -> None:
    words = ("--instruct", "--nproc_per_node", 2, "--max_seq_len", 256)
    done = run(tiny_folder, *HOT, *words, "--json_schema", schema_file)
    assert (done.code, done.error_lines) == (0, []), done.err
    jsonschema.validate(json.loads(done.out), SCHEMA)
    assert done.out.endswith("}\n")


def test_json_holds_the_answer_as_text(run: Run, tiny_folder: Path, schema_file: Path) -> None:
    done = run(tiny_folder, *HOT, "--json-schema", schema_file, "--json", "--quiet")
    assert (done.code, done.err) == (0, "")
    value = json.loads(done.out)
    assert value["finish_reason"] == "stop"
    jsonschema.validate(json.loads(value["text"]), SCHEMA)


@pytest.mark.parametrize("words", [("--json_object",), ("--json_object", "--json", "--quiet")])
def test_cut_answer_says_so_and_stays(run: Run, tiny_folder: Path, words: tuple[str, ...]) -> None:
    done = run(tiny_folder, *HOT, "--max_tokens", 4, *words)
    assert done.code == 1
    if "--json" in words:
        value = json.loads(done.out)
        assert value["finish_reason"] == "length"
        text = value["text"]
    else:
        text = done.out
    assert text.lstrip().startswith("{")
    said = "stopped at --max_tokens 4: the answer is no whole JSON text; give it more room"
    assert done.err == f"mistral-chat: error: {said}\n"


@pytest.mark.usefixtures("nothing_loaded")
def test_wrong_schema_is_named_before_weights_are_loaded(
    tiny_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "wrong.json"
    path.write_text('{"not": {}}')
    assert main([str(tiny_folder), *HOT, "--json_schema", str(path)]) == 1
    said = 'answers cannot be kept to this schema: not supported: "not"'
    assert capsys.readouterr() == ("", f"mistral-chat: error: {path}: {said}\n")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--instruct", "--tools", "t.json", "--json_object"], "--tools and --json_object"),
        (["--instruct", "--tools", "t.json", "--json_schema", "s"], "--tools and --json_schema"),
        (["--stop", "x", "--json_schema", "s"], "--stop and --json_schema"),
        (["--json_object", "--json_schema", "s"], "--json_schema and --json_object"),
        (["--json_object=yes"], "takes no value"),
        (["--json_schema"], "--json_schema needs a value"),
    ],
)
def test_flags_that_exclude_each_other_are_refused(words: list[str], said: str) -> None:
    with pytest.raises(UsageError, match=said):
        request_of(["MODEL", *words])


def test_flags_arrive() -> None:
    options = request_of(["MODEL", "--json-schema", "a.json"])
    assert (options.json_schema, options.json_object) == (Path("a.json"), False)
    assert request_of(["MODEL", "--json_object"]).json_object
