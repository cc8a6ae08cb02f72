"""Sequences in, tokens out: reuse of the cache, batching, endings and seeds."""

import math
import random
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch

from mistral_chat.config import SamplingParams
from mistral_chat.engine.engine import Engine, Prefill, Request, Token
from mistral_chat.engine.ranks.group import Group, Place
from mistral_chat.engine.runner import Runner
from mistral_chat.engine.step import Step
from mistral_chat.errors import CheckpointError, ContextLengthError, PromptError
from mistral_chat.model.args import TransformerArgs
from mistral_chat.model.operations import Span
from mistral_chat.model.transformer import Transformer

ARGS = TransformerArgs(
    dim=32,
    n_layers=2,
    head_dim=12,
    hidden_dim=48,
    n_heads=4,
    n_kv_heads=2,
    norm_eps=1e-5,
    vocab_size=131,
)
GREEDY = SamplingParams(temperature=0, max_tokens=6)


class Recorded(Runner):
    """A runner that remembers its steps."""

    def run(self, step: Step) -> torch.Tensor | None:
        self.steps.append(step)
        return super().run(step)

    @property
    def steps(self) -> list[Step]:
        found: list[Step] = self.__dict__.setdefault("_steps", [])
        return found


def make_model(args: TransformerArgs = ARGS) -> Transformer:
    model = Transformer(args)
    model.init_weights(3)
    return model


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize(
    "params",
    [GREEDY, replace(GREEDY, temperature=1.0), replace(GREEDY, logprobs=3),
     replace(GREEDY, prompt_logprobs=True)],
)  # fmt: skip
def test_scores_that_are_no_numbers_are_no_answer(bad: float, params: SamplingParams) -> None:
    engine, runner = make_engine()
    runner.model.norm.data[3] = bad
    events = engine.generate(Request(ids=[5, 6, 7], params=params))
    with pytest.raises(CheckpointError, match="no numbers"):
        next(events)


def make_engine(
    n_slots: int = 1,
    max_seq_len: int = 64,
    chunk_size: int = 8,
    args: TransformerArgs = ARGS,
) -> tuple[Engine, Recorded]:
    runner = Recorded(
        make_model(args),
        Group(Place()),
        max_batch_size=n_slots,
        max_seq_len=max_seq_len,
        chunk_size=chunk_size,
    )
    runner.cache.k.fill_(torch.nan)  # whoever reads what was not written gives itself away
    runner.cache.v.fill_(torch.nan)
    return Engine(runner), runner


def draw_ids(n: int, seed: int = 0) -> list[int]:
    rng = random.Random(seed)
    return [rng.randrange(ARGS.vocab_size) for _ in range(n)]


def answer(engine: Engine, ids: Sequence[int], params: SamplingParams = GREEDY) -> list[int]:
    events = list(engine.generate(Request(ids=list(ids), params=params)))
    return [e.id for e in events if isinstance(e, Token)]


def answer_all(engine: Engine, requests: Sequence[Request]) -> list[list[int]]:
    answers: list[list[int]] = [[] for _ in requests]
    for index, event in engine.generate_many(requests):
        if isinstance(event, Token):
            answers[index].append(event.id)
    return answers


def first_prefill(engine: Engine, ids: Sequence[int], **params: Any) -> Prefill:
    settings = replace(GREEDY, **params)
    events = list(engine.generate(Request(ids=list(ids), params=settings)))
    return next(e for e in events if isinstance(e, Prefill))


_BY_HAND: dict[tuple[tuple[int, ...], str], list[int]] = {}


def greedy_by_hand(ids: Sequence[int], n: int, args: TransformerArgs = ARGS) -> list[int]:
    """The whole sequence anew for every token: no cache, no chunks. Each is made once."""
    said = _BY_HAND.setdefault((tuple(ids), repr(args)), [])
    if len(said) < n:
        runner = make_engine(max_seq_len=100, args=args)[1]
        while len(said) < n:
            tokens = [*ids, *said]
            spans = [Span(0, 0, len(tokens))]
            logits = runner.model(torch.tensor(tokens), spans, runner.cache, "last")
            assert logits is not None
            said.append(int(logits[-1].argmax()))
    return said[:n]


