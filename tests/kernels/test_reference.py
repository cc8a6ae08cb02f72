"""The plain torch operations against formulas written out by hand, most of them in float64."""

import math
from collections.abc import Iterator
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from mistral_chat.kernels import reference
from tests.kernels.ropes import rope_of


def draw(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


@pytest.fixture
def two_threads() -> Iterator[None]:
    """`linear` takes its own way for one row only where there is more than one thread."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def norm_by_hand(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    x = x.double()
    return x / (x.pow(2).mean(-1, keepdim=True) + eps).sqrt() * weight.double()


@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e3])
@pytest.mark.parametrize("eps", [1e-5, 1e-1])
def test_rms_norm_is_its_formula(scale: float, eps: float) -> None:
    x, weight = scale * draw(5, 48), draw(48, seed=1)
    got = reference.rms_norm(x, weight, eps)
    # a mean of 48 squares, a root and two products in float32: a few units of 6e-8
    torch.testing.assert_close(got.double(), norm_by_hand(x, weight, eps), rtol=1e-6, atol=1e-6)


def test_rms_norm_of_bfloat16_rounds_once() -> None:
    x = 100 * draw(7, 512, dtype=torch.bfloat16)
    weight = draw(512, seed=1, dtype=torch.bfloat16)
    got = reference.rms_norm(x, weight, 1e-5)
    assert got.dtype == torch.bfloat16
    # half a unit of bfloat16 (2^-9) for the one rounding, as much again for a kernel that rounds
    # before the product with the weight; sums kept in bfloat16 would be off by ten times that
    torch.testing.assert_close(
        got.double(), norm_by_hand(x, weight, 1e-5), rtol=2**-8 + 1e-6, atol=1e-6
    )


def test_add_norm_gives_the_normed_sum_and_the_sum() -> None:
    partial, residual, weight = draw(3, 16), draw(3, 16, seed=1), draw(16, seed=2)
    normed, total = reference.add_norm(partial, residual, weight, 1e-5)
    assert torch.equal(total, residual + partial)  # one addition: exact
    torch.testing.assert_close(
        normed.double(), norm_by_hand(partial + residual, weight, 1e-5), rtol=1e-6, atol=1e-6
    )  # as rms_norm


@pytest.mark.parametrize("cuts", [(0, 37), (0, 1, 37), (0, 12, 25, 37), (0, 5, 6, 7, 36, 37)])
def test_embed_rows_of_all_ranges_sum_to_the_embedding(cuts: tuple[int, ...]) -> None:
    weight = draw(37, 8)
    tokens = torch.tensor([0, 36, 5, 6, 12, 24, 25, 5])
    parts = [reference.embed(tokens, weight[first:last], first) for first, last in pairwise(cuts)]
    # each token is in one range and adds zeros elsewhere: exact
    assert torch.equal(torch.stack(parts).sum(0), weight[tokens])


def test_embed_rows_gives_zeros_outside_its_range() -> None:
    got = reference.embed(torch.tensor([4, 9, 5, 100]), draw(3, 4), 5)
    assert got[[0, 1, 3]].abs().max() == 0
    assert torch.equal(got[2], draw(3, 4)[0])


def rotations(positions: torch.Tensor, head_dim: int, theta: float) -> torch.Tensor:
    queries, keys = reference.rope_rotations(positions, rope_of(head_dim, theta))
    assert queries is keys  # nothing that is for queries alone
    return keys


@pytest.mark.parametrize("theta", [1e4, 1e6])
@pytest.mark.parametrize("head_dim", [2, 8, 128])
def test_rope_rotations_are_cosine_and_sine_of_the_angle(head_dim: int, theta: float) -> None:
    positions = [0, 1, 2, 77, 1000]
    got = rotations(torch.tensor(positions), head_dim, theta)
    assert got.shape == (len(positions), head_dim // 2)
    for row, position in zip(got, positions, strict=True):
        for pair, turned in enumerate(row.tolist()):
            angle = position * theta ** (-2 * pair / head_dim)
            # a frequency is right to some 3 units of 6e-8, and an angle grows with the position
            bound = 1e-6 + 2e-7 * angle
            assert abs(turned - complex(math.cos(angle), math.sin(angle))) < bound


def test_rope_rotations_at_position_zero_turn_nothing() -> None:
    x = draw(1, 3, 8)
    turned = reference.apply_rope(x, rotations(torch.tensor([0]), 8, 1e6))
    assert torch.equal(turned, x)


def test_rope_rotations_of_queries_grow_with_the_position() -> None:
    positions = torch.tensor([0, 6, 7, 13, 14, 70, 200_000])
    plain = rotations(positions, 8, 1e4)
    rope = rope_of(8, 1e4, original=7, magnitude=1.25, beta=0.1)
    queries, keys = reference.rope_rotations(positions, rope)
    # one product, or two, and a logarithm in float32
    torch.testing.assert_close(keys, 1.25 * plain, rtol=1e-6, atol=1e-6)
    for row, position in enumerate(positions.tolist()):
        scale = 1.25 * (1 + 0.1 * math.log(1 + position // 7))
        torch.testing.assert_close(queries[row], scale * plain[row], rtol=1e-6, atol=1e-6)


def test_apply_rope_turns_adjacent_pairs() -> None:
    x = draw(4, 3, 6)
    positions = torch.tensor([3, 0, 9, 10])
    got = reference.apply_rope(x, rotations(positions, 6, 100.0))
    for t, position in enumerate(positions.tolist()):
        for head in range(3):
            for pair in range(3):
                angle = position * 100.0 ** (-2 * pair / 6)
                a, b = x[t, head, 2 * pair].item(), x[t, head, 2 * pair + 1].item()
                wanted = (
                    a * math.cos(angle) - b * math.sin(angle),
                    a * math.sin(angle) + b * math.cos(angle),
                )
                # float32 angles up to 10 are right to 1e-6, values are at most about 3
                assert got[t, head, 2 * pair : 2 * pair + 2].tolist() == pytest.approx(
                    wanted, abs=5e-6
                )


def test_apply_rope_scores_depend_on_distance_alone() -> None:
    q, k = draw(1, 1, 64), draw(1, 1, 64, seed=1)

    def score(at_q: int, at_k: int) -> float:
        turned = [
            reference.apply_rope(x, rotations(torch.tensor([at]), 64, 1e4))
            for x, at in ((q, at_q), (k, at_k))
        ]
        return float((turned[0] * turned[1]).sum())

    assert abs(score(5, 2) - score(5, 0)) > 1e-2  # distance matters
    for shift in (1, 100, 1000):
        # angles near 1000 are right to 1e-4 in float32; a score sums 64 products near 1
        assert score(5 + shift, 2 + shift) == pytest.approx(score(5, 2), abs=2e-3)


def test_apply_rope_keeps_the_type() -> None:
    x = draw(2, 1, 4, dtype=torch.bfloat16)
    turns = rotations(torch.arange(2), 4, 1e6)
    assert reference.apply_rope(x, turns).dtype == torch.bfloat16


@pytest.mark.usefixtures("two_threads")
@pytest.mark.parametrize("n_rows", [1, 2, 5])
@pytest.mark.parametrize("n_out", [1, 2, 7, 36, 64, 1031])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_linear_is_the_product_for_any_size(n_rows: int, n_out: int, dtype: torch.dtype) -> None:
    x, weight = draw(n_rows, 33, dtype=dtype), draw(n_out, 33, seed=1, dtype=dtype)
    got = reference.linear(x, weight)
    assert got.shape == (n_rows, n_out)
    assert got.dtype == dtype
    # 33 products near 1 added in float32: about 1e-6; bfloat16 rounds the sum to 2^-9
    tolerance = {torch.float32: 1e-5, torch.bfloat16: 2**-8}[dtype]
    wanted = x.double() @ weight.double().T
    torch.testing.assert_close(got.double(), wanted, rtol=tolerance, atol=1e-5)


@pytest.mark.usefixtures("two_threads")
def test_linear_takes_a_row_out_of_more() -> None:
    whole, weight = draw(6, 40), draw(64, 40, seed=1)
    wanted = whole.double() @ weight.double().T
    for i in range(6):
        got = reference.linear(whole[i : i + 1], weight)
        torch.testing.assert_close(got.double(), wanted[i : i + 1], rtol=1e-5, atol=1e-5)  # above


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_logits_are_float32_whatever_the_weights_are(dtype: torch.dtype) -> None:
    x, weight = draw(4, 33, dtype=dtype), draw(50, 33, seed=1, dtype=dtype)
    got = reference.logits(x, weight)
    assert got.dtype == torch.float32
    wanted = x.double() @ weight.double().T
    tolerance = {torch.float32: 1e-5, torch.bfloat16: 2**-8}[dtype]  # as linear's, at worst
    torch.testing.assert_close(got.double(), wanted, rtol=tolerance, atol=1e-5)


def test_silu_mul_gates_the_second_half_by_the_first() -> None:
    x = draw(3, 10)
    got = reference.silu_mul(x)
    for row, wanted in zip(got.tolist(), x.tolist(), strict=True):
        products = [g / (1 + math.exp(-g)) * u for g, u in zip(wanted[:5], wanted[5:], strict=True)]
        assert row == pytest.approx(products, rel=1e-5)  # one exp and two products in float32


def attention_by_hand(
    q: Tensor, k: Tensor, v: Tensor, start: int, window: int | None, shared: tuple[int, ...]
) -> Tensor:
    """Every query and head by itself, in float64, from the definition."""
    owner = [kv for kv, n in enumerate(shared) for _ in range(n)]
    out = torch.zeros(q.shape, dtype=torch.float64)
    for t in range(q.shape[0]):
        last = start + t
        first = 0 if window is None else max(0, last - window + 1)
        for head, kv in enumerate(owner):
            keys, values = k[kv, first : last + 1].double(), v[kv, first : last + 1].double()
            scores = keys @ q[t, head].double() / math.sqrt(q.shape[2])
            out[t, head] = torch.softmax(scores, 0) @ values
    return out


@pytest.mark.parametrize("shared", [(1,), (1, 1, 1), (4, 4), (3, 2), (1, 3), (2, 3, 1)])
@pytest.mark.parametrize(
    ("n_new", "start"), [(1, 0), (1, 12), (7, 0), (7, 5), (2, 30)], ids=lambda n: str(n)
)
@pytest.mark.parametrize("window", [None, 1, 4, 12, 13, 100])
def test_attention_is_softmax_over_what_a_query_may_see(
    shared: tuple[int, ...], n_new: int, start: int, window: int | None
) -> None:
    q = draw(n_new, sum(shared), 10)
    k, v = (draw(len(shared), start + n_new, 10, seed=s) for s in (1, 2))
    got = reference.attention(q, k, v, start, window, shared)
    assert got.shape == q.shape
    # softmax and a mean of at most 37 values near 1 in float32
    wanted = attention_by_hand(q, k, v, start, window, shared)
    torch.testing.assert_close(got.double(), wanted, rtol=1e-5, atol=1e-5)


def test_attention_reads_nothing_after_a_query_nor_before_its_window() -> None:
    q, k, v = draw(2, 4, 8), draw(2, 12, 8, seed=1), draw(2, 12, 8, seed=2)
    wanted = reference.attention(q, k, v, 10, 3, (2, 2))
    k[:, :8], v[:, :8] = 50, -50  # queries at 10 and 11 see 8 to 10 and 9 to 11
    assert torch.equal(reference.attention(q, k, v, 10, 3, (2, 2)), wanted)
    k[:, 11], v[:, 11] = 50, -50
    changed = reference.attention(q, k, v, 10, 3, (2, 2))
    assert torch.equal(changed[0], wanted[0])
    assert not torch.allclose(changed[1], wanted[1])
