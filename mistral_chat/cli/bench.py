"""`mistral-chat bench`: how fast a model runs here, beside what this machine can do at most.

Drives the engine as a chat does, so its figures are those that a person sees.
"""

import json
import platform
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from mistral_chat.cli import flags
from mistral_chat.config import SamplingParams
from mistral_chat.errors import UsageError

if TYPE_CHECKING:
    import torch

    from mistral_chat.engine.engine import Engine

__all__ = ["run"]

CONTEXTS = (512, 2048, 8192, 32768)
PROMPTS = (128, 512, 2048, 8192)
N_TOKENS = 24
WARM_UP = 4
READ_BYTES = 1 << 28
HELP = """usage: mistral-chat bench MODEL [flags]

Measure decode and time to first token beside the read bandwidth of this machine.

  --contexts N,N       contexts to decode at (512,2048,8192,32768 as far as they fit)
  --prompts N,N        prompt lengths for the time to first token (128,512,2048,8192)
  --peer transformers  measure transformers on the same weights too (one rank)
  --json               one JSON object on stdout instead of a table
  and of the main job: --nproc_per_node --device --dtype --max_seq_len --config --load_format
"""
_OWN = {"contexts": True, "prompts": True, "peer": True, "json": False, "help": False}
_SHARED = ("nproc_per_node", "device", "dtype", "max_seq_len", "config", "load_format")


@dataclass(frozen=True, kw_only=True)
class Asked:
    """What to measure."""

    contexts: tuple[int, ...] = CONTEXTS
    prompts: tuple[int, ...] = PROMPTS
    peer: bool = False
    as_json: bool = False


def run(words: list[str], started: float) -> int:
    """Run the command on this rank; the code to end with."""
    from mistral_chat.engine.launch import launched_rank

    normalized = flags.normalize(words, _OWN | dict.fromkeys(_SHARED, True))
    if "--help" in normalized:
        if launched_rank() in (None, 0):
            print(HELP, end="")
        return 0
    asked, rest = _read(normalized)
    options = flags.parse(rest)
    if launched_rank() is None:
        from mistral_chat.cli.main import ranks_to_start
        from mistral_chat.engine.launch import start_torchrun

        n_ranks = ranks_to_start(options)
        if n_ranks > 1:
            return start_torchrun(n_ranks, ["bench", *words])
    return _measure(options, asked, started)


def _read(words: Sequence[str]) -> tuple[Asked, list[str]]:
    values: dict[str, Any] = {}
    rest = []
    for word in words:
        name, _, value = word.removeprefix("--").partition("=")
        if not word.startswith("--") or name not in _OWN:
            rest.append(word)
        elif name == "json":
            values["as_json"] = True
        elif name == "peer":
            if value != "transformers":
                raise UsageError(f"--peer is {value!r}: expected transformers")
            values["peer"] = True
        else:
            try:
                values[name] = tuple(int(n) for n in value.split(","))
            except ValueError:
                values[name] = (0,)
            if min(values[name]) < 1:
                raise UsageError(f"--{name} is {value!r}: expected whole numbers like 128,512")
    return Asked(**values), rest


def _measure(options: flags.Options, asked: Asked, started: float) -> int:
    imported = time.monotonic()
    import torch

    from mistral_chat.engine.engine import Engine
    from mistral_chat.engine.launch import current_group
    from mistral_chat.engine.runner import choose_device, load_runner

    torch_imported = time.monotonic()
    group = current_group()
    joined = time.monotonic()
    device = choose_device(options.engine.device, group.place.local_rank)
    ceiling = group.minimum(int(read_bandwidth(device)))
    loading = time.monotonic()
    runner = load_runner(options.engine, group)
    loaded = time.monotonic()
    if not group.is_leader:
        runner.follow()
        group.close()
        return 0
    engine = Engine(runner)
    plan = runner.plan
    assert plan is not None
    result: dict[str, Any] = {
        "device": _device_name(device),
        "model": str(options.engine.model or "dummy weights"),
        "world_size": group.world_size,
        "dtype": str(runner.model.dtype).removeprefix("torch."),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "read_gb_per_s": ceiling / 1e9,
        "start": {
            "python_s": imported - started,
            "import_s": torch_imported - imported,
            "process_group_s": joined - torch_imported,
            "load_s": loaded - loading,
        },
        "memory": {
            "weights_bytes": plan.weights,
            "kv_bytes_per_token": plan.kv_per_token,
            "workspace_bytes": plan.workspace,
            "max_seq_len": plan.max_seq_len,
        },
        "decode": [
            _decode(engine, n, ceiling) for n in asked.contexts if n + N_TOKENS < engine.max_seq_len
        ],
        "first_token": [_first_token(engine, n) for n in asked.prompts if n < engine.max_seq_len],
    }
    if asked.peer:
        result["peer"] = _peer(options, asked, engine)
    group.send(None)
    group.close()
    print(json.dumps(result) if asked.as_json else _table(result))
    return 0


