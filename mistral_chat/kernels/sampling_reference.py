"""Sampling in plain torch: the specification of `sampling.sample`.

Knows logits, masks and numbers in [0, 1), not where any of them comes from. It sorts, and sums in
float64, so that it is the kernel's law rather than its twin.

Shapes: T = rows, one token each, V = vocabulary.
"""

import torch
from torch import Tensor

__all__ = ["LEAST_TEMPERATURE", "kept_probabilities", "sample_reference", "unpack_allowed"]

LEAST_TEMPERATURE = 1e-5  # below it every draw is the most likely token


def unpack_allowed(allowed: Tensor, vocab_size: int) -> Tensor:
    """Bit masks as booleans: (T, ceil(V / 32)) int32 -> (T, V)."""
    bits = torch.arange(32, device=allowed.device, dtype=torch.int32)
    ones = (allowed.unsqueeze(-1) >> bits) & 1  # (T, ceil(V / 32), 32)
    return ones.flatten(1)[:, :vocab_size].bool()


def kept_probabilities(logits: Tensor, allowed: Tensor, params: Tensor) -> Tensor:
    """What `sample_reference` draws from at temperatures above 0.

    Args:
        logits: (T, V) float32.
        allowed: (T, ceil(V / 32)) int32.
        params: (T, 4) float32: temperature, top_p, min_p, top_k.

    Returns:
        (T, V) float32, the largest of each row 1 and 0 for what a filter drops. Tokens as likely
        as the last one kept stay too.
    """
    vocab_size = logits.shape[1]
    temperature, top_p, min_p, top_k = params.unsqueeze(-1).unbind(1)  # (T, 1) each
    logits = logits.masked_fill(~unpack_allowed(allowed, vocab_size), -torch.inf)
    # The largest becomes 0, so that no temperature makes an infinity of it.
    spread = (logits - logits.amax(1, keepdim=True)) / temperature.clamp(min=LEAST_TEMPERATURE)
    probs = spread.exp()
    probs = probs.masked_fill(probs < min_p, 0)

    ordered = probs.sort(dim=1, descending=True).values
    n_kept = torch.where(top_k > 0, top_k, vocab_size).clamp(max=vocab_size).long()
    probs = probs.masked_fill(probs < ordered.gather(1, n_kept - 1), 0)

    ordered = probs.sort(dim=1, descending=True).values.double()
    ahead = ordered.cumsum(1) - ordered  # of those more likely, and of equals before it
    needed = ahead < top_p * ordered.sum(1, keepdim=True)
    needed |= top_p >= 1
    n_kept = needed.sum(1, keepdim=True).clamp(min=1)
    return probs.masked_fill(probs < ordered.gather(1, n_kept - 1), 0)


def sample_reference(logits: Tensor, allowed: Tensor, params: Tensor, uniforms: Tensor) -> Tensor:
    """Draw one token from each row.

    Temperature comes first, then min_p, top_k and top_p on what is left, as in vLLM. The draw
    inverts the cumulative sum in order of ids.

    Args:
        logits: (T, V) float32, finite or -inf; a row with anything else chooses no token.
        allowed: (T, ceil(V / 32)) int32: token i of a row may be chosen where bit i % 32 of word
            i // 32 is set (llguidance's layout). Each row allows one token at least.
        params: (T, 4) float32: temperature (0 takes the highest logit, the lowest id on a tie),
            top_p (1 is off), min_p (0 is off), top_k (0 is off).
        uniforms: (T,) float32 in [0, 1), where in its distribution each row is drawn.

    Returns:
        (T,) int64 ids; -1 where NaN or +inf may be chosen.
    """
    masked = logits.masked_fill(~unpack_allowed(allowed, logits.shape[1]), -torch.inf)
    greedy = (masked == masked.amax(1, keepdim=True)).int().argmax(1)

    probs = kept_probabilities(logits, allowed, params).double()
    sums = probs.cumsum(1)  # (T, V)
    beyond = (sums > uniforms.unsqueeze(1) * sums[:, -1:]) & (probs > 0)
    ids = torch.arange(logits.shape[1], device=logits.device)
    last = torch.where(probs > 0, ids, 0).amax(1)
    drawn = torch.where(beyond.any(1), beyond.int().argmax(1), last)
    broken = masked.isnan().any(1) | (masked.amax(1) == torch.inf)
    return torch.where(broken, -1, torch.where(params[:, 0] == 0, greedy, drawn))
