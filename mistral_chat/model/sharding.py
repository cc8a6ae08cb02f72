"""Sharding: a table from a checkpoint's tensors to the rows and columns that one rank holds.

Integers only: no tensors, no files, no process groups. One rule covers it all: a rank owns a
range of query heads and loads the KV heads that those need; everything else is split evenly.
"""

import math
from dataclasses import dataclass, replace

from mistral_chat.errors import CheckpointError, DeviceError
from mistral_chat.model import formats, hf
from mistral_chat.model.args import TransformerArgs
from mistral_chat.model.placement import Held, Placement, Table
from mistral_chat.model.quantization import Quantization

__all__ = ["Placement", "Shard", "Table", "placements", "split"]

# Matrices that one matmul each has, and the stored ones that they are stacked from.
_PARTS = {
    "attention.wqkv": ("attention.wq", "attention.wk", "attention.wv"),
    "attention.wo": ("attention.wo",),
    "feed_forward.w13": ("feed_forward.w1", "feed_forward.w3"),
    "feed_forward.w2": ("feed_forward.w2",),
}


def split(size: int, world_size: int, rank: int, unit: int = 1) -> range:
    """The part of `range(size)` that `rank` owns: whole units, as even as possible, in rank order.

    Args:
        size: a multiple of `unit`.
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


def _unit(size: int, world_size: int, least: int = 1) -> int:
    """`least` times the largest power of two that divides `size` and leaves every rank a unit.

    No more than it takes to have 128.
    """
    unit = least * math.gcd(size // least, max(1, 128 // least))
    while unit > least and size // unit < world_size:
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
        quantization = args.quantization
        if quantization is None:
            return
        formats.check(args, quantization)
        group = formats.row_unit(quantization)
        for size, name in ((args.n_heads * args.head_dim, "wo"), (args.hidden_dim, "w2")):
            unit = math.lcm(group, args.head_dim) if name == "wo" else group
            if self.world_size > size // unit:
                raise DeviceError(
                    f"{self.world_size} ranks would cut {name}'s groups of {group} columns, of "
                    f"which the model has {size // group}: expected at most {size // unit} ranks"
                )

    def _row_unit(self) -> int:
        """Columns of `wo` and `w2` that a rank has together."""
        quantization = self.args.quantization
        return 1 if quantization is None else formats.row_unit(quantization)

    def held(self, layer: int) -> dict[str, Held | None]:
        """How a layer holds `attention.wqkv` and its other matrices; None is as floats.

        Raises:
            CheckpointError: parts of one matmul that are stored in different ways.
        """
        return {
            matrix: _held_alike(
                self.args.quantization, [f"layers.{layer}.{part}" for part in parts]
            )
            for matrix, parts in _PARTS.items()
        }

    @property
    def heads(self) -> range:
        """Query heads of this rank."""
        unit = math.lcm(self._row_unit(), self.args.head_dim) // self.args.head_dim
        return split(self.args.n_heads, self.world_size, self.rank, unit)

    @property
    def kv_heads(self) -> range:
        """KV heads that this rank's query heads attend to; ranks may overlap."""
        group = self.args.n_heads // self.args.n_kv_heads
        return range(self.heads.start // group, (self.heads.stop - 1) // group + 1)

    @property
    def hidden(self) -> range:
        """Units of the feed-forward layer."""
        size = self.args.hidden_dim
        return split(
            size, self.world_size, self.rank, _unit(size, self.world_size, self._row_unit())
        )

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


def placements(shard: Shard, layout: hf.Layout | None = None) -> Table:
    """The table: every tensor of a model -> its place on this rank.

    wq, wk, wv are stacked in `wqkv`, and w1, w3 in `w13`, so that each is one matmul.

    Args:
        shard: this rank's share.
        layout: gives the tensors that a checkpoint must hold: their names, the order of the rows
            of wq and wk, and numbers and scales of quantized matrices apart. None gives the
            matrices as the model has them, by Mistral's names.

    Raises:
        CheckpointError: parts of one matmul that are stored in different ways.
    """
    args = shard.args
    head_dim = args.head_dim

    def scaled(heads: range) -> range:
        return range(heads.start * head_dim, heads.stop * head_dim)

    def columnwise(
        n_rows: int, rows: range, target: str, held: Held | None, at: int = 0
    ) -> Placement:
        shape = (n_rows, args.dim)
        return Placement("column", shape, rows, range(args.dim), target, at, held=held)

    def rowwise(n_cols: int, cols: range, target: str, held: Held | None) -> Placement:
        return Placement("row", (args.dim, n_cols), range(args.dim), cols, target, held=held)

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
    n_q, n_kv, hidden = len(q_rows), len(kv_rows), shard.hidden
    for layer in range(args.n_layers):
        name = f"layers.{layer}"
        attention, feed_forward = f"{name}.attention", f"{name}.feed_forward"
        wqkv, w13 = f"{attention}.wqkv", f"{feed_forward}.w13"
        held = shard.held(layer)
        qkv_held, w13_held = held["attention.wqkv"], held["feed_forward.w13"]
        wo_held, w2_held = held["attention.wo"], held["feed_forward.w2"]
        table |= {
            f"{name}.attention_norm.weight": vector(f"{name}.attention_norm"),
            f"{attention}.wq.weight": columnwise(q_size, q_rows, wqkv, qkv_held),
            f"{attention}.wk.weight": columnwise(kv_size, kv_rows, wqkv, qkv_held, n_q),
            f"{attention}.wv.weight": columnwise(kv_size, kv_rows, wqkv, qkv_held, n_q + n_kv),
            f"{attention}.wo.weight": rowwise(q_size, q_rows, f"{attention}.wo", wo_held),
            f"{name}.ffn_norm.weight": vector(f"{name}.ffn_norm"),
            f"{feed_forward}.w1.weight": columnwise(args.hidden_dim, hidden, w13, w13_held),
            f"{feed_forward}.w3.weight": columnwise(
                args.hidden_dim, hidden, w13, w13_held, len(hidden)
            ),
            f"{feed_forward}.w2.weight": rowwise(
                args.hidden_dim, hidden, f"{feed_forward}.w2", w2_held
            ),
        }
    return table if layout is None else _as_stored(table, args, layout)


def _held_alike(quantization: Quantization | None, parts: list[str]) -> Held | None:
    """How the rank holds the matrix that some stored ones make up."""
    if quantization is None:
        return None
    kept = [name for name in parts if name in quantization.kept]
    if kept and len(kept) < len(parts):
        (other, *_) = (name for name in parts if name not in kept)
        raise CheckpointError(
            f"{kept[0]} is stored as floats and {other} as {quantization.kind}: expected both "
            f"alike, since one matmul has them together"
        )
    return None if kept else formats.held(quantization)


def _as_stored(table: Table, args: TransformerArgs, layout: hf.Layout) -> Table:
    stored: Table = {}
    for name, placement in table.items():
        if layout == "hf":
            if name.endswith((".wq.weight", ".wk.weight")):
                placement = replace(placement, half_split=args.head_dim)
            name = hf.stored_name(name)
        if placement.held is None or args.quantization is None:
            stored[name] = placement
        else:
            stem = name.removesuffix(".weight")
            stored |= formats.stored(stem, placement, args.quantization)
    return stored
