"""The dense transformer, as one rank holds it. Knows its local sizes; no ranks, no process groups.

The forward pass stands here once, over `Operations`. What crosses ranks is visible:
`reduce_add_norm`, twice a layer and once for the embedding. Shapes: R = rows, one for each new
token of a step, over all its sequences.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from mistral_chat.kernels.reference import Rope, Rotations
from mistral_chat.kernels.weight import Quantized
from mistral_chat.model.args import TransformerArgs
from mistral_chat.model.cache import KVCache
from mistral_chat.model.operations import (
    Alone,
    Collective,
    Heads,
    ManyRows,
    Operations,
    Rows,
    Span,
    WhichLogits,
)
from mistral_chat.model.rope import frequencies
from mistral_chat.model.sharding import Placement, Shard, placements
from mistral_chat.model.weight import QuantizedMatrix, empty, empty_matrix, weight_of

__all__ = ["Transformer", "TransformerBlock"]


class Attention(nn.Module):
    """Grouped-query attention over this rank's query heads and the KV heads that they need."""

    def __init__(self, shard: Shard, layer: int) -> None:
        super().__init__()
        args = shard.args
        self.heads = Heads(
            layer=layer,
            head_dim=args.head_dim,
            n_heads=len(shard.heads),
            queries_by_kv_head=shard.queries_by_kv_head,
            window=args.window_by_layer[layer],
        )
        held = shard.held(layer)
        n_rows = (len(shard.heads) + 2 * len(shard.kv_heads)) * args.head_dim
        self.wqkv = empty_matrix(held["attention.wqkv"], n_rows, args.dim)
        self.wo = empty_matrix(held["attention.wo"], args.dim, len(shard.heads) * args.head_dim)

    def forward(self, x: Rows, rotations: Rotations, run: Operations) -> Tensor:
        """(R, dim) -> (R, dim), a partial result that ranks must sum."""
        qkv = run.linear(x, weight_of(self.wqkv)).unflatten(1, (-1, self.heads.head_dim))
        return run.linear(run.attend(qkv, self.heads, rotations), weight_of(self.wo))


class FeedForward(nn.Module):
    """SwiGLU over this rank's hidden units."""

    def __init__(self, shard: Shard, layer: int) -> None:
        super().__init__()
        held = shard.held(layer)
        self.w13 = empty_matrix(held["feed_forward.w13"], 2 * len(shard.hidden), shard.args.dim)
        self.w2 = empty_matrix(held["feed_forward.w2"], shard.args.dim, len(shard.hidden))

    def forward(self, x: Rows, run: Operations) -> Tensor:
        """(R, dim) -> (R, dim), a partial result that ranks must sum."""
        return run.linear(run.gated(x, weight_of(self.w13)), weight_of(self.w2))


