"""How fast a GPU reads its memory: a kernel that does nothing else."""

import torch
import triton
import triton.language as tl
from torch import Tensor

__all__ = ["read_all"]

BLOCK = 8192
WARPS = 8


@triton.jit
def _read(data_ptr, out_ptr, n_words, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    words = tl.load(data_ptr + at, mask=at < n_words, other=0, eviction_policy="evict_first")
    tl.store(out_ptr + tl.program_id(0), tl.sum(words, 0))


def read_all(data: Tensor, out: Tensor) -> None:
    """Read every word once.

    Args:
        data: (n,) int32.
        out: (ceil(n / 8192),) int32, sums that keep the reads from being left out.
    """
    assert data.dtype == out.dtype == torch.int32
    _read[(triton.cdiv(len(data), BLOCK),)](data, out, len(data), BLOCK=BLOCK, num_warps=WARPS)
