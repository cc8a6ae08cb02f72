"""The forward pass of few tokens is the forward pass: same logits, same keys and values.

On CPU `FewRows` runs the reference operations; that the kernels are these is the subject of
tests/kernels/test_fused.py and tests/gpu.
"""

import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from mistral_chat.kernels import reference
from mistral_chat.model.args import TransformerArgs
from mistral_chat.model.cache import KVCache
from mistral_chat.model.few_rows import MOST_ROWS, FewRows, HeadTable, alone, supports
from mistral_chat.model.operations import Collective, Span
from mistral_chat.model.sharding import Shard
from mistral_chat.model.transformer import Transformer
from tests.model.test_transformer import (
    ODD,
    SHAPES,
    assert_close,
    by_shape,
    draw_tokens,
    make_cache,
    make_model,
    run_whole,
)

SLOTS = (2, 0, 3, 1)  # places of sequences in the cache


def integers(values: Sequence[int]) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


class Rows:
    """Runs steps of few rows of one model."""

    def __init__(
        self, model: Transformer, cache: KVCache, collective: Collective | None = None
    ) -> None:
        self.model = model
        self.cache = cache
        self.collective = collective or alone(model.device)
        self.table = HeadTable.of(model.shard, model.device)

    def run(self, tokens: Tensor, slots: Tensor, starts: Tensor, lengths: Tensor) -> Tensor:
        per_span = len(tokens) // len(slots)
        rows = FewRows(slots, starts, lengths, per_span, self.cache, self.table, self.collective)
        logits = self.model.run(tokens, rows)
        assert logits is not None
        return logits


def few_rows(rows: Rows, tokens: Tensor, spans: Sequence[Span], per_span: int = 0) -> Tensor:
    """Run spans padded to `per_span` tokens; give the logits of the real ones."""
    per_span = per_span or max(span.length for span in spans)
    padded = torch.zeros(len(spans), per_span, dtype=torch.int64)
    parts = tokens.split([span.length for span in spans])
    for row, part in zip(padded, parts, strict=True):
        row[: len(part)] = part
    logits = rows.run(
        padded.flatten(),
        integers([span.slot for span in spans]),
        integers([span.start for span in spans]),
        integers([span.length for span in spans]),
    )
    assert logits.dtype == torch.float32
    assert logits.shape[0] == padded.numel()
    real = torch.cat([torch.arange(per_span) < span.length for span in spans])
    return logits[real]


def assert_same_caches(got: KVCache, wanted: KVCache) -> None:
    """Written alike, and what nobody has written still NaN."""
    for ours, theirs in ((got.k, wanted.k), (got.v, wanted.v)):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4, equal_nan=True)


def prefilled(model: Transformer, starts: Sequence[int]) -> KVCache:
    """A cache that holds so many tokens of each sequence."""
    cache = make_cache(model, n_slots=len(SLOTS))
    for seed, start in enumerate(starts):
        if start:
            tokens = draw_tokens(start, model.args, seed)
            model(tokens, [Span(SLOTS[seed], 0, start)], cache, "none")
    return cache


def spans_at(starts: Sequence[int], lengths: Sequence[int]) -> list[Span]:
    return [Span(*place) for place in zip(SLOTS, starts, lengths, strict=False)]


@by_shape
@pytest.mark.parametrize(
    ("starts", "lengths", "per_span"),
    [
        ((0,), (1,), 1),
        ((9,), (1,), 1),
        ((31,), (1,), 1),  # the cache's last position
        ((9, 0, 17, 3), (1, 1, 1, 1), 1),
        ((9,), (2,), 2),
        ((0,), (5,), 9),  # as a step of five is run: in the room of nine
        ((6,), (17,), 17),
        ((30,), (2,), 17),  # room past the cache's end
        ((9, 0, 17, 3), (3, 1, 2, 5), 5),
    ],
)
def test_few_rows_is_the_transformer(
    args: TransformerArgs, starts: tuple[int, ...], lengths: tuple[int, ...], per_span: int
) -> None:
    model = make_model(args)
    tokens, spans = draw_tokens(sum(lengths), args, seed=9), spans_at(starts, lengths)
    caches = [prefilled(model, starts) for _ in range(2)]
    got = few_rows(Rows(model, caches[0]), tokens, spans, per_span)
    wanted = model(tokens, spans, caches[1], "all")
    assert wanted is not None
    assert_close(got, wanted)
    assert_same_caches(caches[0], caches[1])


@by_shape
def test_few_rows_one_by_one_is_the_whole_prompt(args: TransformerArgs) -> None:
    model, tokens = make_model(args), draw_tokens(20, args)
    rows = Rows(model, make_cache(model))
    parts = [few_rows(rows, tokens[i : i + 1], [Span(0, i, 1)]) for i in range(20)]
    assert_close(torch.cat(parts), run_whole(model, tokens))


@by_shape
def test_few_rows_follows_and_precedes_the_transformer(args: TransformerArgs) -> None:
    model, tokens = make_model(args), draw_tokens(24, args)
    cache = make_cache(model)
    rows = Rows(model, cache)
    parts = [
        model(tokens[:7], [Span(0, 0, 7)], cache, "all"),
        few_rows(rows, tokens[7:10], [Span(0, 7, 3)], 5),
        few_rows(rows, tokens[10:11], [Span(0, 10, 1)]),
        model(tokens[11:20], [Span(0, 11, 9)], cache, "all"),
        few_rows(rows, tokens[20:24], [Span(0, 20, 4)], 5),
    ]
    assert_close(torch.cat(parts), run_whole(model, tokens))


