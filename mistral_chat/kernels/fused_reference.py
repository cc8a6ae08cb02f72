"""The decode path's operations in plain torch: what `fused` is compared with, and what CPU can run.

The same functions with the same arguments as `fused`. Positions are read from tensors, as there.

Shapes: N = spans, T = tokens of a span, R = N * T rows, H = local query heads, K = local KV heads,
D = head_dim.
"""

import torch
from torch import Tensor

from mistral_chat.kernels import reference

__all__ = [
    "add_norm",
    "attend",
    "embed",
    "gated",
    "linear",
    "logits",
    "norm",
    "rotations",
]

embed = reference.embed_rows
add_norm = reference.add_norm
norm = reference.rms_norm
linear = reference.linear
logits = reference.logits


def rotations(starts: Tensor, length: int, frequencies: Tensor) -> Tensor:
    """Cosines and sines of each row's position: (N,) -> (R, 2, D / 2) float32."""
    positions = starts.unsqueeze(1) + torch.arange(length, device=starts.device)
    angles = positions.flatten().float().unsqueeze(1) * frequencies
    return torch.stack((angles.cos(), angles.sin()), dim=1)


def gated(x: Tensor, weight: Tensor) -> Tensor:
    """`reference.silu_mul` of the product: (R, n_in), (2 * hidden, n_in) -> (R, hidden)."""
    return reference.silu_mul(reference.linear(x, weight))


def attend(
    qkv: Tensor,
    keys: Tensor,
    values: Tensor,
    rotations: Tensor,
    slots: Tensor,
    starts: Tensor,
    lengths: Tensor,
    first_heads: Tensor,
    kv_heads: Tensor,
    group: int,  # noqa: ARG001, the kernel's
    window: int | None,
) -> Tensor:
    """Turn, store and attend, span by span; arguments and result as `attention.attend`."""
    n_heads = len(kv_heads)
    n_kv = len(first_heads) - 1
    per_span = len(qkv) // len(slots)
    turns = torch.complex(rotations[:, 0], rotations[:, 1])
    turned = reference.apply_rope(qkv[:, : n_heads + n_kv], turns)
    out = torch.zeros_like(turned[:, :n_heads])
    by_kv_head = first_heads.diff().tolist()
    for span, (slot, start, length) in enumerate(
        zip(slots.tolist(), starts.tolist(), lengths.tolist(), strict=True)
    ):
        new = slice(span * per_span, span * per_span + length)
        end = start + length
        keys[slot, :, start:end] = turned[new, n_heads:].transpose(0, 1)
        values[slot, :, start:end] = qkv[new, n_heads + n_kv :].transpose(0, 1)
        if length:
            out[new] = reference.attention(
                turned[new, :n_heads], keys[slot, :, :end], values[slot, :, :end],
                start, window, by_kv_head,
            )  # fmt: skip
    return out.flatten(1)
