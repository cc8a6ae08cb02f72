"""`mistral-chat inspect`: what a model is, and what each rank would hold of it; loads nothing.

Every figure of memory is `engine.memory.plan_memory`'s, which refuses or admits a run too.
"""

import json
from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Any

from mistral_chat.cli.requests import InspectRequest
from mistral_chat.cli.suggestions import require_model
from mistral_chat.engine.ranks.launch import launched_rank
from mistral_chat.errors import NotEnoughMemoryError

if TYPE_CHECKING:
    import torch

    from mistral_chat.config import EngineConfig
    from mistral_chat.engine.memory import Plan
    from mistral_chat.model.args import TransformerArgs
    from mistral_chat.model.folder import ModelFolder

__all__ = ["run"]

WORLD_SIZES = (1, 2, 4, 8)
NO_LIMIT = 1 << 62


def run(request: InspectRequest) -> int:
    """Run the command; the code to end with."""
    if launched_rank() not in (None, 0):
        return 0
    config = replace(request.engine, max_batch_size=request.max_batch_size or 1)
    require_model(config.model)
    result = _inspect(config, request.nproc_per_node, request.gpu_memory)
    from mistral_chat.cli.inspect import text as inspect_text

    print(json.dumps(result) if request.json else inspect_text.text_of(result))
    return 0


def _inspect(config: "EngineConfig", n_ranks: int | None, gpu_memory: int | None) -> dict[str, Any]:
    """All there is to say, as `--json` says it.

    Raises:
        MistralChatError: what a run would refuse this folder or these flags with.
    """
    import torch

    from mistral_chat.engine.start_up import choose_device, choose_dtype
    from mistral_chat.model.folder import ModelFolder

    folder = ModelFolder.open(config)
    args = folder.args
    config.require_positions(args.max_seq_len)
    if gpu_memory is not None:
        device = torch.device("cuda")
        dtype = torch.bfloat16 if config.dtype == "auto" else choose_dtype(config.dtype, device)
    else:
        device = choose_device(config.device, 0)
        dtype = choose_dtype(config.dtype, device)
    shape = asdict(args)
    del shape["max_batch_size"]
    if args.quantization is not None:
        shape["quantization"]["kept"] = sorted(args.quantization.kept)
    free, n_devices = _free(device, gpu_memory)
    return {
        "model": str(config.model or "dummy weights"),
        "parameters": args.n_params,
        "shape": shape,
        "weights": None if config.load_format == "dummy" else _weights(folder),
        "tokenizer": None if folder.path is None else _tokenizer(folder),
        "device": device.type,
        "assumed_gpu_bytes": gpu_memory,
        "dtype": str(dtype).removeprefix("torch."),
        "max_batch_size": config.max_batch_size,
        "plans": [
            _plan_ranks(args, world_size, config, device, dtype, free)
            for world_size in _world_sizes(args, n_ranks, n_devices)
        ],
    }


def _weights(folder: "ModelFolder") -> dict[str, Any]:
    """The files of weights, their headers checked."""
    tensors, paths = folder.headers.tensors, folder.weights.paths
    return {
        "layout": folder.layout if folder.weights.are_safetensors else "pth",
        "files": len(paths),
        "bytes": sum(path.stat().st_size for path in paths),
        "dtypes": sorted({tensor.dtype for tensor in tensors.values()}),
    }


def _tokenizer(folder: "ModelFolder") -> dict[str, str]:
    """The tokenizer, loaded as a run loads it."""
    from mistral_chat.chat.tokenizer import Tokenizer

    version = Tokenizer.from_folder(folder).version
    assert folder.tokenizer_file is not None
    return {"file": folder.tokenizer_file.name, "version": version}


