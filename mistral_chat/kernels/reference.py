"""Every operation in plain torch: what CPU runs, and what faster kernels are compared with.

Shapes: T = new tokens of one sequence or step, S = cached tokens, H = local query heads,
K = local KV heads, D = head_dim.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from mistral_chat.kernels.cached import Cached
from mistral_chat.kernels.weight import Quantized, Weight

__all__ = [
    "Rope",
    "Rotations",
    "add_norm",
    "apply_rope",
    "attend",
    "attention",
    "embed",
    "gated",
    "linear",
    "logits",
    "rms_norm",
    "rope_rotations",
    "rope_store",
    "rotations",
    "silu_mul",
]


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Root-mean-square norm over the last dimension, in float32 inside.

    Source: Zhang and Sennrich 2019, arXiv 1910.07467.
    """
    return F.rms_norm(x, weight.shape, weight, eps)


def add_norm(
    partial: Tensor, residual: Tensor | None, weight: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """Add a layer's output to the residual stream and normalize for the next layer.

    Args:
        partial: (T, dim), the layer's output, summed over ranks.
        residual: (T, dim); None adds nothing.
        weight: (dim,) of the next norm.
        eps: of the next norm.

    Returns:
        the normed stream and the new residual, both (T, dim).
    """
    residual = partial if residual is None else residual + partial
    return rms_norm(residual, weight, eps), residual


def embed(tokens: Tensor, weight: Tensor, first_id: int) -> Tensor:
    """Embedding from a range of rows; zeros for tokens outside, so that ranks sum to the whole.

    Args:
        tokens: (T,) ids.
        weight: (n_rows, dim), the rows of ids `first_id` onwards.
        first_id: id of the first row.

    Returns:
        (T, dim).
    """
    local = tokens - first_id
    inside = (local >= 0) & (local < len(weight))
    rows = F.embedding(local.clamp(0, len(weight) - 1), weight)
    return rows.masked_fill_(~inside.unsqueeze(-1), 0)


@dataclass(frozen=True, slots=True)
class Rope:
    """How positions turn the heads of a model.

    Args:
        frequencies: (D / 2,) float32, radians that each pair turns by per position.
        magnitude: what queries and keys are multiplied by besides (YaRN).
        beta: queries at `position` are multiplied by 1 + beta ln(1 + floor(position / original)),
            too (llama 4); 0 for none.
        original: positions that one step of that has.
    """

    frequencies: Tensor
    magnitude: float = 1.0
    beta: float = 0.0
    original: int = 1


# Of queries and of keys: the same tensor where queries have no scaling of their own.
Rotations = tuple[Tensor, Tensor]


def query_scales(positions: Tensor, rope: Rope) -> Tensor:
    """What a rope with a `beta` multiplies queries by: (T,) integers -> (T,) float32."""
    steps = torch.div(positions, rope.original, rounding_mode="floor")
    return 1 + rope.beta * torch.log1p(steps.float())


def rope_rotations(positions: Tensor, rope: Rope) -> Rotations:
    """Rotations of the rotary embedding at given positions.

    Source: Su et al. 2021, arXiv 2104.09864.

    Args:
        positions: (T,) integers.
        rope: how they turn heads.

    Returns:
        of queries and of keys, each (T, D / 2) complex64.
    """
    angles = positions.to(torch.float32).unsqueeze(-1) * rope.frequencies  # (T, D / 2)
    keys = torch.polar(torch.full_like(angles, rope.magnitude), angles)
    if not rope.beta:
        return keys, keys
    return keys * query_scales(positions, rope).unsqueeze(-1), keys


def apply_rope(x: Tensor, rotations: Tensor) -> Tensor:
    """Rotate adjacent pairs of each head (Mistral's interleaved layout).

    Args:
        x: (T, heads, D).
        rotations: (T, D / 2) complex64.

    Returns:
        (T, heads, D) of x's type.
    """
    pairs = torch.view_as_complex(x.float().unflatten(-1, (-1, 2)))  # (T, heads, D / 2)
    rotated = torch.view_as_real(pairs * rotations.unsqueeze(1))
    return rotated.flatten(-2).type_as(x)


def rope_store(
    qkv: Tensor, keys: Cached, values: Cached, start: int, n_heads: int, rotations: Rotations
) -> Tensor:
    """Rotate queries and keys of one sequence's new tokens; store the keys and the values.

    Args:
        qkv: (T, H + 2 K, D).
        keys: (K, S, D), the sequence's place in the cache; T positions from `start` are written.
        values: the same.
        start: position of the first new token.
        n_heads: H.
        rotations: `rope_rotations` of the new positions.

    Returns:
        the rotated queries, (T, H, D).
    """
    q, k, v = qkv.split([n_heads, len(keys), len(keys)], dim=1)
    keys.put(start, apply_rope(k, rotations[1]).transpose(0, 1))
    values.put(start, v.transpose(0, 1))
    return apply_rope(q, rotations[0])


def linear(x: Tensor, weight: Weight) -> Tensor:
    """`x @ weight.T`: (T, n_in) and (n_out, n_in) -> (T, n_out).

    Quantized numbers are dequantized to x's type first, some rows at a time.

    Few float32 rows on CPU go other ways than `F.linear`. One goes as a batch of row blocks: MKL's
    matrix-vector product runs on one thread, its batched one on all of them (1.7 times as fast on
    two). A few go as `weight @ x.T`: MKL's matmul of few rows with a wide matrix takes 1.1 to 5
    times as long as that of a tall matrix with few columns.
    """
    if isinstance(weight, Quantized):
        parts = [linear(x, rows.dequantize(x.dtype)) for rows in weight.blocks()]
        return parts[0] if len(parts) == 1 else torch.cat(parts, 1)
    if x.device.type != "cpu" or x.dtype != torch.float32:
        return F.linear(x, weight)
    n_threads = torch.get_num_threads()
    if 1 < len(x) <= (8 if n_threads > 1 else 3):
        return (weight @ x.t()).t().contiguous()
    n_out, n_in = weight.shape
    n_blocks = math.gcd(n_out, 1 << (2 * n_threads - 1).bit_length())
    if len(x) != 1 or n_threads == 1 or n_blocks < n_threads:
        return F.linear(x, weight)
    blocks = weight.view(n_blocks, -1, n_in)
    return torch.bmm(blocks, x.t().expand(n_blocks, n_in, 1)).view(1, n_out)


def logits(x: Tensor, weight: Tensor) -> Tensor:
    """`linear` with a float32 result: (T, n_in) and (n_out, n_in) -> (T, n_out).

    bfloat16 logits near 20 are an eighth apart, so that likely tokens tie; the sums behind them
    are float32 on GPUs anyway.
    """
    if x.device.type == "cuda" and x.dtype != torch.float32:
        return torch.mm(x, weight.t(), out_dtype=torch.float32)
    return linear(x, weight).float()


def silu_mul(gate_up: Tensor) -> Tensor:
    """SiLU of the first half times the second half: (T, 2 * hidden) -> (T, hidden)."""
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate) * up


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    start: int,
    window: int | None,
    queries_by_kv_head: Sequence[int],
) -> Tensor:
    """Causal attention of a sequence's new tokens to all of its cached ones.

    Args:
        q: (T, H, D), queries at positions `start` to `start + T - 1`.
        k: (K, S, D), keys of positions 0 to S - 1, S = start + T.
        v: (K, S, D).
        start: position of the first query.
        window: a query attends to this many positions, its own included; None is all.
        queries_by_kv_head: how many neighbouring query heads share each KV head; sums to H.

    Returns:
        (T, H, D).
    """
    n_new = q.shape[0]
    first = 0 if window is None else max(0, start - window + 1)  # no query sees what is before
    if first:
        k, v, start = k[:, first:], v[:, first:], start - first
    mask, causal = _mask(n_new, start, window, k.device)
    q = q.transpose(0, 1)  # (H, T, D)
    group = queries_by_kv_head[0]
    if all(n == group for n in queries_by_kv_head):
        out = _grouped(q, k, v, mask, causal)
    else:
        parts = zip(q.split(list(queries_by_kv_head)), k.split(1), v.split(1), strict=True)
        out = torch.cat([_grouped(*part, mask, causal) for part in parts])
    return out.transpose(0, 1)


