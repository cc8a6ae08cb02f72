"""`mistral-chat bench`: how fast a model runs here, beside what this machine can do at most.

Drives the engine as a chat does, so its figures are those that a person sees.
"""

import json
import platform
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mistral_chat import __version__
from mistral_chat.cli import flags, start
from mistral_chat.cli.begun import Begun, say_what_starts
from mistral_chat.cli.offered import read_offered
from mistral_chat.cli.suggestions import require_model
from mistral_chat.cli.words import OwnFlag, read_own, whole_from
from mistral_chat.engine.launch import launched_rank
from mistral_chat.errors import UsageError

if TYPE_CHECKING:
    import torch

    from mistral_chat.engine.runner import Runner
    from mistral_chat.model.folder import ModelFolder

__all__ = ["run"]

CONTEXTS = (512, 8192, 32768)
PROMPTS = (128, 512, 2048, 8192)
HELP = """usage: mistral-chat bench MODEL [flags]

Measure decode, time to first token, sums over ranks, start and memory, beside what this machine
can do at most.

  --batches N,N        sequences decoded together (1,2,4,8; on CPU 1,2)
  --contexts N,N       contexts to decode at (512,8192,32768 as far as they fit)
  --prompts N,N        prompt lengths for the time to first token (128,512,2048,8192)
  --shard_of N         one process: measure one rank's share of N, with nobody to sum with
  --peer NAME          measure transformers on the same weights too (one rank), or safetensors
                       beside --loading
  --loading            measure how fast the folder's weights are read, and nothing else
  --cold               with --loading: have the system forget the files before each reading
  --json_schema FILE   measure answers kept to this schema beside free text, too
  --plot FILE          draw the figures (.svg, .png; needs matplotlib)
  --json               one JSON object on stdout instead of tables
  and of the main job: --nproc_per_node --device --dtype --max_seq_len --config --load_format
"""


def _whole_numbers(text: str) -> tuple[int, ...]:
    numbers = tuple(int(n) for n in text.split(","))
    if min(numbers) < 1:
        raise ValueError
    return numbers


def _peer(text: str) -> str:
    if text not in ("transformers", "safetensors"):
        raise ValueError
    return text


