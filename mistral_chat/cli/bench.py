"""`mistral-chat bench`: how fast a model runs here, beside what this machine can do at most.

Drives the engine as a chat does, so its figures are those that a person sees.
"""

import json
import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from mistral_chat.cli import flags
from mistral_chat.errors import UsageError

if TYPE_CHECKING:
    import torch

    from mistral_chat.engine.engine import Engine
    from mistral_chat.engine.runner import Runner

__all__ = ["run"]

N_TOKENS = {"cuda": 64, "cpu": 24}
CONTEXTS = (512, 8192, 32768)
PROMPTS = (128, 512, 2048, 8192)
BATCHES = {"cuda": (1, 2, 4, 8), "cpu": (1, 2)}
VERIFY = (5, 9, 17)
VERIFY_CONTEXT = 512
HELP = """usage: mistral-chat bench MODEL [flags]

Measure decode, time to first token, sums over ranks, start and memory, beside what this machine
can do at most.

  --batches N,N        sequences decoded together (1,2,4,8; on CPU 1,2)
  --contexts N,N       contexts to decode at (512,8192,32768 as far as they fit)
  --prompts N,N        prompt lengths for the time to first token (128,512,2048,8192)
  --shard_of N         one process: measure one rank's share of N, with nobody to sum with
  --peer transformers  measure transformers on the same weights too (one rank)
  --plot FILE          draw the figures (.svg, .png; needs matplotlib)
  --json               one JSON object on stdout instead of tables
  and of the main job: --nproc_per_node --device --dtype --max_seq_len --config --load_format
"""
_OWN = {"batches": True, "contexts": True, "prompts": True, "shard_of": True, "peer": True,
        "plot": True, "json": False, "help": False}  # fmt: skip
_SHARED = ("nproc_per_node", "device", "dtype", "max_seq_len", "config", "load_format")


@dataclass(frozen=True, kw_only=True)
class Asked:
    """What to measure."""

    batches: tuple[int, ...] | None = None
    contexts: tuple[int, ...] = CONTEXTS
    prompts: tuple[int, ...] = PROMPTS
    shard_of: int | None = None
    peer: bool = False
    plot: str | None = None
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
    if asked.plot:
        from mistral_chat.cli import plot

        plot.check(asked.plot)
    if launched_rank() is None:
        from mistral_chat.cli.main import ranks_to_start
        from mistral_chat.engine.launch import start_torchrun

        n_ranks = 1 if asked.shard_of else ranks_to_start(options)
        if n_ranks > 1:
            return start_torchrun(n_ranks, ["bench", *words])
    elif asked.shard_of:
        raise UsageError("--shard_of measures one process: expected no torchrun")
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
        elif name == "plot":
            values["plot"] = value
        elif name == "peer":
            if value != "transformers":
                raise UsageError(f"--peer is {value!r}: expected transformers")
            values["peer"] = True
        elif name == "shard_of":
            if not value.isdigit() or int(value) < 2:
                raise UsageError(f"--shard_of is {value!r}: expected a whole number of at least 2")
            values["shard_of"] = int(value)
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

    from mistral_chat.engine import measure
    from mistral_chat.engine.group import Group, Place
    from mistral_chat.engine.launch import current_group
    from mistral_chat.engine.runner import choose_device, load_runner

    torch_imported = time.monotonic()
    group = Group(Place(), shards=asked.shard_of) if asked.shard_of else current_group()
    joined = time.monotonic()
    device = choose_device(options.engine.device, group.place.local_rank)
    ceiling = group.minimum(int(measure.read_bandwidth(device)))
    if device.type == "cuda":
        torch.cuda.empty_cache()
    loading = time.monotonic()
    runner = load_runner(options.engine, group)
    loaded = time.monotonic()
    result: dict[str, Any] = {
        "device": _device_name(device),
        "model": str(options.engine.model or "dummy weights"),
        "commit": _commit(),
        "command": " ".join(["mistral-chat", *sys.argv[1:]]),
        "world_size": group.world_size,
        "shard_of": asked.shard_of,
        "dtype": str(runner.model.dtype).removeprefix("torch."),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "path": runner.path,
        "read_gb_per_s": ceiling / 1e9,
        "product_tflop_per_s": group.minimum(int(measure.product_flops(runner))) / 1e12,
        "sum_us": {path: s * 1e6 for path, s in measure.sum_s(group, runner).items()},
        "start": _start(runner, started, imported, torch_imported, joined, loading, loaded),
        "memory": _memory(runner),
        "decode": [],
    }
    for n_slots, max_seq_len, work in _phases(asked, runner, ceiling, result):
        # Every rank makes the cache; its keys are random, so that long contexts need no run.
        runner.resize(n_slots, max_seq_len)
        runner.cache.k.normal_()
        runner.cache.v.normal_()
        if group.is_leader:
            work()
            group.send(None)
        else:
            runner.follow()
    if group.is_leader and asked.peer:
        result["peer"] = _peer(options, asked, runner)
    group.close()
    if not group.is_leader:
        return 0
    if asked.plot:
        from mistral_chat.cli import plot

        plot.draw(result, asked.plot)
    print(json.dumps(result) if asked.as_json else _tables(result))
    return 0


