"""Sums, gathers and broadcasts of few rows through memory that the GPUs of one node map (peers).

Every word carries 32 bits of data and the 32-bit number of the round, written in one piece, so
that a receiver knows what has arrived without a barrier (NCCL's low-latency protocol). A rank
writes its words into the memory of every other and waits for theirs in its own. Numbers are
counted on the device, so that a captured graph goes on counting.

A round is one sum, gather or broadcast. Two halves of the memory alternate: a rank that writes
round n + 2 has seen n + 1 from all others, and those had read n before they began n + 1. Sums are
float32 in rank order: equal bits on all ranks. Reference: `reference.add_norm` of the sum; gather
and broadcast copy.

Shapes: W = ranks, T = rows.
"""

from dataclasses import dataclass, field

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from mistral_chat.kernels.elementwise import SLICE, Scaled, add_norm, n_slices
from mistral_chat.kernels.tuning import MOST_ROWS, early_launch

__all__ = [
    "PeerMemory",
    "broadcast",
    "bytes_needed",
    "gather_columns",
    "reduce_add_norm",
]

GATHER_BLOCK = 1024
N_SUM_COUNTS = 1024
N_GATHER_COUNTS = 8192


@dataclass(frozen=True, kw_only=True)
class PeerMemory:
    """This rank's view of the memory of all.

    Args:
        rank: this one.
        addresses: (W,) int64 on the device, where each rank's memory begins in this address space.
        widths: columns of logits of each rank.
        dim: of the model, what a row of a sum has.
    """

    rank: int
    addresses: Tensor
    widths: tuple[int, ...]
    dim: int

    def __post_init__(self) -> None:
        def zeros(n: int) -> Tensor:
            return torch.zeros(n, dtype=torch.int32, device=self.addresses.device)

        widths = torch.tensor(self.widths, dtype=torch.int32, device=self.addresses.device)
        object.__setattr__(self, "sum_counts", zeros(N_SUM_COUNTS))
        object.__setattr__(self, "gather_counts", zeros(N_GATHER_COUNTS))
        object.__setattr__(self, "token_counts", zeros(1))
        object.__setattr__(self, "device_widths", widths)

    sum_counts: Tensor = field(init=False)
    gather_counts: Tensor = field(init=False)
    token_counts: Tensor = field(init=False)
    device_widths: Tensor = field(init=False)

    @property
    def world_size(self) -> int:
        """W."""
        return len(self.widths)

    @property
    def sum_words(self) -> int:
        """Words of one rank's part in one half of the sums; float32 takes one each."""
        return MOST_ROWS * self.dim

    @property
    def gather_words(self) -> int:
        """Words of one rank's part of the gather."""
        return MOST_ROWS * max(self.widths)

    @property
    def gather_offset(self) -> int:
        """Words before the gather's."""
        return 2 * self.world_size * self.sum_words

    @property
    def token_offset(self) -> int:
        """Words before the chosen tokens'."""
        return self.gather_offset + self.world_size * self.gather_words


def bytes_needed(dim: int, widths: tuple[int, ...]) -> int:
    """Size of each rank's memory."""
    return 8 * (len(widths) * MOST_ROWS * (2 * dim + max(widths)) + MOST_ROWS)


def _spread(n_counts: int, n_programs: int) -> int:
    """How many counters each program keeps, so that all counters count every round."""
    assert n_programs <= n_counts
    return int(triton.next_power_of_2(triton.cdiv(n_counts, n_programs)))


@triton.jit
def _count(counts_ptr, program, n_programs, number, N_COUNTS: tl.constexpr, SPREAD: tl.constexpr):
    """Note the round in this program's counters; it alone reads and writes them."""
    tl.debug_barrier()
    at = program + tl.arange(0, SPREAD) * n_programs
    tl.store(counts_ptr + at, tl.zeros((SPREAD,), tl.int32) + number, mask=at < N_COUNTS)


@triton.jit
def _n_missing(at, mask, number):
    words = tl.load(at, mask=mask, other=0, volatile=True)
    return tl.sum((mask & ((words >> 32).to(tl.int32) != number)).to(tl.int32), 0)


@triton.jit
def _await_words(at, mask, number):
    """Data of words once all of them are of this round."""
    missing = _n_missing(at, mask, number)
    while missing > 0:
        missing = _n_missing(at, mask, number)
    return tl.load(at, mask=mask, other=0, volatile=True).to(tl.int32)


@triton.jit
def _to_word(data, number):
    return (number.to(tl.int64) << 32) | (data.to(tl.int64) & 0xFFFFFFFF)


@triton.jit
def _low(data, DTYPE: tl.constexpr):
    """The first number of a word's data: all of it for 4-byte types."""
    if DTYPE.primitive_bitwidth == 32:
        return data.to(DTYPE, bitcast=True).to(tl.float32)
    else:
        return data.to(tl.int16).to(DTYPE, bitcast=True).to(tl.float32)


@triton.jit
def _high(data, DTYPE: tl.constexpr):
    """The second number of a word's data: none for 4-byte types."""
    if DTYPE.primitive_bitwidth == 32:
        return tl.zeros_like(data).to(tl.float32)
    else:
        return (data >> 16).to(tl.int16).to(DTYPE, bitcast=True).to(tl.float32)


