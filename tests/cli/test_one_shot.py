"""One prompt in, one answer out: streams, codes and figures, by the real command."""

import io
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from mistral_chat.cli import flags, one_shot
from mistral_chat.errors import PromptError
from tests.conftest import ROOT, Run, command_env

KEYS = {"text", "finish_reason", "tool_calls", "seed", "usage", "timings", "model", "world_size"}


def _options(*words: str) -> flags.Options:
    return flags.parse(flags.normalize(["MODEL", *words]))


def _set_stdin(monkeypatch: pytest.MonkeyPatch, data: bytes) -> None:
    stdin = SimpleNamespace(buffer=io.BytesIO(data), isatty=lambda: False)
    monkeypatch.setattr("sys.stdin", stdin)


def test_prompt_is_files_then_stdin_then_flag(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for name in "ab":
        (tmp_path / name).write_text(f"file {name}\n")
    _set_stdin(monkeypatch, b"piped\n\n")
    words = [f"--file={tmp_path / name}" for name in "ab"]
    prompt = one_shot.read_prompt(_options(*words, "--prompt", "asked\n"))
    assert prompt == "file a\n\nfile b\n\npiped\n\n\nasked\n"


def test_prompt_alone_is_left_as_typed(monkeypatch: pytest.MonkeyPatch) -> None:
    _set_stdin(monkeypatch, b"")
    assert one_shot.read_prompt(_options("--prompt", "  x \n")) == "  x \n"


@pytest.mark.parametrize("words", [["--json"], ["--file", "x"]])
def test_terminal_without_a_prompt_is_refused_for_one_shot_flags(
    monkeypatch: pytest.MonkeyPatch, words: list[str]
) -> None:
    monkeypatch.setattr("sys.stdin", SimpleNamespace(isatty=lambda: True))
    with pytest.raises(PromptError, match="give --prompt"):
        one_shot.read_prompt(_options(*words))


@pytest.mark.parametrize(
    "text", ["Hello, world", "42", "None", "[a]", "# x", "--x y", "", "a=b", "{'k': 1}", "é\n"]
)
def test_text_flags_arrive_as_typed(text: str) -> None:
    assert _options("--instruct", "--prompt", text, "--system", text).prompt == text
    assert _options("--instruct", f"--system={text}").system == text


@pytest.mark.parametrize("name", ["max_tokens", "max-tokens"])
def test_underscore_and_hyphen_are_the_same(name: str) -> None:
    assert _options(f"--{name}", "5").sampling.max_tokens == 5
    assert _options(f"--{name}=5").sampling.max_tokens == 5


def test_flags_win_over_the_preset(tmp_path: Path) -> None:
    path = tmp_path / "preset.toml"
    path.write_text("[run]\ninstruct = true\n[generation]\ntemperature = 0.1\ntop_k = 3\n")
    options = _options("--config", str(path), "--temperature", "0.9")
    assert options.instruct
    assert (options.sampling.temperature, options.sampling.top_k) == (0.9, 3)


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("*.toml")), ids=lambda p: p.stem)
def test_shipped_presets_are_valid(path: Path) -> None:
    from mistral_chat.model.args import TransformerArgs

    options = _options("--config", str(path), "--load_format", "dummy")
    assert options.engine.shape is not None
    args = TransformerArgs.from_dict(options.engine.shape)
    assert (options.nproc_per_node or 1) <= args.n_heads


def test_answer_and_one_newline_alone_on_stdout(run: Run, tiny_folder: Path) -> None:
    done = run(tiny_folder, "--quiet", "--temperature", 0, "--max_tokens", 5, stdin="Hello\n")
    again = run(tiny_folder, "--temperature", 0, "--max_tokens", 5, "--prompt", "Hello", "--json")
    assert (done.code, done.err) == (0, "")
    assert done.out == json.loads(again.out)["text"] + "\n"
    assert "\x1b" not in done.out + again.err
    assert again.err == "mistral-chat: stopped at --max_tokens 5\n"


