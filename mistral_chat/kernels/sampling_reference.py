"""Sampling in plain torch: the specification of `sampling.sample`.

Knows logits, masks and numbers in [0, 1), not where any of them comes from. It sorts, and sums in
float64, so that it is the kernel's law rather than its twin. What no row asks for is left out: CPU
runs choose with it.

Shapes: T = rows, one token each, V = vocabulary.
"""

import numpy as np
import torch
from torch import Tensor

__all__ = ["LEAST_TEMPERATURE", "sample_reference", "unpack_allowed"]

LEAST_TEMPERATURE = 1e-5  # below it every draw is the most likely token
FEW = 256  # tokens that top_p is tried with first


def unpack_allowed(allowed: Tensor, vocab_size: int) -> Tensor:
    """Bit masks as booleans: (T, ceil(V / 32)) int32 -> (T, V)."""
    if allowed.device.type == "cpu":  # numpy is some twenty times as fast
        words = np.ascontiguousarray(allowed.numpy()).view(np.uint8)
        bits = np.unpackbits(words, axis=1, count=vocab_size, bitorder="little")
        return torch.from_numpy(bits.view(np.bool_))
    places = torch.arange(32, device=allowed.device, dtype=torch.int32)
    ones = (allowed.unsqueeze(-1) >> places) & 1  # (T, ceil(V / 32), 32)
    return ones.flatten(1)[:, :vocab_size].bool()


def _kept(logits: Tensor, params: Tensor) -> Tensor:
    """What is drawn from: the largest of each row is 1, and what a filter drops is 0.

    Tokens as likely as the last one kept stay too.
    """
    temperature, top_p, min_p, top_k = params.unsqueeze(-1).unbind(1)  # (T, 1) each
    # The largest becomes 0, so that no temperature makes an infinity of it.
    spread = (logits - logits.amax(1, keepdim=True)) / temperature.clamp(min=LEAST_TEMPERATURE)
    probs = spread.exp()
    if bool((min_p > 0).any()):
        probs = probs.masked_fill(probs < min_p, 0)
    if bool((top_k > 0).any()):
        probs = probs.masked_fill(probs < _least_of_top_k(probs, top_k), 0)
    if bool((top_p < 1).any()):
        probs = probs.masked_fill(probs < _least_of_top_p(probs, top_p), 0)
    return probs


def _least_of_top_k(probs: Tensor, top_k: Tensor) -> Tensor:
    n_kept = top_k.clamp(min=1, max=probs.shape[1]).long()
    ordered = probs.topk(int(n_kept.max())).values
    return torch.where(top_k > 0, ordered.gather(1, n_kept - 1), 0)


def _least_of_top_p(probs: Tensor, top_p: Tensor) -> Tensor:
    """Found among the most likely, of which mostly few are needed."""
    goal = top_p * probs.sum(1, keepdim=True, dtype=torch.float64)
    n = 0
    while True:
        n = min(probs.shape[1], 16 * n or FEW)
        ordered = probs.topk(n).values
        sums = ordered.cumsum(1, dtype=torch.float64)
        needed = sums - ordered < goal  # by those more likely, and by equals before it
        if n == probs.shape[1] or not bool((needed[:, -1:] & (top_p < 1)).any()):
            break
    n_kept = needed.sum(1, keepdim=True).clamp(min=1)
    return torch.where(top_p < 1, ordered.gather(1, n_kept - 1), 0)


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
    highest, chosen = masked.max(1)
    is_drawn = params[:, 0] != 0
    if bool(is_drawn.any()):
        probs = _kept(masked, params)
        sums = probs.cumsum(1, dtype=torch.float64)
        goal = uniforms.unsqueeze(1).double() * sums[:, -1:]
        drawn = torch.searchsorted(sums, goal, right=True)  # the first whose sum is beyond it
        if bool((drawn == probs.shape[1]).any()):  # rounding keeps the sum from its goal
            ids = torch.arange(probs.shape[1], device=probs.device)
            drawn = drawn.minimum(torch.where(probs > 0, ids, 0).amax(1, keepdim=True))
        chosen = torch.where(is_drawn, drawn.squeeze(1), chosen)
    broken = highest.isnan() | (highest == torch.inf)  # the largest beside NaN is NaN
    return torch.where(broken, -1, chosen)
