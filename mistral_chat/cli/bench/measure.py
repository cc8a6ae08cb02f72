"""Measures the machine's limits and the times of steps: medians after a warm-up.

All ranks measure a limit at once, as a step uses it. Knows nothing of flags or tables.
"""

import math
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor

from mistral_chat.config import SamplingParams
from mistral_chat.engine.engine import Engine, Request, Token
from mistral_chat.engine.ranks.group import Group
from mistral_chat.engine.runner import Runner
from mistral_chat.engine.step import Chunk, Step
from mistral_chat.kernels import ops
from mistral_chat.kernels.weight import Quantized
from mistral_chat.model.weight import weight_of

__all__ = [
    "bytes_per_step",
    "decode_s",
    "first_token_s",
    "matmul_flops",
    "prefill_flops",
    "prompt",
    "read_bandwidth",
    "sum_s",
    "verify_s",
    "with_cache",
]

REPEATS = 7
WARM_UP = 4
MATMUL_ROWS = 2048
SUMS = 64  # in one graph


def median_s(work: Callable[[], object], device: torch.device, repeats: int = REPEATS) -> float:
    """Median seconds of some work."""
    taken = []
    for _ in range(repeats + 2):
        _finish(device)
        begin = time.perf_counter()
        work()
        _finish(device)
        taken.append(time.perf_counter() - begin)
    return statistics.median(taken[2:])  # the first two warm up


def _several(work: Callable[[], object], n: int) -> Callable[[], None]:
    """Repeat work without waiting in between, so that launching it weighs little."""

    def run() -> None:
        for _ in range(n):
            work()

    return run


