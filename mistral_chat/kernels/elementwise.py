"""What stands between the matmuls: embedding, norm, rotary embedding, SwiGLU.

References: `reference.embed`, `.add_norm`, `.rope_store`, `.silu_mul` and
`.rotations`.

Shapes: T = new tokens, S = slices of a row, H = local query heads, K = local KV heads,
D = head_dim.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from mistral_chat.kernels.cached import Cached
from mistral_chat.kernels.reference import Rope, Rotations
from mistral_chat.kernels.tuning import early_launch

__all__ = [
    "SLICE",
    "Scaled",
    "add_norm",
    "add_scale",
    "embed",
    "n_slices",
    "rope_store",
    "rotations",
    "silu_mul",
]


@triton.jit
def _embed(
    tokens_ptr, weight_ptr, out_ptr, first_id, n_ids, dim,
    BLOCK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    cols = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    row = tl.program_id(0).to(tl.int64)
    local = tl.load(tokens_ptr + row + tl.zeros_like(cols)) - first_id
    inside = (cols < dim) & (local >= 0) & (local < n_ids)
    values = tl.load(weight_ptr + local * dim + cols, mask=inside, other=0.0)
    tl.store(out_ptr + row * dim + cols, values, mask=cols < dim)


def embed(tokens: Tensor, weight: Tensor, first_id: int) -> Tensor:
    """`reference.embed`: (T,) int64 ids and (n_ids, dim) -> (T, dim)."""
    n_ids, dim = weight.shape
    out = torch.empty(len(tokens), dim, dtype=weight.dtype, device=weight.device)
    block = min(1024, triton.next_power_of_2(dim))
    early = early_launch(weight.device)
    _embed[(len(tokens), triton.cdiv(dim, block))](
        tokens, weight, out, first_id, n_ids, dim, BLOCK=block, PDL=bool(early), **early
    )
    return out


@triton.jit
def _rotations(
    starts_ptr, frequencies_ptr, queries_ptr, keys_ptr, magnitude, beta, original,
    LENGTH: tl.constexpr, HALF: tl.constexpr, HALF_DIM: tl.constexpr, SCALED: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    row = tl.program_id(0)
    position = tl.load(starts_ptr + row // LENGTH) + row % LENGTH
    pair = tl.arange(0, HALF)
    mask = pair < HALF_DIM
    frequency = tl.load(frequencies_ptr + pair, mask=mask, other=0.0)
    angle = position.to(tl.float32) * frequency
    cos = tl.cos(angle) * magnitude
    sin = tl.sin(angle) * magnitude
    at = row * 2 * HALF_DIM + pair
    tl.store(keys_ptr + at, cos, mask=mask)
    tl.store(keys_ptr + at + HALF_DIM, sin, mask=mask)
    if SCALED:
        scale = 1.0 + beta * tl.log((1 + position // original).to(tl.float32))
        tl.store(queries_ptr + at, cos * scale, mask=mask)
        tl.store(queries_ptr + at + HALF_DIM, sin * scale, mask=mask)


def rotations(starts: Tensor, length: int, rope: Rope) -> Rotations:
    """Cosines and sines of the rotary embedding.

    Args:
        starts: (n_spans,) int32, position of each span's first token.
        length: tokens of a span.
        rope: how positions turn heads.

    Returns:
        of queries and of keys, each (n_spans * length, 2, D / 2) float32: cosines, then sines, of
        `reference.rope_rotations`.
    """
    n_rows = len(starts) * length
    half = len(rope.frequencies)
    keys = torch.empty(n_rows, 2, half, dtype=torch.float32, device=starts.device)
    queries = torch.empty_like(keys) if rope.beta else keys
    early = early_launch(starts.device)
    _rotations[(n_rows,)](
        starts, rope.frequencies, queries, keys, rope.magnitude, rope.beta, rope.original,
        LENGTH=length, HALF=triton.next_power_of_2(half), HALF_DIM=half, SCALED=rope.beta != 0,
        PDL=bool(early), num_warps=1, **early,
    )  # fmt: skip
    return queries, keys


@triton.jit
def _add_norm(
    partial_ptr, residual_ptr, weight_ptr, normed_ptr, sum_ptr, dim, eps,
    ADD: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    cols = tl.arange(0, BLOCK)
    mask = cols < dim
    weight = tl.load(weight_ptr + cols, mask=mask, other=0.0).to(tl.float32)
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    at = tl.program_id(0).to(tl.int64) * dim + cols
    x = tl.load(partial_ptr + at, mask=mask, other=0.0).to(tl.float32)
    if ADD:
        x += tl.load(residual_ptr + at, mask=mask, other=0.0).to(tl.float32)
        rounded = x.to(sum_ptr.dtype.element_ty)
        tl.store(sum_ptr + at, rounded, mask=mask)
        x = rounded.to(tl.float32)
    scale = 1.0 / tl.sqrt_rn(tl.sum(x * x, 0) / dim + eps)
    tl.store(normed_ptr + at, (x * scale * weight).to(normed_ptr.dtype.element_ty), mask=mask)


def add_norm(
    partial: Tensor, residual: Tensor | None, weight: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """`reference.add_norm`.

    Args:
        partial: (T, dim).
        residual: (T, dim) to add; None adds nothing.
        weight: (dim,).
        eps: of the norm.

    Returns:
        the normed stream and the new residual, both (T, dim).
    """
    n_rows, dim = partial.shape
    normed = torch.empty_like(partial)
    total = partial if residual is None else torch.empty_like(partial)
    block = triton.next_power_of_2(dim)
    early = early_launch(partial.device)
    _add_norm[(n_rows,)](
        partial, residual, weight, normed, total, dim, eps,
        ADD=residual is not None, BLOCK=block, PDL=bool(early),
        num_warps=min(16, max(1, block // 512)), **early,
    )  # fmt: skip
    return normed, total


@dataclass(frozen=True, slots=True)
class Scaled:
    """Rows on their way through an RMS norm: times its weight, not yet divided by their size.

    Several programs share a row this way without waiting for each other; the matmul that takes
    the rows divides its few results.

    Args:
        rows: (T, dim), x * weight.
        squares: (T, S) float32, sums of x * x over slices of the row; 0 where there is none.
        eps: of the norm.
    """

    rows: Tensor
    squares: Tensor
    eps: float


SLICE = 1024  # columns of a program


def n_slices(dim: int) -> int:
    """S for rows of a width: a power of two."""
    return int(triton.next_power_of_2(triton.cdiv(dim, SLICE)))


@triton.jit
def _add_scale(
    partial_ptr, residual_ptr, weight_ptr, scaled_ptr, sum_ptr, squares_ptr, dim,
    ADD: tl.constexpr, SLICE: tl.constexpr, SLICES: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    part = tl.program_id(1)
    cols = part * SLICE + tl.arange(0, SLICE)
    mask = cols < dim
    weight = tl.load(weight_ptr + cols, mask=mask, other=0.0).to(tl.float32)
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    at = row * dim + cols
    x = tl.load(partial_ptr + at, mask=mask, other=0.0).to(tl.float32)
    if ADD:
        x += tl.load(residual_ptr + at, mask=mask, other=0.0).to(tl.float32)
        rounded = x.to(sum_ptr.dtype.element_ty)
        tl.store(sum_ptr + at, rounded, mask=mask)
        x = rounded.to(tl.float32)
    tl.store(scaled_ptr + at, (x * weight).to(scaled_ptr.dtype.element_ty), mask=mask)
    tl.store(squares_ptr + row * SLICES + part, tl.sum(x * x, 0))


def add_scale(
    partial: Tensor, residual: Tensor | None, weight: Tensor, eps: float
) -> tuple[Scaled, Tensor]:
    """`add_norm`, the division by the rows' size left to the matmul that follows."""
    n_rows, dim = partial.shape
    scaled = torch.empty_like(partial)
    total = partial if residual is None else torch.empty_like(partial)
    slices = n_slices(dim)
    squares = torch.empty(n_rows, slices, dtype=torch.float32, device=partial.device)
    early = early_launch(partial.device)
    _add_scale[(n_rows, slices)](
        partial, residual, weight, scaled, total, squares, dim,
        ADD=residual is not None, SLICE=SLICE, SLICES=slices, PDL=bool(early), num_warps=4, **early,
    )  # fmt: skip
    return Scaled(scaled, squares, eps), total


