"""The `Collective`s of several ranks: all-reduce, gather of logits, broadcast of tokens.

Decode steps use memory that the GPUs of one node map from each other, where that is possible;
everything else uses the process groups (NCCL; on CPU gloo or memory of the node). Both can be
captured in a CUDA graph.
"""

import torch
from torch import Tensor

from mistral_chat.engine.ranks.group import Group
from mistral_chat.engine.ranks.shared_memory import share_memory, why_no_peer_access
from mistral_chat.kernels import ops
from mistral_chat.model import few_rows
from mistral_chat.model.operations import Alone, Collective, Rows
from mistral_chat.model.sharding import Shard
from mistral_chat.model.transformer import Transformer

__all__ = ["GroupCollective", "PeerCollective", "collective_of", "decode_collective"]


class GroupCollective:
    """Through the process group.

    Args:
        group: the ranks.
        widths: columns of logits of each rank.
        path: its name for the user.
    """

    def __init__(self, group: Group, widths: tuple[int, ...], path: str = "") -> None:
        self.path = path
        self._group = group
        self._widths = widths

    def reduce_add_norm(
        self, partial: Tensor, residual: Tensor | None, weight: Tensor, eps: float
    ) -> tuple[Rows, Tensor]:
        """All-reduce, then add and norm."""
        with self._group.collectives() as groups:
            groups.all_reduce(partial)
        return ops.add_norm(partial, residual, weight, eps)

    def gather_columns(self, part: Tensor) -> Tensor | None:
        """Gather the ranks' columns, which may differ in number, on rank 0."""
        padded = part.new_zeros(len(part), max(self._widths))  # a gather wants equal shapes
        padded[:, : part.shape[1]] = part
        with self._group.collectives() as groups:
            parts = groups.gather(padded)
        if parts is None:
            return None
        return torch.cat([p[:, :n] for p, n in zip(parts, self._widths, strict=True)], dim=1)

    def broadcast(self, tokens: Tensor) -> None:
        """Give rank 0's tensor to all, in place."""
        with self._group.collectives() as groups:
            groups.broadcast(tokens)


class PeerCollective:
    """Through memory that the GPUs of one node map from each other, with kernels of our own.

    Args:
        rank: this one.
        dim: of the model.
        widths: columns of logits of each rank.
        addresses: (W,) int64, where each rank's `peer.bytes_needed` begin.
    """

    path = "peer memory"

    def __init__(self, rank: int, dim: int, widths: tuple[int, ...], addresses: Tensor) -> None:
        from mistral_chat.kernels import peer

        self._kernels = peer
        self._memory = peer.PeerMemory(rank=rank, addresses=addresses, widths=widths, dim=dim)

    def reduce_add_norm(
        self, partial: Tensor, residual: Tensor | None, weight: Tensor, eps: float
    ) -> tuple[Rows, Tensor]:
        """Sum, add and norm in one kernel."""
        return self._kernels.reduce_add_norm(self._memory, partial, residual, weight, eps)

    def gather_columns(self, part: Tensor) -> Tensor | None:
        """Ranks write to rank 0."""
        return self._kernels.gather_columns(self._memory, part)

    def broadcast(self, tokens: Tensor) -> None:
        """Rank 0 writes to all."""
        self._kernels.broadcast(self._memory, tokens)


def collective_of(group: Group, shard: Shard) -> Collective:
    """The collective for any number of rows."""
    return Alone() if group.world_size == 1 else GroupCollective(group, _widths(group, shard))


def decode_collective(group: Group, model: Transformer) -> Collective:
    """The collective for decode steps; every rank must call it.

    It uses peer memory if the GPUs can write each other's; else the process groups, and `path` says
    why.
    """
    if group.world_size == 1:
        return few_rows.alone(model.device)
    widths = _widths(group, model.shard)
    why_not = ops.why_no_kernels(model.device) or why_no_peer_access(group)
    if why_not is None:
        from mistral_chat.kernels import peer

        dim = model.args.dim
        addresses = share_memory(group, peer.bytes_needed(dim, widths), model.device)
        if isinstance(addresses, Tensor):
            return PeerCollective(group.rank, dim, widths, addresses)
        why_not = addresses
    backend = "NCCL" if model.device.type == "cuda" else "the CPU group"
    return GroupCollective(group, widths, f"{backend} ({why_not})")


def _widths(group: Group, shard: Shard) -> tuple[int, ...]:
    return tuple(len(shard.vocab_of(rank)) for rank in range(group.world_size))
