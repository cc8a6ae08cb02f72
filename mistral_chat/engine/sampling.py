"""Choosing a token from logits. Runs on rank 0 alone; the others are told.

Shapes: V = vocabulary.
"""

import math
import random
import secrets
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from mistral_chat.config import SamplingParams
from mistral_chat.errors import CheckpointError

__all__ = [
    "NO_TOKEN",
    "Choice",
    "Draws",
    "allowed_words",
    "check_finite",
    "choose",
    "log_probability",
    "no_numbers",
    "probabilities",
]

LEAST_TEMPERATURE = 1e-5  # below it every draw is the most likely token
NO_TOKEN = -1  # what a device chooses where logits are no numbers


@dataclass(frozen=True, slots=True)
class Choice:
    """A chosen token.

    Args:
        id: its id.
        logprob: natural log of the model's own probability of it (before temperature and
            filters); None when not asked for.
        top: the most likely ids with their log-probabilities, most likely first.
    """

    id: int
    logprob: float | None
    top: tuple[tuple[int, float], ...]


def probabilities(logits: Tensor, params: SamplingParams) -> Tensor:
    """What a token is drawn from, at a temperature above 0.

    Temperature comes first, then min_p, top_k and top_p on what is left, as in vLLM. The most
    likely token always stays.

    Args:
        logits: (V,) float32.
        params: their temperature, top_k, top_p and min_p.

    Returns:
        (V,) that sum to 1.
    """
    # The largest becomes 0, so that no temperature makes an infinity of it.
    spread = (logits - logits.max()) / max(params.temperature, LEAST_TEMPERATURE)
    probs = torch.softmax(spread, dim=-1)
    if params.min_p > 0:
        probs = probs.masked_fill(probs < params.min_p * probs.max(), 0)
    if params.top_k or params.top_p < 1:
        n_kept = min(params.top_k or len(probs), len(probs))
        sorted_probs, ids = probs.topk(n_kept)
        if params.top_p < 1:
            share = sorted_probs / sorted_probs.sum()
            ahead = share.cumsum(0) - share
            ahead[0] = -1  # also where top_p is 0 in float32
            sorted_probs = sorted_probs.masked_fill(ahead >= params.top_p, 0)
        probs = torch.zeros_like(probs).scatter_(0, ids, sorted_probs)
    return probs / probs.sum()


def check_finite(logits: Tensor) -> None:
    """Refuse to choose from scores that are no numbers: any choice would look like an answer.

    Args:
        logits: of any shape, before a token is banned.

    Raises:
        CheckpointError: one of them is NaN or infinite.
    """
    if not math.isfinite(float(logits.sum())):  # both stay what they are in a sum
        raise no_numbers()


def no_numbers() -> CheckpointError:
    """The error of an answer that would come of NaN."""
    return CheckpointError(
        "the model's scores are no numbers (NaN or infinite), so that there is no answer: its "
        "weights are damaged, or too large for their type here; fetch them again, or try "
        "--dtype float32"
    )


class Draws:
    """Random numbers of one answer, one for each of its tokens: however a token is chosen, on the
    host or on the device, alone or in a batch, it takes the same number.

    Args:
        seed: where they come from; None draws one.
    """

    def __init__(self, seed: int | None) -> None:
        self._random = random.Random(secrets.randbits(63) if seed is None else seed)

    def next(self) -> float:
        """The next token's, in [0, 1), exact in float32."""
        return self._random.getrandbits(24) / (1 << 24)


def allowed_words(vocab_size: int, banned_ids: Sequence[int]) -> Tensor:
    """Bit mask of the ids that may be chosen.

    Returns:
        (ceil(vocab_size / 32),) int32, bit i % 32 of word i // 32 for id i.
    """
    bits = np.zeros(-(-vocab_size // 32) * 32, dtype=np.uint8)
    bits[:vocab_size] = 1
    bits[list(banned_ids)] = 0
    return torch.from_numpy(np.packbits(bits, bitorder="little").view("<i4").copy())


def choose(logits: Tensor, params: SamplingParams, banned: Tensor | None, uniform: float) -> Choice:
    """Choose one token.

    Args:
        logits: (V,) float32.
        params: how.
        banned: ids never to choose, (n,); None bans nothing.
        uniform: random number in [0, 1): the token is the first, by id, at which the sum of
            probabilities passes it; not used when greedy.
    """
    allowed = logits if banned is None else logits.index_fill(0, banned, -torch.inf)
    if params.temperature == 0:
        chosen = int(allowed.argmax())
    else:
        sums = probabilities(allowed, params).cumsum(0)
        chosen = int((sums > uniform * sums[-1]).to(torch.uint8).argmax())
    if params.logprobs is None:
        return Choice(chosen, None, ())
    logprobs = torch.log_softmax(logits, dim=-1)
    values, ids = logprobs.topk(min(params.logprobs, len(logprobs)))
    top = tuple(zip(ids.tolist(), values.tolist(), strict=True))
    return Choice(chosen, float(logprobs[chosen]), top)


def log_probability(logits: Tensor, tokens: Tensor) -> list[float]:
    """Natural log of each token's probability.

    Args:
        logits: (T, V) float32.
        tokens: (T,) ids, each scored by its row.
    """
    rows = torch.log_softmax(logits, dim=-1)
    found: list[float] = rows.gather(1, tokens.to(logits.device).unsqueeze(1)).squeeze(1).tolist()
    return found
