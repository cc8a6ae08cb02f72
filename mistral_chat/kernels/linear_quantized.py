"""Matmuls with a quantized matrix: its numbers become floats in registers, never in memory.

One row goes through a program per few matrix rows, as in `linear`; up to MOST_ROWS through the
tensor cores. Numbers minus zeros are exact in every float type; sums are float32, and a scale
multiplies the sum of its group. References: `reference.linear`, `.gated`, `.logits`.

Many rows dequantize the matrix into memory, some rows at a time, and take torch's matmul.

Shapes: T = rows of x, n_in, n_out = columns and rows of the matrix, S = slices of a row.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from mistral_chat.kernels.elementwise import Scaled
from mistral_chat.kernels.tuning import (
    MOST_ROWS,
    FewRows,
    OneRow,
    early_launch,
    few_quantized_rows_config,
    has_fp8,
    one_quantized_row_config,
)
from mistral_chat.kernels.weight import Quantized

__all__ = ["dequantize", "matmul_quantized"]

DEQUANTIZED = 4096  # columns of a program

# Two pairs of bytes, each byte's halves -> what is left of 128 + number after a subtraction.
_INT4_ASM = tl.constexpr("""
{
.reg .b32 a, b, al, ah, bl, bh, one;
prmt.b32 a, $4, 0, 0x4140;
prmt.b32 b, $4, 0, 0x4342;
lop3.b32 al, a, 0x000f000f, 0x43004300, 0xea;
lop3.b32 bl, b, 0x000f000f, 0x43004300, 0xea;
shr.u32 a, a, 4;
shr.u32 b, b, 4;
lop3.b32 ah, a, 0x000f000f, 0x43004300, 0xea;
lop3.b32 bh, b, 0x000f000f, 0x43004300, 0xea;
mov.b32 one, 0x3f803f80;
fma.rn.bf16x2 $0, al, one, $5;
fma.rn.bf16x2 $1, bl, one, $6;
fma.rn.bf16x2 $2, ah, one, $5;
fma.rn.bf16x2 $3, bh, one, $6;
}
""")


@triton.jit
def _number(raw, KIND: tl.constexpr, NATIVE: tl.constexpr):
    """One-byte numbers -> float32: int8, or FP8 by the hardware or by its bits.

    FP8's exponent has 7 where float16's has 15: its bits as a float16's are 2^8 too small.
    """
    if KIND == "int8":
        return raw.to(tl.int8, bitcast=True).to(tl.float32)
    elif NATIVE:
        return raw.to(tl.float8e4nv, bitcast=True).to(tl.float32)
    else:
        bits = raw.to(tl.uint16)
        half = ((bits & 0x80) << 8) | ((bits & 0x7F) << 7)
        return half.to(tl.float16, bitcast=True).to(tl.float32) * 256.0


@triton.jit
def _tile_sum(
    raw, x, x_high, zero,
    KIND: tl.constexpr, HAS_ZERO: tl.constexpr, NATIVE: tl.constexpr,
):  # fmt: skip
    """(number - zero) * x of each byte: (ROWS, CHUNKS, BYTES)."""
    if KIND == "int4":
        # 2^23 + number has the number in the last bits of a float32
        wide = raw.to(tl.int32)
        low = ((wide & 15) | 0x4B000000).to(tl.float32, bitcast=True)
        high = ((wide >> 4) | 0x4B000000).to(tl.float32, bitcast=True)
        middle = zero[:, :, None] + 8388608.0
        return (low - middle) * x[None, :, :] + (high - middle) * x_high[None, :, :]
    else:
        number = _number(raw, KIND, NATIVE)
        if HAS_ZERO:
            number -= zero[:, :, None]
        return number * x[None, :, :]


@triton.jit
def _zeros(zero_ptr, at, mask, KIND: tl.constexpr, HAS_ZERO: tl.constexpr):
    """Zeros as float32; int4's are 8 where none are stored."""
    if HAS_ZERO:
        return tl.load(zero_ptr + at, mask=mask, other=0).to(tl.float32)
    elif KIND == "int4":
        return tl.full(at.shape, 8.0, tl.float32)
    else:
        return tl.zeros(at.shape, tl.float32)


