"""The decode path's kernels against their references, operation by operation.

Without a GPU the kernels run in Triton's interpreter, which gets a product (`dot`) of bfloat16
wrong: it multiplies the bits as integers. So types are float32 and float16 here, and bfloat16 is
left to tests/gpu.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from types import ModuleType

import pytest
import torch
from torch import Tensor

from mistral_chat.kernels import elementwise, fused, reference
from mistral_chat.kernels.cached import Cached
from mistral_chat.kernels.elementwise import SLICE, Scaled, n_slices
from mistral_chat.kernels.linear import matmul
from mistral_chat.kernels.tuning import MOST_ROWS, FewRows, OneRow
from tests.kernels.ropes import PLAIN, SCALED, rope_of

pytestmark = [
    # Triton's interpreter makes a loop's bound of an array of one element, which numpy frowns upon.
    pytest.mark.filterwarnings("ignore:Conversion of an array with ndim:DeprecationWarning"),
    # A part of the context that a query sees nothing of takes the logarithm of 0 before it
    # overrules it: fine on a GPU, but numpy says so.
    pytest.mark.filterwarnings("ignore:divide by zero encountered in log2:RuntimeWarning"),
]

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
EPS = 1e-5
HALF_UNIT = {torch.float32: 2**-24, torch.float16: 2**-11}  # of rounding, relative
by_type = pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["f32", "f16"])
by_rows = pytest.mark.parametrize("n_rows", [1, 7, 17])  # a kernel of its own, a tile, two


def draw(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    numbers = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    return numbers.to(DEVICE, dtype)


def draw_matrix(n_out: int, n_in: int, dtype: torch.dtype, seed: int = 1) -> Tensor:
    """Such that products with rows of size 1 have size 1."""
    return (draw(n_out, n_in, seed=seed) * n_in**-0.5).to(dtype)


def draw_gain(dim: int, dtype: torch.dtype) -> Tensor:
    return (1 + draw(dim, seed=2) / 8).to(dtype)


def assert_near(got: Tensor, wanted: Tensor, units: float, size: float = 1.0) -> None:
    """Equal but for `units` roundings of half a unit each, of numbers about `size`.

    Besides, float32 sums of up to 2,500 products in another order are apart by some 1e-6 of what is
    summed, whatever the type of the result.
    """
    assert got.dtype == wanted.dtype
    relative = units * HALF_UNIT[wanted.dtype]
    atol = size * (relative + 4e-6)
    torch.testing.assert_close(got, wanted, rtol=relative + 1e-6, atol=atol)


# Products. References round like the kernels, once at the end, unless said otherwise.

# (n_out, n_in): nothing a power of two; less than a block and several, of rows and of columns.
MATRICES = [(3, 5), (20, 48), (130, 72), (37, 1100), (9, 2500)]
by_matrix = pytest.mark.parametrize(("n_out", "n_in"), MATRICES)


@by_type
@by_rows
@by_matrix
def test_linear_is_the_reference(n_out: int, n_in: int, n_rows: int, dtype: torch.dtype) -> None:
    x, w = draw(n_rows, n_in, dtype=dtype), draw_matrix(n_out, n_in, dtype)
    # each side rounds its sum
    assert_near(fused.linear(x, w), reference.linear(x, w), units=2, size=4)


@by_type
@by_rows
@by_matrix
def test_gated_is_the_reference(n_out: int, n_in: int, n_rows: int, dtype: torch.dtype) -> None:
    x, w = draw(n_rows, n_in, dtype=dtype), draw_matrix(2 * n_out, n_in, dtype)
    # the reference rounds gate, up, the gate's SiLU (which stretches an error by at most 1.1) and
    # the result; the kernel the result alone. Results are products of two numbers up to 4.
    assert_near(fused.gated(x, w), reference.gated(x, w), units=5, size=8)


@by_type
@by_rows
@by_matrix
def test_logits_are_the_reference_in_float32(
    n_out: int, n_in: int, n_rows: int, dtype: torch.dtype
) -> None:
    x, w = draw(n_rows, n_in, dtype=dtype), draw_matrix(n_out, n_in, dtype)
    got = fused.logits(x, w)
    assert got.dtype == torch.float32
    # on CPU the reference's sum has x's type before it becomes float32
    rounding = HALF_UNIT[dtype]
    wanted = reference.logits(x, w)
    torch.testing.assert_close(got, wanted, rtol=rounding + 1e-6, atol=4 * rounding + 4e-6)


def norm_of(module: ModuleType, way: str, x: Tensor, partial: Tensor, gain: Tensor) -> Tensor:
    """Normed rows, in the form that the module's products take."""
    residual = None if way == "norm" else partial
    return module.add_norm(x, residual, gain, EPS)[0]  # type: ignore[no-any-return]


