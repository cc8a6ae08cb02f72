"""What a JSON schema costs: the same decode steps with its masks and without.

Measures answers of the engine as in a chat; prints nothing.
"""

import statistics
import time
from dataclasses import replace
from itertools import pairwise
from typing import Any

from torch import Tensor

from mistral_chat.chat.chat import make_request
from mistral_chat.chat.schema.grammar import Grammar
from mistral_chat.chat.tokenizer import Tokenizer
from mistral_chat.cli.bench import measure
from mistral_chat.config import SamplingParams
from mistral_chat.engine.engine import Engine, Request, Token, TokenMask
from mistral_chat.engine.runner import Runner

__all__ = ["beside_free_text"]

MOST_ANSWERS = 100  # of a schema that has short ones


class _Timed:
    """A mask that records its seconds for each token."""

    def __init__(self, mask: TokenMask, taken: list[float]) -> None:
        self._mask = mask
        self._taken = taken
        self._spent = 0.0

    def allowed(self) -> Tensor:
        """`TokenMask.allowed`."""
        begin = time.perf_counter()
        words = self._mask.allowed()
        self._spent = time.perf_counter() - begin
        return words

    def take(self, token: int) -> None:
        """`TokenMask.take`."""
        begin = time.perf_counter()
        self._mask.take(token)
        self._taken.append(self._spent + time.perf_counter() - begin)


def _gaps(runner: Runner, request: Request) -> list[float]:
    """Seconds between one token and the next."""
    engine = Engine(runner, cached=[request.ids])
    at = [time.perf_counter() for e in engine.generate(request) if isinstance(e, Token)]
    return [after - before for before, after in pairwise(at)]


def beside_free_text(
    engine: Engine, tokenizer: Tokenizer, grammar: Grammar, context: int, n_tokens: int
) -> dict[str, Any]:
    """Decode answers of a schema and free text in turn.

    Args:
        engine: of the model.
        tokenizer: of the same model.
        grammar: of the schema.
        context: positions before each answer.
        n_tokens: most of one answer; three times as many are decoded in all, unless the schema's
            answers are too short.

    Returns:
        `tokens` decoded, medians of `ms_per_token` and `free_ms_per_token`, and the time that masks
        took on rank 0: the mean `mask_ms` per token, and `mask_ms_p99`.
    """
    kept: list[float] = []
    free: list[float] = []
    taken: list[float] = []
    turn = 0
    while len(kept) < 3 * n_tokens and turn < MOST_ANSWERS:
        ids = measure.prompt(engine.runner, context, seed=turn)
        params = SamplingParams(max_tokens=n_tokens, temperature=1.5, seed=turn)
        request, _ = make_request(
            engine, tokenizer, ids, params, instruct=True, tools=False, grammar=grammar
        )
        assert request.mask is not None
        request.mask = _Timed(request.mask, taken)
        kept += _gaps(engine.runner, request)
        params = replace(params, ignore_eos=True)
        free += _gaps(
            engine.runner,
            make_request(engine, tokenizer, ids, params, instruct=True, tools=False)[0],
        )
        turn += 1
    return {
        "context": context,
        "tokens": len(taken),
        "ms_per_token": statistics.median(kept) * 1e3,
        "free_ms_per_token": statistics.median(free) * 1e3,
        "mask_ms": statistics.mean(taken) * 1e3,
        "mask_ms_p99": sorted(taken)[int(0.99 * len(taken))] * 1e3,
    }
