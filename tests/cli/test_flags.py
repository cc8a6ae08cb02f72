"""Flags: names, values as typed, suggestions, ranges, and that nothing heavy is imported first."""

import re
from pathlib import Path
from typing import Any

import pytest

from mistral_chat.cli.main import request_of
from mistral_chat.cli.requests import ChatRequest
from mistral_chat.errors import UsageError
from tests.conftest import Run

HEAVY = ("huggingface_hub", "mistral_common", "numpy", "prompt_toolkit", "rich", "safetensors",
         "torch", "transformers")  # fmt: skip

# The contract's flags of the main job that this version has, with a value that differs from the
# default and where it arrives.
VALUES: dict[str, tuple[str, Any]] = {
    "prompt": ("Hello", "Hello"),
    "file": ("a.txt", (Path("a.txt"),)),
    "system": ("Be brief", "Be brief"),
    "system_file": ("s.txt", Path("s.txt")),
    "reasoning": ("high", "high"),
    "tools": ("t.json", Path("t.json")),
    "tools_env": ("MY_API_KEY", ("MY_API_KEY",)),
    "tool_timeout": ("2.5", 2.5),
    "json_schema": ("s.json", Path("s.json")),
    "max_tokens": ("5", 5),
    "temperature": ("0.25", 0.25),
    "top_p": ("0.5", 0.5),
    "top_k": ("7", 7),
    "min_p": ("0.125", 0.125),
    "seed": ("11", 11),
    "stop": ("END", ("END",)),
    "logprobs": ("3", 3),
    "resume": ("20260101-000000-abcd", "20260101-000000-abcd"),
    "nproc_per_node": ("2", 2),
    "device": ("cpu", "cpu"),
    "dtype": ("float16", "float16"),
    "max_seq_len": ("64", 64),
    "load_format": ("consolidated", "consolidated"),
    "kv_cache_dtype": ("fp8", "fp8"),
    "quantization": ("int8", "int8"),
}
SWITCHES = ("instruct", "json_object", "json", "stats", "quiet", "yes", "plain", "show_thinking")
NEEDS = {"system": ["--instruct"], "system_file": ["--instruct"], "tools": ["--instruct"],
         "reasoning": ["--instruct"],
         "yes": ["--instruct", "--tools=x.py"], "tool_timeout": ["--instruct", "--tools=x.py"],
         "tools_env": ["--instruct", "--tools=x.py"], "logprobs": ["--json"],
         "resume": ["--instruct"]}  # fmt: skip


def _parse(*words: str) -> ChatRequest:
    return request_of(["MODEL", *words])


def _arrived(options: ChatRequest, name: str) -> Any:
    for part in (options, options.sampling, options.engine):
        if hasattr(part, name):
            return getattr(part, name)
    raise AssertionError(f"--{name} arrives nowhere")


@pytest.fixture
def without_heavy(tmp_path: Path) -> dict[str, str]:
    """An environment in which importing anything heavy fails."""
    for name in HEAVY:
        (tmp_path / f"{name}.py").write_text(f"raise SystemExit('{name} was imported')\n")
    return {"PYTHONPATH": str(tmp_path)}


