"""Matmuls of few rows with a large matrix: as fast as the matrix can be read.

One row goes through a program per few matrix rows that multiplies and sums in float32; up to
MOST_ROWS go through the tensor cores, the matrix rows taking the place that a large batch has
elsewhere. References: `reference.linear`, `.gated`, `.logits`.

Shapes: T = rows of x, n_in, n_out = columns and rows of the matrix, S = slices of a row.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from mistral_chat.kernels import reference
from mistral_chat.kernels.elementwise import Scaled, silu_mul
from mistral_chat.kernels.linear_quantized import matmul_quantized
from mistral_chat.kernels.tuning import (
    MOST_ROWS,
    FewRows,
    OneRow,
    early_launch,
    few_rows_config,
    one_row_config,
    shared_memory,
)
from mistral_chat.kernels.weight import Quantized, Weight

__all__ = ["matmul"]


@triton.jit
def _one_row(
    x_ptr, squares_ptr, w_ptr, out_ptr, n_out, eps,
    n_in: tl.constexpr, SLICES: tl.constexpr, GATED: tl.constexpr,
    ROWS: tl.constexpr, COLS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Out = x @ w.T, scaled by what is left of the norm; gated gives silu(first half) * second."""
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    cols = tl.arange(0, COLS)
    row_mask = rows < n_out
    at = rows.to(tl.int64)[:, None] * n_in + cols[None, :]
    mask = row_mask[:, None] & (cols < n_in)[None, :]
    # The first weights are on their way before the kernel that makes x has ended. (Sending for the
    # rest of the row, to the L2, makes the whole step 15 % slower.)
    w = tl.load(w_ptr + at, mask=mask, other=0.0, eviction_policy="evict_first")
    up = w
    up_at = at
    if GATED:
        up_at = at + n_out.to(tl.int64) * n_in
        up = tl.load(w_ptr + up_at, mask=mask, other=0.0, eviction_policy="evict_first")
    if PDL:
        gdc_wait()
    acc = tl.zeros((ROWS, COLS), tl.float32)
    acc_up = tl.zeros((ROWS, COLS), tl.float32)
    for first in tl.static_range(0, n_in, COLS):
        in_row = first + cols < n_in
        if first > 0:
            mask = row_mask[:, None] & in_row[None, :]
            w = tl.load(w_ptr + at + first, mask=mask, other=0.0, eviction_policy="evict_first")
            if GATED:
                up = tl.load(
                    w_ptr + up_at + first, mask=mask, other=0.0, eviction_policy="evict_first"
                )
        x = tl.load(x_ptr + first + cols, mask=in_row, other=0.0).to(tl.float32)
        acc += w.to(tl.float32) * x[None, :]
        if GATED:
            acc_up += up.to(tl.float32) * x[None, :]
    if PDL:
        # Not before: the next kernel's programs would take the places of this one's.
        gdc_launch_dependents()
    total = tl.sum(acc, 1)
    scale = 1.0
    if SLICES > 0:
        scale = 1.0 / tl.sqrt_rn(
            tl.sum(tl.load(squares_ptr + tl.arange(0, SLICES)), 0) / n_in + eps
        )
        total *= scale
    if GATED:
        total = total / (1.0 + tl.exp(-total)) * (tl.sum(acc_up, 1) * scale)
    tl.store(out_ptr + rows, total.to(out_ptr.dtype.element_ty), mask=row_mask)


