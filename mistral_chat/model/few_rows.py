"""The operations of few rows, where everything that a step depends on lies on the device.

The same numbers as `ManyRows`, from kernels that read positions, slots and tokens from tensors, so
that a step can be captured once and replayed for any. On CPU the reference of each kernel.

Shapes: N = spans (one sequence each), T = rows of a span, R = N * T rows.
"""

from dataclasses import dataclass
from types import ModuleType

import torch
from torch import Tensor

from mistral_chat.kernels import ops, reference
from mistral_chat.kernels.reference import Rope, Rotations
from mistral_chat.kernels.tuning import MOST_ROWS
from mistral_chat.model.cache import KVCache
from mistral_chat.model.operations import Alone, Collective, Heads, Rows
from mistral_chat.model.sharding import Shard
from mistral_chat.model.transformer import Transformer

__all__ = ["MOST_ROWS", "FewRows", "HeadTable", "alone", "supports"]


def supports(model: Transformer) -> bool:
    """Whether the kernels have this model's head size."""
    head_dim = model.args.head_dim
    return head_dim in (16, 32, 64, 128, 256) and model.args.dim % 2 == 0


def alone(device: torch.device) -> Alone:
    """The collective of a single rank's few rows."""
    return Alone(_operations(device).add_norm)


@dataclass(frozen=True, slots=True)
class HeadTable:
    """Which KV head each query head reads, on the device; the same in every layer.

    Args:
        first_heads: (K + 1,) int32, the first query head of each KV head, and H.
        kv_heads: (H,) int32.
        most: query heads of the KV head that has most of them.
    """

    first_heads: Tensor
    kv_heads: Tensor
    most: int

    @classmethod
    def of(cls, shard: Shard, device: torch.device) -> "HeadTable":
        """The table of one rank's heads."""
        counts = torch.tensor(shard.queries_by_kv_head)
        first_heads = torch.cat([torch.zeros(1, dtype=torch.int64), counts.cumsum(0)])
        kv_heads = torch.arange(len(counts)).repeat_interleave(counts)
        return cls(
            first_heads.to(device, torch.int32),
            kv_heads.to(device, torch.int32),
            int(counts.max()),
        )


class FewRows:
    """The same number of rows of each of several sequences, some of them empty.

    Args:
        slots: (N,) int32, places in the cache.
        starts: (N,) int32, position of each span's first token.
        lengths: (N,) int32, how many of a span's T rows are real; 0 is an empty span.
        per_span: T.
        cache: keys and values.
        table: this rank's heads.
        collective: how ranks sum.
    """

    def __init__(
        self,
        slots: Tensor,
        starts: Tensor,
        lengths: Tensor,
        per_span: int,
        cache: KVCache,
        table: HeadTable,
        collective: Collective,
    ) -> None:
        self.collective = collective
        self._places = (slots, starts, lengths)
        self._per_span = per_span
        self._cache = cache
        self._table = table
        kernels = _operations(slots.device)
        self.embed, self.linear, self.gated = kernels.embed, kernels.linear, kernels.gated
        self._rotations, self._attend, self._logits = (
            kernels.rotations, kernels.attend, kernels.logits,
        )  # fmt: skip

    def rotations(self, rope: Rope) -> Rotations:
        """Cosines and sines: (R, 2, head_dim / 2) float32 each."""
        rotations: Rotations = self._rotations(self._places[1], self._per_span, rope)
        return rotations

    def attend(self, qkv: Tensor, heads: Heads, rotations: Rotations) -> Tensor:
        """`reference.attend`; rows past a span's length are of no use."""
        keys, values = self._cache.of_layer(heads.layer)
        table = self._table
        attended: Tensor = self._attend(
            qkv, keys, values, rotations, *self._places,
            table.first_heads, table.kv_heads, table.most, heads.window,
        )  # fmt: skip
        return attended

    def logits(self, x: Rows, weight: Tensor) -> Tensor:
        """float32 scores of all rows."""
        scores: Tensor = self._logits(x, weight)
        return scores


def _operations(device: torch.device) -> ModuleType:
    if ops.has_kernels(device):
        from mistral_chat.kernels import fused

        return fused
    return reference
