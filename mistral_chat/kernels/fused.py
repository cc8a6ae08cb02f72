"""The decode path's operations on a GPU. Same functions and arguments as `fused_reference`.

One row's norm is part of the product after it and its residual sum of the one before; several
rows take a kernel of their own for them.
"""

from torch import Tensor

from mistral_chat.kernels.attention import attend
from mistral_chat.kernels.elementwise import add_norm, embed, rotations
from mistral_chat.kernels.linear import product

__all__ = [
    "add_norm",
    "attend",
    "embed",
    "gated",
    "linear",
    "linear_add",
    "logits",
    "norm",
    "norm_gated",
    "norm_linear",
    "norm_logits",
    "rotations",
]


def norm(x: Tensor, gain: Tensor, eps: float) -> Tensor:
    """RMS norm of each row."""
    return add_norm(None, x, gain, eps)[0]


def linear(x: Tensor, weight: Tensor) -> Tensor:
    """`x @ weight.T`."""
    return product(x, weight)


def logits(x: Tensor, weight: Tensor) -> Tensor:
    """`x @ weight.T` as float32."""
    return product(x, weight, float32=True)


def gated(x: Tensor, weight: Tensor) -> Tensor:
    """SiLU of the product with the first half of the rows times that with the second."""
    return product(x, weight, gated=True)


def linear_add(x: Tensor, weight: Tensor, residual: Tensor) -> Tensor:
    """The product plus the residual: one row."""
    return product(x, weight, residual=residual)


def norm_linear(x: Tensor, gain: Tensor, eps: float, weight: Tensor) -> Tensor:
    """The product with the normed row: one row."""
    return product(x, weight, gain=gain, eps=eps)


def norm_gated(x: Tensor, gain: Tensor, eps: float, weight: Tensor) -> Tensor:
    """`gated` of the normed row: one row."""
    return product(x, weight, gain=gain, eps=eps, gated=True)


def norm_logits(x: Tensor, gain: Tensor, eps: float, weight: Tensor) -> Tensor:
    """`logits` of the normed row: one row."""
    return product(x, weight, gain=gain, eps=eps, float32=True)