@pytest.mark.parametrize("length", [1, 7, 8, 9, 30])
@pytest.mark.parametrize("window", [None, 5, [4, None]])
def test_generate_is_the_model_run_anew_for_every_token(
    length: int, window: int | list[int | None] | None
) -> None:
    args = replace(ARGS, sliding_window=window)
    ids = draw_ids(length)
    assert answer(make_engine(args=args)[0], ids) == greedy_by_hand(ids, 6, args)


@pytest.mark.parametrize("chunk_size", [1, 2, 7, 8, 20, 21, 64])
def test_generate_runs_the_prompt_in_chunks(chunk_size: int) -> None:
    engine, runner = make_engine(chunk_size=chunk_size)
    events = list(engine.generate(Request(ids=draw_ids(21), params=GREEDY)))
    progress = [e for e in events if isinstance(e, Prefill)]
    assert [e.done for e in progress] == [*range(chunk_size, 21, chunk_size), 21]
    assert {e.total for e in progress} == {21}
    prefilling = runner.steps[: len(progress)]
    assert all(len(step.chunks[0].tokens) <= chunk_size for step in prefilling)
    # only the last chunk is scored: the others' logits would be thrown away
    assert [step.logits for step in prefilling] == ["none"] * (len(progress) - 1) + ["last"]
    assert [e.id for e in events if isinstance(e, Token)] == answer(make_engine()[0], draw_ids(21))


def test_generate_runs_one_token_a_step_after_the_prompt() -> None:
    engine, runner = make_engine()
    said = answer(engine, draw_ids(8))
    # the last token chosen is never run: nobody asked what follows it
    assert [step.chunks[0].tokens for step in runner.steps[1:]] == [(i,) for i in said[:-1]]
    assert [step.chunks[0].start for step in runner.steps[1:]] == [8, 9, 10, 11, 12]


def test_prefill_counts_the_common_prefix_as_cached() -> None:
    engine, runner = make_engine()
    first = draw_ids(20)
    assert first_prefill(engine, first).cached == 0
    said = answer(engine, first)  # the slot now holds the prompt and all but the last answer token
    cases = [
        ([*first, *said, 5, 6], 25),
        ([*first, *said[:3], (said[3] + 1) % 131], 23),
        ([*first[:11], (first[11] + 1) % 131, 3], 11),
        ([(first[0] + 1) % 131, *first[1:]], 0),
    ]
    for ids, cached in cases:
        answer(engine, first)
        runner.steps.clear()
        assert first_prefill(engine, ids).cached == cached
        assert runner.steps[0].chunks[0].start == cached
        n_run = sum(len(step.chunks[0].tokens) for step in runner.steps)
        assert n_run == len(ids) - cached + 5  # and all but the last of six chosen tokens


@pytest.mark.parametrize("length", [1, 8, 20])
def test_prefill_runs_the_last_prompt_token_even_when_all_is_cached(length: int) -> None:
    engine, _ = make_engine()
    ids = draw_ids(length)
    said = answer(engine, ids)
    again = first_prefill(engine, ids)
    assert again == Prefill(done=length, total=length, cached=length - 1)
    assert answer(engine, ids) == said


def test_prefill_of_a_shorter_prompt_reuses_a_longer_one() -> None:
    engine, _ = make_engine()
    ids = draw_ids(20)
    answer(engine, ids)
    assert first_prefill(engine, ids[:9]).cached == 8
    assert answer(engine, ids[:9]) == answer(make_engine()[0], ids[:9])


