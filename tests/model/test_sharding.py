"""Ranges of every world size: nothing is held twice, nothing is left out."""

import math
from collections import Counter
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
import torch

from mistral_chat.errors import DeviceError
from mistral_chat.model.args import TransformerArgs
from mistral_chat.model.operations import Alone
from mistral_chat.model.sharding import Shard, placements, split
from mistral_chat.model.transformer import Transformer

# Odd on purpose: 9 heads in 3 groups, head_dim that is not dim / n_heads, a prime vocabulary.
ODD = TransformerArgs(
    dim=20,
    n_layers=2,
    head_dim=6,
    hidden_dim=44,
    n_heads=9,
    n_kv_heads=3,
    norm_eps=1e-5,
    vocab_size=1031,
)
SHAPES = {
    "odd": ODD,
    "tied": replace(ODD, tied_embeddings=True, n_layers=1),
    "one query a KV head": replace(ODD, n_heads=8, n_kv_heads=8, hidden_dim=256, vocab_size=512),
    "one KV head": replace(ODD, n_heads=7, n_kv_heads=1, hidden_dim=7, vocab_size=7),
    "sixteen": replace(ODD, n_heads=16, n_kv_heads=2, hidden_dim=768, vocab_size=300),
}
LARGE = replace(
    ODD, dim=12288, head_dim=128, hidden_dim=28672, n_heads=96, n_kv_heads=8, vocab_size=32768
)
CASES = [
    pytest.param(args, world_size, id=f"{name}-{world_size}")
    for name, args in SHAPES.items()
    for world_size in range(1, args.n_heads + 1)
]
LARGE_CASES = [pytest.param(LARGE, n, id=f"large-{n}") for n in (1, 2, 3, 5, 7, 8, 16, 64, 96)]


def shards(args: TransformerArgs, world_size: int) -> list[Shard]:
    return [Shard(args, world_size, rank) for rank in range(world_size)]


def joined(ranges: list[range]) -> list[int]:
    return [i for r in ranges for i in r]


@pytest.mark.parametrize("unit", [1, 2, 128])
@pytest.mark.parametrize("n_units", [1, 2, 7, 16, 97])
def test_split_covers_everything_once_in_rank_order(n_units: int, unit: int) -> None:
    size = n_units * unit
    for world_size in range(1, 17):
        parts = [split(size, world_size, rank, unit) for rank in range(world_size)]
        assert joined(parts) == list(range(size))
        assert {part.start % unit for part in parts} == {0}
        assert max(map(len, parts)) - min(map(len, parts)) <= unit


@pytest.mark.parametrize(("args", "world_size"), CASES + LARGE_CASES)
def test_shards_cover_heads_hidden_units_and_vocabulary_once(
    args: TransformerArgs, world_size: int
) -> None:
    parts = shards(args, world_size)
    assert joined([s.heads for s in parts]) == list(range(args.n_heads))
    assert joined([s.hidden for s in parts]) == list(range(args.hidden_dim))
    assert joined([s.vocab for s in parts]) == list(range(args.vocab_size))
    assert all(s.heads and s.hidden and s.vocab for s in parts)  # no rank is idle


@pytest.mark.parametrize(("args", "world_size"), CASES + LARGE_CASES)
def test_shard_loads_the_kv_heads_that_its_query_heads_need(
    args: TransformerArgs, world_size: int
) -> None:
    group = args.n_heads // args.n_kv_heads
    for shard in shards(args, world_size):
        needed = Counter(head // group for head in shard.heads)
        assert list(shard.kv_heads) == sorted(needed)
        assert shard.queries_by_kv_head == tuple(needed[kv] for kv in shard.kv_heads)


@pytest.mark.parametrize(("args", "world_size"), CASES)
def test_shard_knows_the_vocabulary_of_the_others(args: TransformerArgs, world_size: int) -> None:
    parts = shards(args, world_size)
    for shard in parts:
        assert [shard.vocab_of(rank) for rank in range(world_size)] == [s.vocab for s in parts]


@pytest.mark.parametrize("world_size", range(1, 9))
def test_shard_of_a_large_model_holds_whole_quantization_groups(world_size: int) -> None:
    for shard in shards(LARGE, world_size):
        assert shard.hidden.start % 128 == 0
        assert shard.heads.start * LARGE.head_dim % 128 == 0
        assert len(shard.heads) in (96 // world_size, 96 // world_size + 1)


@pytest.mark.parametrize("world_size", [1, 2, 4, 8])
def test_shard_of_a_large_model_duplicates_no_kv_head_up_to_their_number(world_size: int) -> None:
    parts = shards(LARGE, world_size)
    assert joined([s.kv_heads for s in parts]) == list(range(8))


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"n_heads": 4, "n_kv_heads": 2}, "4 query heads"),
        ({"hidden_dim": 3}, "3 hidden units"),
        ({"vocab_size": 2}, "2 vocabulary entries"),
    ],
)
def test_shard_refuses_more_ranks_than_there_is_to_share(
    changes: dict[str, Any], named: str
) -> None:
    args = replace(ODD, **changes)
    limit = int(named.split()[0])
    assert Shard(args, limit, limit - 1).heads
    with pytest.raises(DeviceError, match=f"{limit + 1} ranks.*{named}.*at most {limit} ranks"):
        Shard(args, limit + 1)