Phase = tuple[int, int, Callable[[], None]]


def _phases(
    asked: Asked, runner: "Runner", ceiling: float, result: dict[str, Any]
) -> Iterator[Phase]:
    """Slots, positions of each, and what rank 0 then measures; the same on every rank."""
    from mistral_chat.engine import measure
    from mistral_chat.engine.engine import Engine

    plan = runner.plan
    assert plan is not None
    device_type = runner.model.device.type
    n_tokens = N_TOKENS[device_type]
    room = plan.max_seq_len
    for batch in asked.batches or BATCHES[device_type]:
        contexts = [c for c in asked.contexts if batch * (c + n_tokens) <= room]
        if not contexts:
            continue

        def decode(batch: int = batch, contexts: Sequence[int] = contexts) -> None:
            engine = Engine(runner)
            for context in contexts:
                seconds = measure.decode_s(engine, batch, context, n_tokens)
                n_bytes = measure.bytes_per_step(runner, batch, context)
                result["decode"].append(
                    {
                        "batch": batch,
                        "context": context,
                        "ms_per_token": seconds * 1e3,
                        "tokens_per_s": batch / seconds,
                        "bytes_per_step": n_bytes,
                        "share_of_read_ceiling": n_bytes / seconds / ceiling,
                    }
                )

        yield batch, max(contexts) + n_tokens, decode

    prompts = [n for n in asked.prompts if n < room]

    def one_sequence() -> None:
        engine = Engine(runner)
        result["first_token"] = [_first_token(engine, n, result) for n in prompts]
        if VERIFY_CONTEXT + max(VERIFY) < runner.max_seq_len:
            result["verify"] = _verify(runner)

    yield 1, min(room, max([*prompts, VERIFY_CONTEXT]) + max(VERIFY) + 1), one_sequence


def _first_token(engine: "Engine", length: int, result: dict[str, Any]) -> dict[str, Any]:
    from mistral_chat.engine import measure

    seconds = measure.first_token_s(engine, length)
    tflop_per_s = measure.prefill_flops(engine.runner, length) / seconds / 1e12
    return {
        "prompt": length,
        "first_token_s": seconds,
        "tflop_per_s": tflop_per_s,
        "share_of_product_ceiling": tflop_per_s / result["product_tflop_per_s"],
    }


def _verify(runner: "Runner") -> list[dict[str, Any]]:
    from mistral_chat.engine import measure

    one = measure.verify_s(runner, 1, VERIFY_CONTEXT)
    rows = []
    for n in VERIFY:
        seconds = measure.verify_s(runner, n, VERIFY_CONTEXT)
        rows.append({"tokens": n, "ms": seconds * 1e3, "of_one_token": seconds / one})
    return rows


def _start(runner: "Runner", *moments: float) -> dict[str, float]:
    """Seconds from the process's start on; what was measured in between is left out.

    Weights are read while kernels are made ready: the two are parts of `load_s` that overlap.
    """
    import psutil

    started, imported, torch_imported, joined, loading, loaded = moments
    before = time.time() - psutil.Process().create_time() - (time.monotonic() - started)
    start_up = runner.start_up
    assert start_up is not None
    return {
        "python_s": before + imported - started,
        "import_s": torch_imported - imported,
        "process_group_s": joined - torch_imported,
        "load_s": loaded - loading,
        "of_it_checks_s": start_up.check_s,
        "of_it_weights_s": start_up.weights_s,
        "of_it_kernels_s": start_up.kernels_s,
        "of_it_capture_s": start_up.capture_s,
    }


def _memory(runner: "Runner") -> dict[str, int]:
    """Bytes of this rank by purpose: what was planned, and what is there."""
    import torch

    plan = runner.plan
    assert plan is not None
    cache = runner.cache
    memory = {
        "weights_bytes": sum(p.numel() * p.element_size() for p in runner.model.parameters()),
        "kv_bytes": 2 * cache.k.numel() * cache.k.element_size(),
        "kv_bytes_per_token": plan.kv_per_token,
        "planned_workspace_bytes": plan.workspace,
        "max_seq_len": plan.max_seq_len,
    }
    if runner.model.device.type == "cuda":
        free, total = torch.cuda.mem_get_info(runner.model.device)
        memory["used_bytes"] = total - free
        memory["graphs_and_workspace_bytes"] = (
            total - free - memory["weights_bytes"] - memory["kv_bytes"]
        )
    return memory


