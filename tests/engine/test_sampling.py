"""Which tokens may be chosen, and how often each is."""

import math
from collections import Counter

import pytest
import torch
from torch import Tensor

from mistral_chat.config import SamplingParams
from mistral_chat.engine.sampling import choose, log_probability, probabilities

VOCAB = 40


def draw_logits(seed: int = 0, n: int = VOCAB) -> Tensor:
    return 2 * torch.randn(n, generator=torch.Generator().manual_seed(seed))


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


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


@pytest.mark.parametrize("top_p", [1e-6, 0.1, 0.5, 0.9, 0.999])
def test_probabilities_top_p_keeps_the_smallest_set_that_reaches_it(top_p: float) -> None:
    for seed in range(5):
        logits = draw_logits(seed)
        full = softmax(logits, 1)
        got = kept(probabilities(logits, SamplingParams(top_p=top_p, temperature=1)))
        order = by_probability(full)
        n = next(n for n in range(1, VOCAB + 1) if sum(full[i] for i in order[:n]) >= top_p)
        assert got == set(order[:n])


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
    "params", [SamplingParams(top_k=1), SamplingParams(top_p=1e-9), SamplingParams(min_p=1.0)]
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


@pytest.mark.parametrize("seed", range(5))
def test_choose_at_temperature_zero_is_the_most_likely(seed: int) -> None:
    logits = draw_logits(seed)
    params = SamplingParams(temperature=0)
    assert choose(logits, params, None, generator()).id == int(logits.argmax())
    banned = logits.topk(3).indices
    wanted = int(logits.topk(4).indices[3])
    assert choose(logits, params, banned, generator()).id == wanted


# 99.99th percentile of chi-square by degrees of freedom; the seed is fixed, so it cannot flicker
CHI_SQUARE = {3: 21.1, 4: 23.5, 9: 33.7, 39: 82.1}


@pytest.mark.parametrize(
    ("params", "freedom"),
    [
        (SamplingParams(temperature=1.0, top_k=4), 3),
        (SamplingParams(temperature=1.5, top_k=10), 9),
        (SamplingParams(temperature=3.0), 39),
    ],
)
def test_choose_draws_each_token_as_often_as_it_is_likely(
    params: SamplingParams, freedom: int
) -> None:
    logits, source, n = draw_logits(), generator(11), 20_000
    wanted = probabilities(logits, params)
    assert len(kept(wanted)) == freedom + 1
    counts = Counter(choose(logits, params, None, source).id for _ in range(n))
    assert set(counts) <= kept(wanted)
    expected = {i: n * float(wanted[i]) for i in kept(wanted)}
    assert min(expected.values()) > 5  # or the statistic has another distribution
    statistic = sum((counts[i] - e) ** 2 / e for i, e in expected.items())
    assert statistic < CHI_SQUARE[freedom]


def test_choose_never_takes_a_banned_id_however_hot() -> None:
    logits, source = draw_logits(), generator()
    banned = logits.topk(20).indices  # the most likely half
    params = SamplingParams(temperature=5)
    chosen = {choose(logits, params, banned, source).id for _ in range(3000)}
    assert chosen == set(range(VOCAB)) - set(banned.tolist())


def test_choose_leaves_the_logits_as_they_are() -> None:
    logits = draw_logits()
    before = logits.clone()
    for params in (SamplingParams(temperature=0), SamplingParams(top_k=2, top_p=0.5, min_p=0.1)):
        choose(logits, params, torch.tensor([1, 2]), generator())
        assert torch.equal(logits, before)


def test_choose_repeats_itself_with_the_same_seed() -> None:
    params = SamplingParams(temperature=2)

    def draw(seed: int) -> list[int]:
        source = generator(seed)
        return [choose(draw_logits(), params, None, source).id for _ in range(30)]

    assert draw(3) == draw(3)
    assert draw(3) != draw(4)


@pytest.mark.parametrize("temperature", [0.0, 2.0])
@pytest.mark.parametrize("n_top", [0, 1, 5, VOCAB, 100])
def test_choose_reports_the_models_own_log_probabilities(n_top: int, temperature: float) -> None:
    logits = draw_logits()
    params = SamplingParams(temperature=temperature, top_k=3, logprobs=n_top)
    banned = logits.topk(1).indices
    choice = choose(logits, params, banned, generator())
    full = [math.log(p) for p in softmax(logits, 1)]  # before temperature, filters and bans
    assert choice.logprob == pytest.approx(full[choice.id], abs=1e-5)  # float32 logs near -10
    assert [i for i, _ in choice.top] == by_probability(full)[:n_top]
    for i, logprob in choice.top:
        assert logprob == pytest.approx(full[i], abs=1e-5)


def test_choose_reports_nothing_unless_asked() -> None:
    choice = choose(draw_logits(), SamplingParams(), None, generator())
    assert choice.logprob is None
    assert choice.top == ()


def test_log_probability_scores_each_token_by_its_row() -> None:
    rows = torch.stack([draw_logits(seed) for seed in range(4)])
    tokens = [3, 0, 39, 3]
    got = log_probability(rows, torch.tensor(tokens))
    wanted = [math.log(softmax(row, 1)[i]) for row, i in zip(rows, tokens, strict=True)]
    assert got == pytest.approx(wanted, abs=1e-5)  # float32 logs near -10
    assert log_probability(rows[:0], torch.tensor([], dtype=torch.int64)) == []
