"""Keys and values of all layers for a fixed number of sequence slots.

A slot holds positions 0 to max_seq_len - 1 of one sequence. What is past a sequence's end is
never read, so nothing is ever cleared. Knows nothing of token ids.
"""

import torch
from torch import Tensor

from mistral_chat.kernels.cached import FP8, Cached
from mistral_chat.model.sharding import Shard

__all__ = ["KVCache", "kv_bytes_per_token"]

SCALE_BYTES = 4


def kv_bytes_per_token(shard: Shard, dtype: torch.dtype) -> int:
    """Bytes that one position of one sequence takes on one rank, over all layers.

    Args:
        shard: whose KV heads.
        dtype: of the cache; FP8 has a scale beside each head of a position.
    """
    args = shard.args
    of_head = args.head_dim * dtype.itemsize + (SCALE_BYTES if dtype == FP8 else 0)
    return 2 * args.n_layers * len(shard.kv_heads) * of_head


class KVCache:
    """Storage of shape (n_layers, n_slots, n_local_kv_heads, max_seq_len, head_dim), twice.

    Args:
        shard: whose KV heads.
        n_slots: sequences held at once.
        max_seq_len: positions of each.
        dtype: of keys and values; FP8 keeps a float32 scale for each position of a head, too.
        device: where they lie.
    """

    def __init__(
        self, shard: Shard, n_slots: int, max_seq_len: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        args = shard.args
        positions = (args.n_layers, n_slots, len(shard.kv_heads), max_seq_len)
        self.n_slots = n_slots
        self.max_seq_len = max_seq_len
        self.dtype = dtype
        self.k = torch.empty((*positions, args.head_dim), dtype=dtype, device=device)
        self.v = torch.empty_like(self.k)
        self._scales: Tensor | None = None  # of keys, and of values
        if dtype == FP8:
            self._scales = torch.empty((2, *positions), dtype=torch.float32, device=device)
        self.bytes_per_token = kv_bytes_per_token(shard, dtype)

    @property
    def n_bytes(self) -> int:
        """Of all slots."""
        return self.n_slots * self.max_seq_len * self.bytes_per_token

    def of_layer(self, layer: int) -> tuple[Cached, Cached]:
        """Keys and values of one layer: (n_slots, n_local_kv_heads, max_seq_len, head_dim) each."""
        k_scale, v_scale = (None, None) if self._scales is None else self._scales[:, layer]
        return Cached(self.k[layer], k_scale), Cached(self.v[layer], v_scale)

    def of(self, layer: int, slot: int) -> tuple[Cached, Cached]:
        """Keys and values of one sequence: (n_local_kv_heads, max_seq_len, head_dim) each."""
        keys, values = self.of_layer(layer)
        return keys[slot], values[slot]

    def fill_random(self) -> None:
        """Keys and values about 1 at every position, as if contexts had been run."""
        for layer in range(len(self.k)):
            for slot in range(self.n_slots):
                for cached in self.of(layer, slot):
                    cached.put(0, torch.randn(cached.data.shape, device=self.k.device))
