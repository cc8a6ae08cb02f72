"""Sampling on the GPU: one kernel from logits to ids. Reference: `sampling_reference`.

Knows logits, masks and numbers in [0, 1), not where any of them comes from. Nothing waits for the
host and nothing is allocated, so that a CUDA graph can hold it.

A sort would cost more than all the rest. Probabilities are not negative, so that their bits, read
as integers, have their order, and a filter is the least bits that it keeps: bisection finds those
in 30 rounds at most, to the last bit.

Shapes: T = rows, one program each, V = vocabulary, n = mask words in a block, 32 tokens each.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from mistral_chat.kernels.sampling_reference import LEAST_TEMPERATURE

__all__ = ["sample"]

RESIDENT_VOCAB = 32768  # a row up to this stays in registers, 32 of them in each of 1024 threads
STREAMED_BLOCK = 8192  # of longer rows, which are read anew each round: little lost at their end
N_WARPS = 32

WORD = tl.constexpr(32)  # tokens of a mask word
ONE_BITS = tl.constexpr(0x3F800000)  # float32 1, the largest probability
LOG2_E = tl.constexpr(1.4426950408889634)
COLDEST = tl.constexpr(LEAST_TEMPERATURE)


def sample(logits: Tensor, allowed: Tensor, params: Tensor, uniforms: Tensor, out: Tensor) -> None:
    """Draw one token from each row.

    `out.copy_(sample_reference(logits, allowed, params, uniforms))`

    Sums are float32 in the kernel's own order, so that a token on the edge of top_p, or next to
    the one drawn, can come out differently from the reference. An id outside the mask cannot.

    Args:
        logits: (T, V) float32, finite or -inf; rows may be any stride apart. A row with anything
            else that is allowed chooses -1.
        allowed: (T, ceil(V / 32)) int32, bit i % 32 of word i // 32 for token i.
        params: (T, 4) float32: temperature, top_p, min_p, top_k.
        uniforms: (T,) float32 in [0, 1).
        out: (T,) int64, written.
    """
    n_rows, vocab_size = logits.shape
    assert logits.dtype == params.dtype == uniforms.dtype == torch.float32
    assert allowed.dtype == torch.int32
    assert out.dtype == torch.int64
    assert allowed.shape == (n_rows, triton.cdiv(vocab_size, 32))
    assert params.shape == (n_rows, 4)
    assert uniforms.shape == out.shape == (n_rows,)
    assert logits.stride(1) == allowed.stride(1) == 1
    assert params.is_contiguous()
    assert uniforms.is_contiguous()
    assert out.is_contiguous()
    if n_rows == 0:
        return
    resident = vocab_size <= RESIDENT_VOCAB
    block = max(32, triton.next_power_of_2(vocab_size)) if resident else STREAMED_BLOCK
    _sample[(n_rows,)](
        logits,
        logits.stride(0),
        allowed,
        allowed.stride(0),
        params,
        uniforms,
        out,
        vocab_size,
        n=block // 32,
        in_registers=resident,
        num_warps=max(1, min(N_WARPS, block // 256)),
    )


@triton.jit
def _masked_logits(logits, allowed, words, vocab_size):
    """Logits of the tokens of mask words, (n,) -> (n, 32); -inf where one may not be chosen."""
    bit = tl.arange(0, WORD)[None, :]
    ids = words[:, None] * WORD + bit  # (n, 32)
    mask = tl.load(allowed + words, mask=words * WORD < vocab_size, other=0)
    logit = tl.load(logits + ids, mask=ids < vocab_size, other=float("-inf"))
    return tl.where(((mask[:, None] >> bit) & 1) != 0, logit, float("-inf"))


@triton.jit
def _probabilities(logit, highest, scale):
    return tl.exp2((logit - highest) * scale)


@triton.jit
def _sums(row, least, n: tl.constexpr, in_registers: tl.constexpr):
    """Sum and number of the probabilities whose bits are `least` or more."""
    resident, logits, allowed, vocab_size, highest, scale = row
    if in_registers:
        kept = resident.to(tl.int32, bitcast=True) >= least
        total = tl.where(kept, resident, 0.0)
        number = kept.to(tl.int32)
    else:
        total = tl.zeros((n, WORD), tl.float32)
        number = tl.zeros((n, WORD), tl.int32)
        for first in range(0, tl.cdiv(vocab_size, WORD), n):
            logit = _masked_logits(logits, allowed, first + tl.arange(0, n), vocab_size)
            probs = _probabilities(logit, highest, scale)
            kept = probs.to(tl.int32, bitcast=True) >= least
            total += tl.where(kept, probs, 0.0)
            number += kept.to(tl.int32)
    return tl.sum(total), tl.sum(number)


@triton.jit
def _raise_least(
    row, least, total, number, amount,
    by_number: tl.constexpr, n: tl.constexpr, in_registers: tl.constexpr,
):  # fmt: skip
    """The largest `least` that still keeps `amount`, by number or by sum, of the probabilities.

    `total` and `number` are the sums of the given one; those of the new one come back with it.
    With one token between the bounds the search is over: it is the last to stay.
    """
    over = tl.full((), ONE_BITS + 1, tl.int32)  # keeps too little
    n_over = number * 0
    while (over - least > 1) & (number - n_over > 1):
        middle = least + (over - least) // 2
        middle_total, middle_number = _sums(row, middle, n, in_registers)
        enough = (middle_number if by_number else middle_total) >= amount
        over = tl.where(enough, over, middle)
        n_over = tl.where(enough, n_over, middle_number)
        least = tl.where(enough, middle, least)
        total = tl.where(enough, middle_total, total)
        number = tl.where(enough, middle_number, number)
    return least, total, number


@triton.jit
def _sample(
    logits, logits_stride, allowed, allowed_stride, params_ptr, uniforms, out, vocab_size,
    n: tl.constexpr, in_registers: tl.constexpr,
):  # fmt: skip
    at = tl.program_id(0).to(tl.int64)
    logits += at * logits_stride
    allowed += at * allowed_stride
    params_ptr += at * 4
    temperature = tl.load(params_ptr)
    n_words = tl.cdiv(vocab_size, WORD)

    best = _masked_logits(logits, allowed, tl.arange(0, n), vocab_size)  # (n, 32)
    no_number = (best != best) | (best == float("inf"))
    first_best = tl.zeros((n, WORD), tl.int32)  # first word of the block that has it
    if not in_registers:
        for first in range(n, n_words, n):
            logit = _masked_logits(logits, allowed, first + tl.arange(0, n), vocab_size)
            no_number |= (logit != logit) | (logit == float("inf"))
            first_best = tl.where(logit > best, first, first_best)
            best = tl.where(logit > best, logit, best)
    highest = tl.max(best)

    if temperature == 0:
        best_ids = (first_best + tl.arange(0, n)[:, None]) * WORD + tl.arange(0, WORD)[None, :]
        chosen = tl.min(tl.where(best == highest, best_ids, vocab_size - 1))
    else:
        scale = LOG2_E / tl.maximum(temperature, COLDEST)
        top_p = tl.load(params_ptr + 1)
        min_p = tl.load(params_ptr + 2)
        top_k = tl.load(params_ptr + 3)
        resident = _probabilities(best, highest, scale)  # of use where the row is one block
        row = (resident, logits, allowed, vocab_size, highest, scale)

        # The bits of min_p are its filter; 1 drops zeros alone.
        least = tl.minimum(tl.maximum(min_p.to(tl.int32, bitcast=True), 1), ONE_BITS)
        total, number = _sums(row, least, n, in_registers)
        if (top_k > 0) & (top_k < number):
            least, total, number = _raise_least(
                row, least, total, number, top_k, True, n, in_registers
            )
        if top_p < 1:
            least, total, number = _raise_least(
                row, least, total, number, top_p * total, False, n, in_registers
            )

        # The word in which the cumulative sum passes its goal. Sums in another order may differ in
        # the last bit, so a word or token counts only if it has a part in the sum.
        goal = tl.load(uniforms + at) * total
        word = n_words
        last_word = n_words * 0
        before = goal * 0
        last_before = goal * 0
        first = n_words * 0
        while (first < n_words) & (word == n_words):
            words = first + tl.arange(0, n)
            if in_registers:
                probs = resident
            else:
                logit = _masked_logits(logits, allowed, words, vocab_size)
                probs = _probabilities(logit, highest, scale)
            kept = probs.to(tl.int32, bitcast=True) >= least
            by_word = tl.sum(tl.where(kept, probs, 0.0), axis=1)  # (n,)
            passed = (before + tl.cumsum(by_word, axis=0) > goal) & (by_word > 0)
            word = tl.min(tl.where(passed, words, n_words))
            last_word = tl.maximum(last_word, tl.max(tl.where(by_word > 0, words, 0)))
            last_before = before + tl.sum(tl.where(words < word, by_word, 0.0))
            before += tl.sum(by_word)
            first += n

        # Then the token in that word; where rounding keeps the sum from its goal, the last kept.
        goal = tl.where(word < n_words, goal, float("inf"))
        word = tl.where(word < n_words, word, last_word)
        logit = _masked_logits(logits, allowed, word + tl.arange(0, 1), vocab_size)
        probs = _probabilities(logit, highest, scale)  # (1, 32)
        kept = probs.to(tl.int32, bitcast=True) >= least
        sums = last_before + tl.cumsum(tl.where(kept, probs, 0.0), axis=1)
        ids = word * WORD + tl.arange(0, WORD)[None, :]
        last = tl.max(tl.where(kept, ids, 0))
        chosen = tl.min(tl.where(kept & (sums > goal), ids, last))
    chosen = tl.where(tl.max(no_number.to(tl.int32)) > 0, -1, chosen)
    tl.store(out + at, chosen.to(tl.int64))
