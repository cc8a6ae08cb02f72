"""The dense transformer, as one rank holds it. Knows its local sizes; no ranks, no process groups.

What crosses ranks is visible: the two callables of `Collective`, called twice a layer and once
for the embedding. Shapes: T = new tokens of a step, over all its sequences.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mistral_chat.kernels import ops, reference
from mistral_chat.model.args import TransformerArgs
from mistral_chat.model.cache import KVCache
from mistral_chat.model.sharding import Placement, Shard, placements

__all__ = ["Alone", "Collective", "Span", "Transformer", "WhichLogits"]

WhichLogits = Literal["none", "last", "all"]


class Collective(Protocol):
    """How partial results of ranks become whole ones."""

    def all_reduce(self, partial: Tensor) -> Tensor:
        """Sum `partial` over ranks; may overwrite it."""

    def reduce_add_norm(
        self, partial: Tensor, residual: Tensor, weight: Tensor, eps: float
    ) -> tuple[Tensor, Tensor]:
        """`reference.add_norm` of the sum of `partial` over ranks."""


class Alone:
    """The collective of a single rank."""

    def all_reduce(self, partial: Tensor) -> Tensor:
        """The partial result is the whole one."""
        return partial

    def reduce_add_norm(
        self, partial: Tensor, residual: Tensor, weight: Tensor, eps: float
    ) -> tuple[Tensor, Tensor]:
        """`reference.add_norm`."""
        return ops.add_norm(partial, residual, weight, eps)


@dataclass(frozen=True, slots=True)
class Span:
    """Neighbouring new tokens of one sequence.

    Args:
        slot: the sequence's place in the cache.
        start: position of the first of them.
        length: how many.
    """

    slot: int
    start: int
    length: int


def _empty(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.empty(shape), requires_grad=False)


class Attention(nn.Module):
    """Grouped-query attention over this rank's query heads and the KV heads that they need."""

    def __init__(self, shard: Shard, layer: int) -> None:
        super().__init__()
        args = shard.args
        self.layer = layer
        self.head_dim = args.head_dim
        self.n_local_heads = len(shard.heads)
        self.n_local_kv_heads = len(shard.kv_heads)
        self.queries_by_kv_head = shard.queries_by_kv_head
        self.window = args.window_by_layer[layer]
        n_rows = (self.n_local_heads + 2 * self.n_local_kv_heads) * args.head_dim
        self.wqkv = _empty(n_rows, args.dim)
        self.wo = _empty(args.dim, self.n_local_heads * args.head_dim)

    def forward(
        self, x: Tensor, rotations: Tensor, spans: Sequence[Span], cache: KVCache
    ) -> Tensor:
        """(T, dim) -> (T, dim), a partial result that ranks must sum."""
        n_q, n_kv = self.n_local_heads, self.n_local_kv_heads
        qkv = reference.linear(x, self.wqkv).view(-1, n_q + 2 * n_kv, self.head_dim)
        out = []
        first = 0
        for span in spans:
            new = slice(first, first + span.length)
            first += span.length
            keys, values = cache.of(self.layer, span.slot)
            q = ops.rope_store(qkv[new], keys, values, span.start, n_q, rotations[new])
            end = span.start + span.length
            out.append(
                reference.attention(
                    q, keys[:, :end], values[:, :end], span.start, self.window,
                    self.queries_by_kv_head,
                )
            )  # fmt: skip
        heads = out[0] if len(out) == 1 else torch.cat(out)  # (T, n_q, head_dim)
        return reference.linear(heads.reshape(len(x), -1), self.wo)


class FeedForward(nn.Module):
    """SwiGLU over this rank's hidden units."""

    def __init__(self, shard: Shard) -> None:
        super().__init__()
        n_hidden = len(shard.hidden)
        self.w13 = _empty(2 * n_hidden, shard.args.dim)
        self.w2 = _empty(shard.args.dim, n_hidden)

    def forward(self, x: Tensor) -> Tensor:
        """(T, dim) -> (T, dim), a partial result that ranks must sum."""
        return reference.linear(ops.silu_mul(reference.linear(x, self.w13)), self.w2)


class TransformerBlock(nn.Module):
    """Attention and feed-forward, each followed by reduce + residual add + the next norm."""

    def __init__(self, shard: Shard, layer: int) -> None:
        super().__init__()
        self.eps = shard.args.norm_eps
        self.attention_norm = _empty(shard.args.dim)
        self.attention = Attention(shard, layer)
        self.ffn_norm = _empty(shard.args.dim)
        self.feed_forward = FeedForward(shard)

    def forward(
        self,
        normed: Tensor,
        residual: Tensor,
        next_norm: Tensor,
        rotations: Tensor,
        spans: Sequence[Span],
        cache: KVCache,
        collective: Collective,
    ) -> tuple[Tensor, Tensor]:
        """Take the normed stream and the residual, both (T, dim); give those of the next block."""
        partial = self.attention(normed, rotations, spans, cache)
        normed, residual = collective.reduce_add_norm(partial, residual, self.ffn_norm, self.eps)
        partial = self.feed_forward(normed)
        return collective.reduce_add_norm(partial, residual, next_norm, self.eps)