def test_few_rows_leaves_empty_spans_alone() -> None:
    model = make_model(ODD)
    caches = [prefilled(model, (9, 4)) for _ in range(2)]
    tokens, spans = draw_tokens(2, seed=9), spans_at((9, 4), (1, 1))
    rows = Rows(model, caches[0])
    # as a graph of four sequences runs two: the others say slot 0, where a real one lies
    got = few_rows(rows, tokens, [*spans, Span(0, 0, 0), Span(0, 0, 0)])
    assert_close(got, few_rows(Rows(model, caches[1]), tokens, spans))
    assert_same_caches(caches[0], caches[1])


def test_few_rows_of_as_many_sequences_as_there_may_be() -> None:
    model = make_model(ODD)
    tokens = draw_tokens(MOST_ROWS)
    cache = make_cache(model, n_slots=MOST_ROWS)
    spans = [Span(MOST_ROWS - 1 - i, 0, 1) for i in range(MOST_ROWS)]
    got = few_rows(Rows(model, cache), tokens, spans)
    alone = torch.cat([run_whole(model, token) for token in tokens.split(1)])
    assert_close(got, alone)


def test_few_rows_reads_its_places_when_it_runs() -> None:
    """The same tensors with other numbers are another step: what a captured graph relies on."""
    model, ids = make_model(ODD), draw_tokens(6)
    rows = Rows(model, make_cache(model, n_slots=2))
    tokens = torch.zeros(1, dtype=torch.int64)
    slots, starts, lengths = integers([1]), integers([0]), integers([1])
    found = []
    for token in ids.split(1):
        tokens.copy_(token)
        found.append(rows.run(tokens, slots, starts, lengths))
        starts += lengths
    assert_close(torch.cat(found), run_whole(model, ids))


class Meeting:
    """Sums over ranks that are threads of this process, in rank order."""

    def __init__(self, world_size: int) -> None:
        self.barrier = threading.Barrier(world_size, timeout=120)
        self.parts: list[Tensor | None] = [None] * world_size

    def sum(self, rank: int, part: Tensor) -> Tensor:
        self.parts[rank] = part
        self.barrier.wait()
        total = torch.stack([p for p in self.parts if p is not None]).sum(0)
        self.barrier.wait()  # nobody brings the next before all have read this
        return total


class Rank:
    """One rank's way to the others: the collective of both kinds of steps."""

    path = "threads"

    def __init__(self, meeting: Meeting, rank: int) -> None:
        self.meeting = meeting
        self.rank = rank

    def reduce_add_norm(
        self, partial: Tensor, residual: Tensor | None, gain: Tensor, eps: float
    ) -> tuple[Any, Tensor]:
        total = self.meeting.sum(self.rank, partial)
        total = total if residual is None else residual + total
        return reference.rms_norm(total, gain, eps), total


def run_ranks(args: TransformerArgs, world_size: int, tokens: Tensor) -> list[Tensor]:
    """A prompt of nine by the model, then five tokens one by one and three at once."""
    meeting = Meeting(world_size)

    def run(rank: int) -> Tensor:
        collective = Rank(meeting, rank)
        model = make_model(args, Shard(args, world_size, rank))
        model.collective = collective
        caches = [make_cache(model), make_cache(model)]
        for cache in caches:
            model(tokens[:9], [Span(0, 0, 9)], cache, "none")
        rows = Rows(model, caches[0], collective)
        parts = [few_rows(rows, tokens[i : i + 1], [Span(0, i, 1)]) for i in range(9, 14)]
        parts.append(few_rows(rows, tokens[14:17], [Span(0, 14, 3)], 5))
        model(tokens[9:17], [Span(0, 9, 8)], caches[1], "none")
        assert_same_caches(*caches)
        return torch.cat(parts)

    with ThreadPoolExecutor(world_size) as threads:
        return list(threads.map(run, range(world_size)))


@by_shape
@pytest.mark.parametrize("world_size", [2, 3, 4])
def test_few_rows_on_ranks_is_the_whole_model(args: TransformerArgs, world_size: int) -> None:
    tokens = draw_tokens(17, args)
    logits = torch.cat(run_ranks(args, world_size, tokens), dim=1)  # each scores its vocabulary
    assert_close(logits, run_whole(make_model(args), tokens)[9:])


def test_few_rows_was_run_with_uneven_heads() -> None:
    uneven = [Shard(ODD, 2, rank).queries_by_kv_head for rank in range(2)]
    assert uneven == [(3, 2), (1, 3)]
    assert len({len(Shard(ODD, 2, rank).vocab) for rank in range(2)}) == 2


@pytest.mark.parametrize(
    ("head_dim", "dim", "wanted"),
    [
        (16, 64, True),
        (128, 64, True),
        (256, 64, True),
        (96, 64, False),
        (6, 64, False),
        (64, 63, False),
    ],
)
def test_few_rows_supports_heads_of_a_power_of_two(head_dim: int, dim: int, wanted: bool) -> None:
    assert supports(Transformer(replace(ODD, head_dim=head_dim, dim=dim, n_layers=1))) == wanted


def test_shapes_have_what_this_file_is_about() -> None:
    shapes = SHAPES.values()
    assert any(s.tied_embeddings for s in shapes)
    assert any(s.sliding_window for s in shapes)
    assert {s.n_heads // s.n_kv_heads for s in shapes} >= {1, 3, 5}
