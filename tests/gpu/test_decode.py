"""The decode path on a GPU equals the reference: per kernel, per step, over many steps."""

import os
import subprocess
import sys

import pytest
import torch
from torch import Tensor

from mistral_chat.config import SamplingParams
from mistral_chat.engine.engine import Engine, Request, Token
from mistral_chat.engine.ranks.group import Group, Place
from mistral_chat.engine.runner import Runner
from mistral_chat.engine.step import Chunk, Step
from mistral_chat.kernels.cached import Cached
from mistral_chat.model.args import TransformerArgs
from mistral_chat.model.rope import QueryScaling, Yarn
from mistral_chat.model.transformer import Transformer
from tests.conftest import ROOT, command_env
from tests.kernels.ropes import SCALED, rope_of

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU"),
]
# 12 queries a KV head as Large-2407 has; 9 heads in 3 groups with a window in every other layer.
SHAPES = {
    "groups of 12": TransformerArgs(
        dim=1024, n_layers=3, head_dim=128, hidden_dim=2816, n_heads=24, n_kv_heads=2,
        norm_eps=1e-5, vocab_size=32768,
    ),
    "windows": TransformerArgs(
        dim=576, n_layers=4, head_dim=64, hidden_dim=1536, n_heads=9, n_kv_heads=3,
        norm_eps=1e-5, vocab_size=49344, sliding_window=[100, None, 100, None],
        tied_embeddings=True,
    ),
    "yarn": TransformerArgs(
        dim=512, n_layers=3, head_dim=128, hidden_dim=1024, n_heads=8, n_kv_heads=2,
        norm_eps=1e-5, vocab_size=32768,
        yarn=Yarn.from_params({"original_max_position_embeddings": 64, "factor": 16, "beta": 4}),
        llama_4_scaling=QueryScaling(beta=0.1, original_max_position_embeddings=64),
    ),
}  # fmt: skip
# Shards of Large-2407 on 2 and on 8 GPUs and Mistral-7B-v0.3's matrices: qkv, wo, w13, w2.
PRODUCTS = [
    (7168, 12288), (12288, 6144), (14336, 12288), (12288, 14336), (1792, 12288), (12288, 1536),
    (3584, 12288), (12288, 3584), (6144, 4096), (4096, 4096), (14336, 4096), (4096, 14336),
    (1234, 1000),
]  # fmt: skip
ALLOCATOR_SEGMENT = 2 * 2**20
PROMPT = [1, *range(300, 800, 3)]


def draw(*shape: int, dtype: torch.dtype, scale: float = 1.0) -> Tensor:
    return (torch.randn(shape, device="cuda") * scale).to(dtype)


def distance(found: Tensor, expected: Tensor) -> float:
    assert found.isfinite().all()
    return float((found.double() - expected.double()).norm() / expected.double().norm())


def make_runner(args: TransformerArgs, dtype: torch.dtype, *, decoder: bool, slots: int) -> Runner:
    with torch.device("cuda"):
        model = Transformer(args).to(dtype)
    model.init_weights(5)
    runner = Runner(model, Group(Place()), max_batch_size=slots, max_seq_len=1024, chunk_size=256)
    if decoder:
        runner.open_decoder()
    return runner


def answers(runner: Runner, params: list[SamplingParams]) -> dict[int, list[int]]:
    requests = [Request(ids=[*PROMPT, n], params=p) for n, p in enumerate(params)]
    found: dict[int, list[int]] = {}
    for index, event in Engine(runner).generate_many(requests):
        if isinstance(event, Token):
            found.setdefault(index, []).append(event.id)
    return found


@pytest.mark.parametrize("shape", SHAPES)
def test_float32_tokens_equal_the_reference_for_512_steps(shape: str) -> None:
    params = [
        SamplingParams(max_tokens=512, temperature=0, ignore_eos=True),
        SamplingParams(max_tokens=100, temperature=0.8, top_p=0.9, seed=1, ignore_eos=True),
        SamplingParams(max_tokens=64, temperature=1.0, top_k=50, seed=2, ignore_eos=True),
    ]
    found = [
        answers(make_runner(SHAPES[shape], torch.float32, decoder=decoder, slots=2), params)
        for decoder in (False, True)
    ]
    assert [len(found[1][n]) for n in range(3)] == [512, 100, 64]
    assert found[0] == found[1]