_SOME = OwnFlag(_whole_numbers, "whole numbers like 128,512")
_OWN = {
    "batches": _SOME,
    "contexts": _SOME,
    "prompts": _SOME,
    "shard_of": whole_from(2),
    "peer": OwnFlag(_peer, "transformers or safetensors"),
    "loading": OwnFlag(),
    "cold": OwnFlag(),
    "plot": OwnFlag(str),
    "json": OwnFlag(name="as_json"),
}
_SHARED = (
    "nproc_per_node", "device", "dtype", "max_seq_len", "config", "load_format", "json_schema",
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Asked:
    """What to measure."""

    batches: tuple[int, ...] | None = None
    contexts: tuple[int, ...] = CONTEXTS
    prompts: tuple[int, ...] = PROMPTS
    shard_of: int | None = None
    peer: str | None = None
    loading: bool = False
    cold: bool = False
    plot: str | None = None
    as_json: bool = False


def run(words: list[str], begun: Begun) -> int:
    """Run the command on this rank; the code to end with."""
    values, rest = read_own(words, _OWN, flags.shared(*_SHARED))
    if values is None:
        if launched_rank() in (None, 0):
            print(HELP, end="")
        return 0
    asked = Asked(**values)
    options = flags.parse(rest, takes_text=False)
    if asked.cold and not asked.loading:
        raise UsageError("--cold belongs to --loading")
    if asked.peer and asked.loading != (asked.peer == "safetensors"):
        raise UsageError("--peer safetensors belongs to --loading, --peer transformers does not")
    if asked.loading and (asked.plot or options.json_schema):
        name, why = ("plot", "draw") if asked.plot else ("json_schema", "answer")
        raise UsageError(f"--loading and --{name}: there is nothing to {why}")
    if asked.plot:
        from mistral_chat.cli.bench import plot

        plot.check(asked.plot)
    if asked.shard_of and launched_rank() is not None:
        raise UsageError("--shard_of measures one process: expected no torchrun")
    folder = None if launched_rank() else _check(options, asked, begun)
    if not asked.shard_of:
        with begun.handed_on():
            n_heads = folder.args.n_heads if folder else 1
            code = start.launch(options, ["bench", *words], n_heads)
        if code is not None:
            return code
    return _measure(options, asked, begun.at, folder)


def _check(options: flags.Options, asked: Asked, begun: Begun) -> "ModelFolder":
    """Check all that can be checked without torch."""
    require_model(options.engine.model)
    say_what_starts(options, begun)
    folder = start.check(options, asked.shard_of, needs_text=bool(options.json_schema))
    read_offered(options)
    return folder


def _measure(
    options: flags.Options, asked: Asked, started: float, folder: "ModelFolder | None"
) -> int:
    imported = time.monotonic()
    import torch

    from mistral_chat.cli.bench import measure
    from mistral_chat.cli.bench import phases as bench_phases
    from mistral_chat.engine.group import Group, Place
    from mistral_chat.engine.launch import current_group
    from mistral_chat.engine.start_up import choose_device, load_runner

    torch_imported = time.monotonic()
    kept_to = None
    if options.json_schema is not None:
        from mistral_chat.chat.grammar import read_grammar
        from mistral_chat.chat.tokenizer import Tokenizer
        from mistral_chat.model.folder import ModelFolder

        folder = folder or ModelFolder.open(options.engine)
        kept_to = Tokenizer.from_folder(folder), read_grammar(options.json_schema)
    aside = time.monotonic() - torch_imported
    group = Group(Place()) if asked.shard_of else current_group()
    joined = time.monotonic() - aside
    device = choose_device(options.engine.device, group.place.local_rank)
    about = {
        "device": _device_name(device),
        "model": str(options.engine.model or "dummy weights"),
        "version": __version__,
        "commit": _commit(),
        "command": " ".join(["mistral-chat", *sys.argv[1:]]),
        "world_size": group.world_size,
        "shard_of": asked.shard_of,
    }
    if asked.loading:
        from mistral_chat.cli.bench import loading as bench_loading

        with group.together():
            bench_loading.run(
                options.engine,
                group,
                about,
                shard_of=asked.shard_of,
                cold=asked.cold,
                competitor=asked.peer is not None,
                as_json=asked.as_json,
            )
        group.close()
        return 0
    ceiling = group.minimum(int(measure.read_bandwidth(device)))
    if device.type == "cuda":
        torch.cuda.empty_cache()
    loading = time.monotonic()
    runner = load_runner(options.engine, group, folder=folder, shard_of=asked.shard_of)
    loaded = time.monotonic()
    result: dict[str, Any] = about | {
        "dtype": str(runner.model.dtype).removeprefix("torch."),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "path": runner.path,
        "read_gb_per_s": ceiling / 1e9,
        "product_tflop_per_s": group.minimum(int(measure.matmul_flops(runner))) / 1e12,
        "sum_us": {path: s * 1e6 for path, s in measure.sum_s(group, runner).items()},
        "start": _start(runner, started, imported, torch_imported, joined, loading, loaded),
        "memory": _memory(runner),
        "decode": [],
    }
    wanted = bench_phases.Wanted(
        batches=asked.batches, contexts=asked.contexts, prompts=asked.prompts, kept_to=kept_to
    )
    for n_slots, max_seq_len, work in bench_phases.phases(wanted, runner, ceiling, result):
        runner = measure.with_cache(runner, n_slots, max_seq_len)
        if group.is_leader:
            work(runner)
            group.send(None)
        else:
            runner.follow()
    if group.is_leader and asked.peer:
        from mistral_chat.cli.bench import competitor

        n_tokens = bench_phases.N_TOKENS[device.type]
        result["peer"] = competitor.decode_beside(
            options.engine.model, runner, asked.contexts, n_tokens
        )
    group.close()
    if not group.is_leader:
        return 0
    if asked.plot:
        from mistral_chat.cli.bench import plot

        plot.draw(result, asked.plot)
    from mistral_chat.cli.bench import tables as bench_tables

    if asked.as_json:
        print(json.dumps(result))
    else:
        print(bench_tables.text_of(result, bench_phases.VERIFY_CONTEXT))
    return 0


def _start(runner: "Runner", *moments: float) -> dict[str, float]:
    """Seconds from the command's start on; what was measured in between is left out.

    Weights are read while kernels are made ready: the two are parts of `load_s` that overlap.
    """
    started, imported, torch_imported, joined, loading, loaded = moments
    start_up = runner.start_up
    assert start_up is not None
    return {
        "python_s": imported - started,
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
    """That of the checkout that this package is the root of; of no repository around it."""
    root = Path(__file__).resolve().parents[3]
    try:
        done = subprocess.run(
            ["git", "-C", str(root), "rev-parse", "--show-toplevel", "--short", "HEAD"],
            capture_output=True, text=True, check=False,
        )  # fmt: skip
    except OSError:  # no git here
        return None
    top, _, commit = done.stdout.strip().rpartition("\n")
    return commit if done.returncode == 0 and Path(top).resolve() == root else None


def _device_name(device: "torch.device") -> str:
    import torch

    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"CPU ({platform.processor() or platform.machine()})"
