"""Attention of a few new tokens to a long cache, the context divided over programs (split KV).

The first kernel also rotates queries and keys (RoPE) and stores the new keys and
values; the second adds up the parts. Positions and lengths lie on the device, so that a captured
graph serves any. Reference: `reference.attend`.

Shapes: N = spans (sequences), T = tokens of a span, H = local query heads, K = local KV heads,
D = head_dim, S = parts of the context, M = rows of a tile: T * queries of a KV head, rounded up.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from mistral_chat.kernels.cached import Cached
from mistral_chat.kernels.reference import Rotations
from mistral_chat.kernels.tuning import attend_config, early_launch, splits

__all__ = ["attend"]

MOST_TILE_ROWS = 64


@triton.jit
def _quantized(rows):
    """`cached.quantize_rows`: (NEW, D) -> FP8 of it, and a scale a row."""
    numbers = rows.to(tl.float32)
    scale = tl.div_rn(tl.max(tl.abs(numbers), 1), 448.0)
    scale = tl.where(scale > 0, scale, 1.0)
    scales = tl.broadcast_to(scale[:, None], numbers.shape)
    return tl.div_rn(numbers, scales).to(tl.float8e4nv), scale


@triton.jit
def _part(
    qkv_ptr, keys_ptr, values_ptr, k_scales_ptr, v_scales_ptr, q_turns_ptr, k_turns_ptr, slots_ptr,
    starts_ptr, lengths_ptr, heads_ptr, sums_ptr, scales_ptr, slot_stride, head_stride,
    scale_slot_stride, scale_head_stride, window, softmax_scale,
    N_HEADS: tl.constexpr, N_KV: tl.constexpr, T: tl.constexpr, GROUP: tl.constexpr,
    M: tl.constexpr, M_ALL: tl.constexpr, D: tl.constexpr, BLOCK_S: tl.constexpr,
    SPLITS: tl.constexpr, NEW: tl.constexpr, IEEE: tl.constexpr, FP8: tl.constexpr,
    STAGES: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """One part of the context of one KV head of one span: weighted means and log-sum-exps."""
    part = tl.program_id(0)
    kv_head = tl.program_id(1)
    span = tl.program_id(2) // (M_ALL // M)
    tile = tl.program_id(2) % (M_ALL // M)
    n_all: tl.constexpr = N_HEADS + 2 * N_KV
    half: tl.constexpr = D // 2
    precision: tl.constexpr = "ieee" if IEEE else "tf32"
    first_head = tl.load(heads_ptr + kv_head)
    n_group = tl.load(heads_ptr + kv_head + 1) - first_head
    # Places change between steps only, and so do keys and values before them.
    start = tl.load(starts_ptr + span)
    length = tl.load(lengths_ptr + span)
    slot = tl.load(slots_ptr + span)
    base = slot.to(tl.int64) * slot_stride + kv_head.to(tl.int64) * head_stride
    scale_base = slot.to(tl.int64) * scale_slot_stride + kv_head.to(tl.int64) * scale_head_stride
    end = start + length
    begin = tl.maximum(start - window + 1, 0)  # what no query sees is not read
    n_tiles = tl.cdiv(end - begin, BLOCK_S)
    per_part = tl.cdiv(n_tiles, SPLITS) * BLOCK_S
    low = begin + part * per_part
    high = tl.minimum(end, low + per_part)
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    rows = tile * M + tl.arange(0, M)  # token * GROUP + head of the group
    out_rows = (((span * N_KV + kv_head) * SPLITS + part) * M_ALL + rows).to(tl.int64)
    if (length == 0) | (low >= high):
        tl.store(scales_ptr + out_rows, tl.full((M,), -float("inf"), tl.float32))
    else:
        pairs = tl.arange(0, half)
        dims = tl.arange(0, D)
        # New keys and values of this part go to the cache; other tiles' programs write the same.
        new = tl.arange(0, NEW)
        new_at = start + new
        mine = (new < length) & (new_at >= low) & (new_at < high)
        row = (span * T + new).to(tl.int64)
        rotation = k_turns_ptr + row[:, None] * D + pairs[None, :]
        cos = tl.load(rotation, mask=mine[:, None], other=0.0)
        sin = tl.load(rotation + half, mask=mine[:, None], other=0.0)
        source = qkv_ptr + (row * n_all + N_HEADS + kv_head)[:, None] * D
        a = tl.load(source + 2 * pairs[None, :], mask=mine[:, None], other=0.0)
        b = tl.load(source + 2 * pairs[None, :] + 1, mask=mine[:, None], other=0.0)
        rotated_a = (a.to(tl.float32) * cos - b.to(tl.float32) * sin).to(a.dtype)
        rotated_b = (a.to(tl.float32) * sin + b.to(tl.float32) * cos).to(a.dtype)
        target = base + new_at.to(tl.int64)[:, None] * D + dims[None, :]
        key = tl.interleave(rotated_a, rotated_b)
        value = tl.load(source + N_KV * D + dims[None, :], mask=mine[:, None], other=0.0)
        if FP8:
            scale_at = scale_base + new_at
            key, scale = _quantized(key)
            tl.store(k_scales_ptr + scale_at, scale, mask=mine)
            value, scale = _quantized(value)
            tl.store(v_scales_ptr + scale_at, scale, mask=mine)
        tl.store(keys_ptr + target, key, mask=mine[:, None])
        tl.store(values_ptr + target, value, mask=mine[:, None])
        # Queries.
        token = rows // GROUP
        of_group = rows % GROUP
        real = (token < T) & (of_group < n_group)
        q_row = (span * T + token).to(tl.int64)
        q_turn = q_turns_ptr + q_row[:, None] * D + pairs[None, :]
        q_cos = tl.load(q_turn, mask=real[:, None], other=0.0)
        q_sin = tl.load(q_turn + half, mask=real[:, None], other=0.0)
        q_at = qkv_ptr + (q_row * n_all + first_head + of_group)[:, None] * D
        q_a = tl.load(q_at + 2 * pairs[None, :], mask=real[:, None], other=0.0)
        q_b = tl.load(q_at + 2 * pairs[None, :] + 1, mask=real[:, None], other=0.0)
        rotated_a = (q_a.to(tl.float32) * q_cos - q_b.to(tl.float32) * q_sin).to(q_a.dtype)
        rotated_b = (q_a.to(tl.float32) * q_sin + q_b.to(tl.float32) * q_cos).to(q_a.dtype)
        q = tl.interleave(rotated_a, rotated_b)  # (M, D)
        tl.debug_barrier()  # what this program has stored, its other threads read
        sees_to = start + token  # the last position that a query sees
        top = tl.full((M,), -float("inf"), tl.float32)
        weight = tl.zeros((M,), tl.float32)
        total = tl.zeros((M, D), tl.float32)
        for first in tl.range(low, high, BLOCK_S, num_stages=STAGES):
            position = first + tl.arange(0, BLOCK_S)
            held = position < high
            at = base + position.to(tl.int64) * D
            k = tl.load(keys_ptr + at[None, :] + dims[:, None], mask=held[None, :], other=0.0)
            score = tl.dot(q, k.to(q.dtype), input_precision=precision) * softmax_scale
            if FP8:
                k_scale = tl.load(k_scales_ptr + scale_base + position, mask=held, other=0.0)
                score *= k_scale[None, :]  # (M, BLOCK_S)
            seen = (position[None, :] <= sees_to[:, None]) & held[None, :]
            seen &= position[None, :] > sees_to[:, None] - window
            score = tl.where(seen, score, -float("inf"))
            new_top = tl.maximum(top, tl.max(score, 1))
            safe_top = tl.where(new_top == -float("inf"), 0.0, new_top)
            rescale = tl.exp2(top - safe_top)
            p = tl.exp2(score - safe_top[:, None])
            weight = weight * rescale + tl.sum(p, 1)
            v = tl.load(values_ptr + at[:, None] + dims[None, :], mask=held[:, None], other=0.0)
            total = total * rescale[:, None]
            if FP8:
                v_scale = tl.load(v_scales_ptr + scale_base + position, mask=held, other=0.0)
                p *= v_scale[None, :]
            total = tl.dot(p.to(q.dtype), v.to(q.dtype), total, input_precision=precision)
            top = new_top
        log_sum = tl.where(weight > 0, top + tl.log2(weight), -float("inf"))
        tl.store(scales_ptr + out_rows, log_sum)
        total = total / tl.where(weight > 0, weight, 1.0)[:, None]
        tl.store(sums_ptr + out_rows[:, None] * D + dims[None, :], total)


@triton.jit
def _combine(
    sums_ptr, scales_ptr, heads_ptr, kv_of_ptr, out_ptr,
    N_HEADS: tl.constexpr, N_KV: tl.constexpr, T: tl.constexpr, GROUP: tl.constexpr,
    M_ALL: tl.constexpr, D: tl.constexpr, SPLITS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Weigh the parts of one head of one token by their log-sum-exps."""
    row = tl.program_id(0)
    head = tl.program_id(1)
    kv_head = tl.load(kv_of_ptr + head)
    of_group = head - tl.load(heads_ptr + kv_head)
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    span = row // T
    tile_row = (row % T) * GROUP + of_group
    parts = tl.arange(0, SPLITS)
    dims = tl.arange(0, D)
    at = (((span * N_KV + kv_head) * SPLITS + parts) * M_ALL + tile_row).to(tl.int64)
    scales = tl.load(scales_ptr + at)
    top = tl.max(scales, 0)
    shares = tl.exp2(scales - tl.where(top == -float("inf"), 0.0, top))
    sums = tl.load(
        sums_ptr + at[:, None] * D + dims[None, :], mask=(shares > 0)[:, None], other=0.0
    )
    weight = tl.sum(shares, 0)
    out = tl.sum(sums * shares[:, None], 0) / tl.where(weight > 0, weight, 1.0)
    to = out_ptr + (row.to(tl.int64) * N_HEADS + head) * D + dims
    tl.store(to, out.to(out_ptr.dtype.element_ty))


