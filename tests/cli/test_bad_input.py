"""Each bad input, by the real command: one line that names it, the right code, nothing running."""

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from mistral_chat.cli import start
from mistral_chat.config import EngineConfig
from mistral_chat.engine import start_up
from mistral_chat.engine.ranks.group import Group, Place
from mistral_chat.errors import TokenizerError
from mistral_chat.model import hf
from mistral_chat.model.folder import ModelFolder
from tests.conftest import ROOT, TINY, Finished, Run, command_env, random_weights, write_params
from tests.warm import Piped

PROMPT = ("--prompt", "Hello", "--max_tokens", "2", "--device", "cpu")
WEIGHTS = "consolidated.safetensors"
HF_WEIGHTS = "model.safetensors"


def _no_params(folder: Path) -> None:
    (folder / "params.json").unlink()


def _no_weights(folder: Path) -> None:
    (folder / WEIGHTS).unlink()


def _no_tokenizer(folder: Path) -> None:
    (folder / "tokenizer.model.v3").unlink()


def _two_tokenizers(folder: Path) -> None:
    (folder / "tekken.json").write_text("{}")


def _invalid_json(folder: Path) -> None:
    (folder / "params.json").write_text('{"dim": 64,')


def _json_list(folder: Path) -> None:
    (folder / "params.json").write_text("[1]")


def _unreadable_json(folder: Path) -> None:
    (folder / "params.json").unlink()
    (folder / "params.json").mkdir()


def _truncated(folder: Path) -> None:
    size = (folder / WEIGHTS).stat().st_size
    os.truncate(folder / WEIGHTS, size - 1000)


def _index_of_missing_file(folder: Path) -> None:
    weight_map = dict.fromkeys(random_weights(TINY), "consolidated-00001-of-00002.safetensors")
    (folder / WEIGHTS).unlink()
    (folder / f"{WEIGHTS}.index.json").write_text(json.dumps({"weight_map": weight_map}))


def _wrong_tensors(folder: Path) -> None:
    weights = load_file(folder / WEIGHTS)
    del weights["layers.1.attention.wk.weight"]
    weights["layers.9.attention.wk.weight"] = torch.ones(2)
    weights["norm.weight"] = torch.ones(65)
    weights["layers.0.ffn_norm.weight"] = torch.ones(64, dtype=torch.int32)
    save_file(weights, folder / WEIGHTS)


def _nan_weights(folder: Path) -> None:
    weights = load_file(folder / WEIGHTS)
    weights["layers.1.attention.wo.weight"][3] = torch.nan
    save_file(weights, folder / WEIGHTS)


def _as_hf(**changes: Any) -> Callable[[Path], None]:
    """The same folder in Hugging Face's layout, with changes to config.json."""

    def change(folder: Path) -> None:
        config = {
            "architectures": ["MistralForCausalLM"],
            "hidden_size": 64,
            "intermediate_size": 96,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "rms_norm_eps": 1e-5,
            "rope_theta": 1e6,
            "sliding_window": None,
            "vocab_size": 32768,
        }
        _no_params(folder)
        weights = load_file(folder / WEIGHTS)
        _no_weights(folder)
        save_file({hf.stored_name(name): w for name, w in weights.items()}, folder / HF_WEIGHTS)
        (folder / "config.json").write_text(json.dumps(config | changes))

    return change


def _hf_of_another_shape(folder: Path) -> None:
    _as_hf()(folder)
    write_params(folder, TINY, hidden_dim=128)


def _hf_wrong_tensors(folder: Path) -> None:
    _as_hf()(folder)
    weights = load_file(folder / HF_WEIGHTS)
    del weights["model.layers.1.self_attn.k_proj.weight"]
    weights["model.layers.0.self_attn.q_proj.bias"] = torch.ones(64)
    weights["model.norm.weight"] = torch.ones(65)
    save_file(weights, folder / HF_WEIGHTS)
    os.truncate(folder / HF_WEIGHTS, (folder / HF_WEIGHTS).stat().st_size - 1000)


def _hf_tokenizer_alone(folder: Path) -> None:
    _as_hf()(folder)
    (folder / "tokenizer.model.v3").rename(folder / "tokenizer.json")


def _params(**changes: Any) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        write_params(folder, TINY, **changes)

    return change