@pytest.mark.parametrize(
    ("words", "code"),
    [
        (["--help"], 0),
        (["--version"], 0),
        (["MODEL", "--promt", "x"], 2),
        (["MODEL", "--temperature", "-1"], 2),
        (["MODEL", "--json_object", "--stop", "x"], 2),
        (["demo", "--promt", "x"], 2),
        (["bench", "MODEL", "--dtyp", "auto"], 2),
        (["bench", "--help"], 0),
        (["/nowhere", "--prompt", "x"], 1),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else str(value),
)
def test_nothing_heavy_is_imported_before_flags_are_right(
    run: Run, without_heavy: dict[str, str], words: list[str], code: int
) -> None:
    done = run(*words, env=without_heavy)
    assert "was imported" not in done.err
    assert done.code == code
    assert len(done.error_lines) == (0 if code == 0 else 1)


def test_heavy_imports_are_seen_by_this_check(
    run: Run, tiny_folder: Path, without_heavy: dict[str, str]
) -> None:
    done = run(tiny_folder, "--prompt", "x", "--device", "cpu", env=without_heavy)
    assert "was imported" in done.err


def test_help_names_every_flag_once() -> None:
    text = request_of(["--help"])
    named = re.findall(r"^  --(\w+)", text, re.MULTILINE)
    assert sorted(named) == sorted([*VALUES, *SWITCHES, "no_save", "config", "help", "version"])
    assert "\x1b" not in text


@pytest.mark.parametrize("name", VALUES)
@pytest.mark.parametrize("equals", [False, True])
@pytest.mark.parametrize("hyphens", [False, True])
def test_flag_arrives_however_it_is_written(name: str, equals: bool, hyphens: bool) -> None:
    text, expected = VALUES[name]
    typed = name.replace("_", "-") if hyphens else name
    needed = NEEDS.get(name, [])
    assert _arrived(_parse(*needed), name) != expected
    words = [f"--{typed}={text}"] if equals else [f"--{typed}", text]
    assert _arrived(_parse(*words, *needed), name) == expected
    assert _arrived(_parse(*needed, *words), name) == expected


@pytest.mark.parametrize("name", SWITCHES)
def test_switch_arrives(name: str) -> None:
    needed = NEEDS.get(name, [])
    assert not _arrived(_parse(*needed), name)
    assert _arrived(_parse(f"--{name}", *needed), name)


@pytest.mark.parametrize("name", ["file", "stop"])
def test_repeatable_flag_keeps_all_in_order(name: str) -> None:
    values = _arrived(_parse(f"--{name}", "b", f"--{name}=a", f"--{name}", "b"), name)
    assert [str(value) for value in values] == ["b", "a", "b"]


@pytest.mark.parametrize("name", [*VALUES, *SWITCHES])
def test_misspelt_flag_suggests_the_right_one(name: str) -> None:
    typed = name[:2] + name[3:] if len(name) > 4 else name + name[-1]
    assert typed not in {*VALUES, *SWITCHES}
    with pytest.raises(UsageError, match=rf"unknown flag --{typed}: did you mean --{name}\?"):
        _parse(f"--{typed}", "x")


@pytest.mark.parametrize(
    "text", ["Hello, world", "42", "None", "[a]", "# x", "", "a=b", "é\n", "-"]
)
def test_text_after_the_model_is_the_prompt(text: str) -> None:
    options = _parse(text, "--max_tokens", "3")
    assert (options.prompt, options.engine.model) == (text, Path("MODEL"))
    assert _parse("--max_tokens", "3", text).prompt == text
    assert _parse("--", text).prompt == text


@pytest.mark.parametrize("word", ["--xyzzy", "-x", "---prompt", "-"])
def test_word_that_is_no_flag_is_never_taken_for_one(word: str) -> None:
    with pytest.raises(UsageError, match=r"unknown flag|expected one MODEL"):
        _parse(word, "x")


def test_commands_without_a_prompt_take_no_text() -> None:
    with pytest.raises(UsageError, match="found 'x' after MODEL: expected one MODEL and flags"):
        request_of(["inspect", "MODEL", "x"])


@pytest.mark.parametrize("abbreviated", ["--promp", "--max_tok", "--sys", "--tem"])
def test_abbreviation_is_not_guessed(abbreviated: str) -> None:
    with pytest.raises(UsageError, match="unknown flag"):
        _parse(abbreviated, "1")


@pytest.mark.parametrize("name", [name for name in VALUES if name != "resume"])
def test_flag_without_its_value_is_refused(name: str) -> None:
    with pytest.raises(UsageError, match=f"--{name} needs a value; found nothing"):
        _parse(f"--{name}")
    with pytest.raises(UsageError, match=f"--{name} needs a value; found the flag --json"):
        _parse(f"--{name}", "--json")


@pytest.mark.parametrize("text", ["--json", "--prompt", "-1", "--", "-h", "--help", "- item", "="])
def test_text_that_looks_like_a_flag_can_be_given(text: str) -> None:
    assert _parse(f"--prompt={text}").prompt == text


@pytest.mark.parametrize("text", ["-1", "--", "-h", "- item", "--no-such-flag", "---"])
def test_text_that_begins_with_a_hyphen_is_a_value(text: str) -> None:
    assert _parse("--prompt", text).prompt == text


@pytest.mark.parametrize(
    ("words", "asks"),
    [
        (["--help"], True),
        (["-h"], True),
        (["--prompt", "x", "--help"], True),
        (["--prompt=--help"], False),
        (["--prompt", "-h"], False),
        (["--", "--help"], False),
    ],
)
def test_help_is_asked_for_by_the_flag_alone(words: list[str], asks: bool) -> None:
    assert isinstance(request_of(["MODEL", *words]), str) == asks


@pytest.mark.parametrize(
    ("name", "refused", "taken"),
    [
        ("max_tokens", ["0", "-1", "1.5", "many", ""], ["1", "1000000"]),
        (
            "temperature",
            ["-1", "-0.001", "nan", "inf", "-inf", "hot", "1e39"],
            ["0", "0.001", "1e30"],
        ),
        ("top_p", ["0", "-1", "1.001", "2", "nan"], ["0.001", "1"]),
        ("top_k", ["-1", "0.5"], ["0", "1"]),
        ("min_p", ["-0.001", "1.001", "nan"], ["0", "1"]),
        ("seed", ["-1", str(2**63), "1e3"], ["0", str(2**63 - 1)]),
        ("stop", [""], [" ", "\n"]),
        ("logprobs", ["-1", "1001", "all"], ["0", "1000"]),
        ("nproc_per_node", ["0", "-1", "gpu"], ["1"]),
        ("max_seq_len", ["0", "1", "-5"], ["2"]),
        ("device", ["gpu", "CUDA", "cuda:0", ""], ["auto", "cuda", "cpu"]),
        ("dtype", ["int8", "fp16", ""], ["auto", "bfloat16", "float16", "float32"]),
        ("load_format", ["gguf", ""], ["auto", "consolidated", "hf", "dummy"]),
        ("quantization", ["int2", "8", ""], ["auto", "none", "fp8", "int8", "int4"]),
        ("kv_cache_dtype", ["int8", ""], ["auto", "fp8"]),
    ],
)
def test_value_out_of_range_is_refused_by_name(
    name: str, refused: list[str], taken: list[str]
) -> None:
    needed = NEEDS.get(name, [])
    for text in taken:
        _parse(*needed, f"--{name}={text}")
    for text in refused:
        with pytest.raises(UsageError, match=rf"--{name}\b"):
            _parse(*needed, f"--{name}={text}")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--system", "x"], "--system needs --instruct"),
        (["--system_file", "x"], "--system_file needs --instruct"),
        (["--tools", "x.json"], "--tools needs --instruct"),
        (["--logprobs", "2"], "--logprobs needs --json"),
        (["--logprobs", "0"], "--logprobs needs --json"),
        (["--instruct", "--system", "x", "--system_file", "y"], "--system and --system_file"),
        (["--tools", "x.py"], "--tools needs --instruct"),
        (["--instruct", "--tools", "x.txt"], "expected a .json file of schemas, or a .py file"),
        (["--instruct", "--yes"], "--yes needs --tools FILE.py"),
        (["--instruct", "--tools", "x.json", "--yes"], "--yes needs --tools FILE.py"),
        (["--instruct", "--tool_timeout", "3"], "--tool_timeout needs --tools FILE.py"),
        (["--instruct", "--tools=x.json", "--tools_env=A"], "--tools_env needs --tools FILE.py"),
        (["--instruct", "--tools=x.json", "--tool-timeout=3"], "--tool_timeout needs --tools"),
        (["--instruct", "--tools=x.py", "--tool_timeout=0"], "--tool_timeout is 0.0: expected"),
        (["--instruct", "--tools=x.py", "--tool_timeout=inf"], "--tool_timeout is inf: expected"),
        (["--instruct", "--tools=x.py", "--tool_timeout=nan"], "--tool_timeout is nan: expected"),
        (["--instruct", "--tools=x.py", "--tool_timeout=x"], "'x' is no number"),
        (["--stats", "--quiet"], "--stats and --quiet"),
        (["--show_thinking", "--quiet"], "--show_thinking and --quiet"),
        (["--reasoning", "high"], "--reasoning needs --instruct"),
        (["--instruct", "--reasoning", "low"], "'low' is none of none, high"),
        (["--json_schema", "x", "--json_object"], "--json_schema and --json_object"),
        (["again", "--prompt", "x"], "found the text 'again' after MODEL and --prompt"),
        (["Why", "is", "it?"], "quoted: mistral-chat MODEL 'Why is it?'"),
        (["x" * 5000, "y"], "expected one MODEL and one text"),
    ],
)
def test_flags_that_do_not_go_together_are_refused(words: list[str], said: str) -> None:
    with pytest.raises(UsageError, match=re.escape(said)):
        _parse(*words)


