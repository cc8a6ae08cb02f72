"""Will it fit: the bytes that a rank needs against those that are free, before weights are read.

Computes from shapes and reads the machine's free memory. Knows nothing of files.
"""

import math
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch

from mistral_chat.errors import NotEnoughMemoryError
from mistral_chat.kernels import ops
from mistral_chat.kernels.cached import FP8
from mistral_chat.model.args import DEFAULT_MAX_SEQ_LEN
from mistral_chat.model.cache import kv_bytes_per_token
from mistral_chat.model.checkpoint import local_bytes
from mistral_chat.model.sharding import Shard, Table

__all__ = ["Plan", "free_bytes", "plan_memory"]

GPU_RESERVE_BYTES = 1 << 30  # cuBLAS and NCCL buffers, fragmentation
CPU_RESERVE_BYTES = 1 << 28
# Least context for a chat; a smaller --max_seq_len is accepted as given.
LEAST_SEQ_LEN = 512


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Bytes of one rank.

    Args:
        weights: of this rank's slices.
        kv_per_token: of one position in every slot.
        workspace: activations of the largest step, and buffers of libraries.
        free: on the device.
        max_seq_len: positions that the cache is planned for.
    """

    weights: int
    kv_per_token: int
    workspace: int
    free: int
    max_seq_len: int


def free_bytes(device: torch.device, ranks_here: int) -> int:
    """Free memory for one rank: of its GPU, or its equal part of the host's."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    available = int(psutil.virtual_memory().available)
    limit, used = Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory.current")
    if limit.exists() and used.exists() and limit.read_text().strip() != "max":
        available = min(available, int(limit.read_text()) - int(used.read_text()))
    return max(0, available) // ranks_here


def plan_memory(
    shard: Shard,
    table: Table,
    *,
    dtype: torch.dtype,
    device: torch.device,
    free: int,
    n_slots: int,
    chunk_size: int,
    max_seq_len: int | None,
    cache_dtype: torch.dtype | None = None,
) -> Plan:
    """Choose the context that fits, or refuse.

    Args:
        shard: this rank's share.
        table: the slices of weights that it holds.
        dtype: of weights.
        device: where they go.
        free: bytes that this rank may take.
        n_slots: sequences in the cache.
        chunk_size: most tokens of a step.
        max_seq_len: positions asked for; None takes what fits, at most the model's.
        cache_dtype: of keys and values; None is that of weights.

    Raises:
        NotEnoughMemoryError: weights and the least or asked-for context do not fit.
    """
    args = shard.args
    weights = local_bytes(table.values(), dtype)
    kv_per_token = n_slots * kv_bytes_per_token(shard, cache_dtype or dtype)
    if cache_dtype == FP8:  # a prompt's attention has one layer of one sequence in floats, twice
        kv_per_token += len(shard.kv_heads) * args.head_dim * (4 + 2 * dtype.itemsize)
    widths = 6 * args.dim + 4 * len(shard.hidden) + 4 * len(shard.heads) * args.head_dim
    reserve = GPU_RESERVE_BYTES if device.type == "cuda" else CPU_RESERVE_BYTES
    workspace = chunk_size * widths * dtype.itemsize + 2 * args.vocab_size * 4 + reserve
    quantized = [math.prod(p.local_shape) for p in table.values() if p.held is not None]
    if quantized:  # w1 with w3 is the largest that is dequantized at once
        workspace += ops.scratch_bytes(device, 2 * max(quantized), dtype)
    left = free - weights - workspace
    fits = max(0, left // kv_per_token)
    most = args.max_seq_len or DEFAULT_MAX_SEQ_LEN
    wanted = max_seq_len or min(most, LEAST_SEQ_LEN)
    if fits < wanted:
        raise NotEnoughMemoryError(
            f"{device} has {_gb(free)} free for this rank; weights need {_gb(weights)}, a context "
            f"of {wanted:,} tokens {_gb(wanted * kv_per_token)}, workspace {_gb(workspace)}: "
            f"{_advice(fits, max_seq_len)}"
        )
    return Plan(
        weights=weights,
        kv_per_token=kv_per_token,
        workspace=workspace,
        free=free,
        max_seq_len=max_seq_len or min(most, fits),
    )


def _advice(fits: int, max_seq_len: int | None) -> str:
    if max_seq_len and fits >= min(max_seq_len, LEAST_SEQ_LEN) // 2:
        return f"use --max_seq_len {fits} or less, or more ranks (--nproc_per_node)"
    return "use more ranks (--nproc_per_node), a smaller --dtype or a smaller model"


def _gb(n_bytes: int) -> str:
    return f"{n_bytes / 1e9:.2f} GB"