BROKEN: list[tuple[Callable[[Path], None], tuple[str, ...]]] = [
    (_no_params, ("params.json is missing",)),
    (_nan_weights, ("scores are no numbers (NaN or infinite)", "weights are damaged")),
    (_no_weights, ("weights are missing",)),
    (_no_tokenizer, ("tokenizer is missing",)),
    (_two_tokenizers, ("2 tokenizers", "tekken.json", "tokenizer.model.v3")),
    (_invalid_json, ("params.json", "not JSON")),
    (_json_list, ("params.json", "expected a JSON object")),
    (_unreadable_json, ("params.json", "is a folder: expected a file")),
    (_truncated, (WEIGHTS, "truncated")),
    (_index_of_missing_file, ("index.json names consolidated-00001-of-00002.safetensors",)),
    (
        _wrong_tensors,
        (
            "layers.1.attention.wk.weight is missing",
            "ers.0.ffn_norm.weight in consolidated.safetensors has type I32",
        ),
    ),
    (
        _as_hf(architectures=["LlamaForCausalLM"]),
        ("config.json says LlamaForCausalLM: expected MistralForCausalLM",),
    ),
    (_as_hf(quantization_config={}), ("config.json: quant_method None is not supported",)),
    (
        _hf_of_another_shape,
        ("hidden_dim is 128 in params.json, intermediate_size is 96 in config.json",),
    ),
    (
        _hf_wrong_tensors,
        (
            "model.safetensors has ",
            "truncated",
            "expected [64] from config.json",
        ),
    ),
    (_hf_tokenizer_alone, ("tokenizer is missing", "tokenizer.json is never read")),
    (_params(moe={"num_experts": 8}), ("moe: a mixture of experts is not supported",)),
    (_params(lora={"rank": 8, "alpha": 2}), ("lora is not supported",)),
    (_params(vision_encoder="pixtral"), ("vision_encoder is 'pixtral': expected an object",)),
    (_params(model_type="mamba"), ("'mamba' is not supported",)),
    (_params(rotary="x"), ("rotary is not supported",)),
    (_params(dim=None), ("dim is missing",)),
    (_params(n_kv_heads=3), ("n_heads is 4", "multiple of n_kv_heads (3)")),
]


def _refused(done: Finished, *said: str, code: int = 1) -> None:
    """One line on stderr and nothing else; that it came back means that no rank still runs.

    Every rank has the pipe that stderr is, and reading it ends when the last of them has ended.
    """
    assert (done.code, done.out) == (code, "")
    assert done.err.splitlines() == done.error_lines, done.err
    assert len(done.error_lines) == 1, done.err
    assert len(done.err) <= 300 + len("mistral-chat: error: \n")
    for text in said:
        assert text in done.err


@pytest.mark.parametrize(
    ("breaks", "said"), BROKEN, ids=[f"{f.__name__}-{said[0]}" for f, said in BROKEN]
)
def test_broken_folder_is_named(
    run: Run, broken_folder: Path, breaks: Callable[[Path], None], said: tuple[str, ...]
) -> None:
    breaks(broken_folder)
    _refused(run(broken_folder, *PROMPT), *said)


def test_tokenizer_is_looked_for_before_any_weight_is_read(
    monkeypatch: pytest.MonkeyPatch, broken_folder: Path
) -> None:
    def read_weights(*_: Any, **__: Any) -> None:
        raise AssertionError("weights are read")

    monkeypatch.setattr(start_up, "load_runner", read_weights)
    config = EngineConfig(model=broken_folder, device="cpu")
    with pytest.raises(AssertionError, match="weights are read"):
        start.load(config, ModelFolder.checked(config), Group(Place()), 0.0, quiet=True)
    _no_tokenizer(broken_folder)
    with pytest.raises(TokenizerError, match="tokenizer is missing"):
        start.load(config, ModelFolder.checked(config), Group(Place()), 0.0, quiet=True)


def test_tokenizer_that_is_missing_is_said_once_by_several_ranks(
    run: Run, broken_folder: Path
) -> None:
    _no_tokenizer(broken_folder)
    done = run(broken_folder, *PROMPT, torchrun=2)
    assert done.code == 1
    assert len(done.error_lines) == 1, done.err
    assert "tokenizer is missing" in done.error_lines[0]


@pytest.mark.parametrize("name", ["n" * 5000, "acme/" + "n" * 5000, "./" + "n/" * 2500])
def test_folder_with_a_name_of_5000_letters_is_refused_in_one_line(run: Run, name: str) -> None:
    _refused(run(name, *PROMPT), "...")


def test_load_format_that_is_not_there_is_named(run: Run, broken_folder: Path) -> None:
    done = run(broken_folder, *PROMPT, "--load_format", "hf")
    _refused(done, "config.json is missing (found params.json)")
    _as_hf()(broken_folder)
    done = run(broken_folder, *PROMPT, "--load_format", "consolidated")
    _refused(done, "params.json is missing (found config.json)")