def test_model_is_needed() -> None:
    with pytest.raises(UsageError, match="MODEL is missing"):
        request_of(["--prompt", "x"])


def test_preset_sets_what_flags_leave_open(tmp_path: Path) -> None:
    path = tmp_path / "preset.toml"
    path.write_text(
        "[run]\ninstruct = true\ndevice = 'cpu'\nmax_seq_len = 64\nshow_thinking = true\n"
        "[generation]\ntemperature = 0\nstop = ['a', '#']\nmax_tokens = 3\nreasoning = 'high'\n"
    )
    options = _parse("--config", str(path), "--max_tokens", "9", "--stop", "b")
    assert options.instruct
    assert (options.engine.device, options.engine.max_seq_len) == ("cpu", 64)
    assert (options.sampling.temperature, options.sampling.max_tokens) == (0, 9)
    assert options.sampling.stop == ("b",)
    assert (options.reasoning, options.show_thinking) == ("high", True)


@pytest.mark.parametrize("name", ["prompt", "file", "system", "json", "config"])
def test_preset_may_not_say_what_to_answer(tmp_path: Path, name: str) -> None:
    path = tmp_path / "preset.toml"
    path.write_text(f"[run]\n{name} = 'x'\n")
    with pytest.raises(UsageError, match=rf"unknown key {name} in \[run\]"):
        _parse("--config", str(path))


@pytest.mark.parametrize(
    ("words", "resume"),
    [
        ((), None),
        (("--resume",), "latest"),
        (("--resume", "20260101-000000-abcd"), "20260101-000000-abcd"),
        (("--resume=2026",), "2026"),
        (("--resume", "--stats"), "latest"),
    ],
)
def test_resume_takes_an_id_or_nothing(words: tuple[str, ...], resume: str | None) -> None:
    options = request_of([*words, "--instruct", "MODEL"])
    assert options.resume == resume
    assert options.engine.model == Path("MODEL")


def test_no_save_is_heard() -> None:
    assert not _parse("--instruct").no_save
    assert _parse("--instruct", "--no-save").no_save


@pytest.mark.parametrize("words", [("--resume",), ("--instruct", "--resume", "--prompt", "x")])
def test_resume_is_for_chats(words: tuple[str, ...]) -> None:
    with pytest.raises(UsageError, match="resume"):
        _parse(*words)