def read_bandwidth(device: "torch.device") -> float:
    """Bytes a second that this rank reads from its memory: the median of summing 256 MB."""
    import torch

    data = torch.ones(READ_BYTES // 4, device=device)
    seconds = _median_s(lambda: data.sum(), device)
    return READ_BYTES / seconds


def _median_s(work: Callable[[], object], device: "torch.device", times: int = 9) -> float:
    import torch

    taken = []
    for _ in range(times + 2):
        begin = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        taken.append(time.perf_counter() - begin)
    return statistics.median(taken[2:])  # the first two warm up


def _prompt(engine: "Engine", length: int) -> list[int]:
    """Ids that differ from call to call in length only, well inside the vocabulary."""
    size = engine.runner.model.args.vocab_size
    return [(7919 * i + 104729 * length) % size for i in range(length)]


def _decode(engine: "Engine", context: int, ceiling: float) -> dict[str, Any]:
    """Milliseconds a token at a context, and the share of the ceiling that its bytes need."""
    from mistral_chat.engine.engine import Request, Token

    n_tokens = N_TOKENS + WARM_UP
    params = SamplingParams(max_tokens=n_tokens, temperature=0, ignore_eos=True)
    request = Request(ids=_prompt(engine, context - N_TOKENS), params=params)
    at = [time.perf_counter() for e in engine.generate(request) if isinstance(e, Token)]
    steps = [b - a for a, b in zip(at[WARM_UP:], at[WARM_UP + 1 :], strict=False)]
    step_s = statistics.median(steps)
    plan = engine.runner.plan
    assert plan is not None
    args = engine.runner.model.args
    weights = plan.weights
    if not args.tied_embeddings:  # a step reads one row of the embedding, and all of the output
        shard = engine.runner.model.shard
        weights -= len(shard.vocab) * args.dim * engine.runner.model.dtype.itemsize
    n_bytes = weights + context * plan.kv_per_token
    return {
        "context": context,
        "ms_per_token": step_s * 1e3,
        "tokens_per_s": 1 / step_s,
        "bytes_per_step": n_bytes,
        "share_of_read_ceiling": n_bytes / step_s / ceiling,
    }


def _first_token(engine: "Engine", length: int) -> dict[str, Any]:
    """Seconds from a fresh prompt to its first token: the median of three."""
    from mistral_chat.engine.engine import Request

    params = SamplingParams(max_tokens=1, temperature=0)
    taken = []
    for turn in range(4):
        ids = [turn, *_prompt(engine, length)[1:]]  # shares no prefix with the one before
        begin = time.perf_counter()
        for _ in engine.generate(Request(ids=ids, params=params)):
            pass
        taken.append(time.perf_counter() - begin)
    seconds = statistics.median(taken[1:])
    args = engine.runner.model.args
    matrices = args.n_params - args.vocab_size * args.dim * (1 if args.tied_embeddings else 2)
    return {
        "prompt": length,
        "first_token_s": seconds,
        "tflop_per_s": 2 * matrices * length / seconds / 1e12 / engine.runner.group.world_size,
    }


def _peer(options: flags.Options, asked: Asked, engine: "Engine") -> dict[str, Any]:
    """Milliseconds a token of transformers, same weights, type, threads and contexts."""
    import torch

    from mistral_chat.cli.peer import as_transformers

    if engine.runner.group.world_size > 1 or options.engine.model is None:
        raise UsageError("--peer transformers compares one rank on a model folder")
    import transformers

    model = as_transformers(options.engine.model, engine.runner.model)
    decode = []
    for context in asked.contexts:
        if context + N_TOKENS >= engine.max_seq_len:
            continue
        ids = torch.tensor([_prompt(engine, context - N_TOKENS)], device=model.device)
        at = []
        with torch.inference_mode():
            out = model(ids, use_cache=True, logits_to_keep=1)
            for _ in range(N_TOKENS + WARM_UP):
                token = out.logits[:, -1:].argmax(-1)
                int(token)
                at.append(time.perf_counter())
                out = model(token, past_key_values=out.past_key_values, use_cache=True)
        steps = [b - a for a, b in zip(at[WARM_UP:], at[WARM_UP + 1 :], strict=False)]
        decode.append({"context": context, "ms_per_token": statistics.median(steps) * 1e3})
    return {"name": f"transformers {transformers.__version__}", "decode": decode}


def _device_name(device: "torch.device") -> str:
    import torch

    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"CPU ({platform.processor() or platform.machine()})"


def _table(result: dict[str, Any]) -> str:
    from rich.console import Console
    from rich.table import Table

    console = Console(file=sys.stdout, highlight=False)
    peers = {d["context"]: d for d in result.get("peer", {}).get("decode", [])}
    peer_name = result.get("peer", {}).get("name")
    table = Table(title="decode, one sequence")
    for name in ("context", "ms a token", "tokens/s", "GB a step and rank", "of the read ceiling"):
        table.add_column(name, justify="right")
    if peer_name:
        table.add_column(f"{peer_name}, ms", justify="right")
    for row in result["decode"]:
        cells = [
            f"{row['context']:,}",
            f"{row['ms_per_token']:.2f}",
            f"{row['tokens_per_s']:.1f}",
            f"{row['bytes_per_step'] / 1e9:.3f}",
            f"{row['share_of_read_ceiling']:.0%}",
        ]
        if peer_name:
            cells.append(f"{peers[row['context']]['ms_per_token']:.2f}")
        table.add_row(*cells)
    first = Table(title="time to first token")
    for name in ("prompt", "s", "TFLOP/s a rank"):
        first.add_column(name, justify="right")
    for row in result["first_token"]:
        first.add_row(
            f"{row['prompt']:,}", f"{row['first_token_s']:.3f}", f"{row['tflop_per_s']:.3f}"
        )
    start = ", ".join(f"{k.removesuffix('_s')} {v:.2f} s" for k, v in result["start"].items())
    memory = result["memory"]
    with console.capture() as capture:
        console.print(
            f"{result['device']}, {result['world_size']} rank(s), {result['dtype']}, "
            f"{result['threads']} thread(s) a rank, torch {result['torch']}\n"
            f"read ceiling {result['read_gb_per_s']:.1f} GB/s a rank; start: {start}\n"
            f"a rank holds {memory['weights_bytes'] / 1e9:.2f} GB of weights and "
            f"{memory['kv_bytes_per_token']:,} bytes of KV a token, context "
            f"{memory['max_seq_len']:,}",
            soft_wrap=True,
        )
        console.print(table)
        console.print(first)
    return capture.get().rstrip("\n")
