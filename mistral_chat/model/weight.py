"""A module's matrix: a plain parameter, or one that holds quantized numbers with their scales."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from mistral_chat.kernels.weight import DTYPES, PACKED, ZERO_DTYPES, Quantized, Weight
from mistral_chat.model.placement import INT4_UNIT, Held

__all__ = ["Matrix", "QuantizedMatrix", "empty", "empty_matrix", "weight_of"]

assert PACKED == INT4_UNIT


def empty(*shape: int, dtype: torch.dtype | None = None) -> nn.Parameter:
    """A parameter that is still to be filled."""
    return nn.Parameter(torch.empty(shape, dtype=dtype), requires_grad=False)


class QuantizedMatrix(nn.Module):
    """The parameters of a `Quantized`, whose types no conversion of the model changes.

    Args:
        held: what it holds.
        n_out: rows.
        n_in: columns.
    """

    def __init__(self, held: Held, n_out: int, n_in: int) -> None:
        super().__init__()
        self._kind = kind = held.kind
        n_groups = held.groups(n_in)
        assert kind != "int4" or n_in % PACKED == 0, n_in
        self.data = empty(n_out, n_in // 2 if kind == "int4" else n_in, dtype=DTYPES[kind])
        self.scale = empty(n_out, n_groups, dtype=torch.float32)
        self.zero = empty(n_out, n_groups, dtype=ZERO_DTYPES[kind]) if held.has_zeros else None

    @property
    def quantized(self) -> Quantized:
        """What kernels take."""
        zero = None if self.zero is None else self.zero.data
        return Quantized(self._kind, self.data.data, self.scale.data, zero)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        def moved(tensor: Tensor) -> Tensor:
            return tensor.to(fn(tensor.new_empty(0)).device)

        return super()._apply(moved, recurse)  # type: ignore[no-untyped-call]


Matrix = nn.Parameter | QuantizedMatrix


def empty_matrix(held: Held | None, n_out: int, n_in: int) -> Matrix:
    """A matrix that is still to be filled; None holds floats."""
    return empty(n_out, n_in) if held is None else QuantizedMatrix(held, n_out, n_in)


def weight_of(matrix: Matrix) -> Weight:
    """What `linear` and `gated` take."""
    return matrix.quantized if isinstance(matrix, QuantizedMatrix) else matrix
