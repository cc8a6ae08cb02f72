"""One prompt in, one answer out: streams, codes and figures, by the real command."""

import json
import os
import signal
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal

import pytest

from mistral_chat.chat.answer import Answer, Usage
from mistral_chat.cli.console import render
from mistral_chat.cli.console.terminal import is_fancy
from mistral_chat.cli.main import request_of
from mistral_chat.cli.requests import ChatRequest
from mistral_chat.config import SamplingParams
from tests.conftest import ROOT, Run, command_env
from tests.warm import Piped, warm

KEYS = {"text", "finish_reason", "tool_calls", "seed", "usage", "timings", "model", "world_size"}


def _options(*words: str) -> ChatRequest:
    return request_of(["MODEL", *words])


@pytest.mark.parametrize(
    "text", ["Hello, world", "42", "None", "[a]", "# x", "--x y", "", "a=b", "{'k': 1}", "é\n"]
)
def test_text_flags_arrive_as_typed(text: str) -> None:
    assert _options("--instruct", "--prompt", text, "--system", text).prompt == text
    assert _options("--instruct", f"--system={text}").system == text


@pytest.mark.parametrize(
    ("reason", "params", "completion_tokens", "said"),
    [
        ("stop", SamplingParams(), 5, None),
        ("length", SamplingParams(max_tokens=5), 5, "stopped at --max_tokens 5"),
        (
            "length",
            SamplingParams(),
            256,
            "stopped at --max_tokens 256, the default of plain completion",
        ),
        ("length", SamplingParams(), 502, "stopped: the context of 512 tokens is full"),
        ("cancelled", SamplingParams(), 5, "interrupted"),
    ],
)
def test_notice_says_why_an_answer_ended(
    reason: Literal["stop", "length", "cancelled"],
    params: SamplingParams,
    completion_tokens: int,
    said: str | None,
) -> None:
    answer = Answer(
        text="x",
        finish_reason=reason,
        token_ids=(),
        tool_calls=(),
        seed=1,
        usage=Usage(10, 0, completion_tokens),
        first_token_s=None,
        decode_tokens_per_s=None,
        logprobs=None,
        prompt_logprobs=None,
        stopped_by_text=False,
    )
    assert render.notice_of(answer, params, 512) == said


@pytest.mark.parametrize(
    ("at_terminal", "environment", "fancy"),
    [
        (True, {"TERM": "xterm"}, True),
        (False, {"TERM": "xterm"}, False),
        (True, {"TERM": "xterm", "NO_COLOR": "1"}, False),
        (True, {"TERM": "dumb"}, False),
        (True, {}, False),
    ],
)
def test_colour_is_for_terminals_that_have_it(
    monkeypatch: pytest.MonkeyPatch, at_terminal: bool, environment: dict[str, str], fancy: bool
) -> None:
    for name in ("TERM", "NO_COLOR"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    stream: Any = SimpleNamespace(isatty=lambda: at_terminal)
    assert is_fancy(stream) == fancy


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("*.toml")), ids=lambda p: p.stem)
def test_shipped_presets_are_valid(path: Path) -> None:
    from mistral_chat.model.args import TransformerArgs

    options = _options("--config", str(path), "--load_format", "dummy")
    assert options.engine.shape is not None
    args = TransformerArgs.from_dict(options.engine.shape)
    assert (options.nproc_per_node or 1) <= args.n_heads


def test_same_seed_gives_the_same_answer_as_json_and_as_text(run: Run, tiny_folder: Path) -> None:
    words = ["--max_tokens", 6, "--seed", 11]
    as_json = run(tiny_folder, "--prompt", "Hello", *words, "--json", "--logprobs", 3, "--stats")
    value = json.loads(as_json.out)
    assert (as_json.code, as_json.out.count("\n")) == (0, 1)
    assert set(value) == KEYS | {"logprobs"}
    assert (value["seed"], value["finish_reason"], value["tool_calls"]) == (11, "length", [])
    assert (value["model"], value["world_size"]) == (str(tiny_folder), 1)
    assert value["usage"] == {"prompt_tokens": 2, "cached_tokens": 0, "completion_tokens": 6}
    assert set(value["timings"]) == {"load_s", "first_token_s", "decode_tokens_per_s"}
    assert all(seconds > 0 for seconds in value["timings"].values())
    assert len(value["logprobs"]) == 6
    assert all(len(entry["top"]) == 3 for entry in value["logprobs"])
    start, notice, stats = as_json.err.splitlines()
    assert start.startswith("mistral-chat: start ")
    assert notice == "mistral-chat: stopped at --max_tokens 6"
    assert "context left 504" in stats
    assert "seed 11" in stats

    as_text = run(tiny_folder, *words, "--quiet", stdin="Hello\n")
    assert (as_text.code, as_text.err) == (0, "")
    assert as_text.out == value["text"] + "\n"
    assert "\x1b" not in as_text.out + as_json.err


