"""Keys and values of all layers for a fixed number of sequence slots.

A slot holds positions 0 to max_seq_len - 1 of one sequence. What is past a sequence's end is
never read, so nothing is ever cleared. Knows nothing of token ids.
"""

import torch
from torch import Tensor

from mistral_chat.model.sharding import Shard

__all__ = ["KVCache", "kv_bytes_per_token"]


def kv_bytes_per_token(shard: Shard, dtype: torch.dtype) -> int:
    """Bytes that one position of one sequence takes on one rank, over all layers."""
    args = shard.args
    return 2 * args.n_layers * len(shard.kv_heads) * args.head_dim * dtype.itemsize


class KVCache:
    """Storage of shape (n_layers, n_slots, n_local_kv_heads, max_seq_len, head_dim), twice.

    Args:
        shard: whose KV heads.
        n_slots: sequences held at once.
        max_seq_len: positions of each.
        dtype: of keys and values.
        device: where they lie.
    """

    def __init__(
        self, shard: Shard, n_slots: int, max_seq_len: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        args = shard.args
        shape = (args.n_layers, n_slots, len(shard.kv_heads), max_seq_len, args.head_dim)
        self.n_slots = n_slots
        self.max_seq_len = max_seq_len
        self.k = torch.empty(shape, dtype=dtype, device=device)
        self.v = torch.empty(shape, dtype=dtype, device=device)

    def of(self, layer: int, slot: int) -> tuple[Tensor, Tensor]:
        """Keys and values of one sequence: (n_local_kv_heads, max_seq_len, head_dim) each."""
        return self.k[layer, slot], self.v[layer, slot]