@pytest.mark.parametrize("window", [None, 5])
def test_generate_with_a_cache_is_generate_without(window: int | None) -> None:
    args = replace(ARGS, sliding_window=window)
    engine, _ = make_engine(args=args)
    params = replace(GREEDY, logprobs=0)
    rng = random.Random(2)
    held = draw_ids(30)
    reused = 0
    for _ in range(40):
        new = draw_ids(rng.randrange(1, 12), rng.randrange(10**6))
        held = [*held[: rng.randrange(len(held))], *new][:50]
        with_cache, without = (
            list(each.generate(Request(ids=list(held), params=params)))
            for each in (engine, make_engine(args=args)[0])
        )
        reused += sum(e.cached for e in with_cache[:1] if isinstance(e, Prefill))
        wanted = [e for e in without if isinstance(e, Token)]
        got = [e for e in with_cache if isinstance(e, Token)]
        assert [e.id for e in got] == [e.id for e in wanted]
        # chunks of other sizes add in another order: float32 noise of logits near 5
        assert [e.logprob for e in got] == pytest.approx([e.logprob for e in wanted], abs=1e-4)
    assert reused > 100


def test_admission_takes_the_slot_with_the_longest_common_prefix() -> None:
    engine, runner = make_engine(n_slots=3)
    prompts = [draw_ids(12, seed) for seed in range(3)]
    answer_all(engine, [Request(ids=p, params=GREEDY) for p in prompts])
    slots = set()
    for prompt in (prompts[1], prompts[2], prompts[0]):
        runner.steps.clear()
        assert first_prefill(engine, [*prompt, 1, 2]).cached == 12
        slots.add(runner.steps[0].chunks[0].slot)
    assert slots == {0, 1, 2}


def test_admission_of_a_new_prompt_spares_the_slot_that_holds_most() -> None:
    engine, _ = make_engine(n_slots=2)
    long, short = draw_ids(30, 1), draw_ids(5, 2)
    answer_all(engine, [Request(ids=ids, params=GREEDY) for ids in (long, short)])
    answer(engine, [next(i for i in range(131) if i not in (long[0], short[0])), 7, 8])
    assert first_prefill(engine, [*long, 3]).cached == 30


@pytest.mark.parametrize("chunk_size", [3, 8, 64])
@pytest.mark.parametrize("n_slots", [1, 2, 3])
def test_generate_many_is_one_by_one(n_slots: int, chunk_size: int) -> None:
    requests = [
        Request(
            ids=draw_ids(length, seed),
            params=SamplingParams(temperature=0, max_tokens=1 + 3 * seed % 8),
        )
        for seed, length in enumerate((9, 1, 17, 4, 30, 12, 2))
    ]
    alone = [answer(make_engine()[0], r.ids, r.params) for r in requests]
    assert [len(a) for a in alone] == [r.params.max_tokens for r in requests]
    engine, runner = make_engine(n_slots=n_slots, chunk_size=chunk_size)
    assert answer_all(engine, requests) == alone
    assert max(len(step.chunks) for step in runner.steps) == n_slots
    for step in runner.steps:
        slots = [chunk.slot for chunk in step.chunks]
        assert len(set(slots)) == len(slots)
        assert sum(len(chunk.tokens) for chunk in step.chunks) <= max(chunk_size, n_slots)


def test_generate_many_takes_requests_only_as_slots_become_free() -> None:
    taken: list[int] = []

    def requests() -> Iterator[Request]:
        for n in range(6):
            taken.append(n)
            yield Request(ids=draw_ids(4, n), params=SamplingParams(temperature=0, max_tokens=3))

    engine, _ = make_engine(n_slots=2)
    finished = 0
    for _, event in engine.generate_many(requests()):
        assert len(taken) <= finished + 3  # two running, and one more at the moment one ends
        finished += isinstance(event, Token) and event.finish_reason is not None
    assert finished == 6


def test_generate_many_keeps_decoding_while_another_prompt_is_run() -> None:
    engine, runner = make_engine(n_slots=2, chunk_size=4)
    short = Request(ids=draw_ids(3), params=SamplingParams(temperature=0, max_tokens=10))
    long = Request(ids=draw_ids(24, 1), params=GREEDY)
    answer_all(engine, [short, long])
    mixed = [s for s in runner.steps if sorted(len(c.tokens) for c in s.chunks) == [1, 3]]
    assert len(mixed) >= 5  # a token of the one beside three of the other's prompt, five times


