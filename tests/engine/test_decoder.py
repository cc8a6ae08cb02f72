"""Decode steps asked for ahead are decode steps one by one: same tokens, same endings, same cache.

On CPU a `Decoder` runs the reference operations; what it does with steps, slots and surplus tokens
is the same as on a GPU.
"""

from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

from mistral_chat.config import SamplingParams
from mistral_chat.engine import engine as engine_module
from mistral_chat.engine.decoder import Choosing, Decoder, Pending
from mistral_chat.engine.engine import MOST_AT_ONCE, Engine, Prefill, Request, Token
from mistral_chat.engine.ranks.group import Group, Place
from mistral_chat.engine.sampling import allowed_words
from mistral_chat.engine.step import Chunk, Step
from mistral_chat.errors import CheckpointError
from mistral_chat.model.args import TransformerArgs
from mistral_chat.model.few_rows import MOST_ROWS
from tests.engine.test_engine import (
    ARGS,
    GREEDY,
    Recorded,
    answer,
    answer_all,
    draw_ids,
    first_prefill,
    greedy_by_hand,
    make_engine,
    make_model,
)
from tests.ranks import run_ranks
from tests.scripts import decoding

HOT = SamplingParams(temperature=1.5, top_k=40, top_p=0.95, min_p=0.01, max_tokens=12, seed=5)