def attend(
    qkv: Tensor,
    keys: Cached,
    values: Cached,
    rotations: Rotations,
    slots: Tensor,
    starts: Tensor,
    lengths: Tensor,
    first_heads: Tensor,
    kv_heads: Tensor,
    group: int,
    window: int | None,
) -> Tensor:
    """Turn, store and attend: new tokens of N spans to their own caches.

    Args:
        qkv: (N * T, H + 2 K, D), of the new tokens.
        keys: (n_slots, K, max_seq_len, D), one layer's cache; new positions are written.
        values: the same.
        rotations: `elementwise.rotations` of the rows, (N * T, 2, D / 2) each.
        slots: (N,) int32, no slot twice among spans that have tokens.
        starts: (N,) int32, position of a span's first token.
        lengths: (N,) int32, how many of a span's T tokens are real; 0 is an empty span.
        first_heads: (K + 1,) int32: KV head k serves query heads first_heads[k] to [k + 1] - 1.
        kv_heads: (H,) int32, the KV head of each query head.
        group: most query heads of a KV head.
        window: positions that a query sees, its own included; None is all.

    Returns:
        (N * T, H * D); rows past a span's length hold nothing of use.
    """
    n_rows, n_all, head_dim = qkv.shape
    n_spans, n_heads = len(slots), len(kv_heads)
    n_kv = (n_all - n_heads) // 2
    length = n_rows // n_spans
    assert keys.data.stride() == values.data.stride()
    assert keys.data.stride(2) == head_dim
    m_all = max(16, triton.next_power_of_2(length * group))
    m = min(m_all, MOST_TILE_ROWS)
    device = qkv.device
    config = attend_config(qkv.dtype)
    n_wanted = config.per_processor * _processors(device)
    n_splits = splits(n_spans * n_kv * (m_all // m), n_wanted)
    sums = torch.empty(n_spans, n_kv, n_splits, m_all, head_dim, dtype=torch.float32, device=device)
    scales = torch.empty(n_spans, n_kv, n_splits, m_all, dtype=torch.float32, device=device)
    out = torch.empty(n_rows, n_heads * head_dim, dtype=qkv.dtype, device=device)
    early = early_launch(device)
    ieee = qkv.dtype == torch.float32
    _part[(n_splits, n_kv, n_spans * (m_all // m))](
        qkv, keys.data, values.data, keys.scale, values.scale, *rotations, slots, starts, lengths,
        first_heads, sums, scales, *keys.data.stride()[:2],
        *((0, 0) if keys.scale is None else keys.scale.stride()[:2]), window or 1 << 30,
        head_dim**-0.5 * 1.4426950408889634,  # log2(e): powers of two are what the chip has
        N_HEADS=n_heads, N_KV=n_kv, T=length, GROUP=group, M=m, M_ALL=m_all, D=head_dim,
        BLOCK_S=config.block, SPLITS=n_splits, NEW=triton.next_power_of_2(length),
        IEEE=ieee, FP8=keys.scale is not None, STAGES=config.stages, PDL=bool(early),
        num_warps=config.warps, **early,
    )  # fmt: skip
    _combine[(n_rows, n_heads)](
        sums, scales, first_heads, kv_heads, out,
        N_HEADS=n_heads, N_KV=n_kv, T=length, GROUP=group, M_ALL=m_all, D=head_dim,
        SPLITS=n_splits, PDL=bool(early), num_warps=4, **early,
    )  # fmt: skip
    return out


def _processors(device: torch.device) -> int:
    if device.type != "cuda":
        return 8
    return torch.cuda.get_device_properties(device).multi_processor_count
