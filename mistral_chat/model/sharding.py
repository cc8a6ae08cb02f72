"""Who holds what: a table from checkpoint tensors to ranges of rows and columns of one rank.

Integers only: no tensors, no files, no process groups. One rule covers it all: a rank owns a
range of query heads and loads whatever KV heads those need; everything else is an even split.
"""

import math
from dataclasses import dataclass, replace
from typing import Literal

from mistral_chat.errors import DeviceError
from mistral_chat.model import hf
from mistral_chat.model.args import TransformerArgs

__all__ = ["Placement", "Shard", "placements", "split"]

Kind = Literal["column", "row", "vocab", "replicated"]


def split(size: int, world_size: int, rank: int, unit: int = 1) -> range:
    """The part of `range(size)` that `rank` owns: whole units, as even as can be, in rank order.

    Args:
        size: what is divided; a multiple of `unit`.
        world_size: number of parts.
        rank: which part.
        unit: parts begin and end at multiples of this.
    """
    assert size % unit == 0, (size, unit)
    assert 0 <= rank < world_size, (rank, world_size)
    per_rank, extra = divmod(size // unit, world_size)
    start = rank * per_rank + min(rank, extra)
    stop = start + per_rank + (rank < extra)
    return range(start * unit, stop * unit)


def _unit(size: int, world_size: int) -> int:
    """Largest power of two up to 128 that divides `size` and leaves every rank a unit."""
    unit = math.gcd(size, 128)
    while unit > 1 and size // unit < world_size:
        unit //= 2
    return unit


@dataclass(frozen=True)
class Shard:
    """One rank's share of a model, as ranges of heads, hidden units and vocabulary.

    Args:
        args: the model's shape.
        world_size: number of ranks.
        rank: this one.

    Raises:
        DeviceError: more ranks than query heads (or than rows to share out).
    """

    args: TransformerArgs
    world_size: int = 1
    rank: int = 0

    def __post_init__(self) -> None:
        args = self.args
        for size, name in ((args.n_heads, "query heads"), (args.hidden_dim, "hidden units"),
                           (args.vocab_size, "vocabulary entries")):  # fmt: skip
            if self.world_size > size:
                raise DeviceError(
                    f"{self.world_size} ranks, but the model has {size} {name}: "
                    f"expected at most {size} ranks"
                )

    @property
    def heads(self) -> range:
        """Query heads of this rank."""
        return split(self.args.n_heads, self.world_size, self.rank)

    @property
    def kv_heads(self) -> range:
        """KV heads that this rank's query heads attend to; ranks may overlap."""
        group = self.args.n_heads // self.args.n_kv_heads
        return range(self.heads.start // group, (self.heads.stop - 1) // group + 1)

    @property
    def hidden(self) -> range:
        """Units of the feed-forward layer."""
        size = self.args.hidden_dim
        return split(size, self.world_size, self.rank, _unit(size, self.world_size))

    @property
    def vocab(self) -> range:
        """Rows of embedding and output."""
        return self.vocab_of(self.rank)

    def vocab_of(self, rank: int) -> range:
        """Rows of embedding and output that `rank` holds."""
        size = self.args.vocab_size
        return split(size, self.world_size, rank, _unit(size, self.world_size))

    @property
    def queries_by_kv_head(self) -> tuple[int, ...]:
        """For each KV head of this rank, how many of this rank's query heads attend to it.

        Equal numbers on all but odd world sizes: 9 heads in 3 groups on 2 ranks give (3, 2) and
        (1, 3).
        """
        group = self.args.n_heads // self.args.n_kv_heads
        heads = self.heads
        return tuple(
            min(heads.stop, (kv + 1) * group) - max(heads.start, kv * group) for kv in self.kv_heads
        )


@dataclass(frozen=True)
class Placement:
    """Where one checkpoint tensor goes on one rank.

    `source[rows, cols]` is stored in `target[target_row : target_row + len(rows)]`, all columns.

    Args:
        kind: column (rows of the matrix are divided), row (columns are), vocab, replicated.
        shape: of the whole tensor in the checkpoint.
        rows: rows that this rank reads.
        cols: columns that this rank reads; None for a vector.
        target: the parameter's name in our model.
        target_row: first row of the target.
        half_split: size of a head whose rows the checkpoint keeps as the first and then the second
            elements of RoPE's pairs, where ours has them pair by pair; 0 for rows in our order.
            `rows` are whole heads then.
    """

    kind: Kind
    shape: tuple[int, ...]
    rows: range
    cols: range | None
    target: str
    target_row: int = 0
    half_split: int = 0

    @property
    def local_shape(self) -> tuple[int, ...]:
        """Shape of the slice that is read."""
        return (len(self.rows),) if self.cols is None else (len(self.rows), len(self.cols))


def placements(shard: Shard, layout: hf.Layout = "consolidated") -> dict[str, Placement]:
    """The table: every tensor that a checkpoint must hold -> its place on this rank.

    wq, wk, wv lie one under the other in `wqkv`, and w1, w3 in `w13`, so that each is one matmul.

    Args:
        shard: this rank's share.
        layout: whose names the tensors have, and whose order the rows of wq and wk.
    """
    args = shard.args
    head_dim = args.head_dim

    def scaled(heads: range) -> range:
        return range(heads.start * head_dim, heads.stop * head_dim)

    def columnwise(n_rows: int, rows: range, target: str, at: int = 0) -> Placement:
        return Placement("column", (n_rows, args.dim), rows, range(args.dim), target, at)

    def rowwise(n_cols: int, cols: range, target: str) -> Placement:
        return Placement("row", (args.dim, n_cols), range(args.dim), cols, target)

    def vocabwise(target: str) -> Placement:
        shape = (args.vocab_size, args.dim)
        return Placement("vocab", shape, shard.vocab, range(args.dim), target)

    def vector(target: str) -> Placement:
        return Placement("replicated", (args.dim,), range(args.dim), None, target)

    table = {"tok_embeddings.weight": vocabwise("tok_embeddings"), "norm.weight": vector("norm")}
    if not args.tied_embeddings:
        table["output.weight"] = vocabwise("output")
    q_rows, kv_rows = scaled(shard.heads), scaled(shard.kv_heads)
    q_size, kv_size = args.n_heads * head_dim, args.n_kv_heads * head_dim
    hidden = shard.hidden
    for layer in range(args.n_layers):
        name = f"layers.{layer}"
        attention, feed_forward = f"{name}.attention", f"{name}.feed_forward"
        wqkv, w13 = f"{attention}.wqkv", f"{feed_forward}.w13"
        table |= {
            f"{name}.attention_norm.weight": vector(f"{name}.attention_norm"),
            f"{attention}.wq.weight": columnwise(q_size, q_rows, wqkv),
            f"{attention}.wk.weight": columnwise(kv_size, kv_rows, wqkv, len(q_rows)),
            f"{attention}.wv.weight": columnwise(
                kv_size, kv_rows, wqkv, len(q_rows) + len(kv_rows)
            ),
            f"{attention}.wo.weight": rowwise(q_size, q_rows, f"{attention}.wo"),
            f"{name}.ffn_norm.weight": vector(f"{name}.ffn_norm"),
            f"{feed_forward}.w1.weight": columnwise(args.hidden_dim, hidden, w13),
            f"{feed_forward}.w3.weight": columnwise(args.hidden_dim, hidden, w13, len(hidden)),
            f"{feed_forward}.w2.weight": rowwise(args.hidden_dim, hidden, f"{feed_forward}.w2"),
        }
    return table if layout == "consolidated" else _as_hf(table, head_dim)


def _as_hf(table: dict[str, Placement], head_dim: int) -> dict[str, Placement]:
    return {
        hf.stored_name(name): replace(placement, half_split=head_dim)
        if name.endswith((".wq.weight", ".wk.weight"))
        else placement
        for name, placement in table.items()
    }
