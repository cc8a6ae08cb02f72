"""What only GPUs can show: NCCL, bfloat16, one process a GPU. `make test-gpu` runs these."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from mistral_chat import LLM, SamplingParams
from mistral_chat.generate import generate
from mistral_chat.model.args import TransformerArgs
from mistral_chat.transformer import Transformer
from tests.conftest import ROOT, Run, command_env, make_folder
from tests.engine.test_several_llms import check_llms, run_llms
from tests.scripts.llms import GREEDY

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU"),
]
N_GPUS = torch.cuda.device_count() if torch.cuda.is_available() else 0
RANKS = [
    pytest.param(n, marks=pytest.mark.skipif(n > N_GPUS, reason=f"{N_GPUS} GPUs"))
    for n in (1, 2, 4, 8)
]
# 9 heads in 3 groups divide by no number of GPUs; the vocabulary is a real one.
ODD = TransformerArgs(
    dim=576, n_layers=4, head_dim=64, hidden_dim=1536, n_heads=9, n_kv_heads=3,
    norm_eps=1e-5, vocab_size=32768, max_seq_len=2048,
)  # fmt: skip
PROMPT = [1, *range(300, 1300, 3)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_folder(tmp_path_factory.mktemp("gpu") / "odd", ODD)


@pytest.fixture(scope="module")
def expected(folder: Path) -> tuple[tuple[float, ...], tuple[int, ...]]:
    """Log-probabilities of the prompt and a greedy answer, on CPU in float32."""
    return _score(folder, "cpu", "float32", 1)


def _score(
    folder: Path, device: str, dtype: str, n_ranks: int
) -> tuple[tuple[float, ...], tuple[int, ...]]:
    greedy = SamplingParams(temperature=0, max_tokens=24, prompt_logprobs=True, ignore_eos=True)
    with LLM(folder, device=device, dtype=dtype, nproc_per_node=n_ranks) as llm:  # type: ignore[arg-type]
        answer = llm.generate([PROMPT], greedy)[0]
    assert answer.prompt_logprobs is not None
    return answer.prompt_logprobs, answer.token_ids


@pytest.mark.parametrize("n_ranks", RANKS)
def test_float32_equals_cpu(
    folder: Path, expected: tuple[tuple[float, ...], tuple[int, ...]], n_ranks: int
) -> None:
    logprobs, tokens = _score(folder, "cuda", "float32", n_ranks)
    # float32 sums of some thousand terms in another order: 1e-3 leaves a factor of ten
    assert max(abs(a - b) for a, b in zip(logprobs, expected[0], strict=True)) < 1e-3
    assert tokens == expected[1]


@pytest.mark.parametrize("n_ranks", RANKS)
def test_bfloat16_is_near_float32(
    folder: Path, expected: tuple[tuple[float, ...], tuple[int, ...]], n_ranks: int
) -> None:
    logprobs, _ = _score(folder, "cuda", "bfloat16", n_ranks)
    errors = torch.tensor(logprobs) - torch.tensor(expected[0])
    # bfloat16 keeps 8 bits, 0.4 %; logits here have a spread of 1, and 4 layers add up
    assert errors.abs().mean() < 0.02
    assert errors.abs().max() < 0.15


def test_generate_scores_alike_whole_and_chunked_on_a_gpu() -> None:
    torch.manual_seed(42)
    args = TransformerArgs(
        dim=512, n_layers=1, head_dim=128, hidden_dim=2048, n_heads=4, n_kv_heads=2,
        norm_eps=1e-5, vocab_size=32_000, max_batch_size=4,
    )  # fmt: skip
    model = Transformer(args).to("cuda", dtype=torch.float32)
    prompts = [[0, *range(1, 8)], [0, 0, 1, 2], [0, 12, 13, 14], [0, 2, 4, 34]]
    tokens, before = generate(prompts, model, temperature=0.0, max_tokens=7)
    longer = [prompt + new for prompt, new in zip(prompts, tokens, strict=True)]
    nothing, after = generate(longer, model, temperature=0.0, max_tokens=0, chunk_size=5)
    assert nothing == []
    for old, new in zip(before, after, strict=True):
        assert max(abs(a - b) for a, b in zip(old, new, strict=True)) < 5e-4


def test_sliding_window_and_chunks_agree_on_a_gpu() -> None:
    torch.manual_seed(1)
    args = TransformerArgs(
        dim=256, n_layers=2, head_dim=64, hidden_dim=512, n_heads=4, n_kv_heads=2,
        norm_eps=1e-5, vocab_size=1000, max_batch_size=1, sliding_window=[None, 16],
    )  # fmt: skip
    model = Transformer(args).to("cuda", dtype=torch.float32)
    prompt = [[i * 7 % 1000 for i in range(200)]]
    _, whole = generate(prompt, model, temperature=0.0, max_tokens=0)
    _, chunked = generate(prompt, model, temperature=0.0, max_tokens=0, chunk_size=37)
    assert max(abs(a - b) for a, b in zip(whole[0], chunked[0], strict=True)) < 5e-4


@pytest.mark.alone
@pytest.mark.timeout(900)
def test_llms_with_ranks_one_after_another_and_at_once(folder: Path, tmp_path: Path) -> None:
    """LLMS=20 opens as many in a row: resident memory grows up to the third, and no more."""
    if N_GPUS < 2:
        pytest.skip(f"{N_GPUS} GPUs")
    n_in_a_row = int(os.environ.get("LLMS", "4"))
    broken = Path(shutil.copytree(folder, tmp_path / "broken"))
    (broken / "consolidated.safetensors").unlink()
    with LLM(folder, device="cpu", dtype="float32", max_seq_len=128) as alone:
        wanted = list(alone.generate("Hello", GREEDY)[0].token_ids)
    said = run_llms("cuda", n_in_a_row, folder, broken, timeout_s=160 + 20 * n_in_a_row)
    check_llms(said, n_in_a_row, wanted, settled=2)
    row = [one["held"]["device_bytes"] for one in said[:n_in_a_row]]
    assert row[-1] <= row[1] + 2**22  # a peer's addresses, 512 bytes each, torch never frees


@pytest.mark.parametrize("n_ranks", RANKS[2:])  # the embedded model's start fewer
def test_command_answers_on_gpus(run: Run, folder: Path, n_ranks: int) -> None:
    done = run(folder, "--prompt", "Hello", "--max_tokens", 4, "--json",
               "--nproc_per_node", n_ranks)  # fmt: skip
    assert done.code == 0, done.err
    assert json.loads(done.out)["world_size"] == n_ranks


@pytest.mark.parametrize("n_ranks", RANKS[:2])
def test_embedded_model_answers_on_gpus(run: Run, embedded_folder: Path, n_ranks: int) -> None:
    done = run(embedded_folder, "--instruct", "--prompt", "What is the capital of France?",
               "--temperature", 0, "--nproc_per_node", n_ranks, "--dtype", "float32",
               "--max_tokens", 20, "--json")  # fmt: skip
    assert done.code == 0, done.err
    said = json.loads(done.out)
    assert (said["text"], said["world_size"]) == ("The capital of France is Paris.", n_ranks)


@pytest.mark.skipif(N_GPUS < 1, reason="no GPU")
def test_too_many_ranks_for_the_gpus_is_refused(folder: Path) -> None:
    words = ["--prompt", "Hello", "--device", "cuda", f"--nproc_per_node={N_GPUS + 1}"]
    done = subprocess.run(
        [sys.executable, "-m", "mistral_chat", str(folder), *words],
        capture_output=True, text=True, timeout=120, env=command_env(), cwd=ROOT, check=False,
        stdin=subprocess.DEVNULL,
    )  # fmt: skip
    assert done.returncode == 1
    assert f"there are {N_GPUS}" in done.stderr