def test_stop_ends_before_its_text(run: Run, tiny_folder: Path) -> None:
    words = ["--prompt", "Hello", "--max_tokens", 300, "--seed", 1, "--json"]
    value = json.loads(run(tiny_folder, *words, "--stop", "never here", "--stop", "e").out)
    assert value["finish_reason"] == "stop"
    assert "e" not in value["text"]
    assert 0 < value["usage"]["completion_tokens"] < 300


def test_full_context_is_said(run: Run, tiny_folder: Path) -> None:
    done = run(tiny_folder, "--instruct", "--prompt", "Hello", "--max_seq_len", 32, "--seed", 1)
    assert done.err == "mistral-chat: stopped: the context of 32 tokens is full\n"


@pytest.mark.parametrize("n_ranks", [1, 2])
def test_interrupt_keeps_what_was_written(roomy_folder: Path, n_ranks: int) -> None:
    words = [str(roomy_folder), "--prompt", "Hello", "--max_tokens", "8000", "--seed", "1"]
    words += ["--nproc_per_node", str(n_ranks)]
    with Piped("mistral_chat", words) as process:
        begun = process.stdout.read(5)
        os.killpg(process.pid, signal.SIGINT)  # as a terminal does
        code, out, err = process.finish()
    assert code == 130
    assert len(begun) == 5
    assert out.endswith(b"\n")
    assert err == b"mistral-chat: interrupted\n"


@pytest.mark.parametrize("words", [["--help"], ["demo", "--help"], ["bench", "--help"]])
def test_help_is_printed_once(run: Run, words: list[str]) -> None:
    done = run(*words)
    assert (done.code, done.err) == (0, "")
    assert done.out.count("usage: ") == 1


def test_no_words_at_all_shows_usage(run: Run) -> None:
    done = run()
    assert (done.code, done.out) == (2, "")
    assert done.err.startswith("usage: mistral-chat MODEL [PROMPT] [flags]")


def test_word_that_is_a_command_needs_a_dot_to_be_a_folder(run: Run) -> None:
    assert "MODEL" in run("inspect").err
    assert "inspect: no such folder" in run("./inspect", "--prompt", "x").err


@pytest.mark.parametrize("n_ranks", [1, 2])
def test_embedded_model_completes_a_pipe(run: Run, embedded_folder: Path, n_ranks: int) -> None:
    done = run(embedded_folder, "--max_tokens", 5, "--temperature", 0, "--nproc_per_node", n_ranks,
               stdin="The capital of France is")  # fmt: skip
    assert done.code == 0, done.err
    assert done.out == " Paris.\n\nThe\n"
    assert done.err == "mistral-chat: stopped at --max_tokens 5\n"


def test_embedded_model_answers_under_torchrun_from_a_checkout(embedded_folder: Path) -> None:
    launcher = ["--nproc-per-node", "2", "mistral-chat", str(embedded_folder)]
    words = ["--instruct", "--prompt", "What is the capital of France?", "--temperature", "0"]
    typed = [*launcher, *words, "--json"]
    _, out, _ = warm().run("torch.distributed.run", typed, command_env(), b"", 300)
    value = json.loads(out)
    assert value["text"] == "The capital of France is Paris."
    assert (value["finish_reason"], value["world_size"]) == ("stop", 2)


def test_demo_is_the_main_job_on_the_embedded_model(run: Run, embedded_folder: Path) -> None:
    assert run("demo", "--path").out == f"{embedded_folder}\n"
    done = run("demo", "--prompt", "What is the capital of France?", "--temperature", 0, "--json")
    value = json.loads(done.out)
    assert value["text"] == "The capital of France is Paris."
    assert value["world_size"] == 2
    assert os.path.samefile(value["model"], embedded_folder)  # noqa: PTH121