class Watched(Recorded):
    """A runner that remembers what was asked of its decoder, and where that goes in the cache."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.asked: list[int] = []  # tokens of each call
        self.positions: dict[int, set[int]] = {}  # by slot, of all decodes
        self._next: dict[int, int] = {}

    def decode(
        self, step: Step, choosing: Sequence[Choosing], uniforms: Sequence[Sequence[float]]
    ) -> list[Pending]:
        if step.chunks:
            self._next = {chunk.slot: chunk.start for chunk in step.chunks}
        assert len(self._next) == len(choosing)
        assert [len(row) for row in uniforms] == [len(choosing)] * step.n_tokens
        self.asked.append(step.n_tokens)
        for slot, start in self._next.items():
            self.positions.setdefault(slot, set()).update(range(start, start + step.n_tokens))
            self._next[slot] = start + step.n_tokens
        return super().decode(step, choosing, uniforms)


def make_decoding(
    n_slots: int = 1, max_seq_len: int = 64, chunk_size: int = 8, args: TransformerArgs = ARGS
) -> tuple[Engine, Watched]:
    """`make_engine`, with an open decoder."""
    runner = Watched(
        make_model(args),
        Group(Place()),
        max_batch_size=n_slots,
        max_seq_len=max_seq_len,
        chunk_size=chunk_size,
    )
    runner.cache.k.fill_(torch.nan)  # whoever reads what was not written gives itself away
    runner.cache.v.fill_(torch.nan)
    runner.open_decoder()
    engine = Engine(runner)
    engine._step_s = 1e-3  # what a step takes here
    return engine, runner


@pytest.fixture(params=[1e-9, 10.0], ids=["one at once", "eight at once"])
def ahead(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """How many steps are asked for at once depends on time: here the least, and the most.

    Even the least is one more than the token that is waited for.
    """
    monkeypatch.setattr(engine_module, "AHEAD_S", request.param)


by_ahead = pytest.mark.usefixtures("ahead")


def tokens_of(engine: Engine, requests: Sequence[Request]) -> list[list[Token]]:
    said: list[list[Token]] = [[] for _ in requests]
    for index, event in engine.generate_many(requests):
        if isinstance(event, Token):
            said[index].append(event)
    return said


class Breaking(Watched):
    """A runner whose last norm becomes NaN after so many decode steps."""

    n_steps = 5

    def decode(self, step: Step, choosing: Any, uniforms: Any) -> Any:
        self.n_steps -= step.n_tokens  # at once, as fast as the machine is
        if self.n_steps <= 0:
            self.model.norm.data.fill_(torch.nan)
        return super().decode(step, choosing, uniforms)


@pytest.mark.parametrize("params", [GREEDY, HOT])
def test_scores_that_become_nan_on_the_device_end_the_answer(params: SamplingParams) -> None:
    runner = Breaking(make_model(), Group(Place()), max_batch_size=2, max_seq_len=64, chunk_size=8)
    runner.open_decoder()
    engine = Engine(runner)
    engine._step_s = 1.0  # one step at once
    params = replace(params, max_tokens=50)
    requests = [Request(ids=draw_ids(9, seed), params=params) for seed in (0, 1)]
    events = engine.generate_many(requests)
    for _ in range(6):  # the prompts, and the first tokens of each
        next(events)
    with pytest.raises(CheckpointError, match="no numbers"):
        list(events)


def said_by(engine: Engine, request: Request) -> list[Token]:
    return tokens_of(engine, [request])[0]


@cache
def answer_anew(ids: tuple[int, ...], params: SamplingParams) -> list[int]:
    """Of an engine that has seen nothing, which has no decoder either; each is made once."""
    return answer(make_engine()[0], ids, params)


def assert_as_fresh(engine: Engine, prompts: Sequence[Sequence[int]]) -> None:
    """Whatever happened before, answers are those of an engine that has seen nothing."""
    for params in (GREEDY, HOT):
        for ids in prompts:
            assert answer(engine, ids, params) == answer_anew(tuple(ids), params)


# Same tokens.


def requests_of(kind: SamplingParams, n: int) -> list[Request]:
    """Requests of every sort: each ends in its own way."""
    found = []
    for seed, length in zip(range(n), (9, 1, 17, 4, 30), strict=False):
        max_tokens = (11, None, 1, 7, 40)[seed]
        said = greedy_by_hand(draw_ids(length, seed), 6)
        found.append(
            Request(
                ids=draw_ids(length, seed),
                params=replace(kind, max_tokens=max_tokens, seed=seed),
                stop_ids=frozenset({said[4], 77}) if seed in (0, 3) else frozenset(),
                banned_ids=tuple(range(seed, 131, 3)) if seed in (1, 4) else (),
            )
        )
    return found


@by_ahead
@pytest.mark.parametrize("kind", [GREEDY, HOT], ids=["greedy", "sampled"])
@pytest.mark.parametrize(
    ("n_requests", "n_slots"), [(1, 1), (1, 2), (2, 1), (3, 3), (5, 2), (5, 3)]
)
def test_decoder_gives_the_tokens_of_an_engine_without(
    n_requests: int, n_slots: int, kind: SamplingParams
) -> None:
    engine, runner = make_decoding(n_slots, max_seq_len=40)
    plain = make_engine(n_slots, max_seq_len=40)[0]
    wanted = tokens_of(plain, requests_of(kind, n_requests))
    assert tokens_of(engine, requests_of(kind, n_requests)) == wanted
    # and once more, from what the cache holds
    assert tokens_of(engine, requests_of(kind, n_requests)) == wanted
    assert sum(runner.asked) > 0
    reasons = [row[-1].finish_reason for row in wanted]
    assert None not in reasons
    if n_requests == 5:
        assert len(wanted[1]) == 39  # one fills its context


@by_ahead
@pytest.mark.parametrize("window", [None, 5, [4, None]])
def test_decoder_is_the_model_run_anew_for_every_token(window: Any) -> None:
    args = replace(ARGS, sliding_window=window)
    for length in (1, 8, 30):
        ids = draw_ids(length)
        params = replace(GREEDY, max_tokens=20)
        assert answer(make_decoding(args=args)[0], ids, params) == greedy_by_hand(ids, 20, args)


@by_ahead
@pytest.mark.parametrize("kind", [GREEDY, HOT], ids=["greedy", "sampled"])
def test_decoder_takes_no_number_that_another_sequence_needs(kind: SamplingParams) -> None:
    """Sequences that end early leave surplus draws; nobody's answer depends on its neighbours."""
    requests = [
        Request(ids=draw_ids(5, n), params=replace(kind, seed=n, max_tokens=most))
        for n, most in enumerate((2, 30, 9, 17))
    ]
    together = tokens_of(make_decoding(n_slots=4)[0], requests)
    alone = [said_by(make_decoding()[0], request) for request in requests]
    assert together == alone
    assert alone == [said_by(make_engine()[0], request) for request in requests]


@by_ahead
def test_decoder_with_a_cache_is_decoder_without() -> None:
    engine, _ = make_decoding(max_seq_len=64)
    held = draw_ids(20)
    for seed in range(12):
        held = [*held[: 3 + 7 * seed % len(held)], *draw_ids(1 + seed % 9, seed)]
        assert answer(engine, held) == answer(make_engine()[0], held)
        held = [*held, *answer(engine, held)][:50]