@triton.jit
def _few_rows(
    x_ptr, squares_ptr, w_ptr, out_ptr, n_rows, n_out, n_in, eps,
    SLICES: tl.constexpr, GATED: tl.constexpr, T: tl.constexpr, ROWS: tl.constexpr,
    COLS: tl.constexpr, STAGES: tl.constexpr, IEEE: tl.constexpr, EVEN: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """`_one_row` for up to T rows of x."""
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    cols = tl.arange(0, COLS)
    tokens = tl.arange(0, T)
    row_mask = rows < n_out
    token_mask = tokens < n_rows
    w_at = w_ptr + rows.to(tl.int64)[:, None] * n_in + cols[None, :]
    up_at = w_at + n_out.to(tl.int64) * n_in
    x_at = x_ptr + tokens[None, :] * n_in + cols[:, None]
    precision: tl.constexpr = "ieee" if IEEE else "tf32"
    if PDL:
        gdc_wait()
    acc = tl.zeros((ROWS, T), tl.float32)
    acc_up = tl.zeros((ROWS, T), tl.float32)
    for first in tl.range(0, n_in, COLS, num_stages=STAGES):
        if EVEN:
            w_mask = row_mask[:, None]
            x_mask = token_mask[None, :]
        else:
            in_row = first + cols < n_in
            w_mask = row_mask[:, None] & in_row[None, :]
            x_mask = in_row[:, None] & token_mask[None, :]
        w = tl.load(w_at + first, mask=w_mask, other=0.0, eviction_policy="evict_first")
        x = tl.load(x_at + first, mask=x_mask, other=0.0)
        acc = tl.dot(w, x, acc, input_precision=precision)
        if GATED:
            up = tl.load(up_at + first, mask=w_mask, other=0.0, eviction_policy="evict_first")
            acc_up = tl.dot(up, x, acc_up, input_precision=precision)
    if PDL:
        # Not before: the next kernel's programs would crowd on the processors that this one leaves
        # free (134 us in place of 84 for Large-2407's w2).
        gdc_launch_dependents()
    if SLICES > 0:
        at = tokens[:, None] * SLICES + tl.arange(0, SLICES)[None, :]
        squares = tl.load(squares_ptr + at, mask=token_mask[:, None], other=0.0)
        scale = 1.0 / tl.sqrt_rn(tl.sum(squares, 1) / n_in + eps)
        acc *= scale[None, :]
        acc_up *= scale[None, :]
    if GATED:
        acc = acc / (1.0 + tl.exp(-acc)) * acc_up
    tl.store(
        out_ptr + tokens[None, :] * n_out + rows[:, None],
        acc.to(out_ptr.dtype.element_ty),
        mask=row_mask[:, None] & token_mask[None, :],
    )


def matmul(
    x: Tensor | Scaled,
    weight: Weight,
    *,
    gated: bool = False,
    float32: bool = False,
    config: OneRow | FewRows | None = None,
) -> Tensor:
    """`x @ weight.T`.

    Args:
        x: (T, n_in), contiguous; T up to MOST_ROWS.
        weight: (n_out, n_in), or (2 * n_out, n_in) when gated.
        gated: give silu of the matmul with the first half of the rows times that with the second.
        float32: the result's type, instead of x's.
        config: how the work is divided; None takes the shipped one.

    Returns:
        (T, n_out).
    """
    if isinstance(weight, Quantized):
        assert not float32
        return matmul_quantized(x, weight, gated=gated, config=config)
    rows, squares, eps = (x.rows, x.squares, x.eps) if isinstance(x, Scaled) else (x, None, 0.0)
    n_rows, n_in = rows.shape
    n_out = len(weight) // 2 if gated else len(weight)
    n_slices = 0 if squares is None else squares.shape[1]
    dtype = torch.float32 if float32 else rows.dtype
    early = early_launch(rows.device)
    if n_rows == 1:
        out = torch.empty(n_rows, n_out, dtype=dtype, device=rows.device)
        one = config or one_row_config(n_out, n_in, gated, weight.dtype)
        assert isinstance(one, OneRow)
        _one_row[(triton.cdiv(n_out, one.rows),)](
            rows, squares, weight, out, n_out, eps,
            n_in=n_in, SLICES=n_slices, GATED=gated,
            ROWS=one.rows, COLS=one.cols, PDL=bool(early), num_warps=one.warps, **early,
        )  # fmt: skip
        return out
    assert n_rows <= MOST_ROWS
    few = config or few_rows_config(n_out, n_in, gated, weight.dtype)
    if few is None:
        if squares is not None:
            scale = torch.rsqrt(squares.sum(1, keepdim=True) / n_in + eps)
            rows = (rows * scale).to(rows.dtype)
        both = reference.logits(rows, weight) if float32 else reference.linear(rows, weight)
        return silu_mul(both) if gated else both
    assert isinstance(few, FewRows)
    out = torch.empty(n_rows, n_out, dtype=dtype, device=rows.device)
    width = 16 if n_rows <= 16 else 32
    stage_bytes = (few.rows * (2 if gated else 1) + width) * few.cols * weight.element_size()
    stages = max(1, min(few.stages, shared_memory(rows.device) // stage_bytes))
    _few_rows[(triton.cdiv(n_out, few.rows),)](
        rows, squares, weight, out, n_rows, n_out, n_in, eps,
        SLICES=n_slices, GATED=gated, T=width, ROWS=few.rows,
        COLS=few.cols, STAGES=stages, IEEE=weight.dtype == torch.float32,
        EVEN=n_in % few.cols == 0, PDL=bool(early), num_warps=few.warps, **early,
    )  # fmt: skip
    return out