def test_json_holds_the_contract(run: Run, tiny_folder: Path) -> None:
    words = ["--json", "--logprobs", 3, "--max_tokens", 6, "--seed", 11, "--stats"]
    first, second = (run(tiny_folder, "--prompt", "Hello", *words) for _ in range(2))
    value = json.loads(first.out)
    assert first.out.count("\n") == 1
    assert set(value) == KEYS | {"logprobs"}
    assert value["seed"] == 11
    assert value["finish_reason"] == "length"
    assert value["usage"] == {"prompt_tokens": 2, "cached_tokens": 0, "completion_tokens": 6}
    assert set(value["timings"]) == {"load_s", "first_token_s", "decode_tokens_per_s"}
    assert len(value["logprobs"]) == 6
    assert all(len(entry["top"]) == 3 for entry in value["logprobs"])
    assert json.loads(second.out)["text"] == value["text"]
    assert "seed 11" in first.err
    assert "context left 504" in first.err


def test_max_tokens_of_plain_completion_is_said_to_be_a_default(
    run: Run, tiny_folder: Path
) -> None:
    done = run(tiny_folder, "--prompt", "Hello")
    assert "stopped at --max_tokens 256, the default of plain completion" in done.err


def test_full_context_is_said(run: Run, tiny_folder: Path) -> None:
    done = run(tiny_folder, "--instruct", "--prompt", "Hello", "--max_seq_len", 32, "--seed", 1)
    assert done.err == "mistral-chat: stopped: the context of 32 tokens is full\n"


def test_stop_ends_before_its_text(run: Run, tiny_folder: Path) -> None:
    common = ("--prompt", "Hello", "--temperature", 0, "--max_tokens", 12, "--json")
    text = json.loads(run(tiny_folder, *common).out)["text"]
    stop = text[len(text) // 2 : len(text) // 2 + 3]
    value = json.loads(run(tiny_folder, *common, "--stop", "never here", "--stop", stop).out)
    assert value["text"] == text[: text.index(stop)]
    assert value["finish_reason"] == "stop"


def test_interrupt_keeps_what_was_written(tiny_folder: Path) -> None:
    command = [sys.executable, "-m", "mistral_chat", str(tiny_folder), "--prompt", "Hello",
               "--max_tokens", "480"]  # fmt: skip
    with subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=command_env(),
        cwd=ROOT,
    ) as process:
        assert process.stdout is not None
        begun = process.stdout.read(5)
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=20)
    assert process.returncode == 130
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
    assert done.err.startswith("usage: mistral-chat MODEL [flags]")


def test_word_that_is_a_command_needs_a_dot_to_be_a_folder(run: Run) -> None:
    assert "not built yet" in run("inspect").err
    assert "inspect: no such folder" in run("./inspect", "--prompt", "x").err


@pytest.mark.parametrize("n_ranks", [1, 2, 3])
def test_embedded_model_completes_a_pipe(run: Run, embedded_folder: Path, n_ranks: int) -> None:
    done = run(embedded_folder, "--max_tokens", 5, "--temperature", 0, "--nproc_per_node", n_ranks,
               stdin="The capital of France is")  # fmt: skip
    assert done.code == 0, done.err
    assert done.out == " Paris.\n\nThe\n"
    assert done.err == "mistral-chat: stopped at --max_tokens 5\n"


def test_embedded_model_answers_under_torchrun_from_a_checkout(embedded_folder: Path) -> None:
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    words = [str(embedded_folder), "--instruct", "--prompt", "What is the capital of France?"]
    done = subprocess.run(
        [*launcher, "mistral-chat", *words, "--temperature", "0", "--json"],
        capture_output=True,
        timeout=120,
        env=command_env(),
        cwd=ROOT,
        check=False,
        stdin=subprocess.DEVNULL,
    )
    value = json.loads(done.stdout)
    assert value["text"] == "The capital of France is Paris."
    assert (value["finish_reason"], value["world_size"]) == ("stop", 2)


def test_demo_is_the_main_job_on_the_embedded_model(run: Run, embedded_folder: Path) -> None:
    assert run("demo", "--path").out == f"{embedded_folder}\n"
    done = run("demo", "--prompt", "What is the capital of France?", "--temperature", 0, "--json")
    value = json.loads(done.out)
    assert value["text"] == "The capital of France is Paris."
    assert value["world_size"] == 2
    assert os.path.samefile(value["model"], embedded_folder)  # noqa: PTH121
