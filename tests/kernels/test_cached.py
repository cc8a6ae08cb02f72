"""Keys and values in FP8: the kernels are the reference, and the reference is its definition."""

from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from mistral_chat.kernels import elementwise, fused, reference
from mistral_chat.kernels.cached import FP8, MOST_FP8, Cached, quantize_rows
from tests.kernels.ropes import SCALED, rope_of
from tests.kernels.test_fused import CASES, DEVICE, Case, assert_near, draw, integers

pytestmark = [
    pytest.mark.filterwarnings("ignore:Conversion of an array with ndim:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:divide by zero encountered in log2:RuntimeWarning"),
]


@pytest.fixture(autouse=True)
def interpreter_rounds(monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton's interpreter loses the carry where FP8 rounds up to the next power of two."""
    from triton import language as tl
    from triton.runtime import interpreter

    theirs = interpreter._convert_float

    def convert(numbers: Any, source: Any, target: Any, rounding: Any) -> Any:
        if target != tl.float8e4nv or source != tl.float32:
            return theirs(numbers, source, target, rounding)
        return torch.from_numpy(numbers.view("<f4").copy()).to(FP8).view(torch.uint8).numpy()

    monkeypatch.setattr(interpreter, "_convert_float", convert)


SOME = ("one token", "many queries a KV head", "a block after")


def new_cache(*positions: int, head_dim: int) -> Cached:
    """Random numbers and scales, of all positions."""
    numbers, scale = quantize_rows(draw(*positions, head_dim, seed=positions[0]))
    return Cached(numbers, scale)


@pytest.mark.parametrize("size", [1e-20, 1e-3, 1.0, 1e6])
def test_rows_are_right_to_half_a_step_of_fp8_at_their_own_size(size: float) -> None:
    rows = size * draw(5, 7, 64) * torch.logspace(-2, 2, 7, device=DEVICE)[:, None]
    rows[2, 3] = 0
    numbers, scale = quantize_rows(rows)
    assert numbers.dtype == FP8
    assert scale.shape == (5, 7)
    assert numbers.float().abs().amax(-1)[rows.abs().amax(-1) > 0].eq(MOST_FP8).all()
    back = Cached(numbers, scale).floats(0, 7, torch.float32)
    # 3 bits behind the point: half a step is 2^-4; below 2^-6 (of 448) steps are 2^-9
    bound = torch.maximum(rows.abs() * 2**-4, scale[..., None] * 2**-10) * (1 + 1e-5)
    assert bool(((back - rows).abs() <= bound).all())
    assert torch.equal(back[2, 3], torch.zeros(64, device=DEVICE))


def assert_same_cache(ours: Cached, theirs: Cached) -> None:
    """Equal but where a rotated number is rounded otherwise, and then crosses to its neighbour."""
    assert ours.scale is not None
    assert theirs.scale is not None
    torch.testing.assert_close(ours.scale, theirs.scale, rtol=1e-6, atol=0)
    mine, other = (cached.data.float() for cached in (ours, theirs))
    assert (mine != other).float().mean() < 1e-2
    torch.testing.assert_close(mine, other, rtol=0.13, atol=2**-9)  # a step


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["f32", "f16"])
@pytest.mark.parametrize(("n_new", "start", "head_dim"), [(1, 0, 12), (7, 3, 64), (30, 0, 10)])
def test_rope_store_into_fp8_is_the_reference(
    n_new: int, start: int, head_dim: int, dtype: torch.dtype
) -> None:
    n_heads, n_kv = 4, 2
    qkv = draw(n_new, n_heads + 2 * n_kv, head_dim, dtype=dtype)
    rope = rope_of(head_dim, 1e4, DEVICE, original=2, **SCALED)
    rotations = reference.rope_rotations(torch.arange(start, start + n_new, device=DEVICE), rope)
    ours, theirs = ([new_cache(3, n_kv, 30, head_dim=head_dim) for _ in "kv"] for _ in range(2))
    queries = qkv.clone()
    elementwise.rope_store(queries, ours[0][1], ours[1][1], start, n_heads, rotations)
    wanted = reference.rope_store(qkv, theirs[0][1], theirs[1][1], start, n_heads, rotations)
    assert_near(queries[:, :n_heads], wanted, units=2, size=5)
    before = new_cache(3, n_kv, 30, head_dim=head_dim)
    unchanged = torch.ones(3, n_kv, 30, dtype=torch.bool, device=DEVICE)
    unchanged[1, :, start : start + n_new] = False
    for mine, other in zip(ours, theirs, strict=True):
        assert_same_cache(mine, other)
        assert torch.equal(mine.data[unchanged].float(), before.data[unchanged].float())


