"""Matmuls with quantized matrices against their reference, which dequantizes first."""

import os
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from mistral_chat.kernels import fused, linear_quantized, reference
from mistral_chat.kernels.elementwise import SLICE
from mistral_chat.kernels.tuning import FewRows, OneRow
from mistral_chat.kernels.weight import DTYPES, Quantized, pack_int4, unpack_int4
from tests.conftest import ROOT
from tests.kernels.test_fused import DEVICE, EPS, assert_near, by_rows, by_type, draw, draw_gain

pytestmark = pytest.mark.filterwarnings(
    "ignore:Conversion of an array with ndim:DeprecationWarning"
)

# kind, columns of a group (0 is a row), zeros
KINDS = [
    ("fp8", 0, False),
    ("int8", 0, False),
    ("int8", 0, True),
    ("int8", 48, True),
    ("int4", 0, False),
    ("int4", 32, True),
    ("int4", 96, False),
    ("int4", 128, True),
]
by_kind = pytest.mark.parametrize(("kind", "group", "zeros"), KINDS)


def draw_quantized(
    n_out: int, n_in: int, kind: str, group: int, zeros: bool, seed: int = 1
) -> Quantized:
    """Such that products with rows of size 1 have size 1."""
    generator = torch.Generator().manual_seed(seed)

    def integers(low: int, high: int, *shape: int) -> Tensor:
        return torch.randint(low, high, shape, generator=generator)

    n_groups = n_in // group if group else 1
    scale = (0.5 + torch.rand(n_out, n_groups, generator=generator)) * n_in**-0.5
    zero = None
    if kind == "fp8":
        data = torch.randn(n_out, n_in, generator=generator).to(DTYPES["fp8"])
    elif kind == "int8":
        data = integers(-128, 128, n_out, n_in).to(torch.int8)
        scale /= 74
        zero = integers(-40, 40, n_out, n_groups).to(torch.int8) if zeros else None
    else:
        data = pack_int4(integers(0, 16, n_out, n_in).to(torch.uint8))
        scale /= 4.6
        zero = integers(5, 11, n_out, n_groups).to(torch.uint8) if zeros else None
    on = None if zero is None else zero.to(DEVICE)
    return Quantized(kind, data.to(DEVICE), scale.to(DEVICE), on)  # type: ignore[arg-type]


def test_int4_pairs_are_16_columns_apart() -> None:
    numbers = torch.arange(64).view(1, 64).remainder(16).to(torch.uint8)
    numbers[0, 17] = 3
    packed = pack_int4(numbers)
    assert packed.shape == (1, 32)
    assert int(packed[0, 1]) == 1 | 3 << 4  # columns 1 and 17
    assert torch.equal(unpack_int4(packed), numbers)


@pytest.mark.parametrize("native", [False] if DEVICE.type == "cpu" else [False, True])
def test_every_fp8_number_is_what_torch_says(native: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(linear_quantized, "has_fp8", lambda device: native)
    numbers = torch.arange(256, dtype=torch.uint8, device=DEVICE)
    numbers = numbers[(numbers & 127) != 127].view(1, -1)  # less the two NaN
    one = torch.ones(1, 1, device=DEVICE)
    weight = Quantized("fp8", numbers.view(torch.float8_e4m3fn), one)
    got = linear_quantized.dequantize(weight, torch.float32)
    assert torch.equal(got, numbers.view(torch.float8_e4m3fn).float())


@by_type
@by_kind
def test_dequantize_is_the_reference(
    kind: str, group: int, zeros: bool, dtype: torch.dtype
) -> None:
    weight = draw_quantized(13, 384, kind, group, zeros)
    got = linear_quantized.dequantize(weight, dtype)
    assert_near(got, weight.dequantize(dtype), units=1, size=0.2)


# Sums of numbers that are exact in float16 and float32; the reference rounds dequantized numbers
# in float16 first, so that it is computed in float32 and rounded last, as the kernels do.


@by_type
@by_rows
@by_kind
@pytest.mark.parametrize(("n_out", "width"), [(21, 1), (70, 2)])
def test_linear_is_the_reference(
    n_out: int, width: int, n_rows: int, kind: str, group: int, zeros: bool, dtype: torch.dtype
) -> None:
    n_in = width * 384 + (0 if group else 32)  # 384 has whole groups of all sizes here
    x, w = draw(n_rows, n_in, dtype=dtype), draw_quantized(n_out, n_in, kind, group, zeros)
    wanted = reference.linear(x.float(), w).to(dtype)
    assert_near(fused.linear(x, w), wanted, units=2, size=8)


@by_rows
@by_kind
def test_gated_is_the_reference(n_rows: int, kind: str, group: int, zeros: bool) -> None:
    n_in = 384
    x, w = draw(n_rows, n_in), draw_quantized(2 * 9, n_in, kind, group, zeros)
    assert_near(fused.gated(x, w), reference.gated(x, w), units=5, size=16)


@pytest.mark.parametrize("operation", ["linear", "gated"])
@pytest.mark.parametrize("n_rows", [1, 5])
@pytest.mark.parametrize(("kind", "group", "zeros"), [KINDS[0], KINDS[5]])
def test_a_norm_that_the_matmul_finishes_is_the_reference(
    kind: str, group: int, zeros: bool, n_rows: int, operation: str
) -> None:
    dim = 2 * SLICE
    partial, residual = draw(n_rows, dim), draw(n_rows, dim, seed=3)
    gain, w = draw_gain(dim, torch.float32), draw_quantized(12, dim, kind, group, zeros)
    ours, theirs = (
        getattr(each, operation)(each.add_norm(partial, residual, gain, EPS)[0], w)
        for each in (fused, reference)
    )
    assert_near(ours, theirs, units=8, size=16)


@pytest.mark.parametrize("kind", KINDS[::3])
def test_every_division_gives_the_same(kind: tuple[str, int, bool]) -> None:
    w = draw_quantized(20, 768, *kind)
    for config, n_rows in (
        (OneRow(1, 64, 1), 1),
        (OneRow(4, 1024, 4), 1),
        (FewRows(16, 32, 2, 1), 3),
        (FewRows(64, 256, 2, 4), 19),
    ):
        x = draw(n_rows, w.shape[1])
        got = linear_quantized.matmul_quantized(x, w, config=config)
        assert_near(got, reference.linear(x, w), units=2, size=8)


def test_rows_of_a_quantized_matrix_are_a_view() -> None:
    w = draw_quantized(10, 64, "int4", 32, True)
    part = w.rows(3, 4)
    assert torch.equal(part.dequantize(torch.float32), w.dequantize(torch.float32)[3:7])
    part.scale.fill_(0)
    assert not w.scale[3:7].any()
    assert replace(w, zero=None).zero is None


@pytest.mark.skipif(DEVICE.type == "cuda", reason="they run here")
def test_kernels_compile_for_gpus_that_are_not_here() -> None:
    """The interpreter takes more than the compiler does, and runs no assembler."""
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", "tests.scripts.compile_kernels"],
        capture_output=True, text=True, check=False, cwd=ROOT, env=env, timeout=300,
    )  # fmt: skip
    assert done.stdout.strip() == "19", done.stderr[-3000:]
