"""From the numbers of a file to ours, as a `Packing` says."""

import torch
from torch import Tensor

from mistral_chat.kernels.weight import pack_int4
from mistral_chat.model.placement import Packing

__all__ = ["decode"]


def decode(stored: Tensor, packing: Packing) -> Tensor:
    """Stored rows in our layout.

    Args:
        stored: (rows, columns) as read.
        packing: says what they mean.

    Returns:
        our rows and columns; (1, 1) for a number that is repeated.
    """
    numbers = _unpack(stored, packing) if packing.bits else stored
    if packing.transposed:
        numbers = numbers.t()
    return pack_int4(numbers) if packing.to_int4 else numbers


def _unpack(stored: Tensor, packing: Packing) -> Tensor:
    """int32 -> uint8 (4 bits) or int8 (8 bits, which are stored with 128 added)."""
    n_rows, n_cols = stored.shape
    numbers = stored.contiguous().view(torch.uint8).view(n_rows, n_cols, 4)  # low byte first
    if packing.bits == 4:
        numbers = torch.stack((numbers & 15, numbers >> 4), -1).view(n_rows, n_cols, 8)
    if packing.add:
        numbers = numbers + packing.add & (1 << packing.bits) - 1
    if packing.order:
        # no list as an index, which a GPU would wait for
        numbers = torch.stack([numbers[:, :, place] for place in packing.order], -1)
    if packing.bits == 8:
        numbers = (numbers ^ 128).view(torch.int8)
    if packing.down:
        numbers = numbers.transpose(1, 2)
        return numbers.reshape(-1, n_cols)
    return numbers.reshape(n_rows, -1)
