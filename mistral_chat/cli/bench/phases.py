"""What `mistral-chat bench` measures of a loaded model, one cache shape after the other.

Uses the engine as a chat does. Knows nothing of argv or of tables.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from mistral_chat.cli.bench import measure
from mistral_chat.engine.engine import Engine
from mistral_chat.engine.runner import Runner

if TYPE_CHECKING:
    from mistral_chat.chat.schema.grammar import Grammar
    from mistral_chat.chat.tokenizer import Tokenizer
    from mistral_chat.cli.requests import BenchRequest

__all__ = ["N_TOKENS", "VERIFY_CONTEXT", "phases"]

N_TOKENS = {"cuda": 64, "cpu": 24}
BATCHES = {"cuda": (1, 2, 4, 8), "cpu": (1, 2)}
VERIFY = (5, 9, 17)
VERIFY_CONTEXT = 512
SCHEMA_CONTEXT, SCHEMA_TOKENS = 512, 96


Phase = tuple[int, int, Callable[[Runner], None]]


def phases(
    request: "BenchRequest",
    kept_to: "tuple[Tokenizer, Grammar] | None",
    runner: Runner,
    ceiling: float,
    result: dict[str, Any],
) -> Iterator[Phase]:
    """What to measure, with the shape of the cache that it takes; the same on every rank.

    Args:
        request: what to measure: batches, contexts as far as they fit, prompts.
        kept_to: tokenizer and schema of constrained answers; None measures none.
        runner: of this rank.
        ceiling: bytes a second that a rank can read.
        result: gets rank 0's figures.

    Yields:
        slots, positions per slot, and what rank 0 does with a runner of that shape.
    """
    plan = runner.plan
    assert plan is not None
    device_type = runner.model.device.type
    n_tokens = N_TOKENS[device_type]
    room = plan.max_seq_len
    for batch in request.batches or BATCHES[device_type]:
        contexts = [c for c in request.contexts if batch * (c + n_tokens) <= room]
        if not contexts:
            continue

        def decode(runner: Runner, batch: int = batch, contexts: Sequence[int] = contexts) -> None:
            for context in contexts:
                seconds = measure.decode_s(runner, batch, context, n_tokens)
                n_bytes = measure.bytes_per_step(runner, batch, context)
                result["decode"].append(
                    {
                        "batch": batch,
                        "context": context,
                        "ms_per_token": seconds * 1e3,
                        "tokens_per_s": batch / seconds,
                        "bytes_per_step": n_bytes,
                        "share_of_read_ceiling": n_bytes / seconds / ceiling,
                    }
                )

        yield batch, max(contexts) + n_tokens, decode

    prompts = [n for n in request.prompts if n < room]

    def one_sequence(runner: Runner) -> None:
        engine = Engine(runner)
        result["first_token"] = [_first_token(engine, n, result) for n in prompts]
        if VERIFY_CONTEXT + max(VERIFY) < runner.max_seq_len:
            result["verify"] = _verify(runner)
        if kept_to is not None:
            from mistral_chat.cli.bench import schema as bench_schema

            context = min(SCHEMA_CONTEXT, runner.max_seq_len - SCHEMA_TOKENS)
            result["json_schema"] = bench_schema.beside_free_text(
                engine, *kept_to, context, SCHEMA_TOKENS
            )

    most = max([*prompts, VERIFY_CONTEXT]) + max(VERIFY)
    if kept_to is not None:
        most = max(most, SCHEMA_CONTEXT + SCHEMA_TOKENS)
    yield 1, min(room, most + 1), one_sequence


def _first_token(engine: Engine, length: int, result: dict[str, Any]) -> dict[str, Any]:
    seconds = measure.first_token_s(engine, length)
    tflop_per_s = measure.prefill_flops(engine.runner, length) / seconds / 1e12
    return {
        "prompt": length,
        "first_token_s": seconds,
        "tflop_per_s": tflop_per_s,
        "share_of_product_ceiling": tflop_per_s / result["product_tflop_per_s"],
    }


def _verify(runner: Runner) -> list[dict[str, Any]]:
    one = measure.verify_s(runner, 1, VERIFY_CONTEXT)
    rows = []
    for n in VERIFY:
        seconds = measure.verify_s(runner, n, VERIFY_CONTEXT)
        rows.append({"tokens": n, "ms": seconds * 1e3, "of_one_token": seconds / one})
    return rows
