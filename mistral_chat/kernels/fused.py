"""The decode path's operations on a GPU. Same functions and arguments as in `reference`."""

import torch
from torch import Tensor

from mistral_chat.kernels import elementwise
from mistral_chat.kernels.attention import attend
from mistral_chat.kernels.elementwise import Scaled, embed, rotations
from mistral_chat.kernels.linear import matmul
from mistral_chat.kernels.weight import Weight

__all__ = ["add_norm", "attend", "embed", "gated", "linear", "logits", "rotations"]

Rows = Tensor | Scaled


def add_norm(
    partial: Tensor, residual: Tensor | None, weight: Tensor, eps: float
) -> tuple[Rows, Tensor]:
    """`reference.add_norm`, the norm left to the matmul that takes the rows."""
    if partial.dtype == torch.float16:  # whose range x * weight could leave
        return elementwise.add_norm(partial, residual, weight, eps)
    return elementwise.add_scale(partial, residual, weight, eps)


def linear(x: Rows, weight: Weight) -> Tensor:
    """`x @ weight.T`."""
    return matmul(x, weight)


def gated(x: Rows, weight: Weight) -> Tensor:
    """SiLU of the matmul with the first half of the rows times that with the second."""
    return matmul(x, weight, gated=True)


def logits(x: Rows, weight: Tensor) -> Tensor:
    """`x @ weight.T` as float32."""
    return matmul(x, weight, float32=True)