@by_type
@pytest.mark.parametrize("way", ["norm", "add_norm"])
@pytest.mark.parametrize("operation", ["linear", "gated", "logits"])
# one slice of a row, two, and three where four have a place
@pytest.mark.parametrize(
    ("dim", "n_rows"),
    [(50, 1), (50, 17), (SLICE + 76, 2), (2 * SLICE + 200, 1), (2 * SLICE + 200, 7)],
)
def test_product_after_a_norm_is_the_reference(
    dim: int, operation: str, way: str, n_rows: int, dtype: torch.dtype
) -> None:
    # rows of very different size: each must be divided by its own
    sizes = torch.logspace(-1, 1, n_rows, device=DEVICE).unsqueeze(1)
    x = (draw(n_rows, dim) * sizes).to(dtype)
    partial = (draw(n_rows, dim, seed=3) * sizes).to(dtype)
    gain = draw_gain(dim, dtype)
    w = draw_matrix(22, dim, dtype)
    ours, theirs = (
        getattr(module, operation)(norm_of(module, way, x, partial, gain), w)
        for module in (fused, reference)
    )
    assert ours.dtype == theirs.dtype
    # Normed rows have size 1 in float16, each rounded up to twice on both sides before the product:
    # 2^-11 of a number about 1, of which those of a row add up like a walk at random to less than
    # 3 * 2^-11; then what the product itself rounds, as above. float32 rounds 2^13 times finer.
    atol = 16 * HALF_UNIT[dtype] + 8e-6
    torch.testing.assert_close(ours, theirs, rtol=5 * HALF_UNIT[dtype] + 2e-6, atol=atol)


@by_type
@by_rows
@pytest.mark.parametrize("dim", [50, 3 * SLICE + 1])
def test_add_norm_gives_the_sum_to_the_bit(dim: int, n_rows: int, dtype: torch.dtype) -> None:
    partial, residual = draw(n_rows, dim, dtype=dtype), draw(n_rows, dim, seed=1, dtype=dtype)
    before = residual.clone()
    got = fused.add_norm(partial, residual, draw_gain(dim, dtype), EPS)[1]
    assert torch.equal(got, reference.add_norm(partial, residual, draw_gain(dim, dtype), EPS)[1])
    assert torch.equal(residual, before)  # a graph's other steps may still read it


@pytest.mark.parametrize("size", [1e-4, 1.0, 1e4])
def test_norm_of_float16_stays_in_range(size: float) -> None:
    # x * gain before the division would be an infinity
    x = (draw(3, 700).clamp(-3, 3) * size).to(torch.float16)
    gain = torch.full((700,), 30.0, dtype=torch.float16, device=DEVICE)
    w = draw_matrix(10, 700, torch.float16)
    got = fused.linear(fused.add_norm(x, None, gain, EPS)[0], w)
    wanted = reference.linear(reference.rms_norm(x, gain, EPS), w)
    assert bool(got.isfinite().all())
    # as after any norm (16 half units), of results near 30 times as large
    torch.testing.assert_close(got, wanted, rtol=0, atol=30 * 16 * 2**-11)


