"""Keys or values of cached positions: floats as they were computed, or FP8 with a scale for each.

A scale belongs to one position of one head, so that none has to be known before: it is the row's
largest number over FP8's.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["FP8", "MOST_FP8", "Cached", "quantize_rows"]

FP8 = torch.float8_e4m3fn
MOST_FP8 = 448.0  # its largest number


def quantize_rows(rows: Tensor) -> tuple[Tensor, Tensor]:
    """(..., D) floats -> FP8 of the same shape, and (...) float32 scales that multiply it."""
    numbers = rows.float()
    scale = numbers.abs().amax(-1) / MOST_FP8
    scale = torch.where(scale > 0, scale, 1.0)
    return (numbers / scale.unsqueeze(-1)).to(FP8), scale


@dataclass(frozen=True, slots=True)
class Cached:
    """Keys or values in a cache.

    Args:
        data: (..., S, D).
        scale: (..., S) float32 for FP8; None for floats.
    """

    data: Tensor
    scale: Tensor | None = None

    def __getitem__(self, at: int) -> "Cached":
        """One of the first dimension."""
        return Cached(self.data[at], None if self.scale is None else self.scale[at])

    def __len__(self) -> int:
        return len(self.data)

    def put(self, start: int, rows: Tensor) -> None:
        """Store new positions.

        Args:
            start: position of the first.
            rows: (..., T, D).
        """
        end = start + rows.shape[-2]
        if self.scale is None:
            self.data[..., start:end, :].copy_(rows)
            return
        numbers, scale = quantize_rows(rows)
        self.data[..., start:end, :].copy_(numbers)
        self.scale[..., start:end].copy_(scale)

    def floats(self, first: int, end: int, dtype: torch.dtype) -> Tensor:
        """Neighbouring positions: (..., end - first, D) of a type; a view where it is theirs."""
        data = self.data[..., first:end, :]
        if self.scale is None:
            return data
        return (data.float() * self.scale[..., first:end, None]).to(dtype)
