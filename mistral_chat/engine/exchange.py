"""What ranks exchange in a step of few rows: sums, logits, chosen tokens.

Through memory that the GPUs of one node write into each other's, else through the process group
(NCCL; on CPU gloo or node memory). Either can be captured in a CUDA graph.
"""

from typing import Any, Protocol

import torch
from torch import Tensor

from mistral_chat.engine.group import Group
from mistral_chat.kernels import ops
from mistral_chat.model.few_rows import RowCollective
from mistral_chat.model.transformer import Transformer

__all__ = ["Exchange", "GroupExchange", "open_exchange"]


class Exchange(RowCollective, Protocol):
    """A `RowCollective` that also brings logits to rank 0 and its tokens to all."""

    path: str

    def gather_columns(self, part: Tensor) -> Tensor | None:
        """(R, width) of each rank -> (R, sum of widths) on rank 0, None elsewhere."""

    def hand_over(self, tokens: Tensor) -> None:
        """Give rank 0's tokens, (N,) int64, to all, in place."""


class GroupExchange:
    """Through the process group.

    Args:
        group: the ranks.
        widths: columns of logits of each rank.
        path: how to call it, and why it is taken.
    """

    def __init__(self, group: Group, widths: tuple[int, ...], path: str) -> None:
        self.path = path
        self._group = group
        self._widths = widths

    def reduce_add_norm(
        self, partial: Tensor, residual: Tensor | None, gain: Tensor, eps: float
    ) -> tuple[Any, Tensor]:
        """Sum, add, norm."""
        total = self._group.all_reduce(partial)
        if residual is None:
            residual = torch.zeros_like(total)
        return ops.add_norm(total, residual, gain, eps)

    def gather_columns(self, part: Tensor) -> Tensor | None:
        """`Group.gather_columns`."""
        return self._group.gather_columns(part, self._widths)

    def hand_over(self, tokens: Tensor) -> None:
        """`Group.hand_over`."""
        self._group.hand_over(tokens)


class PeerExchange:
    """Through peer memory, with kernels of our own.

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
        self, partial: Tensor, residual: Tensor | None, gain: Tensor, eps: float
    ) -> tuple[Any, Tensor]:
        """Sum, add, norm in one kernel."""
        return self._kernels.reduce_add_norm(self._memory, partial, residual, gain, eps)

    def gather_columns(self, part: Tensor) -> Tensor | None:
        """Ranks write to rank 0."""
        return self._kernels.gather_columns(self._memory, part)

    def hand_over(self, tokens: Tensor) -> None:
        """Rank 0 writes to all."""
        self._kernels.hand_over(self._memory, tokens)


def open_exchange(group: Group, model: Transformer) -> Exchange | None:
    """Meet the other ranks, all together; None on a single one.

    GPUs of one node that can write each other's memory do; else the process group carries it,
    and `path` says why.
    """
    if group.world_size == 1:
        return None
    widths = tuple(len(model.shard.vocab_of(rank)) for rank in range(group.world_size))
    why_not = ops.why_no_kernels(model.device) or group.why_no_peer_access()
    if why_not is None:
        from mistral_chat.kernels import peer

        dim = model.args.dim
        addresses = group.share_memory(peer.bytes_needed(dim, widths), model.device)
        if isinstance(addresses, Tensor):
            return PeerExchange(group.rank, dim, widths, addresses)
        why_not = addresses
    backend = "NCCL" if model.device.type == "cuda" else "the CPU group"
    return GroupExchange(group, widths, f"{backend} ({why_not})")