def _commit() -> str | None:
    """The checkout that runs, if it is one."""
    import subprocess
    from pathlib import Path

    done = subprocess.run(
        ["git", "-C", str(Path(__file__).parent), "rev-parse", "--short", "HEAD"],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    return done.stdout.strip() or None


def _peer(options: flags.Options, asked: Asked, runner: "Runner") -> dict[str, Any]:
    """Milliseconds a token of transformers, same weights, type, threads and contexts."""
    import torch

    from mistral_chat.cli.peer import as_transformers
    from mistral_chat.engine.measure import WARM_UP, prompt

    if runner.group.world_size > 1 or options.engine.model is None:
        raise UsageError("--peer transformers compares one rank on a model folder")
    import transformers

    model = as_transformers(options.engine.model, runner.model)
    n_tokens = N_TOKENS[runner.model.device.type]
    decode = []
    for context in asked.contexts:
        assert runner.plan is not None
        if context + n_tokens > runner.plan.max_seq_len:
            continue
        ids = torch.tensor([prompt(runner, context - n_tokens // 2)], device=model.device)
        at = []
        with torch.inference_mode():
            out = model(ids, use_cache=True, logits_to_keep=1)
            for _ in range(n_tokens + WARM_UP):
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


def _tables(result: dict[str, Any]) -> str:
    from rich.console import Console
    from rich.table import Table

    console = Console(file=sys.stdout, highlight=False)

    def table(title: str, names: Sequence[str], rows: Sequence[Sequence[str]]) -> Table:
        made = Table(title=title)
        for name in names:
            made.add_column(name, justify="right")
        for row in rows:
            made.add_row(*row)
        return made

    peer = result.get("peer", {"decode": [], "name": None})
    peers = {row["context"]: row["ms_per_token"] for row in peer["decode"]}
    decode = []
    for row in result["decode"]:
        cells = [
            str(row["batch"]),
            f"{row['context']:,}",
            f"{row['ms_per_token']:.2f}",
            f"{row['tokens_per_s']:.1f}",
            f"{row['bytes_per_step'] / 1e9:.3f}",
            f"{row['share_of_read_ceiling']:.0%}",
        ]
        if peers:
            known = row["batch"] == 1 and row["context"] in peers
            cells.append(f"{peers[row['context']]:.2f}" if known else "")
        decode.append(cells)
    names = ["sequences", "context", "ms a step", "tokens/s", "GB a step and rank",
             "of the read ceiling"]  # fmt: skip
    if peers:
        names.append(f"{peer['name']}, ms")
    first = [
        (f"{row['prompt']:,}", f"{row['first_token_s'] * 1e3:.1f}", f"{row['tflop_per_s']:.3g}",
         f"{row['share_of_product_ceiling']:.0%}")
        for row in result["first_token"]
    ]  # fmt: skip
    verify = [
        (str(row["tokens"]), f"{row['ms']:.2f}", f"{row['of_one_token']:.3f}")
        for row in result.get("verify", [])
    ]
    sums = [(path, f"{us:.1f}") for path, us in result["sum_us"].items()]
    start = result["start"]
    parts = ", ".join(
        f"{k.removesuffix('_s').replace('_', ' ')} {v:.2f} s" for k, v in start.items()
    )
    whole = sum(seconds for part, seconds in start.items() if not part.startswith("of_it"))
    memory = result["memory"]
    share = f", one rank's share of {result['shard_of']}" if result["shard_of"] else ""
    with console.capture() as capture:
        console.print(
            f"{result['device']}, {result['world_size']} rank(s){share}, {result['dtype']}, "
            f"{result['threads']} thread(s) a rank, torch {result['torch']}, commit "
            f"{result['commit']}\n"
            f"decode: {result['path']}\n"
            f"ceilings of a rank: reads {result['read_gb_per_s']:.1f} GB/s, products "
            f"{result['product_tflop_per_s']:.3g} TFLOP/s\n"
            f"start: {whole:.2f} s ({parts})\n"
            f"a rank holds {memory['weights_bytes'] / 1e9:.2f} GB of weights, "
            f"{memory['kv_bytes'] / 1e9:.2f} GB of KV ({memory['kv_bytes_per_token']:,} bytes a "
            f"token) for a context of {memory['max_seq_len']:,}"
            + (
                f", and {memory['graphs_and_workspace_bytes'] / 1e9:.2f} GB besides"
                if "used_bytes" in memory
                else ""
            ),
            soft_wrap=True,
        )
        console.print(table("decode", names, decode))
        console.print(
            table("time to first token",
                  ["prompt", "ms", "TFLOP/s a rank", "of the product ceiling"], first)
        )  # fmt: skip
        if verify:
            title = f"step that scores several tokens, context {VERIFY_CONTEXT}"
            console.print(table(title, ["tokens", "ms", "of one token"], verify))
        if sums:
            console.print(table("sum of one row over ranks, residual, norm", ["path", "us"], sums))
    return capture.get().rstrip("\n")