def _mask(
    n_new: int, start: int, window: int | None, device: torch.device
) -> tuple[Tensor | None, bool]:
    """Attention mask (T, S), and whether plain causal attention does instead."""
    end = start + n_new
    if n_new == 1 and (window is None or window >= end):
        return None, False
    if window is None or window >= end:
        if start == 0:
            return None, True
        if device.type == "cuda":
            from torch.nn.attention.bias import causal_lower_right  # 1.8 s that CPU need not wait

            return causal_lower_right(n_new, end), False
    queries = torch.arange(start, end, device=device).unsqueeze(-1)
    keys = torch.arange(end, device=device)
    mask = keys <= queries
    if window is not None:
        mask &= keys > queries - window
    return mask, False


def _grouped(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool) -> Tensor:
    """Attention where every KV head has the same number of queries: (H, T, D) -> (H, T, D)."""
    n_kv, _, head_dim = k.shape
    n_heads, n_new, _ = q.shape
    group = n_heads // n_kv
    if n_new == 1:  # one query each: a group's heads take the place of the positions
        rows = q.reshape(1, n_kv, group, head_dim)
        return F.scaled_dot_product_attention(rows, k[None], v[None], attn_mask=mask).reshape(
            n_heads, 1, head_dim
        )
    shape = (n_kv, group, k.shape[1], head_dim)
    out = F.scaled_dot_product_attention(
        q.reshape(n_kv, group, n_new, head_dim),
        k.unsqueeze(1).expand(shape),
        v.unsqueeze(1).expand(shape),
        attn_mask=mask,
        is_causal=causal,
    )
    return out.reshape(n_heads, n_new, head_dim)