@triton.jit
def _as_data(low, high, DTYPE: tl.constexpr):
    """One or two numbers, rounded to their type, as a word's data."""
    if DTYPE.primitive_bitwidth == 32:
        return low.to(tl.int32, bitcast=True)
    else:
        first = low.to(DTYPE).to(tl.int16, bitcast=True).to(tl.int32) & 0xFFFF
        return first | (high.to(DTYPE).to(tl.int16, bitcast=True).to(tl.int32) << 16)


@triton.jit
def _reduce(
    partial_ptr, residual_ptr, weight_ptr, scaled_ptr, sum_ptr, squares_ptr,
    addresses_ptr, counts_ptr, words_a_row, sum_words,
    RANK: tl.constexpr, WORLD: tl.constexpr, BLOCK: tl.constexpr, DTYPE: tl.constexpr,
    ADD: tl.constexpr, SCALE: tl.constexpr, SLICES: tl.constexpr,
    N_COUNTS: tl.constexpr, SPREAD: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Sum one slice of one row over all ranks, add the residual, and scale for the norm."""
    row = tl.program_id(0).to(tl.int64)
    part = tl.program_id(1)
    program = tl.program_id(0) * tl.num_programs(1) + part
    within = part * BLOCK + tl.arange(0, BLOCK)
    mask = within < words_a_row
    at = row * words_a_row + within
    if SCALE:
        weight = tl.load(weight_ptr + within, mask=mask, other=0)
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    number = tl.load(counts_ptr + program) + 1
    half = (number & 1).to(tl.int64) * WORLD * sum_words
    own = tl.load(partial_ptr + at, mask=mask, other=0)
    word = _to_word(own, number)
    for step in tl.static_range(1, WORLD):
        peer: tl.constexpr = (RANK + step) % WORLD
        to = tl.load(addresses_ptr + peer).to(tl.pointer_type(tl.int64))
        tl.store(to + half + RANK * sum_words + at, word, mask=mask)
    if ADD:
        before = tl.load(residual_ptr + at, mask=mask, other=0)
    low = tl.zeros((BLOCK,), tl.float32)
    high = tl.zeros((BLOCK,), tl.float32)
    here = tl.load(addresses_ptr + RANK).to(tl.pointer_type(tl.int64)) + half
    for source in tl.static_range(WORLD):
        if source == RANK:  # noqa: SIM108, a compile-time choice
            data = own
        else:
            data = _await_words(here + source * sum_words + at, mask, number)
        low += _low(data, DTYPE)
        high += _high(data, DTYPE)
    total = _as_data(low, high, DTYPE)
    if ADD:
        # Rounded as a reduced tensor of this type would be, then added: as the reference does.
        low = _low(total, DTYPE) + _low(before, DTYPE)
        high = _high(total, DTYPE) + _high(before, DTYPE)
        total = _as_data(low, high, DTYPE)
    tl.store(sum_ptr + at, total, mask=mask)
    if SCALE:
        low = _low(total, DTYPE)
        high = _high(total, DTYPE)
        tl.store(squares_ptr + row * SLICES + part, tl.sum(low * low + high * high, 0))
        scaled = _as_data(low * _low(weight, DTYPE), high * _high(weight, DTYPE), DTYPE)
        tl.store(scaled_ptr + at, scaled, mask=mask)
    n_programs = tl.num_programs(0) * tl.num_programs(1)
    _count(counts_ptr, program, n_programs, number, N_COUNTS, SPREAD)


_TRITON_TYPES = {
    torch.float32: tl.float32,
    torch.bfloat16: tl.bfloat16,
    torch.float16: tl.float16,
}


def reduce_add_norm(
    memory: PeerMemory,
    partial: Tensor,
    residual: Tensor | None,
    weight: Tensor,
    eps: float,
) -> tuple[Tensor | Scaled, Tensor]:
    """Sum over ranks, add the residual, norm.

    Args:
        memory: of this node's ranks.
        partial: (T, dim), this rank's part of the sum; dim is even.
        residual: (T, dim) to add, the same on all ranks; None adds nothing.
        weight: (dim,) of the norm.
        eps: of the norm.

    Returns:
        the normed rows and the sum, (T, dim).
    """
    n_rows, dim = partial.shape
    words = dim * partial.element_size() // 4
    assert n_rows <= MOST_ROWS
    assert dim == memory.dim
    total = torch.empty_like(partial)
    # float16 has no room for x * weight: it is normed by a kernel of its own.
    scale = partial.dtype != torch.float16
    scaled = torch.empty_like(partial) if scale else None
    block = SLICE * partial.element_size() // 4
    slices = n_slices(dim)
    squares = torch.empty(n_rows, slices, dtype=torch.float32, device=partial.device)
    early = early_launch(partial.device)

    def words_of(tensor: Tensor | None) -> Tensor | None:
        return None if tensor is None else tensor.view(torch.int32)

    _reduce[(n_rows, slices)](
        words_of(partial), words_of(residual), words_of(weight), words_of(scaled), words_of(total),
        squares, memory.addresses, memory.sum_counts, words, memory.sum_words,
        RANK=memory.rank, WORLD=memory.world_size, BLOCK=block,
        DTYPE=_TRITON_TYPES[partial.dtype], ADD=residual is not None, SCALE=scale, SLICES=slices,
        N_COUNTS=N_SUM_COUNTS, SPREAD=_spread(N_SUM_COUNTS, n_rows * slices),
        PDL=bool(early), num_warps=4, **early,
    )  # fmt: skip
    if scaled is None:
        return add_norm(total, None, weight, eps)[0], total
    return Scaled(scaled, squares, eps), total


@triton.jit
def _gather(
    part_ptr, whole_ptr, addresses_ptr, counts_ptr, widths_ptr,
    width, whole_width, gather_offset, gather_words,
    RANK: tl.constexpr, WORLD: tl.constexpr, BLOCK: tl.constexpr,
    N_COUNTS: tl.constexpr, SPREAD: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Rank 0's programs wait for all others' columns; theirs send them."""
    row = tl.program_id(0).to(tl.int64)
    within = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    program = tl.program_id(0) * tl.num_programs(1) + tl.program_id(1)
    mask = within < width
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    number = tl.load(counts_ptr + program) + 1
    memory = tl.load(addresses_ptr).to(tl.pointer_type(tl.int64)) + gather_offset
    own = tl.load(part_ptr + row * width + within, mask=mask, other=0.0)
    if RANK == 0:
        tl.store(whole_ptr + row * whole_width + within, own, mask=mask)
        first = width
        for source in tl.static_range(1, WORLD):
            its_width = tl.load(widths_ptr + source)
            mask = within < its_width
            at = memory + source * gather_words + row * its_width + within
            data = _await_words(at, mask, number).to(tl.float32, bitcast=True)
            tl.store(whole_ptr + row * whole_width + first + within, data, mask=mask)
            first += its_width
    else:
        word = _to_word(own.to(tl.int32, bitcast=True), number)
        tl.store(memory + RANK * gather_words + row * width + within, word, mask=mask)
    n_programs = tl.num_programs(0) * tl.num_programs(1)
    _count(counts_ptr, program, n_programs, number, N_COUNTS, SPREAD)


def gather_columns(memory: PeerMemory, part: Tensor) -> Tensor | None:
    """Bring the ranks' columns together on rank 0. A sum must lie between two of these.

    Args:
        memory: of this node's ranks.
        part: (T, width) float32 of this rank.

    Returns:
        (T, sum of widths) float32 on rank 0; None elsewhere.
    """
    n_rows, width = part.shape
    whole = part.new_empty(n_rows, sum(memory.widths)) if memory.rank == 0 else None
    grid = (n_rows, triton.cdiv(max(memory.widths), GATHER_BLOCK))
    early = early_launch(part.device)
    _gather[grid](
        part, whole, memory.addresses, memory.gather_counts, memory.device_widths,
        width, sum(memory.widths), memory.gather_offset, memory.gather_words,
        RANK=memory.rank, WORLD=memory.world_size, BLOCK=GATHER_BLOCK,
        N_COUNTS=N_GATHER_COUNTS, SPREAD=_spread(N_GATHER_COUNTS, grid[0] * grid[1]),
        PDL=bool(early), num_warps=4, **early,
    )  # fmt: skip
    return whole


@triton.jit
def _broadcast(
    tokens_ptr, addresses_ptr, counts_ptr, n_tokens, token_offset,
    RANK: tl.constexpr, WORLD: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Rank 0's chosen tokens, on every rank."""
    at = tl.arange(0, BLOCK)
    mask = at < n_tokens
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    number = tl.load(counts_ptr) + 1
    if RANK == 0:
        tokens = tl.load(tokens_ptr + at, mask=mask, other=0).to(tl.int32)
        for peer in tl.static_range(1, WORLD):
            to = tl.load(addresses_ptr + peer).to(tl.pointer_type(tl.int64)) + token_offset
            tl.store(to + at, _to_word(tokens, number), mask=mask)
    else:
        here = tl.load(addresses_ptr + RANK).to(tl.pointer_type(tl.int64)) + token_offset
        tokens = _await_words(here + at, mask, number)
        tl.store(tokens_ptr + at, tokens.to(tl.int64), mask=mask)
    tl.debug_barrier()
    tl.store(counts_ptr, number)


def broadcast(memory: PeerMemory, tokens: Tensor) -> None:
    """Give rank 0's tokens to all. A sum must lie between two of these.

    Args:
        memory: of this node's ranks.
        tokens: (T,) int64, read on rank 0, written on the others.
    """
    assert len(tokens) <= MOST_ROWS
    early = early_launch(tokens.device)
    _broadcast[(1,)](
        tokens, memory.addresses, memory.token_counts, len(tokens), memory.token_offset,
        RANK=memory.rank, WORLD=memory.world_size, BLOCK=MOST_ROWS, PDL=bool(early),
        num_warps=1, **early,
    )  # fmt: skip
