"""Sums, gathers and hand-overs through memory that ranks write into each other's.

Each rank is a process that runs the kernels in Triton's interpreter on files that all of them map;
what they bring is in `tests/scripts/peer_memory.py`. bfloat16, whose roundings the interpreter gets
wrong, is left to tests/scripts/peers.py, on GPUs.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from mistral_chat.kernels import peer
from mistral_chat.kernels.tuning import MOST_ROWS
from tests.conftest import command_env
from tests.ranks import run_ranks
from tests.scripts import peer_memory as ranks
from tests.warm import Warm, warm

WORLD_SIZES = (2, 3)
by_type = pytest.mark.parametrize("dtype", ranks.TYPES, ids=["f32", "f16"])


@pytest.fixture(scope="module")
def interpreting() -> Iterator[Warm]:
    """What forks ranks whose kernels run in the interpreter, which is chosen by their import."""
    if not torch.cuda.is_available():
        yield warm()
        return
    made = Warm(command_env(TRITON_INTERPRET="1"))
    yield made
    made.close()


@pytest.fixture(scope="module", params=WORLD_SIZES)
def seen_by_all(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, interpreting: Warm
) -> list[dict[str, Any]]:
    """What every rank saw; each number of ranks is run once."""
    world_size: int = request.param
    folder: Path = tmp_path_factory.mktemp(f"{world_size}-peers")
    n_bytes = peer.bytes_needed(ranks.DIM, ranks.WIDTHS[:world_size])
    for rank in range(world_size):
        (folder / f"{rank}.memory").write_bytes(bytes(n_bytes))
    run_ranks("tests.scripts.peer_memory", folder, n_ranks=world_size, forks=interpreting)
    return [torch.load(folder / f"{rank}.pt") for rank in range(world_size)]


@by_type
def test_sum_is_the_one_in_rank_order_on_every_rank(
    seen_by_all: list[dict[str, Any]], dtype: torch.dtype
) -> None:
    for number in range(len(ranks.ROWS)):
        wanted = ranks.reference_sum(number, len(seen_by_all), dtype, add=True)
        for seen in seen_by_all:  # to the bit, or ranks drift
            assert torch.equal(seen[str(dtype)]["sums"][number], wanted), number


@by_type
def test_norm_of_the_sum_is_taken_by_the_next_product(
    seen_by_all: list[dict[str, Any]], dtype: torch.dtype
) -> None:
    rounding = 2**-24 if dtype == torch.float32 else 2**-11
    for number in range(len(ranks.ROWS)):
        wanted = ranks.reference_product(number, len(seen_by_all), dtype)
        for seen in seen_by_all:
            got = seen[str(dtype)]["products"][number]
            # as in test_fused: rows of size 1 that are rounded, summed up like a walk at random
            torch.testing.assert_close(got, wanted, rtol=5 * rounding, atol=16 * rounding + 8e-6)


@by_type
def test_sum_without_residual_is_the_sum(
    seen_by_all: list[dict[str, Any]], dtype: torch.dtype
) -> None:
    wanted = ranks.reference_sum(1, len(seen_by_all), dtype, add=False)
    for seen in seen_by_all:
        assert torch.equal(seen[str(dtype)]["plain"], wanted)


def test_gather_puts_uneven_columns_side_by_side_on_the_leader(
    seen_by_all: list[dict[str, Any]],
) -> None:
    world_size = len(seen_by_all)
    for number in range(len(ranks.ROWS)):
        leader, *others = (seen["whole"][number] for seen in seen_by_all)
        wanted = torch.cat([ranks.columns(number, rank) for rank in range(world_size)], 1)
        assert torch.equal(leader, wanted), number
        assert others == [None] * (world_size - 1)


def test_hand_over_gives_the_leaders_tokens_to_all(seen_by_all: list[dict[str, Any]]) -> None:
    for number in range(len(ranks.ROWS)):
        for seen in seen_by_all:
            assert seen["tokens"][number] == ranks.tokens(number)


def words_of(numbers: torch.Tensor, number: int) -> torch.Tensor:
    """32 bits of data each, below the number of the round."""
    return (numbers.flatten().view(torch.int32).long() & 0xFFFFFFFF) | (number << 32)


# The interpreter alone runs a rank on memory of this process.
@pytest.mark.skipif(torch.cuda.is_available(), reason="kernels are compiled here")
@pytest.mark.filterwarnings("ignore:Conversion of an array with ndim:DeprecationWarning")
@by_type
def test_rank_that_is_one_round_ahead_overwrites_nothing(dtype: torch.dtype) -> None:
    """Rank 1's words of the next round may come before rank 0 has read those of this one."""
    dim, widths, n_words = 1100, (4, 4), peer.bytes_needed(1100, (4, 4)) // 8
    memories = [torch.zeros(n_words, dtype=torch.int64) for _ in widths]
    addresses = torch.tensor([memory.data_ptr() for memory in memories])
    memory = peer.PeerMemory(rank=0, addresses=addresses, widths=widths, dim=dim)
    ours = [ranks.draw(3, dim, seed=n, dtype=dtype) for n in range(4)]
    theirs = [ranks.draw(3, dim, seed=10 + n, dtype=dtype) for n in range(4)]

    def place(number: int, source: int) -> slice:
        begin = ((number % 2) * len(widths) + source) * memory.sum_words
        return slice(begin, begin + 3 * dim * dtype.itemsize // 4)

    memories[0][place(1, 1)] = words_of(theirs[0], 1)
    gain = torch.ones(dim, dtype=dtype)
    for n in range(3):
        number = n + 1
        memories[0][place(number + 1, 1)] = words_of(theirs[n + 1], number + 1)
        total = peer.reduce_add_norm(memory, ours[n], None, gain, 1e-5)[1]
        assert torch.equal(total, (ours[n].float() + theirs[n].float()).to(dtype))
        assert torch.equal(memories[1][place(number, 0)], words_of(ours[n], number))


@pytest.mark.parametrize("widths", [(5,), (16384, 16384), (10, 7, 300), (4096,) * 8])
@pytest.mark.parametrize("dim", [2, 576, 12288])
def test_bytes_needed_hold_all_places(dim: int, widths: tuple[int, ...]) -> None:
    memory = peer.PeerMemory(
        rank=0, addresses=torch.zeros(len(widths), dtype=torch.int64), widths=widths, dim=dim
    )
    n_words = peer.bytes_needed(dim, widths) // 8
    # sums twice, since halves take turns; then the gather, then tokens: one after the other
    assert memory.gather_offset == 2 * len(widths) * memory.sum_words
    assert memory.token_offset == memory.gather_offset + len(widths) * memory.gather_words
    assert memory.token_offset + MOST_ROWS == n_words
    assert memory.sum_words >= MOST_ROWS * dim
    assert memory.gather_words >= MOST_ROWS * max(widths)
