"""Where one tensor goes on one rank, and how its numbers become ours. Integers only: no torch."""

import math
from dataclasses import dataclass
from typing import Literal

from mistral_chat.model.quantization import WeightKind
from mistral_chat.model.stored import FLOATS

__all__ = ["INT4_UNIT", "Held", "Packing", "Placement", "Table"]

INT4_UNIT = 32  # neighbouring columns that int4 packs together: `kernels.weight.PACKED`

TensorKind = Literal["column", "row", "vocab", "replicated"]
Check = Literal["scale", "shape", "order", "nothing"]


@dataclass(frozen=True, slots=True)
class Held:
    """How a rank holds a matrix whose numbers are no floats.

    Args:
        kind: what a number is.
        group: neighbouring columns that share a scale; 0 is a whole row of what the rank has.
        has_zeros: a zero point beside every scale.
    """

    kind: WeightKind
    group: int
    has_zeros: bool

    def groups(self, n_in: int) -> int:
        """Scales of a row."""
        return n_in // self.group if self.group else 1

    def n_bytes(self, n_out: int, n_in: int) -> int:
        """Bytes of a matrix with its scales."""
        numbers = n_out * n_in // (2 if self.kind == "int4" else 1)
        return numbers + n_out * self.groups(n_in) * (4 + self.has_zeros)


@dataclass(frozen=True, slots=True)
class Packing:
    """How stored numbers become ours, where they are not ours already.

    Args:
        bits: of a number, of which an int32 holds 32 / bits, from the low bits; 0 is a number each.
        down: an int32's numbers are neighbours in a column, not in a row.
        order: place in an int32 of each of its neighbours; empty is the same order.
        add: to each number, within its bits.
        transposed: stored rows are our columns.
        to_int4: the numbers are a matrix of int4, which ours has two in a byte.
        repeated: rows of ours that one stored number is for; 0 is one.
    """

    bits: int = 0
    down: bool = False
    order: tuple[int, ...] = ()
    add: int = 0
    transposed: bool = False
    to_int4: bool = False
    repeated: int = 0

    @property
    def unit(self) -> int:
        """Stored rows that must be read together to fill whole bytes of ours."""
        if not (self.transposed and self.to_int4):
            return 1
        return 32 // self.per_int32 if self.down else 32

    @property
    def per_int32(self) -> int:
        """Numbers that a stored one holds."""
        return 32 // self.bits if self.bits else 1

    def region(self, first: int, n_rows: int) -> tuple[int, int, int]:
        """Which part of ours some stored rows make: dimension, first index, length."""
        if self.repeated:
            return 0, 0, self.repeated
        each = self.per_int32 if self.down else 1
        halved = 2 if self.transposed and self.to_int4 else 1
        return int(self.transposed), first * each // halved, n_rows * each // halved


@dataclass(frozen=True)
class Placement:
    """Where one tensor goes on one rank.

    `source[rows, cols]` goes to `target[target_row : target_row + target_rows]`, all columns.

    Args:
        kind: column (rows of the matrix are divided), row (columns are), vocab, replicated.
        shape: of the whole tensor, as it is stored.
        rows: rows that this rank reads.
        cols: columns that this rank reads; None for a vector.
        target: the parameter's name in our model; empty for a tensor that is not read.
        target_row: first row of the target.
        half_split: head size of a tensor whose heads are stored as all first and then all second
            elements of RoPE's pairs, while ours has them pair by pair; our rows are then whole
            heads. 0 for rows in our order.
        held: how the target holds a matrix of other numbers than floats.
        types: that the tensor may be stored in.
        packing: how stored numbers become ours; None where they are ours.
        other_shapes: of the tensor that mean the same.
        check: what its numbers must be: positive scales, `expected` (a shape), or the group of each
            column in rising order, of `expected` columns each.
        expected: by `check`.
        optional: it may be missing.
    """

    kind: TensorKind
    shape: tuple[int, ...]
    rows: range
    cols: range | None
    target: str
    target_row: int = 0
    half_split: int = 0
    held: Held | None = None
    types: tuple[str, ...] = tuple(FLOATS)
    packing: Packing | None = None
    other_shapes: tuple[tuple[int, ...], ...] = ()
    check: Check = "nothing"
    expected: tuple[int, ...] = ()
    optional: bool = False

    @property
    def local_shape(self) -> tuple[int, ...]:
        """Shape of the slice that is read."""
        return (len(self.rows),) if self.cols is None else (len(self.rows), len(self.cols))

    @property
    def unit(self) -> int:
        """Rows that must be read together: whole heads of a half-split, whole bytes of ours."""
        packing = self.packing or Packing()
        if packing.transposed or not self.half_split:
            return packing.unit
        return self.half_split // (packing.per_int32 if packing.down else 1)

    def region(self, first: int, n_rows: int) -> tuple[int, int, int]:
        """Which part of the target some of `rows` fill: dimension, first index, length."""
        return (self.packing or Packing()).region(first, n_rows)

    @property
    def target_rows(self) -> int:
        """Rows of the target that it fills."""
        if self.packing is None:
            return len(self.rows)
        if self.packing.transposed:
            each = 1 if self.packing.down else self.packing.per_int32
            return len(self.cols or range(1)) * each
        return self.packing.region(0, len(self.rows))[2]

    def local_bytes(self, itemsize: int) -> int:
        """Bytes that this rank holds, where a float has `itemsize`."""
        if self.held is None:
            return math.prod(self.local_shape) * itemsize
        assert self.cols is not None
        return self.held.n_bytes(len(self.rows), len(self.cols))


Table = dict[str, Placement]  # by the names of tensors