@by_ahead
@pytest.mark.parametrize("n_slots", [MOST_ROWS, MOST_ROWS + 1])
def test_decoder_takes_as_many_sequences_as_it_has_rows(n_slots: int) -> None:
    engine, runner = make_decoding(n_slots, max_seq_len=16, chunk_size=64)
    requests = [Request(ids=draw_ids(1, n), params=GREEDY) for n in range(n_slots)]
    wanted = answer_all(make_engine(n_slots, max_seq_len=16, chunk_size=64)[0], requests)
    assert answer_all(engine, requests) == wanted
    assert bool(runner.asked) == (n_slots <= MOST_ROWS)  # more go the host's way


@by_ahead
@pytest.mark.parametrize("temperature", [0.0, 5.0])
def test_decoder_never_chooses_a_banned_id(temperature: float) -> None:
    engine, _ = make_decoding(max_seq_len=400)
    banned = tuple(i for i in range(131) if i % 3)
    params = SamplingParams(temperature=temperature, max_tokens=300, seed=1)
    requests = [Request(ids=draw_ids(6), params=params, banned_ids=b) for b in (banned, ())]
    some, any_id = ({t.id for t in said_by(engine, request)} for request in requests)
    assert some.isdisjoint(banned)
    if temperature:
        assert len(some) > 30  # nearly all of the 44 that are left
        assert len(any_id) > 80  # the ban was its own


# Endings.


@by_ahead
@pytest.mark.parametrize("at", [1, 2, 9, 17])
def test_decoder_ends_at_a_stop_id(at: int) -> None:
    ids, params = draw_ids(6), replace(HOT, max_tokens=40, top_k=0)
    said = answer(make_engine()[0], ids, params)
    stop = said[at]
    first = said.index(stop)
    engine, runner = make_decoding()
    request = Request(ids=ids, params=params, stop_ids=frozenset({stop}))
    tokens = said_by(engine, request)
    assert [t.id for t in tokens] == said[: first + 1]
    assert [t.finish_reason for t in tokens] == [None] * first + ["stop"]
    # what was asked for and not taken is bounded: less than two calls are waited for, then one more
    assert sum(runner.asked) - first < 3 * MOST_AT_ONCE
    assert_as_fresh(engine, [ids, [*ids, *said[: first + 1], 3], [*ids, *said[:30]]])


@by_ahead
@pytest.mark.parametrize("max_tokens", [1, 2, 3, 8, 9, 10, 25])
def test_decoder_asks_for_no_more_than_max_tokens(max_tokens: int) -> None:
    engine, runner = make_decoding()
    tokens = said_by(engine, Request(ids=[5, 6], params=replace(GREEDY, max_tokens=max_tokens)))
    assert [t.finish_reason for t in tokens] == [None] * (max_tokens - 1) + ["length"]
    assert sum(runner.asked) == max_tokens - 1  # the prompt's step gives the first


@by_ahead
@pytest.mark.parametrize("max_seq_len", [4, 24, 33])
@pytest.mark.parametrize("lengths", [(3,), (2, 2, 1)])
def test_decoder_writes_within_the_context(lengths: tuple[int, ...], max_seq_len: int) -> None:
    engine, runner = make_decoding(len(lengths), max_seq_len)
    requests = [
        Request(ids=draw_ids(n, n), params=replace(GREEDY, max_tokens=None)) for n in lengths
    ]
    said = tokens_of(engine, requests)
    assert [len(row) for row in said] == [max_seq_len - n for n in lengths]
    assert all(row[-1].finish_reason == "length" for row in said)
    for positions in runner.positions.values():
        # the last token chosen is never run
        assert max(positions) <= max_seq_len - 2
    assert bool(runner.cache.k[:, :, :, -1].isnan().all())
    assert bool(runner.cache.v[:, :, :, -1].isnan().all())


@by_ahead
def test_decoder_writes_only_where_its_sequences_are() -> None:
    engine, runner = make_decoding(n_slots=3)
    stop = answer(make_engine()[0], draw_ids(5), replace(GREEDY, max_tokens=9))[3]
    params = replace(GREEDY, max_tokens=30)
    said_by(engine, Request(ids=draw_ids(5), params=params, stop_ids=frozenset({stop})))
    (slot,) = runner.positions
    written = {int(p) for p in (~runner.cache.k[0, slot, 0, :, 0].isnan()).nonzero()}
    assert written == set(range(5)) | runner.positions[slot]
    others = [s for s in range(3) if s != slot]
    assert bool(runner.cache.k[:, others].isnan().all())
    assert bool(runner.cache.v[:, others].isnan().all())


