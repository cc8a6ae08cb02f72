"""The sampling kernel against its reference, which tests/engine/test_sampling.py holds to its law.

Where kernel and reference are to agree on every id, each row's uniform is the middle of a token's
share of the kept probabilities: half a share, 1e-6 and more, is far from what float32 sums and
exponentials lose, so that equality needs no tolerance.
"""

from itertools import product

import pytest
import torch
from torch import Tensor

from mistral_chat.kernels.sampling import sample
from mistral_chat.kernels.sampling_reference import sample_reference, unpack_allowed
from tests.kept import kept_probabilities

# Triton's interpreter makes a loop's bound of an array of one element, which numpy frowns upon.
pytestmark = pytest.mark.filterwarnings(
    "ignore:Conversion of an array with ndim:DeprecationWarning"
)

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
ALMOST_ONE = 1 - 2**-24  # the largest float32 below 1
GREEDY = (0.0, 1.0, 0.0, 0.0)
PLAIN = (1.0, 1.0, 0.0, 0.0)
# temperature, top_p, min_p, top_k
FILTERS = list(product((0.7, 2.0), (1.0, 0.8), (0.0, 0.03), (0.0, 12.0)))
# Half of them, with all eight ways to take three of the four: the interpreter takes its time.
HALF = [FILTERS[n] for n in range(16) if n.bit_count() % 2 == 0]