@pytest.mark.parametrize("n_slots", [1, 3])
def test_seed_gives_the_same_tokens_whatever_runs_beside(n_slots: int) -> None:
    params = [SamplingParams(temperature=1.5, max_tokens=12, seed=s) for s in (5, 5, 6, 7, 5)]
    prompts = [draw_ids(6, 1), draw_ids(6, 1), draw_ids(6, 1), draw_ids(11, 2), draw_ids(6, 1)]
    engine, _ = make_engine(n_slots=n_slots)
    requests = [Request(ids=i, params=p) for i, p in zip(prompts, params, strict=True)]
    said = answer_all(engine, requests)
    assert said[0] == said[1] == said[4]
    assert said[2] != said[0]
    alone = [answer(make_engine()[0], i, p) for i, p in zip(prompts, params, strict=True)]
    assert said == alone


def test_requests_without_a_seed_differ() -> None:
    engine, _ = make_engine()
    params = SamplingParams(temperature=3, max_tokens=12)
    assert answer(engine, [1], params) != answer(engine, [1], params)


@pytest.mark.parametrize("n_slots", [1, 2])
def test_cancelled_request_ends_and_its_slot_goes_on(n_slots: int) -> None:
    engine, runner = make_engine(n_slots=n_slots)
    request = Request(ids=draw_ids(10), params=SamplingParams(temperature=0, max_tokens=40))
    said: list[int] = []
    for event in engine.generate(request):
        if isinstance(event, Token):
            assert event.finish_reason is None
            said.append(event.id)
            request.cancelled = len(said) == 3
    assert said == greedy_by_hand(request.ids, 3)
    assert len(runner.steps) == 2 + 2  # two chunks of the prompt, then a step for all but the last
    following = [*request.ids, *said, 9]
    assert first_prefill(engine, following).cached == 12
    assert answer(engine, following) == greedy_by_hand(following, 6)


def test_cancelled_request_leaves_the_others_alone() -> None:
    engine, _ = make_engine(n_slots=2)
    requests = [Request(ids=draw_ids(5, n), params=replace(GREEDY, max_tokens=8)) for n in range(4)]
    said: list[list[int]] = [[] for _ in requests]
    for index, event in engine.generate_many(requests):
        if isinstance(event, Token):
            said[index].append(event.id)
            requests[1].cancelled = len(said[1]) >= 2
    assert [len(s) for s in said] == [8, 2, 8, 8]
    for n in (0, 2, 3):
        assert said[n] == greedy_by_hand(requests[n].ids, 8)


def test_request_cancelled_during_its_prompt_gives_no_token() -> None:
    engine, runner = make_engine(chunk_size=4)
    request = Request(ids=draw_ids(20), params=GREEDY)
    events = []
    for event in engine.generate(request):
        events.append(event)
        request.cancelled = len(events) == 2
    assert events == [Prefill(4, 20, 0), Prefill(8, 20, 0)]
    assert len(runner.steps) == 2
    assert first_prefill(engine, request.ids).cached == 8  # what was run is kept


def test_request_cancelled_before_it_begins_does_nothing() -> None:
    engine, runner = make_engine()
    request = Request(ids=draw_ids(5), params=GREEDY, cancelled=True)
    assert list(engine.generate(request)) == []
    assert runner.steps == []


def test_generator_dropped_half_way_leaves_the_engine_usable() -> None:
    engine, _ = make_engine()
    events = engine.generate(Request(ids=draw_ids(5), params=GREEDY))
    next(events)
    next(events)
    del events
    assert answer(engine, draw_ids(7, 3)) == greedy_by_hand(draw_ids(7, 3), 6)


def finish_reasons(engine: Engine, request: Request) -> list[str | None]:
    return [e.finish_reason for e in engine.generate(request) if isinstance(e, Token)]