@pytest.mark.parametrize("shape", SHAPES)
def test_bfloat16_log_probabilities_are_near_the_reference_for_512_steps(shape: str) -> None:
    fast, slow = (
        make_runner(SHAPES[shape], torch.bfloat16, decoder=decoder, slots=1)
        for decoder in (True, False)
    )
    tokens = [(7919 * n) % 30000 for n in range(600)]
    for runner in (fast, slow):
        runner.run(Step((Chunk(0, 0, tuple(tokens[:88])),)))
    by_step = []
    for n in range(88, 600):
        logits = fast.run(Step((Chunk(0, n, (tokens[n],)),)))
        assert logits is not None
        by_step.append(logits[0].clone())
    at_once = slow.run(Step((Chunk(0, 88, tuple(tokens[88:])),), "all"))
    assert at_once is not None
    found = torch.log_softmax(torch.stack(by_step), -1)
    wanted = torch.log_softmax(at_once, -1)
    # A tied output matrix is drawn as the embedding is: its logits spread by 24 and not by 1.
    every = (found - wanted).abs() / wanted.std(-1, keepdim=True)
    # both round to 8 bits at other places
    assert every.mean() < 0.02
    assert every.max() < 0.3


def test_few_tokens_of_one_sequence_are_scored_as_one_by_one() -> None:
    runner = make_runner(SHAPES["groups of 12"], torch.float32, decoder=True, slots=2)
    runner.run(Step((Chunk(1, 0, tuple(PROMPT)),)))
    tokens = (5, 60, 700, 8000, 9, 10, 11, 12, 13)
    start = len(PROMPT)
    single = []
    for n, token in enumerate(tokens):
        logits = runner.run(Step((Chunk(1, start + n, (token,)),)))
        assert logits is not None
        single.append(logits[0].clone())
    for n in (2, 5, 9):
        logits = runner.run(Step((Chunk(1, start, tokens[:n]),), "all"))
        assert logits is not None
        # float32 sums in another order
        torch.testing.assert_close(logits, torch.stack(single[:n]), rtol=1e-4, atol=1e-4)


@pytest.mark.alone
def test_memory_does_not_grow_over_10_000_steps() -> None:
    runner = make_runner(SHAPES["windows"], torch.bfloat16, decoder=True, slots=2)
    params = [SamplingParams(max_tokens=800, temperature=0.7, seed=n, ignore_eos=True)
              for n in range(2)]  # fmt: skip
    for _ in range(2):
        answers(runner, params)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated(), torch.cuda.mem_get_info()[0]
    for _ in range(13):
        answers(runner, params)
    torch.cuda.synchronize()
    assert torch.cuda.memory_allocated() <= before[0]
    # At most one segment more that the allocator keeps for itself: 210 bytes a step.
    assert torch.cuda.mem_get_info()[0] >= before[1] - ALLOCATOR_SEGMENT


@pytest.mark.parametrize("n_ranks", [2])
def test_ranks_exchange_through_peer_memory(n_ranks: int) -> None:
    """On one GPU two ranks take turns, which is slow; on several each has its own."""
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", f"--nproc-per-node={n_ranks}",
         "-m", "tests.scripts.peers"],
        capture_output=True, text=True, timeout=170, cwd=ROOT, check=False,
        env=command_env() | {"STEPS": os.environ.get("STEPS", "20")},
    )  # fmt: skip
    assert done.stdout.strip().endswith("OK"), done.stderr[-3000:]


