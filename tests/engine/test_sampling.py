"""Which tokens may be chosen, and how often each is."""

import math
from collections import Counter

import pytest
import torch
from torch import Tensor

from mistral_chat.config import HOTTEST, SamplingParams
from mistral_chat.engine.sampling import (
    Draws,
    allowed_words,
    choose,
    log_probability,
    settings_of,
)
from mistral_chat.errors import CheckpointError
from mistral_chat.kernels.sampling_reference import unpack_allowed
from tests.kept import kept_probabilities

VOCAB = 40
ALMOST_ONE = 1 - 2**-24  # the largest number that is drawn


def draw_logits(seed: int = 0, n: int = VOCAB) -> Tensor:
    return 2 * torch.randn(n, generator=torch.Generator().manual_seed(seed))


ALL = allowed_words(VOCAB, ())


def all_but(banned: Tensor) -> Tensor:
    return allowed_words(VOCAB, banned.tolist())


def probabilities(logits: Tensor, params: SamplingParams) -> Tensor:
    """What a token is drawn from."""
    allowed = allowed_words(len(logits), ())[None]
    probs = kept_probabilities(logits[None], allowed, torch.tensor([settings_of(params)]))[0]
    return probs / probs.sum()


def kept(probs: Tensor) -> set[int]:
    return set(probs.nonzero().flatten().tolist())


def by_probability(probs: list[float]) -> list[int]:
    return sorted(range(len(probs)), key=lambda i: -probs[i])


def softmax(logits: Tensor, temperature: float) -> list[float]:
    return torch.softmax(logits.double() / temperature, 0).tolist()


@pytest.mark.parametrize("temperature", [0.1, 0.7, 1.0, 3.0])
def test_probabilities_without_filters_are_softmax(temperature: float) -> None:
    logits = draw_logits()
    got = probabilities(logits, SamplingParams(temperature=temperature))
    assert got.tolist() == pytest.approx(softmax(logits, temperature), rel=1e-4)  # float32 exp


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
@pytest.mark.parametrize("top_k", [1, 2, 7, VOCAB, VOCAB + 5])
def test_probabilities_top_k_keeps_the_most_likely(top_k: int, temperature: float) -> None:
    for seed in range(5):
        logits = draw_logits(seed)
        got = probabilities(logits, SamplingParams(top_k=top_k, temperature=temperature))
        assert kept(got) == set(by_probability(softmax(logits, 1))[:top_k])


@pytest.mark.parametrize("top_p", [1e-300, 1e-6, 0.1, 0.5, 0.9, 0.999])
def test_probabilities_top_p_keeps_the_smallest_set_that_reaches_it(top_p: float) -> None:
    for seed in range(5):
        logits = draw_logits(seed)
        full = softmax(logits, 1)
        got = kept(probabilities(logits, SamplingParams(top_p=top_p, temperature=1)))
        order = by_probability(full)
        n = next(n for n in range(1, VOCAB + 1) if sum(full[i] for i in order[:n]) >= top_p)
        assert got == set(order[:n])


@pytest.mark.parametrize(("top_p", "n_kept"), [(0.25, 1), (0.5, 1), (0.75, 2), (0.875, 3)])
def test_top_p_drops_what_comes_after_exactly_enough(top_p: float, n_kept: int) -> None:
    wanted = [0.5, 0.25, 0.125, 0.0625, 0.0625]  # exact in float32, and so are their sums
    logits = torch.tensor(wanted).log2() * math.log(2)
    assert torch.softmax(logits, 0).tolist() == wanted
    assert (logits - logits.max()).exp().tolist() == [2 * p for p in wanted]
    assert kept(probabilities(logits, SamplingParams(top_p=top_p, temperature=1))) == set(
        range(n_kept)
    )


@pytest.mark.parametrize("min_p", [0.01, 0.2, 0.9, 1.0])
def test_probabilities_min_p_drops_what_is_less_likely_than_its_share(min_p: float) -> None:
    for seed in range(5):
        logits = draw_logits(seed)
        full = softmax(logits, 1)
        got = kept(probabilities(logits, SamplingParams(min_p=min_p, temperature=1)))
        assert got == {i for i, p in enumerate(full) if p >= min_p * max(full)}


def test_probabilities_apply_temperature_before_the_filters() -> None:
    logits = torch.tensor([2.0, 1.0, 0.0])  # at 1: 0.67, 0.24, 0.09; at 4: 0.42, 0.33, 0.25
    assert kept(probabilities(logits, SamplingParams(top_p=0.6, temperature=1))) == {0}
    assert kept(probabilities(logits, SamplingParams(top_p=0.6, temperature=4))) == {0, 1}
    assert kept(probabilities(logits, SamplingParams(min_p=0.5, temperature=1))) == {0}
    assert kept(probabilities(logits, SamplingParams(min_p=0.5, temperature=4))) == {0, 1, 2}


