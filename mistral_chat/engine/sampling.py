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
from mistral_chat.kernels import ops

__all__ = [
    "NO_TOKEN",
    "Choice",
    "Draws",
    "allowed_words",
    "check_finite",
    "choose",
    "log_probability",
    "no_numbers",
    "settings_of",
]

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


def settings_of(params: SamplingParams) -> tuple[float, float, float, float]:
    """How to choose, in the order that `kernels.ops.sample` takes it in."""
    return params.temperature, params.top_p, params.min_p, params.top_k


def allowed_words(vocab_size: int, banned_ids: Sequence[int]) -> Tensor:
    """Bit mask of the ids that may be chosen.

    Returns:
        (ceil(vocab_size / 32),) int32, bit i % 32 of word i // 32 for id i.
    """
    bits = np.zeros(-(-vocab_size // 32) * 32, dtype=np.uint8)
    bits[:vocab_size] = 1
    bits[list(banned_ids)] = 0
    return torch.from_numpy(np.packbits(bits, bitorder="little").view("<i4").copy())


def choose(logits: Tensor, params: SamplingParams, allowed: Tensor, uniform: float) -> Choice:
    """Choose one token, as a device does in the midst of its steps.

    Args:
        logits: (V,) float32.
        params: how.
        allowed: (ceil(V / 32),) int32 on CPU: ids that may be chosen, as `allowed_words` has them.
        uniform: random number in [0, 1): the token is the first, by id, at which the sum of
            probabilities passes it; not used when greedy.

    Raises:
        CheckpointError: a logit that may be chosen is NaN or infinite or, where log-probabilities
            are asked for, any.
    """
    device = logits.device
    settings = torch.tensor([settings_of(params)], dtype=torch.float32, device=device)
    uniforms = torch.tensor([uniform], dtype=torch.float32, device=device)
    ids = torch.empty(1, dtype=torch.int64, device=device)
    ops.sample(logits[None], allowed[None].to(device), settings, uniforms, ids)
    chosen = int(ids)
    if chosen == NO_TOKEN:
        raise no_numbers()
    if params.logprobs is None:
        return Choice(chosen, None, ())
    check_finite(logits)
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