class Transformer(nn.Module):
    """One rank's share of the model. Parameters are empty until loaded or `init_weights`.

    Args:
        args: the model's shape.
        shard: this rank's share; None is everything.
        collective: how ranks sum; None is a single rank.

    Raises:
        DeviceError: more ranks than query heads.
    """

    def __init__(
        self,
        args: TransformerArgs,
        shard: Shard | None = None,
        collective: Collective | None = None,
    ) -> None:
        super().__init__()
        self.args = args
        self.shard = shard or Shard(args)
        self.collective: Collective = collective or Alone()
        assert self.shard.world_size == 1 or collective is not None
        n_vocab = len(self.shard.vocab)
        self.tok_embeddings = _empty(n_vocab, args.dim)
        self.layers = nn.ModuleList(TransformerBlock(self.shard, i) for i in range(args.n_layers))
        self.norm = _empty(args.dim)
        # No second name for a tied matrix: moving a module to a device would part the two.
        self.output = None if args.tied_embeddings else _empty(n_vocab, args.dim)

    @property
    def blocks(self) -> list[TransformerBlock]:
        """The layers, first to last."""
        return [block for block in self.layers if isinstance(block, TransformerBlock)]

    @property
    def output_weight(self) -> Tensor:
        """What scores this rank's part of the vocabulary: (local vocabulary, dim)."""
        return self.tok_embeddings if self.output is None else self.output

    @property
    def dtype(self) -> torch.dtype:
        """Type of the weights, and so of the cache."""
        return self.norm.dtype

    @property
    def device(self) -> torch.device:
        """Where the weights lie."""
        return self.norm.device

    def placements(self) -> dict[str, Placement]:
        """Where each tensor of a checkpoint goes on this rank."""
        return placements(self.shard)

    def destination(self, placement: Placement) -> Tensor:
        """The part of a parameter that a placement fills, of its `local_shape`."""
        parameter = self.get_parameter(placement.target).data
        return parameter.narrow(0, placement.target_row, len(placement.rows))

    @torch.no_grad()
    def init_weights(self, seed: int) -> None:
        """Fill all weights at random; the same model for any number of ranks of one device type.

        Each whole tensor is drawn from its own stream and then sliced, so that shards agree.
        Matrices have a standard deviation of 1 / sqrt(columns), which keeps activations near 1;
        embeddings 1; norms are 1.
        """
        generator = torch.Generator(self.device)
        for index, (name, placement) in enumerate(self.placements().items()):
            into = self.destination(placement)
            if placement.cols is None:
                into.fill_(1)
                continue
            generator.manual_seed(seed + 1_000_003 * index)
            whole = torch.empty(placement.shape, dtype=self.dtype, device=self.device)
            whole.normal_(generator=generator)
            if not name.startswith("tok_embeddings"):
                whole *= placement.shape[1] ** -0.5
            rows, cols = placement.rows, placement.cols
            into.copy_(whole[rows.start : rows.stop, cols.start : cols.stop])

    @torch.inference_mode()
    def forward(
        self,
        tokens: Tensor,
        spans: Sequence[Span],
        cache: KVCache,
        logits: WhichLogits = "last",
    ) -> Tensor | None:
        """Run new tokens, keep their keys and values, and score what follows them.

        Args:
            tokens: (T,) ids, the spans' tokens one after the other.
            spans: whose tokens they are; their lengths sum to T.
            cache: keys and values of what is before.
            logits: whether to score after no token, after the last of each span, or after all.

        Returns:
            float32 logits (T or number of spans, local vocabulary), or None for no token.
        """
        args = self.args
        assert len(tokens) == sum(span.length for span in spans)
        positions = torch.cat([torch.arange(s.start, s.start + s.length) for s in spans])
        rotations = reference.rope_rotations(positions.to(self.device), args.head_dim, args.theta)
        if len(self.shard.vocab) == args.vocab_size:
            residual = F.embedding(tokens, self.tok_embeddings)
        else:
            part = reference.embed_rows(tokens, self.tok_embeddings, self.shard.vocab.start)
            residual = self.collective.all_reduce(part)
        blocks = self.blocks
        norms = [block.attention_norm for block in blocks] + [self.norm]
        normed = reference.rms_norm(residual, norms[0], args.norm_eps)
        for layer, next_norm in zip(blocks, norms[1:], strict=True):
            normed, residual = layer(
                normed, residual, next_norm, rotations, spans, cache, self.collective
            )
        if logits == "none":
            return None
        if logits == "last" and len(tokens) > len(spans):
            ends = torch.tensor([s.length for s in spans]).cumsum(0) - 1
            normed = normed[ends.to(self.device)]
        return reference.logits(normed, self.output_weight)