# Requests that end before their time.


@by_ahead
@pytest.mark.parametrize("at", [1, 2, 3, 10])
def test_cancelled_decode_ends_without_another_token(at: int) -> None:
    engine, _ = make_decoding()
    request = Request(ids=draw_ids(10), params=replace(GREEDY, max_tokens=40))
    said = []
    for event in engine.generate(request):
        if isinstance(event, Token):
            assert event.finish_reason is None
            said.append(event.id)
            request.cancelled = len(said) == at
    assert said == greedy_by_hand(request.ids, at)
    going_on = [*request.ids, *said, 9]
    assert first_prefill(engine, going_on).cached == 10 + at - 1
    assert_as_fresh(engine, [going_on, request.ids, [*request.ids, *said[:1]], draw_ids(7, 3)])


@by_ahead
@pytest.mark.parametrize("kind", [GREEDY, HOT], ids=["greedy", "sampled"])
@pytest.mark.parametrize("n_slots", [2, 3])
def test_cancelled_decode_leaves_the_others_alone(n_slots: int, kind: SamplingParams) -> None:
    def ask() -> list[Request]:
        return [
            Request(ids=draw_ids(5, n), params=replace(kind, max_tokens=20, seed=n))
            for n in range(4)
        ]

    wanted = [[t.id for t in said_by(make_engine()[0], request)] for request in ask()]
    engine, _ = make_decoding(n_slots)
    requests = ask()
    said: list[list[int]] = [[] for _ in requests]
    for index, event in engine.generate_many(requests):
        if isinstance(event, Token):
            assert not requests[index].cancelled
            said[index].append(event.id)
            requests[1].cancelled = len(said[1]) >= 4
    assert said == [wanted[0], wanted[1][:4], *wanted[2:]]
    assert_as_fresh(engine, [[*r.ids, *row, 1] for r, row in zip(requests, said, strict=True)])


@by_ahead
def test_request_cancelled_by_anothers_token_gives_no_more() -> None:
    """Cancelled between two tokens of one step: the token chosen with the other's is not given."""
    engine, _ = make_decoding(n_slots=2)
    requests = [Request(ids=draw_ids(5, n), params=replace(GREEDY, max_tokens=20)) for n in (0, 1)]
    said: list[list[int]] = [[], []]
    for index, event in engine.generate_many(requests):
        if isinstance(event, Token):
            said[index].append(event.id)
            if index == 0 and len(said[0]) == 6:
                requests[1].cancelled = True
                before = len(said[1])
    assert said[0] == greedy_by_hand(requests[0].ids, 20)
    # the event of the same step may be on its way already; none of a later step comes
    assert before <= len(said[1]) <= before + 1
    assert said[1] == greedy_by_hand(requests[1].ids, len(said[1]))
    assert_as_fresh(engine, [[*r.ids, *row, 1] for r, row in zip(requests, said, strict=True)])


@by_ahead
@pytest.mark.parametrize("n_taken", [1, 2, 3, 4, 11])
def test_decode_closed_half_way_leaves_what_was_taken_in_the_cache(n_taken: int) -> None:
    engine, _ = make_decoding(n_slots=2)
    ids = draw_ids(12)
    events = engine.generate(Request(ids=ids, params=replace(GREEDY, max_tokens=40)))
    said: list[int] = []
    while len(said) < n_taken:
        event = next(events)
        if isinstance(event, Token):
            said.append(event.id)
    events.close()  # type: ignore[attr-defined]
    assert said == greedy_by_hand(ids, n_taken)
    for prompt, cached in (
        ([*ids, *said, 9], 12 + n_taken - 1),
        ([*ids, (said[0] + 1) % 131], 12),
        ([*ids, *said[:-1], (said[-1] + 1) % 131, 4], 12),
    ):
        assert first_prefill(engine, prompt).cached >= cached
        assert answer(engine, prompt) == greedy_by_hand(prompt, 6)
    assert_as_fresh(engine, [ids, draw_ids(7, 3)])


