"""Ranks that share memory as peers do, without a GPU: processes that map each other's files.

`TRITON_INTERPRET=1 python -m tests.scripts.peer_memory FOLDER` with RANK and WORLD_SIZE set runs
the kernels in Triton's interpreter and writes FOLDER/RANK.pt. What each round brings follows
from its number, so that a test can say what must come of it.
"""

import os
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mistral_chat.kernels import linear, peer, reference
from mistral_chat.kernels.elementwise import Scaled
from tests.interpreter import patch_once

DIM = 1100  # two slices, the second not full
WIDTHS = (1030, 7, 300)  # rank 0's columns take two programs a row
EPS = 1e-5
ROWS = (1, 3, 1, 5, 2)  # of one round after the other: each must count for all
TYPES = (torch.float32, torch.float16)


def draw(*shape: int, seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def partial(number: int, rank: int, dtype: torch.dtype) -> Tensor:
    return draw(ROWS[number], DIM, seed=100 * number + rank, dtype=dtype)


def residual(number: int, dtype: torch.dtype) -> Tensor:
    return draw(ROWS[number], DIM, seed=100 * number + 99, dtype=dtype)


def gain(dtype: torch.dtype) -> Tensor:
    return (1 + draw(DIM, seed=7) / 8).to(dtype)


def matrix(dtype: torch.dtype) -> Tensor:
    return (draw(12, DIM, seed=8) * DIM**-0.5).to(dtype)


def columns(number: int, rank: int) -> Tensor:
    return draw(ROWS[number], WIDTHS[rank], seed=1000 + 10 * number + rank)


def tokens(number: int) -> list[int]:
    return [131_071 - 1000 * number - i for i in range(ROWS[number])]


def open_memory(folder: Path, rank: int, world_size: int) -> tuple[peer.PeerMemory, list[Tensor]]:
    """All ranks' files, as zeros until written, at this process's own addresses."""
    n_words = peer.bytes_needed(DIM, WIDTHS[:world_size]) // 8
    files = [
        torch.from_file(str(folder / f"{r}.memory"), shared=True, size=n_words, dtype=torch.int64)
        for r in range(world_size)
    ]
    addresses = torch.tensor([file.data_ptr() for file in files])
    memory = peer.PeerMemory(rank=rank, addresses=addresses, widths=WIDTHS[:world_size], dim=DIM)
    return memory, files


def run_rounds(memory: peer.PeerMemory) -> dict[str, Any]:
    rank = memory.rank
    seen: dict[str, Any] = {}
    for dtype in TYPES:
        sums, products = [], []
        for number in range(len(ROWS)):
            if number == rank:
                time.sleep(0.2)  # each rank is the last to come once
            normed, total = peer.reduce_add_norm(
                memory, partial(number, rank, dtype), residual(number, dtype), gain(dtype), EPS
            )
            assert isinstance(normed, Scaled | Tensor)
            sums.append(total)
            products.append(linear.matmul(normed, matrix(dtype)))
        seen[str(dtype)] = {"sums": sums, "products": products}
        _, total = peer.reduce_add_norm(memory, partial(1, rank, dtype), None, gain(dtype), EPS)
        seen[str(dtype)]["plain"] = total
    whole, chosen = [], []
    for number in range(len(ROWS)):
        whole.append(peer.gather_columns(memory, columns(number, rank)))
        mine = tokens(number) if rank == 0 else [-1] * ROWS[number]
        given = torch.tensor(mine)
        peer.broadcast(memory, given)
        chosen.append(given.tolist())
        ones = torch.ones(1, DIM)
        peer.reduce_add_norm(memory, ones, None, ones[0], EPS)  # one must lie between
    return seen | {"whole": whole, "tokens": chosen}


def reference_sum(number: int, world_size: int, dtype: torch.dtype, *, add: bool) -> Tensor:
    """In float32 and rank order, rounded, then added to the residual."""
    total = partial(number, 0, dtype).float()
    for rank in range(1, world_size):
        total = total + partial(number, rank, dtype).float()
    return residual(number, dtype) + total.to(dtype) if add else total.to(dtype)


def reference_product(number: int, world_size: int, dtype: torch.dtype) -> Tensor:
    total = reference_sum(number, world_size, dtype, add=True)
    normed = reference.rms_norm(total, gain(dtype), EPS)
    return reference.linear(normed, matrix(dtype))


def wait_patiently() -> None:
    """Leave the processor to the other ranks while their words are missing, as no GPU needs to."""
    n_missing = peer._n_missing

    def n_missing_then_sleep(*args: Any) -> Any:
        missing = n_missing(*args)
        if missing.handle.data > 0:
            time.sleep(0.001)
        return missing

    peer._n_missing = n_missing_then_sleep


def main(folder: Path, rank: int, world_size: int) -> None:
    patch_once()
    wait_patiently()
    memory, files = open_memory(folder, rank, world_size)
    seen = run_rounds(memory)
    assert len(files) == world_size  # mapped until here
    torch.save(seen, folder / f"{rank}.pt")


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(Path(sys.argv[1]), int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"]))
