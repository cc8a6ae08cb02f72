"""Any number of ranks is one rank: real processes, one run for each number.

What they do is in `tests/scripts/ranks.py`; here it is compared with the same in this process.
"""

from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from mistral_chat.engine.ranks.node_memory import NodeMemory
from tests.conftest import random_weights, write_params
from tests.ranks import run_ranks
from tests.scripts import ranks

WORLD_SIZES = (2, 3, 4)  # 4 is more than the 3 KV heads
WAYS = ("node memory", "gloo")
# Logits are at most about 5; ranks add partial sums of 72 to 200 products in another order, which
# moves them by some 1e-6.
WITHIN = 1e-4

Seen = dict[str, Any]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    made = {}
    for name, args in ranks.SHAPES.items():
        made[name] = tmp_path_factory.mktemp("ranks") / name
        made[name].mkdir()
        write_params(made[name], args)
        weights = random_weights(args)
        if args.tied_embeddings:
            # or the token itself is by far the most likely one, and greedy text says nothing
            weights["tok_embeddings.weight"] *= 0.1
        save_file(weights, made[name] / "consolidated.safetensors")
    return made


@pytest.fixture(scope="module")
def alone(models: dict[str, Path]) -> Seen:
    return ranks.collect(models)


@pytest.fixture(scope="module")
def together(models: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Any:
    """What every rank saw, by number of ranks; each number is run once, when first asked for."""

    @cache
    def run(world_size: int) -> list[Seen]:
        out = tmp_path_factory.mktemp(f"seen-by-{world_size}")
        run_ranks("tests.scripts.ranks", out, *models.values(), n_ranks=world_size)
        return [torch.load(out / f"{rank}.pt") for rank in range(world_size)]

    return run


@pytest.fixture(scope="module", params=WORLD_SIZES)
def world_size(request: pytest.FixtureRequest) -> int:
    """Of the module, so that all tests of one number come one after the other, in one process."""
    number: int = request.param
    return number


by_way = pytest.mark.parametrize("way", WAYS)
by_way_and_model = pytest.mark.parametrize(
    ("way", "model"),
    [("node memory", name) for name in ranks.SHAPES] + [("gloo", name) for name in ranks.SLOW_WAY],
)


def test_ranks_of_one_node_share_memory(together: Any, world_size: int) -> None:
    wanted = [NodeMemory.is_supported()] * world_size
    assert [seen["node memory"]["used"] for seen in together(world_size)] == wanted
    assert [seen["gloo"]["used"] for seen in together(world_size)] == [False] * world_size


@by_way_and_model
def test_ranks_give_the_logits_of_one(
    alone: Seen, together: Any, world_size: int, way: str, model: str
) -> None:
    got = together(world_size)[0][way]["models"][model]["logits"]
    wanted = alone[way]["models"][model]["logits"]
    assert [None if x is None else x.shape for x in got] == [
        None if x is None else x.shape for x in wanted
    ]
    for step, (ours, other) in enumerate(zip(got, wanted, strict=True)):
        if other is not None:
            assert ours.shape[1] == ranks.ODD.vocab_size
            assert (ours - other).abs().max() < WITHIN, f"step {step}"
    assert wanted[0].std() > 0.5  # there is something to compare


@by_way_and_model
def test_ranks_give_the_greedy_tokens_of_one(
    alone: Seen, together: Any, world_size: int, way: str, model: str
) -> None:
    got, wanted = together(world_size)[0][way]["models"][model], alone[way]["models"][model]
    assert got["greedy"] == wanted["greedy"]
    assert [len(row) for row in got["greedy"]] == [3, 4, 5, 6, 3, 4, 5]
    assert len({i for row in wanted["greedy"] for i in row}) > 10  # it says more than one thing


@by_way
def test_ranks_repeat_themselves_with_a_cache_and_with_a_seed(
    together: Any, world_size: int, way: str
) -> None:
    seen = together(world_size)[0][way]["models"]["untied"]
    assert seen["greedy again"] == seen["greedy"]
    assert seen["sampled"][0] == seen["sampled"][1]
    assert seen["sampled"][0] != seen["greedy"]


@by_way
def test_followers_see_no_logits(together: Any, world_size: int, way: str) -> None:
    assert all(seen[way]["models"] == {} for seen in together(world_size)[1:])


@by_way
def test_all_reduce_gives_every_rank_the_sum(together: Any, world_size: int, way: str) -> None:
    n = world_size
    for seen in together(world_size):
        got = seen[way]["exchange"]
        powers = sum(10.0**rank for rank in range(n))
        assert got["sum"].tolist() == [n, powers, n * (n - 1) / 2]
        assert got["sum of one"].tolist() == [2 * n + n * (n - 1) / 2]
        assert got["bfloat16 sum"].dtype == torch.bfloat16
        assert torch.equal(got["bfloat16 sum"], torch.full((3, 4), n * (n + 1) / 2).bfloat16())


@by_way
def test_all_reduce_of_many_numbers_is_the_same_on_all_ranks(
    together: Any, world_size: int, way: str
) -> None:
    sums = [seen[way]["exchange"]["big sum"] for seen in together(world_size)]
    assert all(torch.equal(sums[0], other) for other in sums[1:])  # to the bit, or ranks drift
    # at most four numbers below 6 are added in float32
    torch.testing.assert_close(sums[0].double(), ranks.sum_of_big(world_size), rtol=0, atol=3e-6)


@by_way
def test_gather_columns_puts_uneven_parts_side_by_side_on_the_leader(
    together: Any, world_size: int, way: str
) -> None:
    leader, *others = (seen[way]["exchange"]["columns"] for seen in together(world_size))
    assert torch.equal(leader, torch.arange(55, dtype=torch.float32).view(5, 11))
    assert others == [None] * (world_size - 1)


@by_way
def test_ranks_agree_on_what_the_leader_shares_and_on_the_least(
    together: Any, world_size: int, way: str
) -> None:
    for seen in together(world_size):
        assert seen[way]["exchange"]["share"] == {"rank": 0, "text": "é" * 1000}
        assert seen[way]["exchange"]["minimum"] == 11 - world_size
        assert seen[way]["exchange"]["together"] == "went well"


@by_way
@pytest.mark.parametrize("kind", ["greedy", "scored"])
def test_generate_on_ranks_is_generate_on_one(
    alone: Seen, together: Any, world_size: int, way: str, kind: str
) -> None:
    wanted_tokens, wanted_scores = alone[way]["generate"][kind]
    for seen in together(world_size):  # every rank gets the results
        tokens, scores = seen[way]["generate"][kind]
        assert tokens == wanted_tokens
        for row, wanted in zip(scores, wanted_scores, strict=True):
            assert row == pytest.approx(wanted, abs=WITHIN)


@by_way
def test_generate_samples_the_same_on_every_rank(together: Any, world_size: int, way: str) -> None:
    first, *others = (seen[way]["generate"]["sampled"] for seen in together(world_size))
    assert others == [first] * (world_size - 1)
    assert [len(row) for row in first[0]] == [6, 6, 6]


def test_together_fails_on_all_ranks_and_the_first_says_why(together: Any, world_size: int) -> None:
    first = max(1, world_size - 2)
    for rank, seen in enumerate(together(world_size)):
        kind, message = seen["failed"]
        if rank == first:
            assert (kind, message) == ("CheckpointError", f"rank {first} found a fault")
        else:
            assert kind == "OtherRankFailedError"
            assert f"rank {first}" in message