@pytest.mark.parametrize("max_tokens", [1, 2, 9])
def test_answer_ends_at_max_tokens(max_tokens: int) -> None:
    engine, _ = make_engine()
    params = SamplingParams(temperature=0, max_tokens=max_tokens)
    reasons = finish_reasons(engine, Request(ids=draw_ids(4), params=params))
    assert reasons == [None] * (max_tokens - 1) + ["length"]


@pytest.mark.parametrize("max_tokens", [None, 1000])
@pytest.mark.parametrize("length", [1, 20, 23])
def test_answer_ends_when_the_context_is_full(length: int, max_tokens: int | None) -> None:
    engine, _ = make_engine(max_seq_len=24)
    params = SamplingParams(temperature=0, max_tokens=max_tokens)
    reasons = finish_reasons(engine, Request(ids=draw_ids(length), params=params))
    assert len(reasons) == 24 - length  # prompt and answer together
    assert reasons[-1] == "length"


@pytest.mark.parametrize("length", [24, 25, 300])
def test_prompt_that_leaves_no_room_says_its_figures(length: int) -> None:
    engine, runner = make_engine(max_seq_len=24)
    with pytest.raises(ContextLengthError) as caught:
        list(engine.generate(Request(ids=draw_ids(length), params=GREEDY)))
    assert caught.value.prompt_tokens == length
    assert caught.value.max_seq_len == 24
    assert f"has {length} tokens" in str(caught.value)
    assert f"shorten the prompt by {length - 23} tokens" in str(caught.value)
    assert runner.steps == []
    engine.check(Request(ids=draw_ids(23)))


@pytest.mark.parametrize("ids", [[], [131], [3, -1], [0, 10**9]])
def test_prompt_that_is_none_of_the_models_is_refused(ids: list[int]) -> None:
    engine, runner = make_engine()
    with pytest.raises(PromptError):
        list(engine.generate(Request(ids=ids, params=GREEDY)))
    assert runner.steps == []
    engine.check(Request(ids=[0, 130]))


def test_stop_id_ends_the_answer_and_is_its_last_token() -> None:
    ids = draw_ids(6)
    said = greedy_by_hand(ids, 30)
    stop = next(i for n, i in enumerate(said) if n >= 2 and i not in said[:n])
    at = said.index(stop)
    engine, _ = make_engine()
    params = SamplingParams(temperature=0, max_tokens=30)
    request = Request(ids=ids, params=params, stop_ids=frozenset({stop, 9999}))
    tokens = [e for e in engine.generate(request) if isinstance(e, Token)]
    assert [t.id for t in tokens] == said[: at + 1]
    assert [t.finish_reason for t in tokens] == [None] * at + ["stop"]


def test_stop_id_at_max_tokens_is_a_stop() -> None:
    ids = draw_ids(6)
    said = greedy_by_hand(ids, 1)
    request = Request(
        ids=ids,
        params=SamplingParams(temperature=0, max_tokens=1),
        stop_ids=frozenset(said),
    )
    assert finish_reasons(make_engine()[0], request) == ["stop"]


def test_ignored_stop_id_does_not_end_the_answer() -> None:
    ids = draw_ids(6)
    params = SamplingParams(temperature=0, max_tokens=5, ignore_eos=True)
    request = Request(ids=ids, params=params, stop_ids=frozenset(range(131)))
    assert finish_reasons(make_engine()[0], request) == [None] * 4 + ["length"]


@pytest.mark.parametrize("temperature", [0.0, 5.0])
def test_banned_ids_are_never_chosen(temperature: float) -> None:
    engine, _ = make_engine(max_seq_len=400)
    banned = tuple(i for i in range(131) if i % 3)
    params = SamplingParams(temperature=temperature, max_tokens=300, seed=1)
    request = Request(ids=draw_ids(6), params=params, banned_ids=banned)
    chosen = {e.id for e in engine.generate(request) if isinstance(e, Token)}
    assert chosen.isdisjoint(banned)
    if temperature:
        assert len(chosen) > 30  # nearly all of the 44 that are left