@triton.jit
def _one_row(
    x_ptr, squares_ptr, data_ptr, scale_ptr, zero_ptr, out_ptr, n_out, eps,
    n_in: tl.constexpr, GROUP: tl.constexpr, KIND: tl.constexpr, HAS_ZERO: tl.constexpr,
    SLICES: tl.constexpr, GATED: tl.constexpr, ROWS: tl.constexpr, CHUNKS: tl.constexpr,
    WIDTH: tl.constexpr, NATIVE: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """`linear._one_row`, a tile of CHUNKS parts of a group with WIDTH columns each at a time."""
    PACK: tl.constexpr = 2 if KIND == "int4" else 1
    BYTES: tl.constexpr = WIDTH // PACK
    N_GROUPS: tl.constexpr = n_in // GROUP
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    row_mask = rows < n_out
    chunks = tl.arange(0, CHUNKS)
    byte = tl.arange(0, BYTES)
    offset = chunks[:, None] * BYTES + byte[None, :]  # (CHUNKS, BYTES), in bytes
    if KIND == "int4":
        cols = chunks[:, None] * WIDTH + byte[None, :] // 16 * 32 + byte[None, :] % 16
    else:
        cols = offset
    at = rows.to(tl.int64)[:, None, None] * (n_in // PACK) + offset[None, :, :]
    mask = row_mask[:, None, None] & (cols < n_in)[None, :, :]
    # As in `linear`: the first weights are on their way before the kernel that makes x has ended.
    raw = tl.load(data_ptr + at, mask=mask, other=0, eviction_policy="evict_first")
    up_raw = raw
    up_at = at
    if GATED:
        up_at = at + n_out.to(tl.int64) * (n_in // PACK)
        up_raw = tl.load(data_ptr + up_at, mask=mask, other=0, eviction_policy="evict_first")
    if PDL:
        gdc_wait()
    acc = tl.zeros((ROWS, CHUNKS, BYTES), tl.float32)
    acc_up = tl.zeros((ROWS, CHUNKS, BYTES), tl.float32)
    for first in tl.static_range(0, n_in, CHUNKS * WIDTH):
        in_row = first + cols < n_in
        if first > 0:
            mask = row_mask[:, None, None] & in_row[None, :, :]
            here = first // PACK
            raw = tl.load(data_ptr + at + here, mask=mask, other=0, eviction_policy="evict_first")
            if GATED:
                up_raw = tl.load(
                    data_ptr + up_at + here, mask=mask, other=0, eviction_policy="evict_first"
                )
        x = tl.load(x_ptr + first + cols, mask=in_row, other=0.0).to(tl.float32)
        x_high = x
        if KIND == "int4":
            x_high = tl.load(x_ptr + first + cols + 16, mask=in_row, other=0.0).to(tl.float32)
        group = (first + chunks * WIDTH) // GROUP
        group_at = rows[:, None] * N_GROUPS + group[None, :]
        group_mask = row_mask[:, None] & (group < N_GROUPS)[None, :]
        zero = _zeros(zero_ptr, group_at, group_mask, KIND, HAS_ZERO)
        part = _tile_sum(raw, x, x_high, zero, KIND, HAS_ZERO, NATIVE)
        if N_GROUPS > 1:
            part *= tl.load(scale_ptr + group_at, mask=group_mask, other=0.0)[:, :, None]
        acc += part
        if GATED:
            up_group_at = group_at + n_out * N_GROUPS
            up_zero = _zeros(zero_ptr, up_group_at, group_mask, KIND, HAS_ZERO)
            part = _tile_sum(up_raw, x, x_high, up_zero, KIND, HAS_ZERO, NATIVE)
            if N_GROUPS > 1:
                part *= tl.load(scale_ptr + up_group_at, mask=group_mask, other=0.0)[:, :, None]
            acc_up += part
    if PDL:
        gdc_launch_dependents()
    total = tl.sum(tl.sum(acc, 2), 1)
    up = tl.sum(tl.sum(acc_up, 2), 1)
    if N_GROUPS == 1:
        total *= tl.load(scale_ptr + rows, mask=row_mask, other=0.0)
        if GATED:
            up *= tl.load(scale_ptr + n_out + rows, mask=row_mask, other=0.0)
    if SLICES > 0:
        norm = 1.0 / tl.sqrt_rn(tl.sum(tl.load(squares_ptr + tl.arange(0, SLICES)), 0) / n_in + eps)
        total *= norm
        up *= norm
    if GATED:
        total = total / (1.0 + tl.exp(-total)) * up
    tl.store(out_ptr + rows, total.to(out_ptr.dtype.element_ty), mask=row_mask)


@triton.jit
def _add_tile(
    acc, x, x_high, data_ptr, scale_ptr, zero_ptr, rows, row_mask, mask, at, group, N_GROUPS,
    KIND: tl.constexpr, HAS_ZERO: tl.constexpr, GROUPED: tl.constexpr, NATIVE: tl.constexpr,
    ASM: tl.constexpr, IEEE: tl.constexpr,
):  # fmt: skip
    """Acc + scale * (numbers - zeros) @ x, for a tile of columns of one group."""
    precision: tl.constexpr = "ieee" if IEEE else "tf32"
    raw = tl.load(data_ptr + at, mask=mask, other=0, eviction_policy="evict_first")
    group_at = rows * N_GROUPS + group
    zero = _zeros(zero_ptr, group_at, row_mask, KIND, HAS_ZERO)
    start = acc
    if GROUPED:
        start = tl.zeros(acc.shape, tl.float32)
    if KIND == "int4":
        if ASM:
            offset = tl.broadcast_to((-128.0 - zero).to(tl.bfloat16)[:, None], raw.shape)
            low, high = tl.inline_asm_elementwise(
                _INT4_ASM, "=r,=r,=r,=r,r,r,r", [raw, offset],
                dtype=(tl.bfloat16, tl.bfloat16), is_pure=True, pack=4,
            )  # fmt: skip
        else:
            low = ((raw & 15).to(tl.float32) - zero[:, None]).to(x.dtype)
            high = ((raw >> 4).to(tl.float32) - zero[:, None]).to(x.dtype)
        part = tl.dot(low, x, start, input_precision=precision)
        part = tl.dot(high, x_high, part, input_precision=precision)
    else:
        number = _number(raw, KIND, NATIVE)
        if HAS_ZERO:
            number -= zero[:, None]
        part = tl.dot(number.to(x.dtype), x, start, input_precision=precision)
    if GROUPED:
        return acc + part * tl.load(scale_ptr + group_at, mask=row_mask, other=0.0)[:, None]
    else:
        return part


@triton.jit
def _few_rows(
    x_ptr, squares_ptr, data_ptr, scale_ptr, zero_ptr, out_ptr, n_rows, n_out, n_in, eps,
    GROUP, GROUPED: tl.constexpr, KIND: tl.constexpr, HAS_ZERO: tl.constexpr,
    SLICES: tl.constexpr, GATED: tl.constexpr, T: tl.constexpr, ROWS: tl.constexpr,
    COLS: tl.constexpr, STAGES: tl.constexpr, IEEE: tl.constexpr, NATIVE: tl.constexpr,
    ASM: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """`_one_row` for up to T rows of x; COLS divides a group, or there is one a row."""
    PACK: tl.constexpr = 2 if KIND == "int4" else 1
    BYTES: tl.constexpr = COLS // PACK
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    byte = tl.arange(0, BYTES)
    tokens = tl.arange(0, T)
    row_mask = rows < n_out
    token_mask = tokens < n_rows
    cols = byte
    if KIND == "int4":
        cols = byte // 16 * 32 + byte % 16
    at = rows.to(tl.int64)[:, None] * (n_in // PACK) + byte[None, :]
    up_at = at + n_out.to(tl.int64) * (n_in // PACK)
    x_at = x_ptr + tokens[None, :] * n_in + cols[:, None]
    n_groups = n_in // GROUP
    if PDL:
        gdc_wait()
    acc = tl.zeros((ROWS, T), tl.float32)
    acc_up = tl.zeros((ROWS, T), tl.float32)
    for first in tl.range(0, n_in, COLS, num_stages=STAGES):
        in_row = first + cols < n_in
        mask = row_mask[:, None] & in_row[None, :]
        x_mask = in_row[:, None] & token_mask[None, :]
        x = tl.load(x_at + first, mask=x_mask, other=0.0)
        x_high = x
        if KIND == "int4":
            x_high = tl.load(x_at + first + 16, mask=x_mask, other=0.0)
        group = first // GROUP
        here = first // PACK
        acc = _add_tile(
            acc, x, x_high, data_ptr, scale_ptr, zero_ptr, rows, row_mask, mask, at + here,
            group, n_groups, KIND, HAS_ZERO, GROUPED, NATIVE, ASM, IEEE,
        )  # fmt: skip
        if GATED:
            acc_up = _add_tile(
                acc_up, x, x_high, data_ptr, scale_ptr, zero_ptr, rows + n_out, row_mask, mask,
                up_at + here, group, n_groups, KIND, HAS_ZERO, GROUPED, NATIVE, ASM, IEEE,
            )  # fmt: skip
    if PDL:
        gdc_launch_dependents()
    if not GROUPED:
        acc *= tl.load(scale_ptr + rows, mask=row_mask, other=0.0)[:, None]
        if GATED:
            acc_up *= tl.load(scale_ptr + n_out + rows, mask=row_mask, other=0.0)[:, None]
    if SLICES > 0:
        square_at = tokens[:, None] * SLICES + tl.arange(0, SLICES)[None, :]
        squares = tl.load(squares_ptr + square_at, mask=token_mask[:, None], other=0.0)
        norm = 1.0 / tl.sqrt_rn(tl.sum(squares, 1) / n_in + eps)
        acc *= norm[None, :]
        acc_up *= norm[None, :]
    if GATED:
        acc = acc / (1.0 + tl.exp(-acc)) * acc_up
    tl.store(
        out_ptr + tokens[None, :] * n_out + rows[:, None],
        acc.to(out_ptr.dtype.element_ty),
        mask=row_mask[:, None] & token_mask[None, :],
    )


@triton.jit
def _dequantize(
    data_ptr, scale_ptr, zero_ptr, out_ptr, n_in, GROUP, KIND: tl.constexpr,
    HAS_ZERO: tl.constexpr, NATIVE: tl.constexpr, CHUNKS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """CHUNKS neighbouring parts of a row, of WIDTH columns each that have one scale."""
    PACK: tl.constexpr = 2 if KIND == "int4" else 1
    BYTES: tl.constexpr = WIDTH // PACK
    row = tl.program_id(0).to(tl.int64)
    chunk = tl.program_id(1) * CHUNKS + tl.arange(0, CHUNKS)
    byte = tl.arange(0, BYTES)
    offset = chunk[:, None] * BYTES + byte[None, :]
    is_chunk = chunk * WIDTH < n_in
    mask = is_chunk[:, None] & (offset < n_in // PACK)
    raw = tl.load(data_ptr + row * (n_in // PACK) + offset, mask=mask, other=0)
    group_at = row * (n_in // GROUP) + chunk * WIDTH // GROUP
    scale = tl.load(scale_ptr + group_at, mask=is_chunk, other=0.0)[:, None]
    zero = _zeros(zero_ptr, group_at, is_chunk, KIND, HAS_ZERO)[:, None]
    out_at = out_ptr + row * n_in + offset
    if KIND == "int4":
        out_at = out_ptr + row * n_in + chunk[:, None] * WIDTH + (byte // 16 * 32 + byte % 16)[None]
        low = ((raw & 15).to(tl.float32) - zero) * scale
        high = ((raw >> 4).to(tl.float32) - zero) * scale
        tl.store(out_at, low.to(out_ptr.dtype.element_ty), mask=mask)
        tl.store(out_at + 16, high.to(out_ptr.dtype.element_ty), mask=mask)
    else:
        number = (_number(raw, KIND, NATIVE) - zero) * scale
        tl.store(out_at, number.to(out_ptr.dtype.element_ty), mask=mask)


def _parts(weight: Quantized) -> tuple[Tensor, Tensor, Tensor]:
    """Bytes, scales and zeros (or anything where there are none)."""
    zero = weight.scale if weight.zero is None else weight.zero
    return weight.data.view(torch.uint8), weight.scale, zero


def dequantize(weight: Quantized, dtype: torch.dtype) -> Tensor:
    """`weight.dequantize(dtype)`."""
    n_out, n_in = weight.shape
    out = torch.empty(n_out, n_in, dtype=dtype, device=weight.device)
    group = weight.group
    width = min(group & -group, DEQUANTIZED)
    chunks = DEQUANTIZED // width
    _dequantize[(n_out, triton.cdiv(n_in, DEQUANTIZED))](
        *_parts(weight), out, n_in, group, KIND=weight.kind, HAS_ZERO=weight.zero is not None,
        NATIVE=has_fp8(weight.device), CHUNKS=chunks, WIDTH=width,
    )  # fmt: skip
    return out


def matmul_quantized(
    x: Tensor | Scaled,
    weight: Quantized,
    *,
    gated: bool = False,
    config: OneRow | FewRows | None = None,
) -> Tensor:
    """`linear.matmul` with a quantized matrix.

    Args:
        x: (T, n_in), contiguous; T up to MOST_ROWS.
        weight: (n_out, n_in), or (2 * n_out, n_in) when gated.
        gated: give silu of the matmul with the first half of the rows times that with the second.
        config: how the work is divided; None takes the shipped one.

    Returns:
        (T, n_out).
    """
    rows, squares, eps = (x.rows, x.squares, x.eps) if isinstance(x, Scaled) else (x, None, 0.0)
    n_rows, n_in = rows.shape
    n_out = len(weight) // 2 if gated else len(weight)
    group, device = weight.group, rows.device
    is_grouped = group < n_in
    n_slices = 0 if squares is None else squares.shape[1]
    early = early_launch(device)
    out = torch.empty(n_rows, n_out, dtype=rows.dtype, device=device)
    # a power of two that divides a group, so that a tile's part of a row has one scale
    width = group & -group
    same = {
        "KIND": weight.kind, "HAS_ZERO": weight.zero is not None, "SLICES": n_slices,
        "GATED": gated, "NATIVE": has_fp8(device), "PDL": bool(early),
    }  # fmt: skip
    assert n_rows <= MOST_ROWS
    if config is None and n_rows == 1:
        config = one_quantized_row_config(n_out, n_in, gated, weight.kind)
    few = config or few_quantized_rows_config(n_out)
    if isinstance(few, OneRow):
        assert n_rows == 1
        width = min(width, few.cols) if is_grouped else few.cols
        _one_row[(triton.cdiv(n_out, few.rows),)](
            rows, squares, *_parts(weight), out, n_out, eps,
            n_in=n_in, GROUP=group, ROWS=few.rows, CHUNKS=few.cols // width, WIDTH=width,
            num_warps=few.warps, **same, **early,
        )  # fmt: skip
        return out
    is_bf16 = rows.dtype == torch.bfloat16
    _few_rows[(triton.cdiv(n_out, few.rows),)](
        rows, squares, *_parts(weight), out, n_rows, n_out, n_in, eps, group,
        GROUPED=is_grouped, T=16 if n_rows <= 16 else 32, ROWS=few.rows,
        COLS=min(few.cols, width) if is_grouped else few.cols, STAGES=few.stages,
        IEEE=rows.dtype == torch.float32, ASM=is_bf16 and device.type == "cuda",
        num_warps=few.warps, **same, **early,
    )  # fmt: skip
    return out
