"""`quantize.fit` on a GPU: all its steps in registers, not each a pass over memory.

Shapes: G = groups, C = columns of a group.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

__all__ = ["fit_int4"]

NUMBERS = 2048  # of a program


@triton.jit
def _numbers(values, scale, zero):
    rounded = tl.floor(values / scale[:, None] + zero[:, None] + 0.5)
    return tl.minimum(tl.maximum(rounded, 0.0), 15.0)


@triton.jit
def _fit(
    values_ptr, scale_ptr, zero_ptr, n_groups, power, beta, beta_growth, tiny,
    GROUP: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr, STEPS: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    cols = tl.arange(0, COLS)
    in_group = (cols < GROUP)[None, :]
    mask = (rows < n_groups)[:, None] & in_group
    at = rows.to(tl.int64)[:, None] * GROUP + cols[None, :]
    values = tl.load(values_ptr + at, mask=mask, other=0.0)
    low = tl.minimum(tl.min(values, 1), 0.0)
    high = tl.maximum(tl.max(values, 1), 0.0)
    scale = tl.maximum((high - low) / 15.0, tiny)
    zero = tl.floor(-low / scale + 0.5)
    unit = scale
    best_scale = scale
    best_zero = zero
    best = tl.full((ROWS,), float("inf"), tl.float32)
    for _ in range(STEPS):
        numbers = _numbers(values, scale, zero)
        error = (values - (numbers - zero[:, None]) * scale[:, None]) / unit[:, None]
        # a power of 0 is taken as that of a tiny number, which is nearly 0 as well
        size = tl.abs(error)
        log = tl.log2(tl.maximum(size, 1e-8))
        loss = tl.sum(tl.where(in_group & (size > 0), tl.exp2(power * log), 0.0), 1)
        better = loss < best
        best = tl.where(better, loss, best)
        best_scale = tl.where(better, scale, best_scale)
        best_zero = tl.where(better, zero, best_zero)
        left = tl.maximum(size - tl.exp2((power - 1.0) * log) / beta, 0.0)
        left = tl.where(error < 0, -left, left)
        target = values - left * unit[:, None]
        mean = tl.sum(tl.where(in_group, numbers - target / scale[:, None], 0.0), 1) / GROUP
        zero = tl.minimum(tl.maximum(tl.floor(mean + 0.5), 0.0), 15.0)
        centred = tl.where(in_group, numbers - zero[:, None], 0.0)
        squares = tl.sum(centred * centred, 1)
        fitted = tl.sum(target * centred, 1) / tl.where(squares > 0, squares, 1.0)
        scale = tl.maximum(tl.where(fitted > 0, fitted, scale), tiny)
        beta *= beta_growth
    tl.store(scale_ptr + rows, best_scale, mask=rows < n_groups)
    tl.store(zero_ptr + rows, best_zero, mask=rows < n_groups)


def fit_int4(
    grouped: Tensor, *, steps: int, power: float, beta: float, beta_growth: float, tiny: float
) -> tuple[Tensor, Tensor]:
    """`quantize.fit`: (G, C) float32 -> scales and zeros, (G, 1) float32 each."""
    n_groups, group = grouped.shape
    scale = torch.empty(n_groups, 1, dtype=torch.float32, device=grouped.device)
    zero = torch.empty_like(scale)
    cols = triton.next_power_of_2(group)
    rows = max(1, NUMBERS // cols)
    _fit[(triton.cdiv(n_groups, rows),)](
        grouped, scale, zero, n_groups, power, beta, beta_growth, tiny,
        GROUP=group, ROWS=rows, COLS=cols, STEPS=steps, num_warps=4,
    )  # fmt: skip
    return scale, zero
