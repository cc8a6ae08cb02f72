"""A step survives the way to the other ranks unchanged."""

import random

import pytest

from mistral_chat.engine.step import Chunk, Step
from mistral_chat.model.operations import Span, WhichLogits


def draw_step(rng: random.Random) -> Step:
    chunks = tuple(
        Chunk(
            slot=rng.randrange(1000),
            start=rng.randrange(131_072),
            tokens=tuple(rng.randrange(131_072) for _ in range(rng.choice([1, 1, 2, 7, 300]))),
        )
        for _ in range(rng.randrange(9))
    )
    return Step(chunks, rng.choice(["none", "last", "all"]), rng.choice([0, 0, 1, 8, 1000]))


@pytest.mark.parametrize("seed", range(50))
def test_step_unpacks_to_what_was_packed(seed: int) -> None:
    step = draw_step(random.Random(seed))
    packed = step.pack()
    assert all(type(value) is int for value in packed)
    assert Step.unpack(packed) == step


@pytest.mark.parametrize("which", ["none", "last", "all"])
def test_step_of_one_token_is_few_numbers(which: WhichLogits) -> None:
    packed = Step((Chunk(3, 17, (5,)),), which).pack()
    # what a decode step costs on its way: which logits, decodes, a count, then slot, start,
    # length, id
    assert len(packed) == 7
    assert packed[1:] == [0, 1, 3, 17, 1, 5]


@pytest.mark.parametrize("n_tokens", [1, 8, 500])
def test_step_that_goes_on_decoding_is_three_numbers(n_tokens: int) -> None:
    packed = Step((), n_tokens=n_tokens).pack()
    assert len(packed) == 3
    assert Step.unpack(packed) == Step((), "last", n_tokens)


def test_step_packs_its_decodes_beside_its_chunks() -> None:
    chunks = (Chunk(1, 5, (7,)), Chunk(0, 2, (9,)))
    packed = [Step(chunks, n_tokens=n).pack() for n in (0, 1, 2)]
    assert len({tuple(p) for p in packed}) == 3
    assert [Step.unpack(p).n_tokens for p in packed] == [0, 1, 2]
    assert all(Step.unpack(p).chunks == chunks for p in packed)


def test_step_packs_are_different_for_different_steps() -> None:
    steps = [draw_step(random.Random(seed)) for seed in range(100)]
    assert len({tuple(step.pack()) for step in steps}) == len(set(steps))


def test_step_asks_for_the_last_logits_unless_told_otherwise() -> None:
    assert Step((Chunk(0, 0, (1,)),)).logits == "last"
    assert Step((Chunk(0, 0, (1,)),)).n_tokens == 0


def test_chunk_span_is_its_place_and_length() -> None:
    assert Chunk(2, 9, (4, 4, 4)).span == Span(2, 9, 3)