def test_probabilities_apply_top_p_to_what_top_k_left() -> None:
    logits = torch.tensor([0.4, 0.3, 0.2, 0.1]).log()
    both = SamplingParams(top_k=2, top_p=0.55, temperature=1)
    # of the two that top_k leaves the first has 4/7 = 0.57, which is enough; of all four it is not
    assert kept(probabilities(logits, both)) == {0}
    assert kept(probabilities(logits, SamplingParams(top_p=0.55, temperature=1))) == {0, 1}


@pytest.mark.parametrize(
    "params",
    [
        SamplingParams(temperature=0.8, top_k=5),
        SamplingParams(temperature=0.8, top_p=0.7),
        SamplingParams(temperature=0.8, min_p=0.1),
        SamplingParams(temperature=0.8, top_k=9, top_p=0.9, min_p=0.02),
    ],
)
def test_probabilities_keep_their_proportions_and_sum_to_one(params: SamplingParams) -> None:
    logits = draw_logits()
    full = softmax(logits, params.temperature)
    got = probabilities(logits, params)
    assert 1 < len(kept(got)) < VOCAB
    assert float(got.sum()) == pytest.approx(1, abs=1e-6)
    share = sum(full[i] for i in kept(got))
    for i in kept(got):
        assert float(got[i]) == pytest.approx(full[i] / share, rel=1e-4)  # float32 exp


@pytest.mark.parametrize(
    "params",
    [
        SamplingParams(top_k=1),
        SamplingParams(top_p=1e-9),
        SamplingParams(top_p=1e-300),
        SamplingParams(min_p=1.0),
    ],
)
def test_probabilities_keep_one_of_equals_at_least(params: SamplingParams) -> None:
    got = probabilities(torch.zeros(VOCAB), params)
    assert len(kept(got)) >= 1
    assert float(got.sum()) == pytest.approx(1)


@pytest.mark.parametrize("temperature", [1e-4, 1e-30, 1e-40, 1e-300])
def test_probabilities_at_a_tiny_temperature_are_greedy(temperature: float) -> None:
    got = probabilities(draw_logits(), SamplingParams(temperature=temperature))
    assert kept(got) == {int(draw_logits().argmax())}
    assert float(got.max()) == 1


@pytest.mark.parametrize("uniform", [0.0, 0.5, ALMOST_ONE])
@pytest.mark.parametrize("seed", range(5))
def test_choose_at_temperature_zero_is_the_most_likely(seed: int, uniform: float) -> None:
    logits = draw_logits(seed)
    params = SamplingParams(temperature=0)
    assert choose(logits, params, ALL, uniform).id == int(logits.argmax())
    banned = logits.topk(3).indices
    wanted = int(logits.topk(4).indices[3])
    assert choose(logits, params, all_but(banned), uniform).id == wanted


# An interval of length p holds n * p of n points that are 1 / n apart, give or take one: no
# statistic is needed where the numbers are such points.
@pytest.mark.parametrize(
    ("params", "n_kept"),
    [
        (SamplingParams(temperature=1.0, top_k=4), 4),
        (SamplingParams(temperature=1.5, top_k=10), 10),
        (SamplingParams(temperature=3.0), VOCAB),
    ],
)
def test_choose_draws_each_token_as_often_as_it_is_likely(
    params: SamplingParams, n_kept: int
) -> None:
    logits, n = draw_logits(), 1000
    wanted = probabilities(logits, params)
    assert len(kept(wanted)) == n_kept
    counts = Counter(choose(logits, params, ALL, (i + 0.5) / n).id for i in range(n))
    assert set(counts) == kept(wanted)
    for i in kept(wanted):
        assert abs(counts[i] - n * float(wanted[i])) <= 1.01  # float32 sums


@pytest.mark.parametrize("temperature", [5, HOTTEST])
def test_choose_never_takes_a_banned_id_however_hot(temperature: float) -> None:
    logits, n = draw_logits(), 500
    banned = logits.topk(20).indices  # the most likely half
    params = SamplingParams(temperature=temperature)
    chosen = {choose(logits, params, all_but(banned), i / n).id for i in range(n)}
    assert chosen == set(range(VOCAB)) - set(banned.tolist())


