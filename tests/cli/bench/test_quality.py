"""`bench --quality`: perplexity of a text, and how far a run is from another one."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from mistral_chat import LLM, SamplingParams
from mistral_chat.cli.bench.quality import MOST_TOKENS, windows_of
from mistral_chat.errors import PromptError
from tests.conftest import Run

TEXT = "Paris is the capital of France, and Rome that of Italy. " * 3


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("texts") / "text.txt"
    path.write_text(TEXT)
    return path


@pytest.fixture(scope="module")
def written(run: Run, tiny_folder: Path, text: Path, tmp_path_factory: Any) -> Path:
    """What a run in float32 predicted, in windows of 20 tokens."""
    path: Path = tmp_path_factory.mktemp("logprobs") / "of.safetensors"
    quality(run, tiny_folder, text, "--window", 20, "--write_logprobs", path)
    return path


def quality(run: Run, folder: Path, text: Path, *words: object) -> dict[str, Any]:
    done = run("bench", folder, "--quality", text, "--device", "cpu", "--json", *words)
    assert done.code == 0, done.err
    found: dict[str, Any] = json.loads(done.out)
    return found


def test_windows_hold_every_token_once_behind_the_first() -> None:
    ids = [1, *range(100, 150)]
    for length in (2, 3, 17, 51, 52, 1000):
        windows = windows_of(ids, length)
        assert [i for window in windows for i in window[1:]] == ids[1:]
        assert all(window[0] == 1 and 2 <= len(window) <= length for window in windows)
    longer = windows_of([1] + [5] * (MOST_TOKENS + 9), 2048)
    assert sum(len(window) - 1 for window in longer) == MOST_TOKENS
    with pytest.raises(PromptError, match="the text has 3 tokens: expected at least 16"):
        windows_of([1, 2, 3, 4], 20)


def test_perplexity_is_that_of_the_prompts_log_probabilities(
    run: Run, tiny_folder: Path, text: Path
) -> None:
    with LLM(tiny_folder, device="cpu") as llm:
        params = SamplingParams(max_tokens=1, prompt_logprobs=True, temperature=0)
        (answer,) = llm.generate([TEXT], params)
    assert answer.prompt_logprobs is not None
    wanted = math.exp(-sum(answer.prompt_logprobs) / len(answer.prompt_logprobs))
    found = quality(run, tiny_folder, text)
    assert found["tokens"] == len(answer.prompt_logprobs)
    assert found["windows"] == 1
    assert found["perplexity"] == pytest.approx(wanted, rel=1e-5)


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_run_beside_itself_differs_by_rounding_alone(
    run: Run, tiny_folder: Path, text: Path, written: Path, ranks: int
) -> None:
    words = ("--window", 20, "--against", written, "--nproc_per_node", ranks)
    found = quality(run, tiny_folder, text, *words)
    # Log-probabilities about 10 were kept in float16, which rounds them by up to 4e-3.
    assert found["perplexity"] == pytest.approx(found["reference_perplexity"], rel=1e-3)
    assert abs(found["kl"]) < 1e-4
    assert found["same_top"] > 0.98


def test_a_cache_in_fp8_predicts_nearly_the_same_on_any_number_of_ranks(
    run: Run, tiny_folder: Path, text: Path, written: Path
) -> None:
    words = ("--window", 20, "--against", written, "--kv_cache_dtype", "fp8")
    alone, on_two = (
        quality(run, tiny_folder, text, *words, "--nproc_per_node", ranks) for ranks in (1, 2)
    )
    assert on_two["perplexity"] == pytest.approx(alone["perplexity"], rel=1e-4)
    assert 1e-6 < alone["kl"] < 0.05


def test_divergence_is_its_formula(
    run: Run, tiny_folder: Path, text: Path, written: Path, tmp_path: Path
) -> None:
    mine = load_file(written)
    other = dict(mine)
    for name, logprobs in mine.items():
        if name.startswith("window"):
            noise = torch.randn(logprobs.shape, generator=torch.Generator().manual_seed(1))
            other[name] = (logprobs.float() + noise).log_softmax(-1).half()
    path = tmp_path / "other.safetensors"
    save_file(other, path)
    found = quality(run, tiny_folder, text, "--window", 20, "--against", path)
    divergences, same = [], []
    for name in (n for n in mine if n.startswith("window")):
        p, q = other[name].double(), mine[name].double()
        divergences.append((p.exp() * (p - q)).sum(-1))
        same.append(p.argmax(-1) == q.argmax(-1))
    wanted = torch.cat(divergences)
    assert found["kl"] == pytest.approx(wanted.mean().item(), rel=0.02)  # float16, as above
    assert found["kl_p99"] == pytest.approx(wanted.quantile(0.99).item(), rel=0.02)
    assert found["same_top"] == pytest.approx(torch.cat(same).double().mean().item(), abs=0.05)


def test_quality_as_text_has_its_figures(
    run: Run, tiny_folder: Path, text: Path, written: Path
) -> None:
    words = ("--quality", text, "--window", 20, "--device", "cpu", "--against", written)
    done = run("bench", tiny_folder, *words)
    assert done.code == 0, done.err
    for said in ("tokens predicted in", "perplexity", "(KL), nats a token", "same token most lik"):
        assert said in done.out


def test_what_cannot_be_compared_is_refused_in_one_line(
    run: Run, tiny_folder: Path, text: Path, written: Path, tmp_path: Path
) -> None:
    short, empty = tmp_path / "short.txt", tmp_path / "empty.safetensors"
    short.write_text("Hello.")
    empty.touch()
    missing = tmp_path / "missing"
    for words, said in [
        (("--quality", short), "tokens: expected at least 16"),
        (("--quality", missing), f"{missing} does not exist"),
        (("--quality", text, "--against", written), "is of another text, window or vocabulary"),
        (("--quality", text, "--against", empty), f"--against {empty} cannot be read"),
        (("--quality", text, "--write_logprobs", written), "there is such a file"),
    ]:
        done = run("bench", tiny_folder, "--device", "cpu", *words)
        assert done.code == 1
        assert said in done.err.splitlines()[-1]
    for words, said in [
        (("--window", 20), "--window belongs to --quality"),
        (("--against", written), "--against belongs to --quality"),
        (("--quality", text, "--loading"), "--loading and --quality: expected one of them"),
        (("--quality", text, "--window", 1), "--window"),
    ]:
        done = run("bench", tiny_folder, "--device", "cpu", *words)
        assert done.code == 2
        assert said in done.err