@by_ahead
def test_decode_closed_half_way_of_several_sequences() -> None:
    engine, _ = make_decoding(n_slots=3)
    requests = [
        Request(ids=draw_ids(5, n), params=replace(GREEDY, max_tokens=30)) for n in range(3)
    ]
    for n_events in (4, 9, 10, 11, 20):
        events = engine.generate_many(requests)
        for _ in range(n_events):
            next(events)
        events.close()  # type: ignore[attr-defined]
        assert answer_all(engine, requests) == [greedy_by_hand(r.ids, 30) for r in requests]


def test_failed_decode_leaves_nothing_behind_that_was_not_run(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    engine, runner = make_decoding()
    ids = draw_ids(12)
    answer(engine, ids)
    assert runner.decoder is not None
    advance, calls = runner.decoder.advance, 0

    def fail_once(*args: Any) -> list[Pending]:
        nonlocal calls
        calls += 1
        if calls == 2:
            raise RuntimeError("the device said no")
        return advance(*args)

    monkeypatch.setattr(runner.decoder, "advance", fail_once)
    with pytest.raises(RuntimeError, match="the device said no"):
        answer(engine, ids, replace(GREEDY, max_tokens=40))
    assert_as_fresh(engine, [ids, [*ids, *greedy_by_hand(ids, 3), 5]])


# The host's way beside the device's.


@pytest.mark.parametrize("kind", [GREEDY, HOT], ids=["greedy", "sampled"])
def test_requests_with_logprobs_are_chosen_on_the_host(kind: SamplingParams) -> None:
    engine, runner = make_decoding()
    request = Request(ids=draw_ids(9), params=replace(kind, logprobs=2))
    got, wanted = said_by(engine, request), said_by(make_engine()[0], request)
    assert runner.asked == []
    assert [t.id for t in got] == [t.id for t in wanted]
    assert [t.id for t in got] == [t.id for t in said_by(engine, replace(request, params=kind))]
    assert runner.asked != []
    for ours, theirs in zip(got, wanted, strict=True):
        assert len(ours.top) == 2
        # the same sums of float32 logits near 5 in another order
        assert ours.logprob == pytest.approx(theirs.logprob, abs=1e-4)


@by_ahead
@pytest.mark.parametrize("n_slots", [2, 3])
def test_requests_with_logprobs_and_without_run_side_by_side(n_slots: int) -> None:
    requests = [
        Request(ids=draw_ids(4, n), params=replace(HOT, seed=n, max_tokens=5 + 4 * n, logprobs=top))
        for n, top in enumerate((None, 0, None, 3, None))
    ]
    engine, runner = make_decoding(n_slots)
    got = tokens_of(engine, requests)
    wanted = [said_by(make_engine()[0], request) for request in requests]
    assert [[t.id for t in row] for row in got] == [[t.id for t in row] for row in wanted]
    assert [t.logprob is None for row in got for t in row] == [
        t.logprob is None for row in wanted for t in row
    ]
    assert runner.asked  # the last ones have the device for themselves


@by_ahead
def test_prompt_logprobs_do_not_keep_the_answer_from_the_device() -> None:
    engine, runner = make_decoding()
    request = Request(ids=draw_ids(9), params=replace(GREEDY, prompt_logprobs=True))
    events, wanted = (list(e.generate(request)) for e in (engine, make_engine()[0]))
    assert [e for e in events if isinstance(e, Token)] == [
        e for e in wanted if isinstance(e, Token)
    ]
    ours, theirs = (
        [e.logprobs for e in each if isinstance(e, Prefill)][-1] for each in (events, wanted)
    )
    assert ours == pytest.approx(theirs, abs=1e-4)  # as above
    assert sum(runner.asked) == 5


# The decoder itself.


def step_of(*lengths: int, logits: str = "last") -> Step:
    chunks = (Chunk(n, 3, (7,) * length) for n, length in enumerate(lengths))
    return Step(tuple(chunks), logits)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("step", "wanted"),
    [
        (step_of(1), True),
        (step_of(1, logits="all"), True),
        (step_of(1, logits="none"), False),
        (step_of(1, 1, 1), True),
        (step_of(1, 1, 1, logits="all"), True),
        (step_of(*[1] * MOST_ROWS), True),
        (step_of(*[1] * (MOST_ROWS + 1)), False),
        (step_of(2), False),  # the last token's logits alone are a prompt's
        (step_of(2, logits="all"), True),
        (step_of(MOST_ROWS, logits="all"), True),
        (step_of(MOST_ROWS + 1, logits="all"), False),
        (step_of(2, 1, logits="all"), False),
        (step_of(17, logits="none"), False),
    ],
)
def test_decoder_fits_few_tokens_that_are_scored(step: Step, wanted: bool) -> None:
    assert Decoder.fits(step) == wanted