def _finish(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def read_bandwidth(device: torch.device) -> float:
    """Bytes a second that this rank reads from its memory.

    On a GPU: a kernel that only reads, over 2 GB. On CPU: torch's sum over 256 MB.
    """
    if ops.has_kernels(device):
        from mistral_chat.kernels.bandwidth import BLOCK, read_all

        data = torch.randint(1 << 30, (1 << 29,), dtype=torch.int32, device=device)
        out = torch.empty(-(-len(data) // BLOCK), dtype=torch.int32, device=device)
        return 10 * 4 * len(data) / median_s(_several(lambda: read_all(data, out), 10), device)
    values = torch.ones(1 << 26, device=device)
    return 4 * len(values) / median_s(lambda: values.sum(), device)


def matmul_flops(runner: Runner) -> float:
    """Floating-point operations a second of the feed-forward's first matmul, 2,048 rows."""
    held = weight_of(runner.model.blocks[0].feed_forward.w13)
    weight = held.dequantize(runner.model.dtype) if isinstance(held, Quantized) else held
    n_rows = MATMUL_ROWS if weight.device.type == "cuda" else 256
    x = torch.randn(n_rows, weight.shape[1], device=weight.device).to(weight.dtype)
    work = _several(lambda: x @ weight.t(), 10)
    return 10 * 2 * n_rows * weight.numel() / median_s(work, weight.device)


def sum_s(group: Group, runner: Runner) -> dict[str, float]:
    """Seconds of one row's all-reduce with residual and norm, through every path there is.

    Every rank must call it. On GPUs many are captured in one graph, as in a decode step.
    """
    if group.world_size == 1:
        return {}
    model = runner.model
    rows = torch.randn(1, model.args.dim, device=model.device).to(model.dtype)
    weight, eps = model.norm, model.args.norm_eps
    paths: dict[str, Callable[[Tensor], object]] = {}
    decode = runner.decode_collective
    if decode is not None:
        paths[decode.path] = lambda x: decode.reduce_add_norm(x, rows, weight, eps)
    name = "NCCL" if model.device.type == "cuda" else "CPU group"
    paths[name] = lambda x: model.collective.reduce_add_norm(x, rows, weight, eps)
    found = {}
    for path, work in paths.items():
        if model.device.type == "cuda":
            found[path] = _in_graph_s(lambda run=work: run(rows.clone()), model.device)  # type: ignore[misc]
        else:
            found[path] = median_s(lambda run=work: run(rows.clone()), model.device, 30)  # type: ignore[misc]
        group.minimum(0)
    return found


def _in_graph_s(work: Callable[[], object], device: torch.device) -> float:
    for _ in range(2):
        work()
    torch.cuda.synchronize(device)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        for _ in range(SUMS):
            work()
    return median_s(graph.replay, device) / SUMS


def prompt(runner: Runner, length: int, seed: int = 0) -> list[int]:
    """Ids in the vocabulary; those of other seeds differ from the first id on."""
    size = runner.model.args.vocab_size
    return [(7919 * i + 104729 * length + 31 * seed + seed) % size for i in range(length)]


def with_cache(runner: Runner, max_batch_size: int, max_seq_len: int) -> Runner:
    """A runner of the same model with a new cache of random keys and values; on every rank.

    The given runner is closed first, since there may be no room for both caches.
    """
    model, collective = runner.model, runner.decode_collective
    had_decoder = runner.decoder is not None
    cache_dtype = runner.cache.dtype
    runner.close()
    runner = Runner(
        model,
        runner.group,
        max_batch_size=max_batch_size,
        max_seq_len=max_seq_len,
        chunk_size=runner.chunk_size,
        plan=runner.plan,
        cache_dtype=cache_dtype,
    )
    if had_decoder:
        runner.decode_collective = collective  # no cache's, so its peer memory is mapped once
        runner.open_decoder()
    runner.cache.fill_random()  # so that long contexts need not be run
    return runner


def bytes_per_step(runner: Runner, batch: int, context: int) -> int:
    """Bytes that one decode step of one rank must read: weights, and keys and values."""
    model = runner.model
    args, shard = model.args, model.shard
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    if not args.tied_embeddings:  # a step reads one row of the embedding, and all of the output
        weights -= len(shard.vocab) * args.dim * model.dtype.itemsize
    return weights + batch * context * runner.cache.bytes_per_token


def decode_s(runner: Runner, batch: int, context: int, n_tokens: int) -> float:
    """Seconds of a decode step, from one token to the next; the median of three answers.

    Args:
        runner: with `batch` slots; its cache is used as it is for the contexts.
        batch: sequences decoded together.
        context: positions of each, halfway through the answer.
        n_tokens: of an answer.
    """
    taken = []
    for turn in range(3):
        requests = []
        for slot in range(batch):
            ids = prompt(runner, context - n_tokens // 2, turn * batch + slot)
            params = SamplingParams(max_tokens=n_tokens + WARM_UP, temperature=0, ignore_eos=True)
            requests.append(Request(ids=ids, params=params))
        engine = Engine(runner, cached=[request.ids for request in requests])
        at = [
            time.perf_counter()
            for index, event in engine.generate_many(requests)
            if index == 0 and isinstance(event, Token)
        ]
        taken.append((at[-1] - at[WARM_UP - 1]) / n_tokens)
    return statistics.median(taken)


def verify_s(runner: Runner, n_tokens: int, context: int, repeats: int = 20) -> float:
    """Seconds of a step that runs and scores a few tokens of one sequence."""
    tokens = tuple(prompt(runner, n_tokens))
    step = Step((Chunk(0, context, tokens),), "all")
    return median_s(_several(lambda: runner.run(step), repeats), runner.model.device, 3) / repeats


def first_token_s(engine: Engine, length: int) -> float:
    """Seconds from a new prompt to its first token, the median of three."""
    params = SamplingParams(max_tokens=1, temperature=0)
    taken = []
    for turn in range(4):
        ids = prompt(engine.runner, length, seed=turn + 1)
        begin = time.perf_counter()
        for _ in engine.generate(Request(ids=ids, params=params)):
            pass
        taken.append(time.perf_counter() - begin)
    return statistics.median(taken[1:])


def prefill_flops(runner: Runner, length: int) -> int:
    """Floating-point operations of this rank's matmuls for a prompt (attention not counted)."""
    blocks = runner.model.blocks
    attention, feed_forward = blocks[0].attention, blocks[0].feed_forward
    matrices = (attention.wqkv, attention.wo, feed_forward.w13, feed_forward.w2)
    numbers = sum(math.prod(weight_of(matrix).shape) for matrix in matrices)
    return 2 * length * numbers * len(blocks)
