"""Floats -> the numbers and scales of a `Quantized`, without calibration data.

FP8 and int8 take a scale a row, from its largest number. int4 takes scales and zeros a group by
half-quadratic optimization, which lets a few large numbers be wrong where that makes the many
small ones right: Badri and Shaji 2023, "Half-Quadratic Quantization of Large Machine Learning
Models". Unlike theirs, zeros are whole numbers, and scales are fitted as well.

Shapes: n_out, n_in = rows and columns of the matrix, G = groups of a row's columns.
"""

import torch
from torch import Tensor

from mistral_chat.kernels.ops import has_kernels
from mistral_chat.kernels.weight import Quantized, pack_int4

__all__ = ["fit", "quantize"]

FP8_MOST = 448.0  # the largest number of E4M3
INT8_MOST = 127.0
INT4_MOST = 15.0
TINY = 1e-12  # a scale must be positive, also of a row of zeros

STEPS = 20
# Of the error that is made small: 2 is a square, below it outliers count less. The paper takes 0.7;
# on the embedded model that is as far from the floats as rounding to nearest (KL 0.62), 1.5 less
# far (0.56; 1.9 and 1.99 alike).
POWER = 1.5
BETA = 10.0  # weight of the square that stands for the error, in units of a group's range
BETA_GROWTH = 1.01


def quantize(floats: Tensor, into: Quantized, scale_dtype: torch.dtype = torch.float32) -> None:
    """Fill a quantized matrix.

    Args:
        floats: (n_out, n_in).
        into: of the same shape; int4 must have zeros.
        scale_dtype: that scales are rounded to, before numbers are chosen for them.
    """
    values = floats.float()
    if into.kind == "int4":
        _quantize_int4(values, into, scale_dtype)
        return
    most = FP8_MOST if into.kind == "fp8" else INT8_MOST
    grouped = values.view(len(values), into.scale.shape[1], -1)
    scale = (grouped.abs().amax(-1) / most).clamp_(min=TINY).to(scale_dtype).float()
    into.scale.copy_(scale)
    numbers = (grouped / scale.unsqueeze(-1)).view_as(values).clamp_(-most, most)
    if into.kind == "int8":
        numbers.round_()
        if into.zero is not None:
            into.zero.zero_()
    into.data.copy_(numbers)


def _quantize_int4(values: Tensor, into: Quantized, scale_dtype: torch.dtype) -> None:
    assert into.zero is not None
    grouped = values.view(-1, into.group)
    if has_kernels(values.device):
        from mistral_chat.kernels.fit_int4 import fit_int4

        scale, zero = fit_int4(
            grouped.contiguous(), steps=STEPS, power=POWER, beta=BETA, beta_growth=BETA_GROWTH,
            tiny=TINY,
        )  # fmt: skip
    else:
        scale, zero = fit(grouped)
    # bfloat16 moves a number by 15 / 512 of a step at most, so the zero stays the best one
    scale = scale.to(scale_dtype).float()
    numbers = _numbers(grouped, scale, zero).to(torch.uint8)
    into.data.copy_(pack_int4(numbers.view_as(values)))
    into.scale.copy_(scale.view_as(into.scale))
    into.zero.copy_(zero.view_as(into.zero))


def _numbers(grouped: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
    return (grouped / scale).add_(zero).round_().clamp_(0, INT4_MOST)


def fit(grouped: Tensor) -> tuple[Tensor, Tensor]:
    """Scale and zero of each group: the best of all steps by sum |error|^POWER.

    Args:
        grouped: (groups, columns) float32.

    Returns:
        both (groups, 1) float32.
    """
    low = grouped.amin(-1, keepdim=True).clamp_(max=0)
    high = grouped.amax(-1, keepdim=True).clamp_(min=0)
    scale = ((high - low) / INT4_MOST).clamp_(min=TINY)
    zero = (-low / scale).round_()
    unit = scale  # errors are measured in it, so that a group's size does not matter
    best_scale, best_zero = scale, zero
    best = torch.full_like(scale, torch.inf)
    beta = BETA
    for _ in range(STEPS):
        numbers = _numbers(grouped, scale, zero)
        error = (grouped - (numbers - zero) * scale) / unit
        size = error.abs()
        power = size.clamp(min=1e-8).pow(POWER - 1)
        loss = (size * power).sum(-1, keepdim=True)
        better = loss < best
        best = torch.where(better, loss, best)
        best_scale = torch.where(better, scale, best_scale)
        best_zero = torch.where(better, zero, best_zero)
        # what of the error is left to stand (an outlier's), and what is to be made small
        left = error.sign() * (size - power / beta).clamp_(min=0)
        target = grouped - left * unit
        zero = (numbers - target / scale).mean(-1, keepdim=True).round_().clamp_(0, INT4_MOST)
        centred = numbers - zero
        squares = centred.square().sum(-1, keepdim=True)
        fitted = (target * centred).sum(-1, keepdim=True) / squares.clamp(min=TINY)
        scale = torch.where(fitted > 0, fitted, scale).clamp_(min=TINY)
        beta *= BETA_GROWTH
    return best_scale, best_zero