@pytest.mark.parametrize(
    "step",
    [
        step_of(1),
        step_of(1, 1, 1),
        *(step_of(n, logits="all") for n in (1, 2, 3, 4, 5, 6, 17, 18, 32)),
    ],
    ids=lambda step: f"{len(step.chunks)} of {len(step.chunks[0].tokens)}",
)
def test_decoder_scores_as_the_model_does(step: Step) -> None:
    runners = make_engine(n_slots=3)[1], make_decoding(n_slots=3)[1]
    prompt = Step(tuple(Chunk(n, 0, tuple(draw_ids(3, n))) for n in range(3)), "none")
    found = []
    for runner in runners:
        assert runner.run(prompt) is None
        logits = runner.run(step)
        assert logits is not None
        found.append(logits.clone())
    # the same sums in another order; logits near 5
    torch.testing.assert_close(found[1], found[0], rtol=1e-4, atol=1e-4)
    for ours, theirs in zip(
        (runners[1].cache.k, runners[1].cache.v), (runners[0].cache.k, runners[0].cache.v),
        strict=True,
    ):  # fmt: skip
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4, equal_nan=True)


def test_decoder_warms_up_without_touching_the_cache() -> None:
    runner = make_decoding(n_slots=2)[1]
    assert bool(runner.cache.k.isnan().all())
    assert bool(runner.cache.v.isnan().all())


def test_decoder_advances_however_its_steps_are_divided() -> None:
    found = []
    for parts in ([12], [1] * 12, [5, 1, 6]):
        runner = make_decoding(n_slots=3)[1]
        assert runner.decoder is not None
        chunks = tuple(Chunk(slot, 0, (slot + 4,)) for slot in (2, 0))
        words = allowed_words(ARGS.vocab_size, (3, 5))
        choosing = [Choosing(GREEDY, words), Choosing(HOT, words)]
        pending: list[Pending] = []
        for n, n_tokens in enumerate(parts):
            first = len(pending)
            uniforms = [[0.25, (first + i) / 12] for i in range(n_tokens)]
            step = Step(() if n else chunks, n_tokens=n_tokens)
            pending += runner.decode(step, choosing, uniforms)
        found.append([p.wait() for p in pending])
    assert found[0] == found[1] == found[2]
    assert [len(row) for row in found[0]] == [2] * 12


# Ranks.


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What `tests.scripts.decoding` saw on each of two ranks."""
    out: Path = tmp_path_factory.mktemp("decoding")
    run_ranks("tests.scripts.decoding", out, n_ranks=2)
    return [torch.load(out / f"{rank}.pt") for rank in range(2)]


@pytest.fixture(scope="module")
def one_rank() -> dict[str, Any]:
    return decoding.collect(Group(Place()))


@pytest.mark.parametrize("way", ["node memory", "gloo"])
@pytest.mark.parametrize("shape", decoding.SHAPES)
def test_decoder_on_two_ranks_is_one(
    two_ranks: list[dict[str, Any]], one_rank: dict[str, Any], way: str, shape: str
) -> None:
    got, wanted = two_ranks[0][way][shape], one_rank["gloo"][shape]
    assert got["tokens"] == wanted["tokens"]
    assert got["asked"] > 0
    # partial sums in another order; logits near 5
    torch.testing.assert_close(got["logits"], wanted["logits"], rtol=1e-4, atol=1e-4)
    assert len({i for row in wanted["tokens"] for i, _ in row}) > 10  # it says more than one thing
    assert {reason for row in wanted["tokens"] for _, reason in row} == {None, "stop", "length"}


def test_decoder_on_one_rank_is_an_engine_without(one_rank: dict[str, Any]) -> None:
    for shape in decoding.SHAPES:
        assert one_rank["gloo"][shape]["tokens"] == one_rank["gloo"][shape]["without"]


def test_decoder_on_ranks_says_how_they_sum(two_ranks: list[dict[str, Any]]) -> None:
    for way in ("node memory", "gloo"):
        for shape in decoding.SHAPES:
            paths = {seen[way][shape]["path"] for seen in two_ranks}
            assert paths == {"one by one, sums through the CPU group (cpu runs the reference)"}
