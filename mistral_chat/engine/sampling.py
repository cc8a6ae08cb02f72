"""Chooses a token from logits, on rank 0 only; the other ranks receive it.

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

NO_TOKEN = -1  # a device's choice if logits are NaN or infinite


@dataclass(frozen=True, slots=True)
class Choice:
    """A chosen token.

    Args:
        id: its id.
        logprob: natural log of its probability before temperature and filters; None when not
            asked for.
        top: the most likely ids with their log-probabilities, most likely first.
    """

    id: int
    logprob: float | None
    top: tuple[tuple[int, float], ...]


def check_finite(logits: Tensor) -> None:
    """Refuse logits that are NaN or infinite: any choice among them would look like an answer.

    Args:
        logits: of any shape, before tokens are banned.

    Raises:
        CheckpointError: one of them is NaN or infinite.
    """
    if not math.isfinite(float(logits.sum())):  # a sum keeps NaN and infinity
        raise no_numbers()


def no_numbers() -> CheckpointError:
    """The error for logits that are NaN or infinite."""
    return CheckpointError(
        "the model's scores are no numbers (NaN or infinite), so that there is no answer: its "
        "weights are damaged, or too large for their type here; fetch them again, or try "
        "--dtype float32"
    )


class Draws:
    """Random numbers of one answer, one for each token.

    A token gets the same number whether it is chosen on the host or on the device, alone or in a
    batch.

    Args:
        seed: of the numbers; None draws a seed.
    """

    def __init__(self, seed: int | None) -> None:
        self._random = random.Random(secrets.randbits(63) if seed is None else seed)

    def next(self) -> float:
        """The number of the next token, in [0, 1), exact in float32."""
        return self._random.getrandbits(24) / (1 << 24)


def settings_of(params: SamplingParams) -> tuple[float, float, float, float]:
    """The settings in the order of `kernels.ops.sample`."""
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
    """Choose one token, by the same operation as a device between its steps.

    Args:
        logits: (V,) float32.
        params: temperature and filters.
        allowed: (ceil(V / 32),) int32 on CPU: ids that may be chosen, as `allowed_words` has them.
        uniform: random number in [0, 1): the token is the first, by id, at which the sum of
            probabilities exceeds it; unused when greedy.

    Raises:
        CheckpointError: the logit of an allowed token is NaN or infinite; with log-probabilities,
            that of any token.
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
