"""Quantizing floats: how far each number may be off, and how int4 chooses its scales."""

import pytest
import torch
from torch import Tensor

from mistral_chat.kernels.fit_int4 import fit_int4
from mistral_chat.kernels.quantize import BETA, BETA_GROWTH, POWER, STEPS, TINY, fit, quantize
from mistral_chat.kernels.weight import DTYPES, ZERO_DTYPES, Kind, Quantized


def empty(kind: Kind, n_out: int, n_in: int, n_groups: int = 1) -> Quantized:
    width = n_in // 2 if kind == "int4" else n_in
    zero = torch.zeros(n_out, n_groups, dtype=ZERO_DTYPES["int4"]) if kind == "int4" else None
    data = torch.zeros(n_out, width).to(DTYPES[kind])
    return Quantized(kind, data, torch.zeros(n_out, n_groups), zero)


def quantized(floats: Tensor, kind: Kind, n_groups: int = 1) -> Quantized:
    into = empty(kind, *floats.shape, n_groups)
    quantize(floats, into)
    return into


def draw(seed: int, n_out: int = 24, n_in: int = 256) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    sizes = 10 ** (4 * torch.rand(n_out, 1, generator=generator) - 3)
    return torch.randn(n_out, n_in, generator=generator) * sizes


@pytest.mark.parametrize("seed", range(5))
def test_fp8_is_right_to_a_sixteenth_and_int8_to_half_a_step(seed: int) -> None:
    floats = draw(seed)
    most = floats.abs().amax(1, keepdim=True)
    fp8 = quantized(floats, "fp8").dequantize(torch.float32)
    # three bits after the first, rounded: 1 / 16; below the smallest normal half of its last bit
    assert ((fp8 - floats).abs() <= floats.abs() / 16 * 1.001 + most / 448 * 2**-10).all()
    int8 = quantized(floats, "int8").dequantize(torch.float32)
    assert ((int8 - floats).abs() <= most / 127 * 0.5001).all()


@pytest.mark.parametrize("kind", ["fp8", "int8", "int4"])
@pytest.mark.parametrize("value", [0.0, 1e-30, -3.0, 3e4])
def test_rows_of_one_number_keep_it_and_have_a_positive_scale(kind: Kind, value: float) -> None:
    into = quantized(torch.full((3, 64), value), kind, 2 if kind == "int4" else 1)
    assert (into.scale > 0).all()
    got = into.dequantize(torch.float32)
    torch.testing.assert_close(got, torch.full_like(got, value), rtol=1e-6, atol=1e-11)


@pytest.mark.parametrize("kind", ["fp8", "int8", "int4"])
def test_what_is_quantized_already_stays(kind: Kind) -> None:
    floats = draw(3, 8, 128)
    once = quantized(floats, kind, 2 if kind == "int4" else 1).dequantize(torch.float32)
    twice = quantized(once, kind, 2 if kind == "int4" else 1).dequantize(torch.float32)
    torch.testing.assert_close(twice, once, rtol=1e-5, atol=1e-6 * float(once.abs().max()))


def nearest(floats: Tensor, group: int) -> Tensor:
    """int4 from the least and the greatest of each group, rounded to the nearest."""
    grouped = floats.view(-1, group)
    low, high = (
        grouped.amin(1, keepdim=True).clamp(max=0),
        grouped.amax(1, keepdim=True).clamp(min=0),
    )
    scale = (high - low) / 15
    zero = (-low / scale).round()
    numbers = (grouped / scale + zero).round().clamp(0, 15)
    return ((numbers - zero) * scale).view_as(floats)


@pytest.mark.parametrize("seed", range(5))
def test_int4_is_better_than_rounding_to_the_nearest(seed: int) -> None:
    floats = draw(seed)
    floats[:, ::50] *= 4  # outliers
    got = quantized(floats, "int4", 2).dequantize(torch.float32)
    size = floats.abs().amax(1, keepdim=True)
    ours, theirs = (
        float(((each - floats) / size).abs().pow(POWER).mean())
        for each in (got, nearest(floats, 128))
    )
    assert ours < 0.97 * theirs


@pytest.mark.parametrize("group", [32, 96, 128])
def test_the_kernel_fits_as_well_as_the_reference(group: int) -> None:
    grouped = draw(2, 40, group).float()
    grouped[7], grouped[8] = 0, 2.5
    settings = {
        "steps": STEPS, "power": POWER, "beta": BETA, "beta_growth": BETA_GROWTH, "tiny": TINY
    }  # fmt: skip
    losses = []
    for scale, zero in (fit(grouped), fit_int4(grouped, **settings)):  # type: ignore[arg-type]
        assert (scale > 0).all()
        assert torch.equal(zero, zero.round().clamp(0, 15))
        numbers = (grouped / scale + zero).round().clamp(0, 15)
        error = ((numbers - zero) * scale - grouped) / grouped.abs().amax(1, keepdim=True).clamp(
            1e-9
        )
        losses.append(error.abs().pow(POWER).sum(1))
    # a number that lies in the middle of two may be rounded either way, which the steps carry on
    torch.testing.assert_close(losses[1], losses[0], rtol=0.05, atol=1e-3)
    assert float((losses[1] - losses[0]).abs().median()) < 1e-3


def test_a_row_does_not_depend_on_the_rows_beside_it() -> None:
    floats = draw(1)
    whole = quantized(floats, "int4", 8)
    part = quantized(floats[5:9], "int4", 8)
    assert torch.equal(whole.dequantize(torch.float32)[5:9], part.dequantize(torch.float32))