def attend(module: ModuleType, case: Case, dtype: torch.dtype) -> tuple[Tensor, Cached, Cached]:
    counts = torch.tensor(case.by_kv_head)
    n_heads, n_kv, head_dim = int(counts.sum()), len(counts), case.head_dim
    n_rows = len(case.starts) * case.per_span
    qkv = draw(n_rows, n_heads + 2 * n_kv, head_dim, dtype=dtype)
    keys, values = (
        new_cache(case.n_slots, n_kv, case.max_seq_len, head_dim=head_dim) for _ in "kv"
    )
    starts = integers(case.starts)
    rope = rope_of(head_dim, 1e4, DEVICE, original=5, **SCALED)
    out = module.attend(
        qkv, keys, values, reference.rotations(starts, case.per_span, rope),
        integers(case.slots(seed=3)), starts, integers(case.lengths),
        integers([0, *counts.cumsum(0).tolist()]),
        integers(torch.arange(n_kv).repeat_interleave(counts).tolist()),
        int(counts.max()), case.window,
    )  # fmt: skip
    return out, keys, values


@pytest.mark.parametrize("name", CASES)
def test_attend_to_fp8_is_the_reference(name: str) -> None:
    case = CASES[name]
    ours, theirs = (attend(each, case, torch.float32) for each in (fused, reference))
    real = case.real_rows()
    for mine, other in zip(ours[1:], theirs[1:], strict=True):
        assert_same_cache(mine, other)
    # A stored number that crossed to its neighbour, by a sixteenth, is one of all that are summed.
    torch.testing.assert_close(ours[0][real], theirs[0][real], rtol=0, atol=2e-2)
    apart = (ours[0][real] - theirs[0][real]).abs()
    assert not apart.numel() or apart.median() < 1e-5


@pytest.mark.parametrize("name", SOME)
def test_attend_to_fp8_is_near_to_floats(name: str) -> None:
    case = CASES[name]
    out, keys, values = attend(fused, case, torch.float32)
    floats = tuple(
        Cached(cached.floats(0, case.max_seq_len, torch.float32)) for cached in (keys, values)
    )
    again = attend_with(case, *floats)
    real = case.real_rows()
    # what the floats are was rounded already, so that only the new positions' own rounding differs
    torch.testing.assert_close(out[real], again[real], rtol=0, atol=0.2)


def attend_with(case: Case, keys: Cached, values: Cached) -> Tensor:
    counts = torch.tensor(case.by_kv_head)
    n_heads, n_kv = int(counts.sum()), len(counts)
    n_rows = len(case.starts) * case.per_span
    starts = integers(case.starts)
    rope = rope_of(case.head_dim, 1e4, DEVICE, original=5, **SCALED)
    out: Tensor = reference.attend(
        draw(n_rows, n_heads + 2 * n_kv, case.head_dim), keys, values,
        reference.rotations(starts, case.per_span, rope),
        integers(case.slots(seed=3)), starts, integers(case.lengths),
        integers([0, *counts.cumsum(0).tolist()]),
        integers(torch.arange(n_kv).repeat_interleave(counts).tolist()),
        int(counts.max()), case.window,
    )  # fmt: skip
    return out
