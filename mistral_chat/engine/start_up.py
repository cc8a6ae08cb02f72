"""From a config to a model that runs, on every rank: check, plan, read weights, prepare kernels.

All ranks go through it together and fail together. Knows nothing of steps or of files' contents.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from typing import TypeVar

import torch

from mistral_chat.config import EngineConfig
from mistral_chat.engine.collectives import collective_of
from mistral_chat.engine.loading import OnLoading, Watch
from mistral_chat.engine.memory import Plan, free_bytes, plan_memory
from mistral_chat.engine.ranks.group import Group, Place
from mistral_chat.engine.ranks.launcher import cores_each
from mistral_chat.engine.runner import Runner, StartUp, why_no_decoder
from mistral_chat.errors import DeviceError
from mistral_chat.kernels import ops
from mistral_chat.kernels.cached import FP8
from mistral_chat.kernels.tuning import has_fp8
from mistral_chat.model.args import DEFAULT_MAX_SEQ_LEN, TransformerArgs
from mistral_chat.model.checkpoint import Headers
from mistral_chat.model.folder import ModelFolder
from mistral_chat.model.loading import Reading
from mistral_chat.model.sharding import Shard, placements
from mistral_chat.model.transformer import Transformer

__all__ = [
    "choose_cache_dtype",
    "choose_device",
    "choose_dtype",
    "chunk_size_of",
    "default_dtype",
    "load_model",
    "load_runner",
    "reading_threads",
]

AnyTransformer = TypeVar("AnyTransformer", bound=Transformer)


def choose_device(device: str, local_rank: int) -> torch.device:
    """The device of a rank: auto is this rank's GPU where there are any, else the CPU.

    Raises:
        DeviceError: no GPU, or none of this rank's number.
    """
    n_gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if device == "cpu" or (device == "auto" and not n_gpus):
        return torch.device("cpu")
    if not n_gpus:
        raise DeviceError(
            f"--device {device}, but torch {torch.__version__} sees no GPU here: use --device cpu, "
            f"or install a CUDA build of torch and check nvidia-smi"
        )
    if local_rank >= n_gpus:
        raise DeviceError(
            f"rank {local_rank} of this node needs GPU {local_rank}, but there are {n_gpus}: "
            f"expected at most {n_gpus} ranks a node"
        )
    torch.cuda.set_device(local_rank)
    # cuDNN's attention builds a plan for every new length: 30 to 40 ms a decoded token.
    torch.backends.cuda.enable_cudnn_sdp(False)
    return torch.device("cuda", local_rank)


def choose_dtype(dtype: str, device: torch.device) -> torch.dtype:
    """Type of weights and cache: auto is float32 on CPU, else bfloat16 (float16 before sm80)."""
    if dtype != "auto":
        chosen = getattr(torch, dtype)
        assert isinstance(chosen, torch.dtype)
        return chosen
    if device.type == "cpu":
        return torch.float32
    return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float16


def choose_cache_dtype(
    kv_cache_dtype: str, dtype: torch.dtype, device: torch.device
) -> torch.dtype:
    """Type of keys and values: auto is that of the weights' floats.

    Raises:
        DeviceError: FP8 on a GPU whose kernels cannot convert it.
    """
    if kv_cache_dtype == "auto":
        return dtype
    if ops.has_kernels(device) and not has_fp8(device):
        raise DeviceError(
            f"--kv_cache_dtype fp8: {torch.cuda.get_device_name(device)} has no FP8; expected a "
            f"GPU of compute capability 8.9 or more"
        )
    return FP8


def reading_threads(device: torch.device, place: Place) -> int:
    """Number of threads that read weights on one rank.

    On GPUs up to 16, which keeps up with copies to the device; on CPU up to 4, since there fresh
    memory for the weights costs more than reading them (BENCHMARKS.md).
    """
    each = cores_each(place.local_world_size)
    return max(2, min(16, each)) if device.type == "cuda" else min(4, each)


def chunk_size_of(config: EngineConfig, device: torch.device) -> int:
    """Most tokens of one step: as asked for, else as many as take about half a second."""
    return config.chunk_size or (2048 if device.type == "cuda" else 256)


def _begin(
    config: EngineConfig,
    group: Group,
    make: Callable[[TransformerArgs], AnyTransformer],
    folder: ModelFolder | None = None,
    shard_of: int | None = None,
) -> tuple[AnyTransformer, Plan, Reading | None]:
    """Check, plan, make the empty model, and start reading its weights or draw random ones."""
    with group.together():
        folder = folder or ModelFolder.open(config)
        args = replace(folder.args, max_batch_size=config.max_batch_size)
        shard = Shard(args, shard_of or group.world_size, group.rank)
        device = choose_device(config.device, group.place.local_rank)
        dtype = choose_dtype(config.dtype, device)
    headers: Headers | None = None
    with group.together():
        if group.is_leader and config.load_format != "dummy":
            headers = folder.headers
    told = group.share(headers.to_json() if headers else None)
    if told is not None and headers is None and folder.path is not None:
        headers = Headers.from_json(told, folder.path)
    table = headers.placements(shard) if headers else placements(shard)
    with group.together():
        config.require_positions(args.max_seq_len)
        most = config.max_seq_len or args.max_seq_len or DEFAULT_MAX_SEQ_LEN
        plan = plan_memory(
            shard,
            table,
            dtype=dtype,
            device=device,
            free=free_bytes(device, group.place.local_world_size),
            n_slots=config.max_batch_size,
            chunk_size=min(chunk_size_of(config, device), most),
            max_seq_len=config.max_seq_len,
            cache_dtype=choose_cache_dtype(config.kv_cache_dtype, dtype, device),
        )
    plan = replace(plan, max_seq_len=group.minimum(plan.max_seq_len))
    reading: Reading | None = None
    try:
        with group.together():
            with device, default_dtype(dtype):
                model = make(args)
            if headers is None:
                model.init_weights(config.seed)
            else:
                if why_no_decoder(model) is None:  # its kernels run before the weights are there
                    for parameter in model.parameters():
                        parameter.data.zero_()
                    if device.type == "cuda":
                        torch.cuda.synchronize(device)  # threads that read have their own streams
                reading = Reading(model, headers, table, reading_threads(device, group.place))
                reading.start()
    except BaseException:
        if reading is not None:
            reading.abandon()
        raise
    return model, plan, reading


@contextmanager
def _watched(reading: Reading | None, group: Group, on_loading: OnLoading) -> Iterator[None]:
    """Tell how far a reading is while a block runs, and then wait until it has read all."""
    is_whole = True
    with nullcontext() if reading is None else Watch(reading, group, on_loading):
        yield
        with group.together():
            if reading is not None:
                is_whole = reading.finish()
        assert is_whole  # stopped only where a rank has failed


def load_model(
    config: EngineConfig,
    group: Group,
    make: Callable[[TransformerArgs], AnyTransformer],
    on_loading: OnLoading = lambda loading: None,
) -> tuple[AnyTransformer, Plan]:
    """Check, plan and load this rank's share of the model; fails on all ranks or on none.

    Args:
        config: what to load and where.
        group: the ranks.
        make: gives an empty model of a shape, on torch's default device and in its default type.
        on_loading: on rank 0 told of progress, from a thread.

    Raises:
        CheckpointError: the folder or its weights cannot be used.
        DeviceError: a device or number of ranks that cannot be.
        NotEnoughMemoryError: it does not fit.
    """
    model, plan, reading = _begin(config, group, make)
    with _watched(reading, group, on_loading):
        pass
    return model, plan


def load_runner(
    config: EngineConfig,
    group: Group,
    on_loading: OnLoading = lambda loading: None,
    meanwhile: Callable[[], None] = lambda: None,
    *,
    folder: ModelFolder | None = None,
    shard_of: int | None = None,
) -> Runner:
    """`load_model`, with its cache; kernels are made ready while weights are read.

    Args:
        config: what to load and where.
        group: the ranks.
        on_loading: on rank 0 told of progress, from a thread.
        meanwhile: run on this rank while weights are read; if it fails, all ranks fail.
        folder: of the config, where this rank has opened it already; None opens it.
        shard_of: how many shares the model is divided into; None is one for each rank. A single
            rank with more than one takes the first share and has nobody to sum with.

    Raises:
        MistralChatError: as `load_model`, or from `meanwhile`.
    """

    def make(args: TransformerArgs) -> Transformer:
        shard = Shard(args, shard_of or group.world_size, group.rank)
        return Transformer(args, shard, collective_of(group, shard))

    started = time.monotonic()
    model, plan, reading = _begin(config, group, make, folder, shard_of)
    begun = time.monotonic()
    with _watched(reading, group, on_loading):
        runner = Runner(
            model,
            group,
            max_batch_size=config.max_batch_size,
            max_seq_len=plan.max_seq_len,
            chunk_size=chunk_size_of(config, model.device),
            plan=plan,
            cache_dtype=choose_cache_dtype(config.kv_cache_dtype, model.dtype, model.device),
        )
        if why_no_decoder(model) is None:
            runner.open_decoder()
        ready = time.monotonic()
        with group.together():
            meanwhile()
        done = time.monotonic()
    decoder = runner.decoder
    runner.start_up = StartUp(
        load_s=time.monotonic() - started,
        check_s=begun - started,
        weights_s=reading.seconds if reading else 0.0,
        weights_bytes=reading.total if reading else 0,
        kernels_s=decoder.kernels_s if decoder else 0.0,
        capture_s=decoder.capture_s if decoder else 0.0,
        meanwhile_s=done - ready,
    )
    return runner


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    """Set the type of tensors that are made inside a block."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)
