"""What a rank needs against what is free."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
import torch

from mistral_chat.engine.memory import Plan, free_bytes, plan_memory
from mistral_chat.errors import NotEnoughMemoryError
from mistral_chat.model.args import TransformerArgs
from mistral_chat.model.sharding import Shard, placements

LARGE = TransformerArgs(
    dim=12288,
    n_layers=88,
    head_dim=128,
    hidden_dim=28672,
    n_heads=96,
    n_kv_heads=8,
    norm_eps=1e-5,
    vocab_size=32768,
    max_seq_len=131_072,
)
CUDA, CPU = torch.device("cuda"), torch.device("cpu")
GB = 10**9


def plan(
    world_size: int = 8, free: int = 80 * GB, max_seq_len: int | None = None, **changes: Any
) -> Plan:
    args = changes.pop("args", LARGE)
    settings: dict[str, Any] = {
        "dtype": torch.bfloat16,
        "device": CUDA,
        "n_slots": 1,
        "chunk_size": 2048,
    }
    shard = Shard(args, world_size, 0)
    table = placements(shard)
    return plan_memory(shard, table, free=free, max_seq_len=max_seq_len, **(settings | changes))


def test_plan_of_the_large_model_has_its_known_sizes() -> None:
    whole = plan(world_size=1, free=400 * GB)
    assert whole.weights == 2 * LARGE.n_params
    assert round(whole.weights / 1e9, 1) == 245.2
    assert whole.kv_per_token == 360_448
    eighth = plan(world_size=8)
    # matrices are divided, norms are not: 177 vectors of 12,288
    norms = 2 * 12288 * 177
    assert eighth.weights == (whole.weights - norms) // 8 + norms
    assert eighth.kv_per_token == 360_448 // 8


@pytest.mark.parametrize("world_size", [4, 8])
@pytest.mark.parametrize("free", [70 * GB, 80 * GB, 141 * GB])
@pytest.mark.parametrize("n_slots", [1, 4])
def test_plan_fits_what_is_free_and_wastes_nothing(
    world_size: int, free: int, n_slots: int
) -> None:
    got = plan(world_size, free, n_slots=n_slots)
    taken = got.weights + got.workspace + got.kv_per_token * got.max_seq_len
    assert taken <= free
    assert LARGE.max_seq_len is not None
    assert got.max_seq_len <= LARGE.max_seq_len
    if got.max_seq_len < LARGE.max_seq_len:
        assert taken + got.kv_per_token > free


def test_plan_counts_every_slot() -> None:
    assert plan(n_slots=5).kv_per_token == 5 * plan().kv_per_token


@pytest.mark.parametrize(("dtype", "size"), [(torch.bfloat16, 2), (torch.float32, 4)])
def test_plan_counts_in_the_type_of_the_weights(dtype: torch.dtype, size: int) -> None:
    got = plan(free=200 * GB, dtype=dtype)
    assert got.weights == size * plan().weights // 2
    assert got.kv_per_token == size * plan().kv_per_token // 2


def test_plan_workspace_grows_with_the_chunk() -> None:
    small, large = plan(chunk_size=256), plan(chunk_size=4096)
    hidden = 28672 // 8
    assert large.workspace - small.workspace >= 3840 * 2 * (12288 + hidden)


def test_plan_takes_the_context_that_was_asked_for() -> None:
    assert plan(max_seq_len=1000).max_seq_len == 1000
    assert plan(max_seq_len=3).max_seq_len == 3  # less than a chat needs, but asked for


def test_plan_without_a_known_context_is_bounded() -> None:
    assert plan(args=replace(LARGE, max_seq_len=None), free=141 * GB).max_seq_len == 32_768


def boundary(fits: Callable[[int], bool]) -> int:
    """Least number of free bytes for which something fits."""
    low, high = 0, 400 * GB
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if fits(middle) else (middle, high)
    return high


@pytest.mark.parametrize("max_seq_len", [None, 100, 20_000])
def test_plan_refuses_exactly_what_does_not_fit(max_seq_len: int | None) -> None:
    def fits(free: int) -> bool:
        try:
            plan(free=free, max_seq_len=max_seq_len)
        except NotEnoughMemoryError:
            return False
        return True

    least = boundary(fits)
    got = plan(free=least, max_seq_len=max_seq_len)
    assert got.max_seq_len == (max_seq_len or 512)  # less context than that is no chat
    assert least == got.weights + got.workspace + got.kv_per_token * got.max_seq_len


def test_plan_says_what_it_needs_and_what_there_is() -> None:
    with pytest.raises(NotEnoughMemoryError) as caught:
        plan(world_size=2, free=80 * GB)
    message = str(caught.value)
    for figure in ("80.00 GB free", "weights need 122.6", "512 tokens", "--nproc_per_node"):
        assert figure in message
    assert "\n" not in message


def test_plan_advises_the_context_that_does_fit() -> None:
    most = plan(free=70 * GB, args=replace(LARGE, max_seq_len=10**7)).max_seq_len
    with pytest.raises(NotEnoughMemoryError, match=f"--max_seq_len {most} or less"):
        plan(free=70 * GB, max_seq_len=most + 1)
    assert plan(free=70 * GB, max_seq_len=most).max_seq_len == most


@pytest.mark.parametrize("free", [0, -5])
def test_plan_refuses_when_nothing_is_free(free: int) -> None:
    with pytest.raises(NotEnoughMemoryError):
        plan(free=free)


@pytest.mark.parametrize("ranks_here", [1, 3, 8])
def test_free_bytes_of_a_host_are_divided_by_its_ranks(
    monkeypatch: pytest.MonkeyPatch, ranks_here: int
) -> None:
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=10**6))
    assert free_bytes(CPU, ranks_here) == 10**6 // ranks_here


@pytest.mark.parametrize(
    ("limit", "used", "wanted"),
    [("max", "500", 1000), ("900", "500", 400), ("90000", "500", 1000), ("400", "500", 0)],
)
def test_free_bytes_of_a_container_are_what_it_may_still_take(
    monkeypatch: pytest.MonkeyPatch, limit: str, used: str, wanted: int
) -> None:
    files = {"memory.max": f"{limit}\n", "memory.current": f"{used}\n"}
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=1000))
    monkeypatch.setattr(Path, "exists", lambda path: path.name in files)
    monkeypatch.setattr(Path, "read_text", lambda path: files[path.name])
    assert free_bytes(CPU, 1) == wanted
