"""Operations of the whole forward pass, each by the fastest implementation for its device.

GPUs that Triton knows take the kernels; CPU and other GPUs the reference, which says what each
operation is. Which one runs depends on the device alone.
"""

from functools import lru_cache
from importlib.util import find_spec

import torch
from torch import Tensor

from mistral_chat.kernels import reference
from mistral_chat.kernels.cached import Cached
from mistral_chat.kernels.reference import Rotations
from mistral_chat.kernels.sampling_reference import sample_reference
from mistral_chat.kernels.weight import BLOCK_NUMBERS, Quantized, Weight

__all__ = [
    "add_norm",
    "embed",
    "has_kernels",
    "linear",
    "rope_store",
    "sample",
    "scratch_bytes",
    "silu_mul",
    "why_no_kernels",
]

GPU_BLOCK_NUMBERS = 1 << 27  # of a quantized matrix that are dequantized at a time


def scratch_bytes(device: torch.device, n_numbers: int, dtype: torch.dtype) -> int:
    """Memory that `linear` takes for a quantized matrix of so many numbers."""
    if device.type == "cuda":
        return min(n_numbers, GPU_BLOCK_NUMBERS) * dtype.itemsize
    return min(n_numbers, BLOCK_NUMBERS) * (1 + 4 + 2 * dtype.itemsize)


@lru_cache
def why_no_kernels(device: torch.device) -> str | None:
    """Why a device runs the reference; None when it has kernels."""
    if device.type != "cuda":
        return f"{device.type} runs the reference"
    if torch.version.hip is not None:
        return "kernels are written for NVIDIA GPUs"
    if find_spec("triton") is None:
        return "triton is not installed"
    if torch.cuda.get_device_capability(device) < (8, 0):
        return f"{torch.cuda.get_device_name(device)} is older than sm_80"
    return None


def has_kernels(device: torch.device) -> bool:
    """Whether a device runs Triton's kernels."""
    return why_no_kernels(device) is None


def embed(tokens: Tensor, weight: Tensor, first_id: int) -> Tensor:
    """`reference.embed`."""
    if has_kernels(weight.device):
        from mistral_chat.kernels import elementwise

        return elementwise.embed(tokens, weight, first_id)
    return reference.embed(tokens, weight, first_id)


def add_norm(
    partial: Tensor, residual: Tensor | None, weight: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """`reference.add_norm`."""
    if has_kernels(partial.device):
        from mistral_chat.kernels import elementwise

        return elementwise.add_norm(partial, residual, weight, eps)
    return reference.add_norm(partial, residual, weight, eps)


def linear(x: Tensor, weight: Weight) -> Tensor:
    """`reference.linear`, for any number of rows."""
    if isinstance(weight, Quantized) and has_kernels(x.device):
        from mistral_chat.kernels.linear_quantized import dequantize

        out = x.new_empty(len(x), len(weight))
        start = 0
        for rows in weight.blocks(GPU_BLOCK_NUMBERS):
            into = out[:, start : start + len(rows)]
            torch.mm(x, dequantize(rows, x.dtype).t(), out=into)
            start += len(rows)
        return out
    return reference.linear(x, weight)


def silu_mul(gate_up: Tensor) -> Tensor:
    """`reference.silu_mul`."""
    if has_kernels(gate_up.device):
        from mistral_chat.kernels import elementwise

        return elementwise.silu_mul(gate_up)
    return reference.silu_mul(gate_up)


def rope_store(
    qkv: Tensor, keys: Cached, values: Cached, start: int, n_heads: int, rotations: Rotations
) -> Tensor:
    """`reference.rope_store`; may overwrite `qkv`."""
    if has_kernels(qkv.device):
        from mistral_chat.kernels import elementwise

        elementwise.rope_store(qkv, keys, values, start, n_heads, rotations)
        return qkv[:, :n_heads]
    return reference.rope_store(qkv, keys, values, start, n_heads, rotations)


def sample(logits: Tensor, allowed: Tensor, params: Tensor, uniforms: Tensor, out: Tensor) -> None:
    """`sample_reference` into `out`."""
    if has_kernels(logits.device):
        from mistral_chat.kernels import sampling

        sampling.sample(logits, allowed, params, uniforms, out)
    else:
        out.copy_(sample_reference(logits, allowed, params, uniforms))