def _free(
    device: "torch.device", gpu_memory: int | None
) -> tuple[Callable[[int, int], int], int | None]:
    """What a rank of so many may take, and how many devices there are; None: as many as wanted."""
    import torch

    from mistral_chat.engine.memory import free_bytes

    if gpu_memory is not None:
        return lambda rank, world_size: gpu_memory, None
    if device.type == "cpu":
        host = free_bytes(device, 1)
        return lambda rank, world_size: host // world_size, None
    gpus = [free_bytes(torch.device("cuda", n), 1) for n in range(torch.cuda.device_count())]
    # More ranks than GPUs run on several machines, which are taken to be like this one.
    return lambda rank, world_size: gpus[rank % len(gpus)], len(gpus)


def _world_sizes(
    args: "TransformerArgs", n_ranks: int | None, n_devices: int | None
) -> Sequence[int]:
    if n_ranks is not None:
        return [n_ranks]
    most = min(args.n_heads, args.hidden_dim, args.vocab_size, n_devices or max(WORLD_SIZES))
    return [n for n in WORLD_SIZES if n <= most]


def _plan_ranks(
    args: "TransformerArgs",
    world_size: int,
    config: "EngineConfig",
    device: "torch.device",
    dtype: "torch.dtype",
    free: Callable[[int, int], int],
) -> dict[str, Any]:
    """One number of ranks: what each holds for the context that a run would take."""
    from mistral_chat.engine.memory import LEAST_SEQ_LEN, plan_memory
    from mistral_chat.engine.start_up import choose_cache_dtype, chunk_size_of
    from mistral_chat.model.args import DEFAULT_MAX_SEQ_LEN
    from mistral_chat.model.sharding import Shard, placements

    tables = [placements(Shard(args, world_size, rank)) for rank in range(world_size)]
    most = args.max_seq_len or DEFAULT_MAX_SEQ_LEN
    asked = config.max_seq_len

    def plan(rank: int, room: int, max_seq_len: int | None) -> "Plan":
        return plan_memory(
            Shard(args, world_size, rank),
            tables[rank],
            dtype=dtype,
            device=device,
            free=room,
            n_slots=config.max_batch_size,
            chunk_size=min(chunk_size_of(config, device), max_seq_len or most),
            max_seq_len=max_seq_len,
            cache_dtype=choose_cache_dtype(config.kv_cache_dtype, dtype, device),
        )

    def fits(rank: int, room: int, max_seq_len: int | None) -> int | None:
        try:
            return plan(rank, room, max_seq_len).max_seq_len
        except NotEnoughMemoryError:
            return None

    def longest(rank: int, room: int) -> int:
        """The largest --max_seq_len that a run is not refused with; 0 for none."""
        contexts = range(2, most + 1)
        n = bisect_left(contexts, True, key=lambda n: fits(rank, room, n) is None)
        return contexts[n - 1] if n else 0

    rooms = [free(rank, world_size) for rank in range(world_size)]
    planned = [fits(rank, room, asked) for rank, room in enumerate(rooms)]
    fitting = [n for n in planned if n is not None]
    all_fit = len(fitting) == world_size
    context = min(fitting) if all_fit else asked or min(most, LEAST_SEQ_LEN)
    ranks = []
    for rank, (room, fitted) in enumerate(zip(rooms, planned, strict=True)):
        needs = plan(rank, NO_LIMIT, asked)
        kv = context * needs.kv_per_token
        at_most = longest(rank, room) if asked or fitted is None else fitted
        ranks.append(
            {
                "rank": rank,
                "weights_bytes": needs.weights,
                "kv_bytes": kv,
                "kv_bytes_per_token": needs.kv_per_token,
                "workspace_bytes": needs.workspace,
                "free_bytes": room,
                "fits": fitted is not None,
                "missing_bytes": max(0, needs.weights + kv + needs.workspace - room),
                "longest_context": at_most,
            }
        )
    return {
        "world_size": world_size,
        "fits": all_fit,
        "context": context,
        "longest_context": min(row["longest_context"] for row in ranks),
        "ranks": ranks,
    }
