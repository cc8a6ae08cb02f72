"""The decode path's operations on a GPU. Same functions and arguments as `fused_reference`."""

import torch
from torch import Tensor

from mistral_chat.kernels import elementwise
from mistral_chat.kernels.attention import attend
from mistral_chat.kernels.elementwise import Scaled, embed, rotations
from mistral_chat.kernels.linear import product

__all__ = ["add_norm", "attend", "embed", "gated", "linear", "logits", "norm", "rotations"]

Rows = Tensor | Scaled


def norm(x: Tensor, gain: Tensor, eps: float) -> Rows:
    """RMS norm of each row."""
    if x.dtype == torch.float16:  # whose range x * gain could leave
        return elementwise.add_norm(None, x, gain, eps)[0]
    return elementwise.add_scale(None, x, gain, eps)[0]


def add_norm(partial: Tensor, residual: Tensor, gain: Tensor, eps: float) -> tuple[Rows, Tensor]:
    """The norm of the sum, and the sum."""
    if residual.dtype == torch.float16:
        return elementwise.add_norm(partial, residual, gain, eps)
    return elementwise.add_scale(partial, residual, gain, eps)


def linear(x: Rows, weight: Tensor) -> Tensor:
    """`x @ weight.T`."""
    return product(x, weight)


def gated(x: Rows, weight: Tensor) -> Tensor:
    """SiLU of the product with the first half of the rows times that with the second."""
    return product(x, weight, gated=True)


def logits(x: Rows, weight: Tensor) -> Tensor:
    """`x @ weight.T` as float32."""
    return product(x, weight, float32=True)
