"""The forward pass of few tokens: everything it depends on lies on the device.

The same numbers as `Transformer.forward`, from kernels that read positions, slots and tokens from
tensors, so that it can be captured once and run for any. No ranks, no process groups.

Shapes: N = spans (one sequence each), T = tokens of a span, R = N * T rows.
"""

from types import ModuleType
from typing import Any, Protocol

import torch
from torch import Tensor

from mistral_chat.kernels import fused_reference, ops, reference
from mistral_chat.model.cache import KVCache
from mistral_chat.model.transformer import Transformer

__all__ = ["MOST_ROWS", "FewRows", "RowCollective", "supports"]

MOST_ROWS = 32


class RowCollective(Protocol):
    """How partial results of few rows become whole ones; can be captured in a graph."""

    def reduce_add_norm(
        self, partial: Tensor, residual: Tensor | None, gain: Tensor, eps: float
    ) -> tuple[Any, Tensor]:
        """Sum over ranks, add the residual if there is one, and norm.

        Args:
            partial: (R, dim), may be overwritten.
            residual: (R, dim) or None.
            gain: (dim,) of the norm.
            eps: of the norm.

        Returns:
            the normed rows, in whatever form the next product takes them, and the sum.
        """


def supports(model: Transformer) -> bool:
    """Whether the kernels have this model's head size."""
    head_dim = model.args.head_dim
    return head_dim in (16, 32, 64, 128, 256) and model.args.dim % 2 == 0


class FewRows:
    """Runs few new tokens of one or several sequences.

    Args:
        model: this rank's share.
        cache: its keys and values.
        collective: how ranks sum; None is a single rank.
    """

    def __init__(
        self, model: Transformer, cache: KVCache, collective: RowCollective | None
    ) -> None:
        self.model = model
        self.cache = cache
        self.collective = collective
        device, args, shard = model.device, model.args, model.shard
        self._ops = _operations(device)
        self._frequencies = reference.rope_frequencies(args.head_dim, args.theta, device)
        counts = torch.tensor(shard.queries_by_kv_head)
        first_heads = torch.cat([torch.zeros(1, dtype=torch.int64), counts.cumsum(0)])
        self._first_heads = first_heads.to(device, torch.int32)
        self._kv_heads = torch.arange(len(counts)).repeat_interleave(counts).to(device, torch.int32)
        self._group = int(counts.max())
        self._whole_vocab = len(shard.vocab) == args.vocab_size
        blocks = model.blocks
        self._gains = [block.attention_norm for block in blocks] + [model.norm]

    @torch.inference_mode()
    def forward(self, tokens: Tensor, slots: Tensor, starts: Tensor, lengths: Tensor) -> Tensor:
        """Run new tokens, keep their keys and values, and score what follows each.

        Args:
            tokens: (R,) int64 ids, T for each span.
            slots: (N,) int32, places in the cache.
            starts: (N,) int32, position of each span's first token.
            lengths: (N,) int32, how many of a span's T tokens are real; 0 is an empty span.

        Returns:
            float32 logits (R, local vocabulary); of no use past a span's length.
        """
        model, run = self.model, self._ops
        eps = model.args.norm_eps
        per_span = len(tokens) // len(slots)
        residual = run.embed(tokens, model.tok_embeddings, model.shard.vocab.start)
        if self.collective and not self._whole_vocab:
            normed, residual = self.collective.reduce_add_norm(residual, None, self._gains[0], eps)
        else:
            normed = run.norm(residual, self._gains[0], eps)
        rotations = run.rotations(starts, per_span, self._frequencies)
        for n, block in enumerate(model.blocks):
            attention, feed_forward = block.attention, block.feed_forward
            qkv = run.linear(normed, attention.wqkv)
            heads = run.attend(
                qkv.view(len(tokens), -1, attention.head_dim),
                self.cache.k[n], self.cache.v[n], rotations, slots, starts, lengths,
                self._first_heads, self._kv_heads, self._group, attention.window,
            )  # fmt: skip
            partial = run.linear(heads, attention.wo)
            normed, residual = self._add_norm(partial, residual, block.ffn_norm)
            partial = run.linear(run.gated(normed, feed_forward.w13), feed_forward.w2)
            normed, residual = self._add_norm(partial, residual, self._gains[n + 1])
        scores: Tensor = run.logits(normed, model.output_weight)
        return scores

    def _add_norm(self, partial: Tensor, residual: Tensor, gain: Tensor) -> tuple[Any, Tensor]:
        """The sum over ranks plus the residual, as the next product takes it, and as it is."""
        eps = self.model.args.norm_eps
        if self.collective:
            return self.collective.reduce_add_norm(partial, residual, gain, eps)
        normed, total = self._ops.add_norm(partial, residual, gain, eps)
        return normed, total


def _operations(device: torch.device) -> ModuleType:
    if ops.has_kernels(device):
        from mistral_chat.kernels import fused

        return fused
    return fused_reference