def draw_logits(n_rows: int, vocab_size: int, seed: int = 0, spread: float = 2.0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return spread * torch.randn(n_rows, vocab_size, generator=generator)


def pack(allowed: Tensor) -> Tensor:
    """Booleans as bit masks; the bits past the vocabulary are set, which is to mean nothing."""
    n_rows, vocab_size = allowed.shape
    n_words = -(-vocab_size // 32)
    bits = torch.ones(n_rows, n_words * 32, dtype=torch.int64)
    bits[:, :vocab_size] = allowed
    words = (bits.view(n_rows, n_words, 32) << torch.arange(32)).sum(-1)
    return torch.where(words < 2**31, words, words - 2**32).int()


def all_allowed(n_rows: int, vocab_size: int) -> Tensor:
    return pack(torch.ones(n_rows, vocab_size, dtype=torch.bool))


def some_allowed(n_rows: int, vocab_size: int, seed: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return pack(torch.rand(n_rows, vocab_size, generator=generator) < 0.6)


def run_kernel(logits: Tensor, allowed: Tensor, params: Tensor, uniforms: Tensor) -> list[int]:
    out = torch.full((len(logits),), -7, device=DEVICE)
    sample(*(x.to(DEVICE) for x in (logits, allowed, params, uniforms)), out)
    ids: list[int] = out.tolist()
    return ids


def middles(probs: Tensor) -> Tensor:
    """Where in its row's distribution the middle of each token's share lies: (T, V) -> (T, V)."""
    probs = probs.double()
    return ((probs.cumsum(1) - probs / 2) / probs.sum(1, keepdim=True)).float()


def one_row_each(params: tuple[float, ...], n_rows: int) -> Tensor:
    return torch.tensor([params]).expand(n_rows, -1).contiguous()


def kept(probs: Tensor) -> list[int]:
    return [int(i) for i in probs.nonzero().flatten()]


@pytest.mark.parametrize(
    ("vocab_size", "settings"),
    [
        (33, FILTERS),
        (1000, HALF),
        (32768, HALF),
        # rows of several blocks take seconds in the interpreter
        (49344, [PLAIN, FILTERS[3], FILTERS[5]]),
        (131072, [FILTERS[7]]),
    ],
)
def test_sample_is_the_reference(vocab_size: int, settings: list[tuple[float, ...]]) -> None:
    params = torch.tensor([*settings, GREEDY])
    logits = draw_logits(len(params), vocab_size)
    allowed = some_allowed(len(params), vocab_size)
    probs = kept_probabilities(logits, allowed, params)
    wanted = probs.multinomial(1, generator=torch.Generator().manual_seed(2))
    uniforms = middles(probs).gather(1, wanted).squeeze(1)
    wanted[-1] = logits[-1].where(unpack_allowed(allowed, vocab_size)[-1], -torch.inf).argmax()

    assert sample_reference(logits, allowed, params, uniforms).tolist() == wanted[:, 0].tolist()
    assert run_kernel(logits, allowed, params, uniforms) == wanted[:, 0].tolist()


@pytest.mark.parametrize("setting", HALF)
def test_sample_can_draw_each_token_that_the_reference_keeps(setting: tuple[float, ...]) -> None:
    logits, allowed = draw_logits(1, 70, seed=4), some_allowed(1, 70)
    probs = kept_probabilities(logits, allowed, torch.tensor([setting]))
    ids = kept(probs[0])
    rows = len(ids)
    # the shares are apart by one token's only if the kernel keeps the same set
    got = run_kernel(
        logits.expand(rows, -1),
        allowed.expand(rows, -1),
        one_row_each(setting, rows),
        middles(probs)[0, ids],
    )
    assert got == ids


@pytest.mark.parametrize("top_k", [1, 2, 3, 50, 69, 70, 71, 1000])
def test_sample_keeps_top_k_and_no_more(top_k: int) -> None:
    logits = draw_logits(1, 70, seed=5, spread=0.5)
    ids = sorted(logits[0].topk(min(top_k, 70)).indices.tolist())
    # of the kept, in order of ids, the first holds 0 and the last what is just below 1
    got = run_kernel(
        logits.expand(2, -1),
        all_allowed(2, 70),
        one_row_each((1.0, 1.0, 0.0, top_k), 2),
        torch.tensor([0, ALMOST_ONE]),
    )
    assert got == [ids[0], ids[-1]]


@pytest.mark.parametrize(
    ("vocab_size", "setting"),
    [(5, GREEDY), (1000, PLAIN), (32801, GREEDY), (32801, (0.5, 0.3, 0.2, 4.0))],
)
def test_sample_of_a_mask_with_one_token_is_that_token(
    vocab_size: int, setting: tuple[float, ...]
) -> None:
    ids = [0, vocab_size // 2, vocab_size - 1]
    allowed = pack(torch.nn.functional.one_hot(torch.tensor(ids), vocab_size).bool())
    params = one_row_each(setting, len(ids))
    logits = draw_logits(len(ids), vocab_size)
    uniforms = torch.tensor([0, 0.5, ALMOST_ONE])
    assert run_kernel(logits, allowed, params, uniforms) == ids
    assert sample_reference(logits, allowed, params, uniforms).tolist() == ids


@pytest.mark.parametrize("setting", [PLAIN, (30.0, 0.999, 0.0, 0.0), (30.0, 1.0, 0.0, 39.0)])
def test_sample_never_takes_what_is_not_allowed(setting: tuple[float, ...]) -> None:
    uniforms = torch.linspace(0, ALMOST_ONE, 9)
    logits = draw_logits(1, 70).expand(9, -1)
    allowed = some_allowed(1, 70)
    may = unpack_allowed(allowed, 70)[0]
    got = run_kernel(logits, allowed.expand(9, -1), one_row_each(setting, 9), uniforms)
    assert all(may[i] for i in got)


@pytest.mark.parametrize(
    "tied", [(3, 4), (31, 32), (700, 20_000), (700, 700 + 8192), (20_000, 32_800)]
)
def test_sample_at_temperature_zero_takes_the_lowest_of_equals(tied: tuple[int, ...]) -> None:
    logits = draw_logits(1, 32801)
    logits[0, list(tied)] = logits.max() + 1
    greedy, uniforms = torch.tensor([GREEDY]), torch.tensor([ALMOST_ONE])
    for vocab_size in (32801, 32768):  # several blocks and one
        if max(tied) < vocab_size:
            rows = logits[:, :vocab_size], all_allowed(1, vocab_size), greedy, uniforms
            assert run_kernel(*rows) == [tied[0]]
            assert sample_reference(*rows).tolist() == [tied[0]]


@pytest.mark.parametrize(
    "setting",
    [(1.0, 1.0, 0.0, 3.0), (1.0, 0.3, 0.0, 0.0), (1.0, 1.0, 1.0, 0.0), (1.0, 0.3, 1.0, 3.0)],
)
def test_sample_keeps_all_equals_of_the_last_kept(setting: tuple[float, ...]) -> None:
    logits = torch.zeros(10, 40)
    logits[:, ::4] = 1.0  # ten equals with 0.48 of the whole, more than a filter asks for
    uniforms = (torch.arange(10) + 0.5) / 10
    rows = logits, all_allowed(10, 40), one_row_each(setting, 10), uniforms
    assert run_kernel(*rows) == list(range(0, 40, 4))
    assert sample_reference(*rows).tolist() == list(range(0, 40, 4))


@pytest.mark.parametrize("top_p", [1.0, 0.5, 1e-6])
@pytest.mark.parametrize("temperature", [1e-30, 1e-5, 1e-3, 1.0])
def test_sample_of_one_likely_token_is_that_token(temperature: float, top_p: float) -> None:
    logits = draw_logits(3, 1000)
    logits[:, 77] = 1e6  # 1e11 after the least temperature: no infinity minus an infinity
    uniforms = torch.tensor([0, 0.5, ALMOST_ONE])
    params = one_row_each((temperature, top_p, 0.0, 0.0), 3)
    assert run_kernel(logits, all_allowed(3, 1000), params, uniforms) == [77] * 3


@pytest.mark.parametrize("vocab_size", [5, 32, 33, 1000, 32801])
def test_sample_of_equals_is_uniform(vocab_size: int) -> None:
    ids = [0, vocab_size // 3, vocab_size // 2, vocab_size - 1]
    uniforms = (torch.tensor(ids) + 0.5) / vocab_size
    rows = torch.full((4, vocab_size), -3.0), all_allowed(4, vocab_size)
    params = torch.tensor([PLAIN, (0.1, 0.5, 0.0, 0.0), (9.0, 1.0, 1.0, 0.0), (1.0, 0.5, 0.5, 1.0)])
    assert run_kernel(*rows, params, uniforms) == ids
    assert sample_reference(*rows, params, uniforms).tolist() == ids


@pytest.mark.parametrize(
    ("vocab_size", "setting"),
    [(5, GREEDY), (5, PLAIN), (1000, (0.5, 0.3, 0.2, 4.0)), (32801, GREEDY), (32801, PLAIN)],
)
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_sample_chooses_nothing_from_what_is_no_number(
    vocab_size: int, setting: tuple[float, ...], bad: float
) -> None:
    logits = draw_logits(4, vocab_size)
    logits[1, vocab_size - 1] = bad
    logits[2] = bad
    logits[3, vocab_size - 2] = bad  # which is not allowed: that row is as good as ever
    allowed = torch.ones(4, vocab_size, dtype=torch.bool)
    allowed[3, vocab_size - 2] = False
    args = logits, pack(allowed), one_row_each(setting, 4), torch.full((4,), 0.5)
    for ids in (run_kernel(*args), sample_reference(*args).tolist()):
        assert [id_ >= 0 for id_ in ids] == [True, False, False, True]


def test_sample_reads_rows_any_stride_apart() -> None:
    wide, words = draw_logits(5, 130), some_allowed(5, 130)
    params = torch.tensor([GREEDY, PLAIN, *FILTERS[5:8]])
    logits, allowed = wide[:, :90], words[:, :3]
    probs = kept_probabilities(logits, allowed, params)
    uniforms = middles(probs).gather(1, probs.argmax(1, keepdim=True)).squeeze(1)
    wanted = probs.argmax(1).tolist()
    out = torch.full((5,), -1, device=DEVICE)
    there = [x.to(DEVICE) for x in (wide, words, params, uniforms)]  # a copy of a slice is dense
    sample(there[0][:, :90], there[1][:, :3], there[2], there[3], out)
    assert out.tolist() == wanted


def test_sample_of_no_rows_does_nothing() -> None:
    assert (
        run_kernel(draw_logits(0, 40), all_allowed(0, 40), torch.empty(0, 4), torch.empty(0)) == []
    )


# An interval of length p holds n * p of n points that are 1 / n apart, give or take one: no
# statistic is needed where the uniforms are such points.
@pytest.mark.parametrize("setting", [PLAIN, *FILTERS[::3]])
def test_sample_reference_draws_each_token_as_often_as_it_is_likely(
    setting: tuple[float, ...],
) -> None:
    n, vocab_size = 4000, 60
    logits, allowed = draw_logits(1, vocab_size), some_allowed(1, vocab_size)
    probs = kept_probabilities(logits, allowed, torch.tensor([setting]))[0].double()
    rows = logits.expand(n, -1), allowed.expand(n, -1), one_row_each(setting, n)
    got = sample_reference(*rows, (torch.arange(n) + 0.5) / n)
    counts = got.bincount(minlength=vocab_size)
    assert float((counts - n * probs / probs.sum()).abs().max()) <= 1


def test_unpack_allowed_reads_the_lowest_bit_first() -> None:
    words = torch.tensor([[1, 2], [-(2**31), -1]], dtype=torch.int32)
    got = unpack_allowed(words, 40)
    assert kept(got[0]) == [0, 33]
    assert kept(got[1]) == [31, *range(32, 40)]