def test_missing_folder_is_named(run: Run, tmp_path: Path) -> None:
    _refused(run(tmp_path / "nowhere", *PROMPT), "nowhere: no such folder")


def test_file_for_a_folder_is_named(run: Run, tiny_folder: Path) -> None:
    _refused(run(tiny_folder / "params.json", *PROMPT), "params.json is a file")


def test_more_ranks_than_heads_is_refused(run: Run, broken_folder: Path) -> None:
    write_params(broken_folder, TINY, n_heads=1, n_kv_heads=1)
    done = run(broken_folder, *PROMPT, "--nproc_per_node", 2)
    _refused(done, "2 ranks, but the model has 1 query heads")


def test_broken_folder_is_said_once_by_several_ranks(run: Run, broken_folder: Path) -> None:
    _wrong_tensors(broken_folder)
    _refused(run(broken_folder, *PROMPT, "--nproc_per_node", 2), "norm.weight")


@pytest.mark.skipif(torch.cuda.is_available(), reason="the device is there")
def test_missing_device_is_named(run: Run, tiny_folder: Path) -> None:
    _refused(run(tiny_folder, "--prompt", "Hello", "--device", "cuda"), "sees no GPU")


def test_too_little_memory_is_told_in_figures(run: Run, broken_folder: Path) -> None:
    write_params(broken_folder, TINY, max_seq_len=None)
    done = run(broken_folder, *PROMPT, "--max_seq_len", 2**40)
    # 2 layers x (keys, values) x 2 heads x 16 x 4 bytes are 512 bytes a token
    needed = f"a context of {2**40:,} tokens {2**40 * 512 / 1e9:.2f} GB"
    _refused(done, "GB free", "weights need 0.02 GB", needed, "--max_seq_len")


def test_context_beyond_the_model_is_refused(run: Run, tiny_folder: Path) -> None:
    done = run(tiny_folder, *PROMPT, "--max_seq_len", 513)
    _refused(done, "the model knows 512 positions", code=2)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--promt", "x"], "did you mean --prompt?"),
        (["--zzz"], "unknown flag --zzz"),
        (["-x"], "unknown flag -x"),
        (["--temperature", "-1"], "--temperature is -1.0"),
        (["--temperature", "nan"], "--temperature is nan"),
        (["--temperature", "hot"], "no number"),
        (["--top_p", "2"], "--top_p is 2.0"),
        (["--top_p", "0"], "--top_p is 0.0"),
        (["--min_p", "-0.1"], "--min_p is -0.1"),
        (["--top_k", "-1"], "--top_k is -1"),
        (["--top_k", "1.5"], "no whole number"),
        (["--max_tokens", "0"], "--max_tokens is 0"),
        (["--max-tokens", "-5"], "--max_tokens is -5"),
        (["--seed", "-1"], "--seed is -1"),
        (["--nproc_per_node", "0"], "--nproc_per_node is 0"),
        (["--max_seq_len", "1"], "--max_seq_len is 1"),
        (["--stop", ""], "--stop"),
        (["--device", "tpu"], "none of auto, cuda, cpu"),
        (["--dtype", "int8"], "none of auto, bfloat16"),
        (["--logprobs", "2"], "--logprobs needs --json"),
        (["--system", "x"], "--system needs --instruct"),
        (["--prompt"], "--prompt needs a value"),
        (["--prompt", "--instruct"], "--prompt needs a value"),
        (["--instruct=yes"], "takes no value"),
        (["--config", "nowhere.toml"], "nowhere.toml"),
        (["a", "b"], "expected one MODEL and one text"),
        (["--json_object", "--stop", "x"], "--stop and --json_object"),
    ],
)
def test_wrong_usage_ends_with_2(run: Run, tiny_folder: Path, words: list[str], said: str) -> None:
    _refused(run(tiny_folder, *words), said, code=2)


def test_wrong_usage_is_said_once_under_torchrun(run: Run, tiny_folder: Path) -> None:
    done = run(tiny_folder, "--promt", "x", torchrun=2)
    assert (done.code, done.out) == (1, "")
    assert len(done.error_lines) == 1, done.err
    assert "did you mean --prompt?" in done.error_lines[0]


def test_rank_that_is_wrong_alone_says_so(run: Run, tiny_folder: Path) -> None:
    """Such as for want of a file on its machine: nobody else would."""
    started = {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}
    done = run(tiny_folder, *PROMPT, "--config", "not-here.toml", env=started)
    _refused(done, "not-here.toml", code=2)