@pytest.mark.parametrize("dim", [1, 50, SLICE, SLICE + 1, 5 * SLICE])
def test_add_scale_leaves_the_size_of_each_row_beside_it(dim: int) -> None:
    x, gain = draw(3, dim), draw_gain(dim, torch.float32)
    scaled, total = elementwise.add_scale(x, None, gain, EPS)
    assert total is x
    assert torch.equal(scaled.rows, x * gain)  # one product: exact
    assert scaled.squares.shape == (3, n_slices(dim))
    assert scaled.eps == EPS
    n_full = -(-dim // SLICE)
    assert not scaled.squares[:, n_full:].any()  # slices past the row, which are loaded too
    wanted = x.double().pow(2).sum(1)
    # float32 sums of at most 1,024 squares, and float64 of those
    torch.testing.assert_close(scaled.squares.double().sum(1), wanted, rtol=1e-6, atol=0)


ONE = [OneRow(4, 64, 1), OneRow(16, 256, 2), OneRow(8, 128, 4)]
FEW = [FewRows(16, 16, 1, 4), FewRows(64, 128, 3, 4), FewRows(128, 32, 6, 4)]


@by_type
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("config", [*ONE, *FEW], ids=str)
def test_product_is_the_same_however_it_is_divided(
    config: OneRow | FewRows, scaled: bool, gated: bool, dtype: torch.dtype
) -> None:
    n_rows = 1 if isinstance(config, OneRow) else 19
    rows, w = draw(n_rows, 150, dtype=dtype), draw_matrix(2 * 41, 150, dtype)
    squares = draw(n_rows, 4, seed=5).abs() * 100
    x: Tensor | Scaled = Scaled(rows, squares, 0.1) if scaled else rows
    exact = rows.double() @ w.double().T
    if scaled:
        exact /= (squares.double().sum(1, keepdim=True) / 150 + 0.1).sqrt()
    if gated:
        gate, up = exact.chunk(2, dim=1)
        exact = torch.nn.functional.silu(gate) * up
    got = matmul(x, w, gated=gated, float32=True, config=config)
    # float32 sums and no rounding before them: numbers up to 10 with seven digits
    torch.testing.assert_close(got.double(), exact, rtol=2e-6, atol=1e-5)
    rounded = matmul(x, w, gated=gated, config=config)
    assert torch.equal(rounded, got.to(dtype))  # the one rounding is the last


@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("n_rows", [2, 16, 17, MOST_ROWS])
def test_product_of_few_rows_is_each_row_alone(n_rows: int, scaled: bool) -> None:
    rows, w = draw(n_rows, 100), draw_matrix(14, 100, torch.float32)
    squares = draw(n_rows, 2, seed=5).abs() * 100

    def part(which: slice) -> Tensor | Scaled:
        return Scaled(rows[which], squares[which], EPS) if scaled else rows[which]

    whole = matmul(part(slice(None)), w, gated=True, config=FewRows(32, 32, 2, 4))
    for i in {0, 1, n_rows // 2, n_rows - 1}:
        alone = matmul(part(slice(i, i + 1)), w, gated=True)
        assert_near(whole[i : i + 1], alone, units=4, size=8)  # the order of additions


def test_product_reads_and_writes_nothing_past_its_rows() -> None:
    # NaN behind the matrix and behind the rows: whoever reads them gives itself away
    weights, rows = draw(60, 50), draw(20, 50)
    weights[44:], rows[3:] = torch.nan, torch.nan
    for n_rows in (1, 3):
        for gated in (False, True):
            few = FewRows(32, 32, 2, 4) if n_rows > 1 else None
            got = matmul(rows[:n_rows], weights[:44], gated=gated, config=few)
            assert got.shape == (n_rows, 22 if gated else 44)
            assert bool(got.isfinite().all())


# What stands between the products.


@by_type
@pytest.mark.parametrize("dim", [7, 1030])
@pytest.mark.parametrize(("first_id", "n_ids"), [(0, 40), (0, 11), (11, 9), (39, 1)])
def test_embed_is_the_reference(first_id: int, n_ids: int, dim: int, dtype: torch.dtype) -> None:
    weight = draw(n_ids, dim, dtype=dtype)
    tokens = torch.tensor([0, 39, 11, 10, 19, 20, 11], device=DEVICE)
    got = fused.embed(tokens, weight, first_id)
    assert torch.equal(got, reference.embed(tokens, weight, first_id))  # copies: exact


LAST = 131_071  # the last position of Mistral's longest context


@pytest.mark.parametrize("theta", [1e4, 1e6])
@pytest.mark.parametrize("head_dim", [2, 12, 16, 128])
@pytest.mark.parametrize(
    ("starts", "length"),
    [([0], 1), ([LAST], 1), ([LAST - 16], 17), ([5, 0, LAST - 2], 3), ([3, LAST, 700, 0], 1)],
)
@pytest.mark.parametrize("scaling", [PLAIN, SCALED], ids=["plain", "scaled"])
def test_rotations_are_the_reference(
    starts: list[int], length: int, head_dim: int, theta: float, scaling: dict[str, float]
) -> None:
    rope = rope_of(head_dim, theta, DEVICE, original=2, **scaling)
    places = torch.tensor(starts, dtype=torch.int32, device=DEVICE)
    got = fused.rotations(places, length, rope)
    assert (got[0] is got[1]) == (scaling == PLAIN)
    wanted = reference.rotations(places, length, rope)
    positions = torch.cat([torch.arange(s, s + length) for s in starts]).to(DEVICE)
    # The angle is the same product in float32; cosines are right to a unit or two of 6e-8, and
    # scales are up to 3.
    bound = 2.5e-7 if scaling == PLAIN else 1.5e-6
    for ours, theirs, turns in zip(
        got, wanted, reference.rope_rotations(positions, rope), strict=True
    ):
        assert ours.shape == (len(starts) * length, 2, head_dim // 2)
        torch.testing.assert_close(ours, theirs, rtol=0, atol=bound)
        torch.testing.assert_close(torch.complex(ours[:, 0], ours[:, 1]), turns, rtol=0, atol=bound)


@by_type
@by_rows
@pytest.mark.parametrize("n_hidden", [5, 2100])
def test_silu_mul_is_the_reference(n_hidden: int, n_rows: int, dtype: torch.dtype) -> None:
    both = (3 * draw(n_rows, 2 * n_hidden)).to(dtype)
    # the reference rounds SiLU and the product, the kernel the product; numbers up to 100
    assert_near(elementwise.silu_mul(both), reference.silu_mul(both), units=3, size=0.1)


@by_type
@by_rows
@pytest.mark.parametrize("dim", [50, 1100])
@pytest.mark.parametrize("size", [1e-3, 1.0, 100.0])
def test_elementwise_add_norm_is_the_reference(
    size: float, dim: int, n_rows: int, dtype: torch.dtype
) -> None:
    partial, residual = ((size * draw(n_rows, dim, seed=s)).to(dtype) for s in (0, 1))
    gain = draw_gain(dim, dtype)
    normed, total = elementwise.add_norm(partial, residual, gain, EPS)
    wanted_normed, wanted_total = reference.add_norm(partial, residual, gain, EPS)
    assert torch.equal(total, wanted_total)  # one addition: exact
    # the reference may round before the gain as well; numbers up to 5
    assert_near(normed, wanted_normed, units=3)
    alone, same = elementwise.add_norm(total, None, gain, EPS)
    assert torch.equal(alone, normed)
    assert same is total


@by_type
@pytest.mark.parametrize(
    ("n_heads", "n_kv", "head_dim", "n_new", "start"),
    [(4, 2, 12, 1, 0), (5, 1, 64, 7, 3), (3, 3, 2, 2, 28), (2, 1, 10, 30, 0), (4, 2, 128, 3, 9)],
)
def test_rope_store_is_the_reference(
    n_heads: int, n_kv: int, n_new: int, start: int, head_dim: int, dtype: torch.dtype
) -> None:
    qkv = draw(n_new, n_heads + 2 * n_kv, head_dim, dtype=dtype)
    positions = torch.arange(start, start + n_new, device=DEVICE)
    rope = rope_of(head_dim, 1e4, DEVICE, original=2, **SCALED)
    rotations = reference.rope_rotations(positions, rope)
    caches = [draw(2, 3, n_kv, 30, head_dim, seed=4, dtype=dtype) for _ in range(2)]
    queries, ours = qkv.clone(), caches[0]
    elementwise.rope_store(
        queries, Cached(ours[0, 1]), Cached(ours[1, 1]), start, n_heads, rotations
    )
    theirs = Cached(caches[1][0, 1]), Cached(caches[1][1, 1])
    wanted = reference.rope_store(qkv, *theirs, start, n_heads, rotations)
    # two products and a sum, which one side may fuse; numbers up to 5
    assert_near(queries[:, :n_heads], wanted, units=2, size=5)
    assert_near(ours, caches[1], units=2, size=5)
    assert torch.equal(ours[1], caches[1][1])  # values are copied
    changed = torch.ones(3, n_kv, 30, dtype=torch.bool, device=DEVICE)
    changed[1, :, start : start + n_new] = False
    before = draw(2, 3, n_kv, 30, head_dim, seed=4, dtype=dtype)
    assert torch.equal(ours[:, changed], before[:, changed])  # nothing else is written


# Attention.


@dataclass(frozen=True, kw_only=True)
class Case:
    """Spans with their caches.

    Args:
        starts: of each span.
        lengths: real tokens of each span, 0 is an empty one.
        per_span: tokens that each has room for.
        by_kv_head: queries of each KV head.
    """

    starts: tuple[int, ...]
    lengths: tuple[int, ...]
    per_span: int = 1
    by_kv_head: tuple[int, ...] = (2, 2)
    head_dim: int = 16
    window: int | None = None
    max_seq_len: int = 90
    n_slots: int = 6

    def slots(self, seed: int) -> list[int]:
        order = torch.randperm(self.n_slots, generator=torch.Generator().manual_seed(seed))
        # empty spans say slot 0, as the decoder's do, whoever else has it
        chosen = zip(order.tolist(), self.lengths, strict=False)
        return [slot if length else 0 for slot, length in chosen]

    def real_rows(self) -> Tensor:
        return torch.cat([torch.arange(self.per_span) < n for n in self.lengths]).to(DEVICE)


Attended = tuple[Tensor, Tensor, Tensor]


@cache
def attend_once(case: Case) -> Attended:
    """`attend` by the kernel in float32, for every law; the interpreter is slow. Read only."""
    return attend(fused, case, torch.float32)


def attend(
    module: ModuleType, case: Case, dtype: torch.dtype, junk: float | None = None
) -> Attended:
    """Output and both caches after; `junk` is what stands where nothing is to be read."""
    n_rows = len(case.starts) * case.per_span
    counts = torch.tensor(case.by_kv_head)
    n_heads, n_kv, head_dim = int(counts.sum()), len(counts), case.head_dim
    qkv = draw(n_rows, n_heads + 2 * n_kv, head_dim, dtype=dtype)
    shape = (case.n_slots, n_kv, case.max_seq_len, head_dim)
    keys, values = draw(*shape, seed=1, dtype=dtype), draw(*shape, seed=2, dtype=dtype)
    slots = case.slots(seed=3)
    if junk is not None:
        qkv[~case.real_rows()] = junk
        held = torch.zeros(case.n_slots, case.max_seq_len, dtype=torch.bool, device=DEVICE)
        for slot, start, length in zip(slots, case.starts, case.lengths, strict=True):
            if length:
                first = 0 if case.window is None else max(0, start - case.window + 1)
                held[slot, first:start] = True
        unread = ~held.unsqueeze(1).expand(-1, n_kv, -1)
        keys[unread], values[unread] = junk, junk
    starts = integers(case.starts)
    rope = rope_of(head_dim, 1e4, DEVICE, original=5, **SCALED)
    out = module.attend(
        qkv, Cached(keys), Cached(values), reference.rotations(starts, case.per_span, rope),
        integers(slots), starts, integers(case.lengths),
        integers([0, *counts.cumsum(0).tolist()]),
        integers(torch.arange(n_kv).repeat_interleave(counts).tolist()),
        int(counts.max()), case.window,
    )  # fmt: skip
    assert out.shape == (n_rows, n_heads * head_dim)
    assert out.dtype == dtype
    return out, keys, values


def integers(values: Sequence[int]) -> Tensor:
    return torch.tensor(values, dtype=torch.int32, device=DEVICE)


UNEVEN = {"by_kv_head": (3, 2)}
CASES = {
    "first token": Case(starts=(0,), lengths=(1,)),
    "one token": Case(starts=(70,), lengths=(1,), **UNEVEN),
    "last position": Case(starts=(89,), lengths=(1,)),
    "a block before": Case(starts=(63,), lengths=(1,)),
    "a block after": Case(starts=(64,), lengths=(1,)),
    "one KV head": Case(starts=(33,), lengths=(1,), by_kv_head=(5,)),
    "one query each": Case(starts=(33,), lengths=(1,), by_kv_head=(1, 1, 1)),
    "many queries a KV head": Case(starts=(50,), lengths=(1,), by_kv_head=(12, 12)),
    "sequences": Case(starts=(40, 3, 89), lengths=(1, 1, 1), by_kv_head=(1, 3)),
    "sequences and empty ones": Case(
        starts=(40, 0, 7, 0), lengths=(1, 0, 1, 0), **UNEVEN
    ),
    "empty": Case(starts=(0, 0), lengths=(0, 0)),
    "empty with a start": Case(starts=(9, 30), lengths=(0, 1), by_kv_head=(1, 3)),
    "two tokens": Case(starts=(30,), lengths=(2,), per_span=2, **UNEVEN),
    "three from the start": Case(starts=(0,), lengths=(3,), per_span=3),
    "five, four real": Case(starts=(20,), lengths=(4,), per_span=5, by_kv_head=(1, 3)),
    "nine, one real": Case(starts=(61,), lengths=(1,), per_span=9),
    "seventeen": Case(starts=(60,), lengths=(17,), per_span=17, by_kv_head=(3, 2)),
    "seventeen, the last ones": Case(starts=(73,), lengths=(17,), per_span=17),
    "seventeen past the end, ten real": Case(starts=(80,), lengths=(10,), per_span=17),
    "two tiles of rows": Case(starts=(50,), lengths=(17,), per_span=17, by_kv_head=(5, 4)),
    "spans of several tokens": Case(
        starts=(30, 0, 85), lengths=(3, 0, 5), per_span=5, by_kv_head=(2, 1)
    ),
    "window": Case(starts=(70,), lengths=(1,), window=9, **UNEVEN),
    "window of one": Case(starts=(33,), lengths=(1,), window=1),
    "window larger than the context": Case(starts=(33, 5), lengths=(1, 1), window=80),
    "window of the context": Case(starts=(33,), lengths=(1,), window=34),
    "window less than the tokens": Case(starts=(60,), lengths=(9,), per_span=9, window=4),
    "window and many tokens": Case(
        starts=(71, 0), lengths=(5, 4), per_span=5, window=66, by_kv_head=(1, 3)
    ),
    "head of 32": Case(starts=(40,), lengths=(2,), per_span=3, head_dim=32),
    "head of 64": Case(starts=(40, 2), lengths=(1, 1), head_dim=64, **UNEVEN),
    "head of 128": Case(starts=(70,), lengths=(3,), per_span=3, head_dim=128, window=40),
    "long": Case(starts=(997, 300), lengths=(3, 2), per_span=3, max_seq_len=1000, n_slots=3),
}  # fmt: skip
HALF = (
    "one token",
    "sequences and empty ones",
    "five, four real",
    "two tiles of rows",
    "window and many tokens",
    "head of 128",
)
UNREAD = (  # cases with something else that must not be read
    "first token",
    "sequences",
    "sequences and empty ones",
    "empty with a start",
    "five, four real",
    "nine, one real",
    "seventeen past the end, ten real",
    "spans of several tokens",
    "window",
    "window of one",
    "window less than the tokens",
    "window and many tokens",
    "head of 32",
    "long",
)


def assert_attended(ours: Attended, theirs: Attended, case: Case) -> None:
    real = case.real_rows()
    # float16: both round turned queries, keys and the result, and the kernel the weights too, each
    # by 2^-11 of what it is; scores of 128 products and weighted means of numbers about 1 (at most
    # 4) come out some units apart. float32 takes 2^-24 for it.
    assert_near(ours[0][real], theirs[0][real], units=8)
    # turned keys: two products and a sum, which one side may fuse
    assert_near(ours[1], theirs[1], units=2, size=4)
    assert torch.equal(ours[2], theirs[2])  # values are copied


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_attend_is_the_reference_and_writes_new_positions_of_its_own_slots_alone(
    case: Case,
) -> None:
    ours = attend_once(case)
    assert_attended(ours, attend(reference, case, torch.float32), case)
    _, keys, values = ours
    for seed, got in ((1, keys), (2, values)):
        changed = (got != draw(*got.shape, seed=seed)).any(-1)  # (n_slots, n_kv, max_seq_len)
        expected = torch.zeros_like(changed)
        for slot, start, length in zip(case.slots(3), case.starts, case.lengths, strict=True):
            expected[slot, :, start : start + length] = True
        assert torch.equal(changed, expected)


@pytest.mark.parametrize("name", HALF)
def test_attend_in_float16_is_the_reference(name: str) -> None:
    case = CASES[name]
    ours, theirs = (attend(each, case, torch.float16) for each in (fused, reference))
    assert_attended(ours, theirs, case)


# numpy's words for a row of scores that are all NaN, as those of a row of NaN are
@pytest.mark.filterwarnings("ignore:All-NaN slice encountered:RuntimeWarning")
@pytest.mark.parametrize("name", UNREAD)
def test_attend_reads_nothing_that_is_not_seen(name: str) -> None:
    """Not rows past a span's length, nor the cache past its end or before its window."""
    case = CASES[name]
    plain = attend_once(case)
    real = case.real_rows()
    out, keys, values = attend(fused, case, torch.float32, torch.nan)
    assert torch.equal(out[real], plain[0][real])
    for got, wanted in ((keys, plain[1]), (values, plain[2])):
        for slot, start, length in zip(case.slots(3), case.starts, case.lengths, strict=True):
            new = slice(start, start + length)
            assert torch.equal(got[slot, :, new], wanted[slot, :, new])


@pytest.mark.parametrize("window", [None, 6])
def test_attend_of_a_few_tokens_is_one_after_the_other(window: int | None) -> None:
    # the same law that lets a verify step take the place of decodes
    n, start = 5, 60
    n_heads, n_kv, head_dim = 5, 2, 16
    qkv = draw(n, n_heads + 2 * n_kv, head_dim)
    caches = [[draw(1, n_kv, 80, head_dim, seed=s) for s in (1, 2)] for _ in range(2)]
    rope = rope_of(head_dim, 1e4, DEVICE)
    heads = integers([0, 3, 5]), integers([0, 0, 0, 1, 1]), 3, window

    def run(rows: Tensor, cache: list[Tensor], at: int) -> Tensor:
        starts = integers([at])
        turns = fused.rotations(starts, len(rows), rope)
        out: Tensor = fused.attend(
            rows, *map(Cached, cache), turns, integers([0]), starts, integers([len(rows)]), *heads
        )
        return out

    together = run(qkv, caches[0], start)
    one_by_one = [run(qkv[i : i + 1], caches[1], start + i) for i in range(n)]
    assert_near(together, torch.cat(one_by_one), units=4)  # the order of additions
    for ours, other in zip(*caches, strict=True):
        assert torch.equal(ours, other)