@triton.jit
def _silu_mul(both_ptr, out_ptr, n_hidden, BLOCK: tl.constexpr, PDL: tl.constexpr):
    cols = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = cols < n_hidden
    row = tl.program_id(0).to(tl.int64)
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    at = both_ptr + row * 2 * n_hidden + cols
    gate = tl.load(at, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(at + n_hidden, mask=mask, other=0.0).to(tl.float32)
    value = gate / (1.0 + tl.exp(-gate)) * up
    tl.store(out_ptr + row * n_hidden + cols, value.to(out_ptr.dtype.element_ty), mask=mask)


def silu_mul(both: Tensor) -> Tensor:
    """`reference.silu_mul`: (T, 2 * hidden) -> (T, hidden)."""
    n_rows, n_hidden = both.shape[0], both.shape[1] // 2
    out = torch.empty(n_rows, n_hidden, dtype=both.dtype, device=both.device)
    early = early_launch(both.device)
    _silu_mul[(n_rows, triton.cdiv(n_hidden, 2048))](
        both, out, n_hidden, BLOCK=2048, PDL=bool(early), num_warps=8, **early
    )
    return out


@triton.jit
def _rope_store(
    qkv_ptr, keys_ptr, values_ptr, k_scales_ptr, v_scales_ptr, q_turns_ptr, k_turns_ptr, start,
    key_stride, scale_stride,
    N_Q: tl.constexpr, N_KV: tl.constexpr, HALF: tl.constexpr, HALF_DIM: tl.constexpr,
    FP8: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0)
    head = tl.program_id(1)
    pair = tl.arange(0, HALF)
    mask = pair < HALF_DIM
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    at = qkv_ptr + (token.to(tl.int64) * (N_Q + 2 * N_KV) + head) * 2 * HALF_DIM + 2 * pair
    even = tl.load(at, mask=mask, other=0.0)
    odd = tl.load(at + 1, mask=mask, other=0.0)
    if head < N_Q + N_KV:
        turns_ptr = q_turns_ptr
        if head >= N_Q:
            turns_ptr = k_turns_ptr
        rotation = turns_ptr + token * 2 * HALF_DIM + 2 * pair
        cos = tl.load(rotation, mask=mask, other=0.0)
        sin = tl.load(rotation + 1, mask=mask, other=0.0)
        a = even.to(tl.float32)
        b = odd.to(tl.float32)
        even = (a * cos - b * sin).to(even.dtype)
        odd = (a * sin + b * cos).to(odd.dtype)
    if head < N_Q:
        tl.store(at, even, mask=mask)
        tl.store(at + 1, odd, mask=mask)
    else:
        cache_ptr = keys_ptr
        kv_head = head - N_Q
        if head >= N_Q + N_KV:
            cache_ptr = values_ptr
            kv_head -= N_KV
        position = (start + token).to(tl.int64)
        to = cache_ptr + kv_head * key_stride + position * 2 * HALF_DIM + 2 * pair
        if FP8:
            scales_ptr = k_scales_ptr
            if head >= N_Q + N_KV:
                scales_ptr = v_scales_ptr
            a = even.to(tl.float32)
            b = odd.to(tl.float32)
            most = tl.maximum(tl.max(tl.abs(a), 0), tl.max(tl.abs(b), 0))
            scale = tl.div_rn(most, 448.0)
            scale = tl.where(scale > 0, scale, 1.0)
            tl.store(scales_ptr + kv_head * scale_stride + position, scale)
            tl.store(to, tl.div_rn(a, scale).to(tl.float8e4nv), mask=mask)
            tl.store(to + 1, tl.div_rn(b, scale).to(tl.float8e4nv), mask=mask)
        else:
            tl.store(to, even, mask=mask)
            tl.store(to + 1, odd, mask=mask)


def rope_store(
    qkv: Tensor, keys: Cached, values: Cached, start: int, n_heads: int, rotations: Rotations
) -> None:
    """`reference.rope_store`, with the queries rotated in place."""
    n_new, n_all, head_dim = qkv.shape
    assert qkv.is_contiguous()
    assert keys.data.stride() == values.data.stride()
    assert keys.data.stride(1) == head_dim
    half = head_dim // 2
    early = early_launch(qkv.device)
    _rope_store[(n_new, n_all)](
        qkv, keys.data, values.data, keys.scale, values.scale,
        *map(torch.view_as_real, rotations), start, keys.data.stride(0),
        0 if keys.scale is None else keys.scale.stride(0),
        N_Q=n_heads, N_KV=(n_all - n_heads) // 2, HALF=triton.next_power_of_2(half),
        HALF_DIM=half, FP8=keys.scale is not None, PDL=bool(early), num_warps=1, **early,
    )  # fmt: skip