FILTERED = [
    SamplingParams(temperature=1),
    SamplingParams(temperature=3, min_p=0.02),
    SamplingParams(temperature=0.8, top_k=9),
    SamplingParams(temperature=1.5, top_k=20, top_p=0.9, min_p=0.01),
]


@pytest.mark.parametrize("params", FILTERED)
def test_choose_takes_the_token_whose_share_the_number_is_in(params: SamplingParams) -> None:
    logits = draw_logits()
    probs = probabilities(logits, params).double()
    ids = sorted(kept(probs))
    for i in ids:  # the middle of a share is far from where float32 sums may put its ends
        uniform = float(probs[:i].sum() + probs[i] / 2)
        assert choose(logits, params, ALL, uniform).id == i
    assert choose(logits, params, ALL, 0.0).id == ids[0]
    assert choose(logits, params, ALL, ALMOST_ONE).id == ids[-1]


@pytest.mark.parametrize("temperature", [0.3, 2.5])
@pytest.mark.parametrize("top_p", [1.0, 0.95, 0.4, 1e-6])
@pytest.mark.parametrize("min_p", [0.0, 0.05, 1.0])
@pytest.mark.parametrize("top_k", [0, 1, 20, 500])
@pytest.mark.parametrize("spread", [0.1, 2.0])  # nearly flat: hundreds of tokens are kept
def test_probabilities_of_all_filters_are_brute_force(
    temperature: float, top_p: float, min_p: float, top_k: int, spread: float
) -> None:
    logits = spread * draw_logits(5, 1000)
    wanted = softmax(logits, temperature)
    order = [i for i in by_probability(wanted) if wanted[i] >= min_p * max(wanted) * (1 - 1e-6)]
    order = order[: top_k or None]
    goal, ahead, left = top_p * sum(wanted[i] for i in order), 0.0, []
    for i in order:
        if ahead >= goal and top_p < 1 and left:
            break
        left.append(i)
        ahead += wanted[i]
    params = SamplingParams(temperature=temperature, top_p=top_p, min_p=min_p, top_k=top_k)
    got = probabilities(logits, params)
    assert kept(got) == set(left)
    total = sum(wanted[i] for i in left)
    assert [float(got[i]) for i in left] == pytest.approx([wanted[i] / total for i in left], 1e-4)


@pytest.mark.parametrize(
    ("params", "wanted"),
    [
        (SamplingParams(temperature=0), {3}),
        (SamplingParams(temperature=1, top_k=1), {3, 9}),
        (SamplingParams(temperature=1, top_k=2), {3, 9}),
        (SamplingParams(temperature=1, top_k=3), {1, 3, 9, 20}),
        (SamplingParams(temperature=1, top_p=0.1), {3, 9}),
        (SamplingParams(temperature=1, min_p=0.9), {3, 9}),
    ],
)
def test_choose_keeps_all_that_are_as_likely_as_the_last_one_kept(
    params: SamplingParams, wanted: set[int]
) -> None:
    logits = torch.full((VOCAB,), -2.0)
    logits[[9, 3]] = 5.0
    logits[[20, 1]] = 4.0
    assert {choose(logits, params, ALL, n / 500).id for n in range(500)} == wanted


@pytest.mark.parametrize("number", [math.nan, math.inf])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_choose_refuses_what_is_no_number_where_it_counts(
    temperature: float, number: float
) -> None:
    logits = draw_logits()
    logits[7] = number
    for logprobs, allowed in ((None, ALL), (2, ALL), (2, all_but(torch.tensor([7])))):
        params = SamplingParams(temperature=temperature, logprobs=logprobs)
        with pytest.raises(CheckpointError, match="no numbers"):
            choose(logits, params, allowed, 0.5)
    choose(logits, SamplingParams(temperature=temperature), all_but(torch.tensor([7])), 0.5)


def test_choose_leaves_the_logits_as_they_are() -> None:
    logits = draw_logits()
    before = logits.clone()
    for params in (SamplingParams(temperature=0), SamplingParams(top_k=2, top_p=0.5, min_p=0.1)):
        choose(logits, params, all_but(torch.tensor([1, 2])), 0.5)
        assert torch.equal(logits, before)


def test_choose_repeats_itself_with_the_same_seed() -> None:
    params = SamplingParams(temperature=2)

    def draw(seed: int) -> list[int]:
        draws = Draws(seed)
        return [choose(draw_logits(), params, ALL, draws.next()).id for _ in range(30)]

    assert draw(3) == draw(3)
    assert draw(3) != draw(4)


