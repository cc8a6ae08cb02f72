"""What a token is drawn from, for the laws of `tests/engine` and `tests/kernels`."""

import torch
from torch import Tensor

from mistral_chat.kernels.sampling_reference import _kept, unpack_allowed

__all__ = ["kept_probabilities"]


def kept_probabilities(logits: Tensor, allowed: Tensor, params: Tensor) -> Tensor:
    """What `sample_reference` draws from at temperatures above 0.

    Args:
        logits: (T, V) float32.
        allowed: (T, ceil(V / 32)) int32.
        params: (T, 4) float32: temperature, top_p, min_p, top_k.

    Returns:
        (T, V) float32, the largest of each row 1 and 0 for what a filter drops.
    """
    banned = ~unpack_allowed(allowed, logits.shape[1])
    return _kept(logits.masked_fill(banned, -torch.inf), params)