# A decode step's operations, whose positions lie in tensors: N = spans, R = N * T rows.


def rotations(starts: Tensor, length: int, rope: Rope) -> Rotations:
    """Cosines and sines of each row's position, of queries and of keys: (N,) -> (R, 2, D / 2)."""
    positions = (starts.unsqueeze(1) + torch.arange(length, device=starts.device)).flatten()
    queries, keys = (
        torch.stack((turns.real, turns.imag), dim=1) for turns in rope_rotations(positions, rope)
    )
    return (queries if rope.beta else keys), keys


def gated(x: Tensor, weight: Weight) -> Tensor:
    """`silu_mul` of the matmul: (R, n_in), (2 * hidden, n_in) -> (R, hidden)."""
    return silu_mul(linear(x, weight))


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
    group: int,  # noqa: ARG001, the kernel's
    window: int | None,
) -> Tensor:
    """Rotate, store and attend, span by span; arguments and result as `attention.attend`."""
    n_heads = len(kv_heads)
    n_kv = len(first_heads) - 1
    per_span = len(qkv) // len(slots)
    q, k, v = qkv.split([n_heads, n_kv, n_kv], dim=1)
    q, k = (
        apply_rope(part, torch.complex(turns[:, 0], turns[:, 1]))
        for part, turns in zip((q, k), rotations, strict=True)
    )
    out = torch.zeros_like(q)
    by_kv_head = first_heads.diff().tolist()
    for span, (slot, start, length) in enumerate(
        zip(slots.tolist(), starts.tolist(), lengths.tolist(), strict=True)
    ):
        new = slice(span * per_span, span * per_span + length)
        end = start + length
        for cached, rows in ((keys[slot], k), (values[slot], v)):
            cached.put(start, rows[new].transpose(0, 1))
        if length:
            out[new] = attention(
                q[new], keys[slot].floats(0, end, q.dtype), values[slot].floats(0, end, q.dtype),
                start, window, by_kv_head,
            )  # fmt: skip
    return out.flatten(1)