@pytest.mark.parametrize("temperature", [0.0, 2.0])
@pytest.mark.parametrize("n_top", [0, 1, 5, VOCAB, 100])
def test_choose_reports_the_models_own_log_probabilities(n_top: int, temperature: float) -> None:
    logits = draw_logits()
    params = SamplingParams(temperature=temperature, top_k=3, logprobs=n_top)
    banned = logits.topk(1).indices
    choice = choose(logits, params, all_but(banned), 0.5)
    full = [math.log(p) for p in softmax(logits, 1)]  # before temperature, filters and bans
    assert choice.logprob == pytest.approx(full[choice.id], abs=1e-5)  # float32 logs near -10
    assert [i for i, _ in choice.top] == by_probability(full)[:n_top]
    for i, logprob in choice.top:
        assert logprob == pytest.approx(full[i], abs=1e-5)


def test_choose_reports_nothing_unless_asked() -> None:
    choice = choose(draw_logits(), SamplingParams(), ALL, 0.5)
    assert choice.logprob is None
    assert choice.top == ()


def test_log_probability_scores_each_token_by_its_row() -> None:
    rows = torch.stack([draw_logits(seed) for seed in range(4)])
    tokens = [3, 0, 39, 3]
    got = log_probability(rows, torch.tensor(tokens))
    wanted = [math.log(softmax(row, 1)[i]) for row, i in zip(rows, tokens, strict=True)]
    assert got == pytest.approx(wanted, abs=1e-5)  # float32 logs near -10
    assert log_probability(rows[:0], torch.tensor([], dtype=torch.int64)) == []


@pytest.mark.parametrize("seed", [0, 1, 12345, 2**63 - 1])
def test_draws_of_a_seed_are_the_same_numbers_each_time(seed: int) -> None:
    first, same, other = Draws(seed), Draws(seed), Draws(seed ^ 1)
    numbers = [first.next() for _ in range(100)]
    assert numbers == [same.next() for _ in range(100)]
    assert numbers != [other.next() for _ in range(100)]
    assert len(set(numbers)) == 100


def test_draws_without_a_seed_differ() -> None:
    first, other = Draws(None), Draws(None)
    assert [first.next() for _ in range(10)] != [other.next() for _ in range(10)]


def test_draws_of_one_seed_do_not_disturb_those_of_another() -> None:
    alone, mixed, beside = Draws(1), Draws(1), Draws(2)
    numbers = [alone.next() for _ in range(20)]
    got = []
    for _ in range(20):
        beside.next()
        got.append(mixed.next())
    assert got == numbers


def test_draws_lie_from_0_to_below_1_and_are_exact_in_float32() -> None:
    draws = Draws(0)
    numbers = [draws.next() for _ in range(20_000)]
    assert all(0 <= x < 1 for x in numbers)
    assert torch.tensor(numbers, dtype=torch.float32).tolist() == numbers
    assert all(x <= ALMOST_ONE for x in numbers)


CHI_SQUARE = 82.1  # its 99.99th percentile by 39 degrees of freedom; the seed is fixed


def test_draws_are_uniform() -> None:
    draws, n = Draws(3), 20_000
    counts = Counter(int(draws.next() * 40) for _ in range(n))
    assert sum((counts[i] - n / 40) ** 2 / (n / 40) for i in range(40)) < CHI_SQUARE


@pytest.mark.parametrize("vocab_size", [1, 31, 32, 33, 131, 32768])
@pytest.mark.parametrize("n_banned", [0, 1, 7, 10_000])
def test_allowed_words_have_a_bit_for_each_id(vocab_size: int, n_banned: int) -> None:
    order = torch.randperm(vocab_size, generator=torch.Generator().manual_seed(1)).tolist()
    banned = order[: min(n_banned, vocab_size)]
    words = allowed_words(vocab_size, banned)
    assert words.dtype == torch.int32
    assert words.shape == (-(-vocab_size // 32),)
    n_bits = 32 * len(words)
    bits = [(word >> bit) & 1 for word in words.tolist() for bit in range(32)]
    wanted = [int(i < vocab_size and i not in set(banned)) for i in range(min(n_bits, 400))]
    assert bits[: len(wanted)] == wanted
    assert sum(bits) == vocab_size - len(banned)  # none past the vocabulary
    allowed = unpack_allowed(words.unsqueeze(0), vocab_size)[0]
    assert kept(allowed) == set(order[len(banned) :])  # as the device reads them


def test_allowed_words_take_an_id_twice_as_once_and_in_any_order() -> None:
    once = allowed_words(100, (3, 31, 32, 99))
    assert torch.equal(allowed_words(100, (99, 3, 32, 31, 3, 99)), once)
    assert torch.equal(allowed_words(100, [3, 31, 32, 99]), once)