@pytest.mark.parametrize(("args", "world_size"), CASES)
def test_placements_fill_every_element_of_every_parameter_once(
    args: TransformerArgs, world_size: int
) -> None:
    for shard in shards(args, world_size):
        model = Transformer(args, shard, Alone())
        for parameter in model.parameters():
            parameter.data.zero_()
        for name, placement in model.placements().items():
            into = model.destination(placement)
            assert tuple(into.shape) == placement.local_shape, name
            into += 1
        for name, parameter in model.named_parameters():
            assert torch.equal(parameter.data, torch.ones_like(parameter)), name


@pytest.mark.parametrize(("args", "world_size"), CASES)
def test_placements_of_all_ranks_read_every_element_of_the_checkpoint(
    args: TransformerArgs, world_size: int
) -> None:
    tables = [placements(shard) for shard in shards(args, world_size)]
    assert len({frozenset(table) for table in tables}) == 1
    for name, first in tables[0].items():
        times_read = torch.zeros(first.shape)
        for table in tables:
            placement = table[name]
            assert placement.shape == first.shape
            rows = slice(placement.rows.start, placement.rows.stop)
            if placement.cols is None:
                times_read[rows] += 1
            else:
                times_read[rows, placement.cols.start : placement.cols.stop] += 1
        if first.kind == "replicated":
            assert bool((times_read == world_size).all()), name
        elif name.endswith(("wk.weight", "wv.weight")):
            assert times_read.min() >= 1, name  # ranks that share a KV head all hold it
        else:
            assert bool((times_read == 1).all()), name


@pytest.mark.parametrize("tied", [False, True])
def test_placements_are_the_tensors_of_a_checkpoint(tied: bool) -> None:
    table = placements(Shard(replace(ODD, tied_embeddings=tied)))
    outer = {"tok_embeddings.weight", "norm.weight"} | (set() if tied else {"output.weight"})
    inner = ("attention_norm", "attention.wq", "attention.wk", "attention.wv", "attention.wo",
             "ffn_norm", "feed_forward.w1", "feed_forward.w2", "feed_forward.w3")  # fmt: skip
    assert set(table) == outer | {f"layers.{i}.{part}.weight" for i in range(2) for part in inner}
    shapes = {name.removeprefix("layers.1."): placement.shape for name, placement in table.items()}
    assert shapes["attention.wq.weight"] == (54, 20)
    assert shapes["attention.wk.weight"] == shapes["attention.wv.weight"] == (18, 20)
    assert shapes["attention.wo.weight"] == (20, 54)
    assert shapes["feed_forward.w1.weight"] == shapes["feed_forward.w3.weight"] == (44, 20)
    assert shapes["feed_forward.w2.weight"] == (20, 44)
    assert shapes["tok_embeddings.weight"] == (1031, 20)


@pytest.mark.parametrize("world_size", range(1, 9))
def test_placements_keep_parts_of_one_product_in_order(world_size: int) -> None:
    for shard in shards(LARGE, world_size):
        table = placements(shard)
        for parts in (("attention.wq", "attention.wk", "attention.wv"),
                      ("feed_forward.w1", "feed_forward.w3")):  # fmt: skip
            found = [table[f"layers.0.{part}.weight"] for part in parts]
            assert found[0].target_row == 0
            for above, below in pairwise(found):
                assert above.target == below.target
                assert below.target_row == above.target_row + len(above.rows)


@pytest.mark.parametrize("world_size", [2, 4, 8])
def test_placements_of_an_even_split_are_equal_shares(world_size: int) -> None:
    sizes = {
        sum(math.prod(p.local_shape) for p in placements(s).values() if p.cols is not None)
        for s in shards(LARGE, world_size)
    }
    matrices = LARGE.n_params - LARGE.dim * (2 * LARGE.n_layers + 1)
    assert sizes == {matrices // world_size}