@pytest.mark.parametrize("chunk_size", [1, 4, 64])
def test_prompt_logprobs_score_each_token_after_the_first(chunk_size: int) -> None:
    ids = draw_ids(14)
    runner = make_engine()[1]
    logits = runner.model(torch.tensor(ids), [Span(0, 0, 14)], runner.cache, "all")
    assert logits is not None
    rows = torch.log_softmax(logits.double(), -1)
    wanted = [float(row[i]) for row, i in zip(rows, ids[1:], strict=False)]
    engine, _ = make_engine(chunk_size=chunk_size)
    answer(engine, ids)  # a full cache must not leave anything out
    params = replace(GREEDY, prompt_logprobs=True)
    events = list(engine.generate(Request(ids=ids, params=params)))
    progress = [e for e in events if isinstance(e, Prefill)]
    assert progress[-1].cached == 0
    # float32 logits near 5 and their logarithms, in chunks that add in another order
    assert progress[-1].logprobs == pytest.approx(wanted, abs=1e-4)
    for event in progress:
        assert event.logprobs == progress[-1].logprobs[: len(event.logprobs)]
        assert len(event.logprobs) == min(event.done, 13)
    assert [e.id for e in events if isinstance(e, Token)] == greedy_by_hand(ids, 6)


def test_prompt_logprobs_of_one_sequence_leave_the_others_alone() -> None:
    requests = [
        Request(ids=draw_ids(n, n), params=replace(GREEDY, prompt_logprobs=n % 2 == 1))
        for n in (3, 6, 9, 12)
    ]
    engine, _ = make_engine(n_slots=3, chunk_size=5)
    assert answer_all(engine, requests) == [greedy_by_hand(r.ids, 6) for r in requests]


@pytest.mark.parametrize("n_top", [0, 3])
def test_token_logprobs_are_the_models_own(n_top: int) -> None:
    ids = draw_ids(9)
    params = SamplingParams(temperature=2, top_k=20, max_tokens=5, seed=0, logprobs=n_top)
    engine, runner = make_engine()
    events = engine.generate(Request(ids=ids, params=params, banned_ids=(1, 2)))
    tokens = [e for e in events if isinstance(e, Token)]
    whole = torch.tensor([*ids, *(t.id for t in tokens)])
    logits = runner.model(whole, [Span(0, 0, 14)], make_engine()[1].cache, "all")
    assert logits is not None
    for token, row in zip(tokens, torch.log_softmax(logits.double(), -1)[8:], strict=False):
        assert token.logprob == pytest.approx(float(row[token.id]), abs=1e-4)  # as above
        values, likely = row.topk(n_top)
        assert [i for i, _ in token.top] == likely.tolist()
        assert [v for _, v in token.top] == pytest.approx(values.tolist(), abs=1e-4)
    assert all(math.isfinite(t.logprob or 0) for t in tokens)


def test_token_without_logprobs_has_none() -> None:
    engine, _ = make_engine()
    events = list(engine.generate(Request(ids=[4, 5], params=GREEDY)))
    assert all(e.logprob is None and e.top == () for e in events if isinstance(e, Token))
    assert all(e.logprobs == () for e in events if isinstance(e, Prefill))


def test_failed_step_leaves_nothing_behind_that_was_not_run(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    engine, runner = make_engine(chunk_size=4)
    ids = draw_ids(12)
    answer(engine, ids)
    whole = runner.model.forward
    calls = 0

    def fail_once(*args: Any) -> torch.Tensor | None:
        nonlocal calls
        calls += 1
        if calls == 2:
            raise RuntimeError("the device said no")
        return whole(*args)

    other = [(ids[0] + 1) % 131, *ids[1:]]
    monkeypatch.setattr(runner.model, "forward", fail_once)
    with pytest.raises(RuntimeError, match="the device said no"):
        answer(engine, other)
    assert first_prefill(engine, other).cached == 4
    assert answer(engine, other) == greedy_by_hand(other, 6)
