"""One matrix as a rank holds it: floats, or FP8, int8 or int4 numbers with their scales.

There is one layout, whatever a checkpoint's was; W = (number - zero) * scale. int4 numbers lie two
in a byte: of each 32 neighbouring columns, byte j holds column j in its low half and column j + 16
in its high half, so that a kernel has both without a shuffle.

Shapes: n_out, n_in = rows and columns of the matrix, G = groups of a row's columns.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

__all__ = [
    "BLOCK_NUMBERS",
    "PACKED",
    "Kind",
    "Quantized",
    "Weight",
    "pack_int4",
    "unpack_int4",
]

Kind = Literal["fp8", "int8", "int4"]
PACKED = 32  # neighbouring columns that int4 packs together
MIDDLE = 8  # int4's zero where none is stored
BLOCK_NUMBERS = 1 << 25  # that are dequantized at a time

DTYPES = {"fp8": torch.float8_e4m3fn, "int8": torch.int8, "int4": torch.uint8}
ZERO_DTYPES = {"int8": torch.int8, "int4": torch.uint8}


@dataclass(frozen=True, slots=True)
class Quantized:
    """A matrix of small numbers.

    Args:
        kind: what the numbers are.
        data: (n_out, n_in) float8_e4m3fn or int8, or (n_out, n_in / 2) uint8 of int4 pairs.
        scale: (n_out, G) float32; n_in / G neighbouring columns share one.
        zero: (n_out, G) of int8 (int8) or uint8 (int4); None is 0, for int4 8, whose numbers are 0
            to 15.
    """

    kind: Kind
    data: Tensor
    scale: Tensor
    zero: Tensor | None = None

    @property
    def shape(self) -> tuple[int, int]:
        """(n_out, n_in)."""
        n_out, width = self.data.shape
        return n_out, 2 * width if self.kind == "int4" else width

    @property
    def device(self) -> torch.device:
        """Where it lies."""
        return self.data.device

    @property
    def group(self) -> int:
        """Columns that share a scale."""
        return self.shape[1] // self.scale.shape[1]

    def __len__(self) -> int:
        return len(self.data)

    def rows(self, start: int, length: int) -> "Quantized":
        """A view of neighbouring rows."""
        scale = self.scale.narrow(0, start, length)
        zero = None if self.zero is None else self.zero.narrow(0, start, length)
        return Quantized(self.kind, self.data.narrow(0, start, length), scale, zero)

    def fill_normal(self, normal: Tensor, deviation: float) -> None:
        """Take numbers of a standard deviation from ones of 1, all with the same scale and zero.

        Args:
            normal: (n_out, n_in) of floats.
            deviation: of the dequantized matrix.
        """
        units = {"fp8": 1.0, "int8": 32.0, "int4": 2.5}[self.kind]  # numbers within 3 deviations
        self.scale.fill_(deviation / units)
        numbers = normal.float() * units
        if self.kind == "fp8":
            self.data.copy_(numbers)
            return
        numbers = numbers.round_()
        if self.zero is not None:
            self.zero.fill_(MIDDLE if self.kind == "int4" else 0)
        if self.kind == "int8":
            self.data.copy_(numbers.clamp_(-127, 127))
        else:
            self.data.copy_(pack_int4((numbers + MIDDLE).clamp_(0, 15).to(torch.uint8)))

    def dequantize(self, dtype: torch.dtype) -> Tensor:
        """The matrix in floats, computed in float32: (n_out, n_in)."""
        out = torch.empty(self.shape, dtype=dtype, device=self.device)
        start = 0
        for rows in self.blocks():
            out[start : start + len(rows)] = rows._whole()
            start += len(rows)
        return out

    def blocks(self, n_numbers: int = BLOCK_NUMBERS) -> Iterator["Quantized"]:
        """Views of neighbouring rows, of up to so many numbers each."""
        n_rows = max(1, n_numbers // self.shape[1])
        for start in range(0, len(self), n_rows):
            yield self.rows(start, min(n_rows, len(self) - start))

    def _whole(self) -> Tensor:
        n_out, n_groups = self.scale.shape
        numbers = unpack_int4(self.data) if self.kind == "int4" else self.data
        values = numbers.to(torch.float32).view(n_out, n_groups, -1)
        if self.zero is not None:
            values -= self.zero.to(torch.float32).unsqueeze(-1)
        elif self.kind == "int4":
            values -= MIDDLE
        values *= self.scale.unsqueeze(-1)
        return values.view(n_out, -1)


Weight = Tensor | Quantized


def pack_int4(numbers: Tensor) -> Tensor:
    """(n_out, n_in) uint8 of 0 to 15 -> (n_out, n_in / 2), two in a byte; n_in % 32 == 0."""
    n_out = len(numbers)
    halves = numbers.reshape(n_out, -1, 2, PACKED // 2)
    return (halves[:, :, 0] | halves[:, :, 1] << 4).view(n_out, -1)


def unpack_int4(data: Tensor) -> Tensor:
    """The inverse of `pack_int4`."""
    n_out = len(data)
    pairs = data.reshape(n_out, -1, PACKED // 2)
    return torch.stack((pairs & 15, pairs >> 4), 2).view(n_out, -1)