# bfloat16 keeps 8 bits: results rounded at other places differ by half a percent at most. float32
# sums of some ten thousand terms in another order: a hundred times its 6e-8.
@pytest.mark.parametrize(
    ("n_out", "n_in", "dtype", "tolerance"),
    [(*shape, torch.bfloat16, 5e-3) for shape in PRODUCTS]
    + [(*shape, torch.float16, 1e-3) for shape in PRODUCTS[-2:]]
    + [(*shape, torch.float32, 6e-6) for shape in PRODUCTS[-2:]],
)
def test_products_equal_the_reference(
    n_out: int, n_in: int, dtype: torch.dtype, tolerance: float
) -> None:
    from mistral_chat.kernels import fused, reference

    torch.manual_seed(n_out)
    weight = draw(n_out, n_in, dtype=dtype, scale=n_in**-0.5)
    both = draw(2 * n_out, n_in, dtype=dtype, scale=n_in**-0.5)
    gain = 1 + draw(n_in, dtype=dtype, scale=0.1)
    for n_rows in (1, 2, 9, 17, 32):
        x = draw(n_rows, n_in, dtype=dtype, scale=3)
        partial = draw(n_rows, n_in, dtype=dtype)
        exact = reference.linear(x.double(), weight.double())
        assert distance(fused.linear(x, weight), exact) < tolerance
        normed, total = fused.add_norm(partial, x, gain, 1e-5)
        expected, expected_total = reference.add_norm(partial, x, gain, 1e-5)
        assert torch.equal(total, expected_total)
        assert distance(fused.linear(normed, weight), expected.double() @ weight.double().T) < (
            2 * tolerance  # the norm is rounded too
        )
        gated = reference.gated(expected.double(), both.double())
        assert distance(fused.gated(normed, both), gated) < 3 * tolerance
        scores = fused.logits(normed, weight)
        assert scores.dtype == torch.float32
        assert distance(scores, expected.double() @ weight.double().T) < 2 * tolerance


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("context", [1, 63, 5000, 32000])
@pytest.mark.parametrize("length", [1, 5, 17])
def test_attention_equals_the_reference(dtype: torch.dtype, context: int, length: int) -> None:
    from mistral_chat.kernels import fused, reference

    torch.manual_seed(context)
    n_heads, n_kv, head_dim, n_slots = 24, 2, 128, 3
    slots = torch.tensor([2, 0], dtype=torch.int32, device="cuda")
    starts = torch.tensor([context, context // 2], dtype=torch.int32, device="cuda")
    lengths = torch.tensor([length, max(1, length - 2)], dtype=torch.int32, device="cuda")
    shape = (n_slots, n_kv, context + 40, head_dim)
    keys, values = draw(*shape, dtype=dtype), draw(*shape, dtype=dtype)
    qkv = draw(2 * length, n_heads + 2 * n_kv, head_dim, dtype=dtype)
    first = torch.tensor([0, 12, 24], dtype=torch.int32, device="cuda")
    of = torch.arange(2, dtype=torch.int32, device="cuda").repeat_interleave(12)
    rope = rope_of(head_dim, 1e6, "cuda", original=1000, **SCALED)
    results = []
    for run in (fused, reference):
        k, v = keys.clone(), values.clone()
        rotations = run.rotations(starts, length, rope)
        out = run.attend(
            qkv, Cached(k), Cached(v), rotations, slots, starts, lengths, first, of, 12, None
        )
        results.append((out, k, v))
    (out, k, v), (expected, expected_k, expected_v) = results
    assert torch.equal(v, expected_v)
    # float32: sums of up to 32,000 weights in parts; bfloat16: weights rounded to 8 bits
    tolerance = 2e-5 if dtype == torch.float32 else 1e-2
    assert distance(k, expected_k) < tolerance
    real = torch.cat([torch.arange(length) < n for n in lengths.tolist()])
    assert distance(out[real], expected[real]) < tolerance


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_sampling_equals_the_reference_on_a_gpu(dtype: torch.dtype) -> None:
    from mistral_chat.kernels.sampling import sample
    from mistral_chat.kernels.sampling_reference import sample_reference

    torch.manual_seed(3)
    for vocab_size in (1000, 32768, 49344, 131072):
        logits = draw(8, vocab_size, dtype=dtype, scale=3).float()
        allowed = torch.randint(-(2**31), 2**31, (8, -(-vocab_size // 32)), device="cuda").int()
        rows = [(0, 1, 0, 0), (1, 1, 0, 0), (0.7, 0.9, 0, 0), (1, 1, 0.05, 0), (1, 1, 0, 40),
                (1.5, 0.8, 0.01, 100), (0.3, 0.999, 0, 1), (5, 0.5, 0, 7)]  # fmt: skip
        params = torch.tensor(rows, device="cuda")
        out = torch.full((8,), -1, device="cuda")
        # in the middle of a token's share, where sums in another order choose the same
        for uniform in (0.0, 0.123, 0.5, 0.987):
            uniforms = torch.full((8,), uniform, device="cuda")
            sample(logits, allowed, params, uniforms, out)
            expected = sample_reference(logits, allowed, params, uniforms)
            same = int((out == expected).sum())
            assert same >= 7, (vocab_size, uniform, out, expected)  # one may lie on an edge
