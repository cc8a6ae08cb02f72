"""Another cache for a loaded model, as bench takes one for each shape that it measures."""

from typing import Any

import pytest

from mistral_chat.cli.bench.measure import prefill_flops, with_cache
from mistral_chat.config import SamplingParams
from mistral_chat.engine.engine import Engine, Request, Token
from mistral_chat.engine.ranks.group import Group, Place
from mistral_chat.engine.runner import Runner
from mistral_chat.errors import UsageError
from mistral_chat.model.formats import as_asked
from mistral_chat.model.transformer import Transformer
from tests.engine.test_decoder import draw_ids, greedy_by_hand, make_decoding
from tests.model.quantized_files import SHAPE


def answer(runner: Runner, ids: list[int]) -> list[int]:
    params = SamplingParams(temperature=0, max_tokens=6)
    events = Engine(runner).generate(Request(ids=ids, params=params))
    return [event.id for event in events if isinstance(event, Token)]


def test_another_cache_decodes_from_the_device_as_the_first_did() -> None:
    _, first = make_decoding(max_seq_len=16)
    runner = with_cache(first, 2, 50)
    assert answer(runner, draw_ids(20)) == greedy_by_hand(draw_ids(20), 6)
    assert runner.decoder is not None
    assert runner.path == "one by one"
    assert (runner.cache.n_slots, runner.max_seq_len) == (2, 50)
    assert runner.cache.k.isfinite().all()
    with pytest.raises(UsageError, match="closed"):
        _ = first.model  # its memory has gone to the second


@pytest.mark.parametrize("asked", ["none", "fp8", "int8", "int4"])
def test_operations_of_a_prompt_do_not_depend_on_how_matrices_are_held(asked: Any) -> None:
    args = as_asked(SHAPE, asked)
    runner = Runner(
        Transformer(args), Group(Place()), max_batch_size=1, max_seq_len=8, chunk_size=8
    )
    numbers = SHAPE.n_params - 2 * SHAPE.vocab_size * SHAPE.dim
    norms = (2 * SHAPE.n_layers + 1) * SHAPE.dim
    assert prefill_flops(runner, 10) == 2 * 10 * (numbers - norms)


def test_cached_ids_are_not_run_again() -> None:
    """What bench builds on: a long context costs nothing before its first token."""
    _, runner = make_decoding(n_slots=2)
    runner.cache.k.normal_()
    runner.cache.v.normal_()
    ids = [draw_ids(9), draw_ids(12)]
    engine = Engine(runner, cached=[ids[1], ids[0]])
    steps: list[int] = []
    run = runner.run
    runner.run = lambda step: steps.append(sum(len(c.tokens) for c in step.chunks)) or run(step)  # type: ignore[func-returns-value,method-assign]
    requests = [Request(ids=one, params=SamplingParams(max_tokens=1)) for one in ids]
    assert len([e for _, e in engine.generate_many(requests) if isinstance(e, Token)]) == 2
    assert sum(steps) == 2  # the last token of each alone