class TransformerBlock(nn.Module):
    """Attention and feed-forward, each followed by all-reduce + residual add + the next norm."""

    def __init__(self, shard: Shard, layer: int) -> None:
        super().__init__()
        self.eps = shard.args.norm_eps
        self.attention_norm = empty(shard.args.dim)
        self.attention = Attention(shard, layer)
        self.ffn_norm = empty(shard.args.dim)
        self.feed_forward = FeedForward(shard, layer)

    def forward(
        self,
        normed: Rows,
        residual: Tensor,
        next_norm: Tensor,
        rotations: Rotations,
        run: Operations,
    ) -> tuple[Rows, Tensor]:
        """Take the normed rows and the residual stream, both (R, dim); give the next block's."""
        ranks = run.collective
        partial = self.attention(normed, rotations, run)
        normed, residual = ranks.reduce_add_norm(partial, residual, self.ffn_norm, self.eps)
        partial = self.feed_forward(normed, run)
        return ranks.reduce_add_norm(partial, residual, next_norm, self.eps)


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
        self._rope: Rope | None = None
        n_vocab = len(self.shard.vocab)
        self.tok_embeddings = empty(n_vocab, args.dim)
        self.layers = nn.ModuleList(TransformerBlock(self.shard, i) for i in range(args.n_layers))
        self.norm = empty(args.dim)
        # No second name for a tied matrix: moving a module to a device would part the two.
        self.output = None if args.tied_embeddings else empty(n_vocab, args.dim)

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
        """Which part of each matrix and norm this rank has, and where, by Mistral's names."""
        return placements(self.shard)

    def destination(self, placement: Placement) -> Tensor:
        """The part of a parameter that a placement fills: all columns of its rows."""
        parameter = self.get_parameter(placement.target).data
        return parameter.narrow(0, placement.target_row, placement.target_rows)

    def quantized(self, placement: Placement) -> Quantized:
        """The part of a quantized matrix that a placement of `placements` fills."""
        matrix = self.get_submodule(placement.target)
        assert isinstance(matrix, QuantizedMatrix)
        return matrix.quantized.rows(placement.target_row, placement.target_rows)

    @torch.no_grad()
    def init_weights(self, seed: int) -> None:
        """Fill all weights at random; the same model for any number of ranks of one device type.

        Each whole tensor is drawn from its own stream and then sliced, so that shards agree.
        Matrices have a standard deviation of 1 / sqrt(columns), which keeps activations near 1;
        embeddings 1; norms are 1. Quantized matrices have one scale, so that ranks agree.
        """
        generator = torch.Generator(self.device)
        for index, (name, placement) in enumerate(self.placements().items()):
            if placement.cols is None:
                self.destination(placement).fill_(1)
                continue
            generator.manual_seed(seed + 1_000_003 * index)
            whole = torch.empty(placement.shape, dtype=self.dtype, device=self.device)
            whole.normal_(generator=generator)
            rows, cols = placement.rows, placement.cols
            part = whole[rows.start : rows.stop, cols.start : cols.stop]
            deviation = placement.shape[1] ** -0.5
            if placement.held is not None:
                self.quantized(placement).fill_normal(part, deviation)
            elif name.startswith("tok_embeddings"):
                self.destination(placement).copy_(part)
            else:
                self.destination(placement).copy_(part * deviation)

    @property
    def rope(self) -> Rope:
        """How positions turn this model's heads."""
        if self._rope is None or self._rope.frequencies.device != self.device:
            args, scaling = self.args, self.args.llama_4_scaling
            turns = frequencies(args.head_dim, args.theta, args.yarn)
            self._rope = Rope(
                torch.tensor(turns, dtype=torch.float32, device=self.device),
                magnitude=args.yarn.magnitude if args.yarn else 1.0,
                beta=scaling.beta if scaling else 0.0,
                original=scaling.original_max_position_embeddings if scaling else 1,
            )
        return self._rope

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
            tokens: (R,) ids, the spans' tokens one after the other.
            spans: whose tokens they are; their lengths sum to R.
            cache: keys and values of what is before.
            logits: whether to score after no token, after the last of each span, or after all.

        Returns:
            float32 logits (R or number of spans, local vocabulary), or None for no token.
        """
        assert len(tokens) == sum(span.length for span in spans)
        return self.run(tokens, ManyRows(spans, cache, self.collective, logits))

    def run(self, tokens: Tensor, run: Operations) -> Tensor | None:
        """The forward pass.

        Args:
            tokens: (R,) ids.
            run: the operations on these rows, which know their positions.

        Returns:
            float32 logits (rows that are scored, local vocabulary), or None.
        """
        norms = [block.attention_norm for block in self.blocks] + [self.norm]
        embedded = run.embed(tokens, self.tok_embeddings, self.shard.vocab.start)
        normed, residual = run.collective.reduce_add_norm(
            embedded, None, norms[0], self.args.norm_eps
        )
        rotations = run.rotations(self.rope)
        for block, next_norm in zip(self.blocks, norms[1:], strict=True):
            normed, residual = block(normed, residual, next_norm, rotations, run)
        return run.logits(normed, self.output_weight)
