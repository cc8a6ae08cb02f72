"""`mistral-chat bench`: how fast a model runs here, beside what this machine can do at most.

Drives the engine as a chat does, so its figures are those that a person sees.
"""

import json
import platform
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mistral_chat import __version__
from mistral_chat.cli import start
from mistral_chat.cli.begun import Begun, say_what_starts
from mistral_chat.cli.requests import BenchRequest
from mistral_chat.cli.suggestions import require_model
from mistral_chat.engine.ranks.launch import launched_rank
from mistral_chat.errors import OutputError, PromptError, UsageError
from mistral_chat.files import read_json, read_text

if TYPE_CHECKING:
    import torch

    from mistral_chat.engine.ranks.group import Group
    from mistral_chat.engine.runner import Runner
    from mistral_chat.model.folder import ModelFolder

__all__ = ["run"]

WINDOW = 2048


def run(request: BenchRequest, words: Sequence[str], begun: Begun) -> int:
    """Run the command on this rank; the code to end with.

    Args:
        request: of the command line.
        words: the command line itself, for ranks that are started.
        begun: when it was.
    """
    if request.plot:
        from mistral_chat.cli.bench import plot

        plot.check(request.plot)
    if request.shard_of and launched_rank() is not None:
        raise UsageError("--shard_of measures one process: expected no torchrun")
    folder = None if launched_rank() else _check(request, begun)
    if not request.shard_of:
        with begun.handed_on():
            code = start.launch(request, words, folder.args.n_heads if folder else 1)
        if code is not None:
            return code
    return _measure(request, begun.at, folder)


def _check(request: BenchRequest, begun: Begun) -> "ModelFolder":
    """Check all that can be checked without torch."""
    require_model(request.engine.model)
    say_what_starts(request, begun)
    needs_text = request.json_schema is not None or request.quality is not None
    folder = start.check(request, request.shard_of, needs_text=needs_text)
    if request.quality is not None:
        read_text(request.quality, PromptError)
        if request.write_logprobs is not None and request.write_logprobs.exists():
            raise OutputError(f"--write_logprobs {request.write_logprobs}: there is such a file")
    if request.json_schema is not None:
        read_json(request.json_schema, PromptError)
        from mistral_chat.chat.schema.grammar import read_grammar

        read_grammar(request.json_schema)
    return folder


def _measure(request: BenchRequest, started: float, folder: "ModelFolder | None") -> int:
    imported = time.monotonic()
    import torch

    from mistral_chat.cli.bench import measure
    from mistral_chat.cli.bench import phases as bench_phases
    from mistral_chat.engine.ranks.group import Group, Place
    from mistral_chat.engine.ranks.launch import current_group
    from mistral_chat.engine.start_up import choose_device, load_runner

    torch_imported = time.monotonic()
    kept_to = None
    if request.json_schema is not None:
        from mistral_chat.chat.schema.grammar import read_grammar
        from mistral_chat.chat.tokenizer import Tokenizer
        from mistral_chat.model.folder import ModelFolder

        folder = folder or ModelFolder.open(request.engine)
        kept_to = Tokenizer.from_folder(folder), read_grammar(request.json_schema)
    aside = time.monotonic() - torch_imported
    group = Group(Place()) if request.shard_of else current_group()
    joined = time.monotonic() - aside
    device = choose_device(request.engine.device, group.place.local_rank)
    about: dict[str, Any] = {
        "device": _device_name(device),
        "model": str(request.engine.model or "dummy weights"),
        "version": __version__,
        "commit": _commit(),
        "command": " ".join(["mistral-chat", *sys.argv[1:]]),
        "world_size": group.world_size,
        "shard_of": request.shard_of,
    }
    if request.loading:
        from mistral_chat.cli.bench.loading import measure_loading
        from mistral_chat.cli.bench.tables import loading_text

        with group.together():
            result = about | measure_loading(
                request.engine, group, folder,
                shard_of=request.shard_of, cold=request.cold, competitor=request.peer is not None,
            )  # fmt: skip
        if group.is_leader:
            print(json.dumps(result) if request.json else loading_text(result))
        group.close()
        return 0
    if request.quality is not None:
        return _measure_quality(request, group, folder, about)
    ceiling = group.minimum(int(measure.read_bandwidth(device)))
    if device.type == "cuda":
        torch.cuda.empty_cache()
    loading = time.monotonic()
    runner = load_runner(request.engine, group, folder=folder, shard_of=request.shard_of)
    loaded = time.monotonic()
    result = about | {
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
    for n_slots, max_seq_len, work in bench_phases.phases(
        request, kept_to, runner, ceiling, result
    ):
        runner = measure.with_cache(runner, n_slots, max_seq_len)
        if group.is_leader:
            work(runner)
            group.send(None)
        else:
            runner.follow()
    if group.is_leader and request.peer:
        from mistral_chat.cli.bench import competitor

        n_tokens = bench_phases.N_TOKENS[device.type]
        result["peer"] = competitor.decode_beside(
            request.engine.model, runner, request.contexts, n_tokens
        )
    group.close()
    if not group.is_leader:
        return 0
    if request.plot:
        from mistral_chat.cli.bench import plot

        plot.draw(result, request.plot)
    from mistral_chat.cli.bench.tables import text_of

    verify_context = bench_phases.VERIFY_CONTEXT
    print(json.dumps(result) if request.json else text_of(result, verify_context))
    return 0


def _measure_quality(
    request: BenchRequest, group: "Group", folder: "ModelFolder | None", about: dict[str, Any]
) -> int:
    """`--quality`, on this rank; the code to end with."""
    from mistral_chat.chat.tokenizer import Tokenizer
    from mistral_chat.cli.bench import quality
    from mistral_chat.cli.bench.tables import quality_text
    from mistral_chat.engine.start_up import load_runner
    from mistral_chat.model.folder import ModelFolder

    assert request.quality is not None
    folder = folder or ModelFolder.open(request.engine)
    length = min(request.window or WINDOW, folder.args.max_seq_len or WINDOW)
    windows, reference = [], None
    with group.together():
        if group.is_leader:
            ids = Tokenizer.from_folder(folder).encode(read_text(request.quality, PromptError))
            windows = quality.windows_of(ids, length)
            if request.against is not None:
                reference = quality.read_reference(request.against, windows, folder.args.vocab_size)
    config = replace(request.engine, max_seq_len=request.engine.max_seq_len or length)
    runner = load_runner(config, group, folder=folder)
    if group.is_leader:
        found = quality.measure_quality(runner, windows, request.write_logprobs, reference)
        result = about | {"dtype": str(runner.model.dtype).removeprefix("torch.")} | found
        group.send(None)
        print(json.dumps(result) if request.json else quality_text(result))
    else:
        runner.follow()
    group.close()
    return 0


def _start(runner: "Runner", *moments: float) -> dict[str, float]:
    """Seconds of each part of the start, without what was measured in between.

    Weights are read while kernels are compiled: these two parts of `load_s` overlap.
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
    """Bytes of this rank by purpose, planned and in use."""
    import torch

    plan = runner.plan
    assert plan is not None
    memory = {
        "weights_bytes": sum(p.numel() * p.element_size() for p in runner.model.parameters()),
        "kv_bytes": runner.cache.n_bytes,
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
    """Commit of the checkout that holds this package; None where a repository only surrounds it."""
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
