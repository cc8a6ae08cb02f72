"""Sums through shared memory, whose ranks are threads of this process here."""

import os
import threading
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from mistral_chat.engine.ranks.node_memory import PIECE_BYTES, NodeMemory

pytestmark = pytest.mark.skipif(not NodeMemory.is_supported(), reason="no memory is shared here")


def run_ranks(world_size: int, act: Callable[[NodeMemory, int], Tensor]) -> list[Tensor]:
    fd = NodeMemory.create(world_size)
    memories = [NodeMemory(rank, world_size, fd) for rank in range(world_size)]
    os.close(fd)  # what is mapped stays
    results: dict[int, Tensor] = {}

    def run(rank: int) -> None:
        results[rank] = act(memories[rank], rank)

    threads = [threading.Thread(target=run, args=[rank]) for rank in range(world_size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    return [results[rank] for rank in range(world_size)]


@pytest.mark.parametrize(("dtype", "big"), [(torch.bfloat16, 256.0), (torch.float16, 2048.0)])
def test_sum_is_rounded_once(dtype: torch.dtype, big: float) -> None:
    """In the type itself each 1 would be lost on its way: the next number is 2 away."""

    def act(memory: NodeMemory, rank: int) -> Tensor:
        mine = torch.full((5,), 1.0 if rank else big, dtype=dtype)
        memory.all_reduce(mine)
        return mine

    assert all(torch.equal(x, torch.full((5,), big + 2, dtype=dtype)) for x in run_ranks(3, act))


def test_sum_in_pieces_is_the_sum_in_rank_order() -> None:
    n = 2 * PIECE_BYTES // 2 + 7
    parts = [torch.randn(n, generator=torch.Generator().manual_seed(r)).half() for r in range(3)]
    wanted = (parts[0].float() + parts[1].float() + parts[2].float()).half()

    def act(memory: NodeMemory, rank: int) -> Tensor:
        mine = parts[rank].clone()
        memory.all_reduce(mine)
        return mine

    assert all(torch.equal(got, wanted) for got in run_ranks(3, act))
