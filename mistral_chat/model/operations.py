"""What the forward pass is written over: the operations on a step's rows, and how ranks sum.

`Transformer.run` states the layers once. A set of operations says at which positions the rows are
and which implementation each operation takes: `ManyRows` has torch's matmuls and attention, for
prompts on GPUs and for everything on CPU; `FewRows` (few_rows.py) has the kernels of a decode step.
Knows no process groups. Shapes: R = rows, one for each new token of a step, over all its sequences.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from mistral_chat.kernels import ops, reference
from mistral_chat.kernels.reference import Rope, Rotations
from mistral_chat.kernels.weight import Weight
from mistral_chat.model.cache import KVCache

__all__ = [
    "Alone",
    "Collective",
    "Heads",
    "ManyRows",
    "Operations",
    "Rows",
    "Span",
    "WhichLogits",
]

WhichLogits = Literal["none", "last", "all"]
Rows = Any  # (R, dim): a tensor, or rows whose norm the next matmul finishes (`Scaled`)


class Collective(Protocol):
    """How ranks put together what each has a part of.

    `path` says for people what carries it.
    """

    path: str

    def reduce_add_norm(
        self, partial: Tensor, residual: Tensor | None, weight: Tensor, eps: float
    ) -> tuple[Rows, Tensor]:
        """Sum over ranks, add the residual stream, and norm for the next matmul.

        Args:
            partial: (R, dim) of this rank; may be overwritten.
            residual: (R, dim), the same on all ranks; None adds nothing.
            weight: (dim,) of the norm.
            eps: of the norm.

        Returns:
            the normed rows and the new residual stream, (R, dim).
        """

    def gather_columns(self, part: Tensor) -> Tensor | None:
        """(R, columns of this rank) -> (R, columns of all ranks) on rank 0, None elsewhere."""

    def broadcast(self, tokens: Tensor) -> None:
        """Give rank 0's tensor to all ranks, in place."""


class Alone:
    """The collective of a single rank: what it has is the whole.

    Args:
        add_norm: as `reference.add_norm`.
    """

    path = "nothing: one rank"

    def __init__(self, add_norm: Callable[..., tuple[Rows, Tensor]] = ops.add_norm) -> None:
        self._add_norm = add_norm

    def reduce_add_norm(
        self, partial: Tensor, residual: Tensor | None, weight: Tensor, eps: float
    ) -> tuple[Rows, Tensor]:
        """`reference.add_norm`."""
        return self._add_norm(partial, residual, weight, eps)

    def gather_columns(self, part: Tensor) -> Tensor | None:
        """All columns are here."""
        return part

    def broadcast(self, tokens: Tensor) -> None:
        """All ranks have them."""


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


@dataclass(frozen=True, slots=True, kw_only=True)
class Heads:
    """The heads of one layer on one rank.

    Args:
        layer: its number.
        head_dim: numbers of a head.
        n_heads: query heads.
        queries_by_kv_head: how many neighbouring query heads share each KV head.
        window: positions that a query attends to, its own included; None is all.
    """

    layer: int
    head_dim: int
    n_heads: int
    queries_by_kv_head: tuple[int, ...]
    window: int | None


class Operations(Protocol):
    """One step's rows, and what the layers do with them."""

    collective: Collective

    def embed(self, tokens: Tensor, weight: Tensor, first_id: int) -> Tensor:
        """`reference.embed`: (R,) ids -> (R, dim), zeros for ids that other ranks hold."""

    def rotations(self, rope: Rope) -> Rotations:
        """Rotations of each row's position, in the form that `attend` takes."""

    def linear(self, x: Rows, weight: Weight) -> Tensor:
        """`x @ weight.T`."""

    def attend(self, qkv: Tensor, heads: Heads, rotations: Rotations) -> Tensor:
        """Rotate queries and keys, store keys and values, attend to all that is cached.

        Args:
            qkv: (R, H + 2 K, head_dim); may be overwritten.
            heads: the layer's, H of queries and K of keys.
            rotations: of each row.

        Returns:
            (R, H * head_dim).
        """

    def gated(self, x: Rows, weight: Weight) -> Tensor:
        """SwiGLU: SiLU of `x @ weight.T`'s first half of columns times the second half."""

    def logits(self, x: Rows, weight: Tensor) -> Tensor | None:
        """float32 scores of the rows that the step asks for; None for none."""


class ManyRows:
    """Any number of new tokens: torch's matmuls and attention, sequence by sequence.

    Args:
        spans: whose tokens the rows are.
        cache: keys and values of what is before them.
        collective: how ranks sum.
        scored: whether to score after no token, after the last of each span, or after all.
    """

    embed = staticmethod(ops.embed)
    linear = staticmethod(ops.linear)

    def __init__(
        self,
        spans: Sequence[Span],
        cache: KVCache,
        collective: Collective,
        scored: WhichLogits = "last",
    ) -> None:
        self.collective = collective
        self._spans = spans
        self._cache = cache
        self._scored = scored

    def rotations(self, rope: Rope) -> Rotations:
        """`reference.rope_rotations`: (R, head_dim / 2) complex64 each."""
        positions = torch.cat([torch.arange(s.start, s.start + s.length) for s in self._spans])
        return reference.rope_rotations(positions.to(rope.frequencies.device), rope)

    def attend(self, qkv: Tensor, heads: Heads, rotations: Rotations) -> Tensor:
        """`ops.rope_store` and `reference.attention` of each span."""
        out = []
        lengths = [span.length for span in self._spans]
        turns = zip(*(rotation.split(lengths) for rotation in rotations), strict=True)
        for span, new, rotation in zip(self._spans, qkv.split(lengths), turns, strict=True):
            keys, values = self._cache.of(heads.layer, span.slot)
            q = ops.rope_store(new, keys, values, span.start, heads.n_heads, rotation)
            end = span.start + span.length
            k, v = keys.floats(0, end, q.dtype), values.floats(0, end, q.dtype)
            out.append(
                reference.attention(q, k, v, span.start, heads.window, heads.queries_by_kv_head)
            )
        whole = out[0] if len(out) == 1 else torch.cat(out)  # (R, H, head_dim)
        return whole.reshape(len(qkv), -1)

    def gated(self, x: Tensor, weight: Weight) -> Tensor:
        """`ops.silu_mul` of the matmul."""
        return ops.silu_mul(ops.linear(x, weight))

    def logits(self, x: Tensor, weight: Tensor) -> Tensor | None:
        """`reference.logits` of the rows that are asked for."""
        if self._scored == "none":
            return None
        if self._scored == "last" and len(x) > len(self._spans):
            ends = torch.tensor([span.length for span in self._spans]).cumsum(0) - 1
            x = x[ends.to(x.device)]
        return reference.logits(x, weight)
