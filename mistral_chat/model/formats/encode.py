"""From our numbers to those of a compressed-tensors checkpoint: the inverse of `decode`.

Shapes: N, K = rows and columns of the matrix, P = numbers in an int32, G = groups of a row.
"""

import torch
from torch import Tensor

from mistral_chat.kernels.weight import Quantized, unpack_int4

__all__ = ["SCALE_DTYPE", "encode"]

SCALE_DTYPE = torch.bfloat16  # compressed-tensors keeps scales in the type of the model


def encode(matrix: Quantized) -> dict[str, Tensor]:
    """A matrix as `fp8.stored` and `packed.compressed_tensors` read it.

    Args:
        matrix: whose scales are bfloat16 numbers already; int8 has no zeros.

    Returns:
        by what follows the matrix's name: `weight` (N, K) and `weight_scale` (N, 1) of FP8;
        `weight_packed` (N, K / P), `weight_scale` (N, G), `weight_shape` (2,) and, of int4,
        `weight_zero_point` (N / P, G) of the others.
    """
    scale = matrix.scale.to(SCALE_DTYPE)
    if matrix.kind == "fp8":
        return {"weight": matrix.data, "weight_scale": scale}
    bits = 4 if matrix.kind == "int4" else 8
    if matrix.kind == "int4":
        numbers = unpack_int4(matrix.data)
    else:
        numbers = matrix.data.view(torch.uint8) ^ 128  # 128 is added to what is stored
    tensors = {
        "weight_packed": _pack(numbers, bits),
        "weight_scale": scale,
        "weight_shape": torch.tensor(matrix.shape),
    }
    if matrix.zero is not None:
        assert matrix.kind == "int4"
        tensors["weight_zero_point"] = _pack(matrix.zero.t(), bits).t().contiguous()
    return tensors


def _pack(numbers: Tensor, bits: int) -> Tensor:
    """uint8 (rows, columns) -> int32 (rows, columns * bits / 32), the first in the low bits."""
    if bits == 4:
        pairs = numbers.reshape(len(numbers), -1, 2)
        numbers = pairs[:, :, 0] | pairs[:, :, 1] << 4
    return numbers.contiguous().view(torch.int32)