def test_ranks_that_torchrun_did_not_start_are_refused(run: Run, tiny_folder: Path) -> None:
    started = {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}
    done = run(tiny_folder, *PROMPT, "--nproc_per_node", 3, env=started)
    _refused(done, "--nproc_per_node is 3, but torchrun started 1 ranks", code=2)


def test_launch_that_cannot_be_read_is_named(run: Run, tiny_folder: Path) -> None:
    started = {"RANK": "a", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}
    _refused(run(tiny_folder, *PROMPT, env=started), "RANK='a'", code=2)


@pytest.mark.parametrize(
    ("stdin", "said"),
    [
        (b"caf\xe9", "stdin is not UTF-8 text: byte 0xe9 at offset 3"),
        (b"", "stdin is empty"),
    ],
)
def test_bad_stdin_is_named(run: Run, tiny_folder: Path, stdin: bytes, said: str) -> None:
    _refused(run(tiny_folder, "--device", "cpu", stdin=stdin), said)


def test_prompt_that_is_not_utf8_is_named(run: Run, tiny_folder: Path) -> None:
    prompt = os.fsdecode(b"caf\xe9")
    done = run(tiny_folder, "--device", "cpu", "--max_tokens", 2, "--prompt", prompt)
    _refused(done, "--prompt", "UTF-8")


def _run_redirected(redirection: str, *words: str | Path) -> Finished:
    """Run the command as a shell does with a redirection."""
    done = subprocess.run(
        ["bash", "-c", f'exec "$0" -m mistral_chat "$@" {redirection}', sys.executable, *words],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=300,
        env=command_env(),
        cwd=ROOT,
        check=False,
    )
    return Finished(done.returncode, done.stdout, done.stderr)


def test_closed_stdin_without_a_prompt_is_named(tiny_folder: Path) -> None:
    _refused(_run_redirected("<&-", tiny_folder, "--device", "cpu"), "stdin is closed")


def test_closed_stdin_with_a_prompt_answers(tiny_folder: Path) -> None:
    done = _run_redirected("<&-", tiny_folder, *PROMPT, "--quiet")
    assert (done.code, done.err) == (0, "")
    assert re.fullmatch(r".+\n", done.out)


@pytest.mark.parametrize("redirection", [">&-", ">/dev/full"])
def test_stdout_that_takes_nothing_is_named(tiny_folder: Path, redirection: str) -> None:
    _refused(_run_redirected(redirection, tiny_folder, *PROMPT, "--quiet"), "stdout")


def test_missing_prompt_file_is_named(run: Run, tiny_folder: Path) -> None:
    done = run(tiny_folder, "--file", "nowhere.txt", *PROMPT)
    _refused(done, "nowhere.txt does not exist: expected a file")


@pytest.mark.parametrize("n_ranks", [1, 2])
def test_reader_that_closes_the_pipe_ends_all_quietly(tiny_folder: Path, n_ranks: int) -> None:
    words = [str(tiny_folder), "--prompt", "Hello", "--max_tokens", "400"]
    with Piped("mistral_chat", [*words, "--nproc_per_node", str(n_ranks)]) as process:
        assert len(process.stdout.read(3)) == 3
        process.stdout.close()
        code, _, err = process.finish()
    assert (code, err) == (0, b"")


def test_bad_tools_file_is_named(run: Run, tiny_folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "tools.json"
    path.write_text('[{"function": {}}]')
    done = run(tiny_folder, "--instruct", "--tools", path, *PROMPT)
    _refused(done, str(path), "tool 1: not a function schema")


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("[run\n", "is not TOML"),
        ("[runs]\n", "expected the tables"),
        ("[run]\ndtyp = 'auto'\n", "did you mean dtype?"),
        ("[generation]\ntemperature = 'hot'\n", "no number"),
        ("[run]\ninstruct = 1\n", "neither true nor false"),
    ],
)
def test_bad_preset_is_named(
    run: Run, tiny_folder: Path, tmp_path: Path, content: str, said: str
) -> None:
    path = tmp_path / "preset.toml"
    path.write_text(content)
    _refused(run(tiny_folder, "--config", path, *PROMPT), str(path), said, code=2)


def test_prompt_beyond_the_context_is_refused_in_figures(run: Run, tiny_folder: Path) -> None:
    done = run(tiny_folder, "--device", "cpu", stdin="word " * 600)
    # <s>, 600 words and what SentencePiece makes of the last space
    _refused(done, "the prompt has 602 tokens", "context holds 512", "by 91 tokens")
