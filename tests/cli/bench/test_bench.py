"""bench measures what it says, on a small model on CPU. No figure is judged."""

import json
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import Run

SCHEMA = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 30}, "is_old": {"type": "boolean"}},
    "required": ["name", "is_old"],
    "additionalProperties": False,
}
SMALL = ("--contexts", "32,100000", "--prompts", "8,16", "--batches", "1,2", "--device", "cpu")


def measured(run: Run, folder: Path, *words: object) -> dict[str, object]:
    done = run("bench", folder, *SMALL, "--json", *words)
    assert done.code == 0, done.err
    result: dict[str, object] = json.loads(done.out)
    return result


@pytest.fixture(scope="module")
def schema_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("schemas") / "schema.json"
    path.write_text(json.dumps(SCHEMA))
    return path


@pytest.fixture(scope="module")
def alone(run: Run, tiny_folder: Path) -> dict[str, object]:
    """The figures of one rank."""
    return measured(run, tiny_folder)


@pytest.fixture(scope="module")
def on_two(run: Run, tiny_folder: Path, schema_file: Path) -> dict[str, object]:
    """The figures of two ranks, answers of a schema among them."""
    return measured(run, tiny_folder, "--nproc_per_node", 2, "--json_schema", schema_file)


@pytest.mark.parametrize(("figures", "n_ranks"), [("alone", 1), ("on_two", 2)])
def test_bench_reports_every_figure(
    request: pytest.FixtureRequest, figures: str, n_ranks: int
) -> None:
    result: dict[str, Any] = request.getfixturevalue(figures)
    assert result["world_size"] == n_ranks
    decode = result["decode"]
    assert isinstance(decode, list)
    assert [(row["batch"], row["context"]) for row in decode] == [(1, 32), (2, 32)]
    for row in decode:
        assert row["ms_per_token"] > 0
        assert row["tokens_per_s"] == pytest.approx(1e3 * row["batch"] / row["ms_per_token"])
        seconds = row["ms_per_token"] / 1e3
        share = row["bytes_per_step"] / seconds / (1e9 * result["read_gb_per_s"])  # type: ignore[operator]
        assert row["share_of_read_ceiling"] == pytest.approx(share)
    first = result["first_token"]
    assert isinstance(first, list)
    assert [row["prompt"] for row in first] == [8, 16]
    sums = result["sum_us"]
    assert isinstance(sums, dict)
    assert (len(sums) > 0) == (n_ranks > 1)
    start = result["start"]
    assert isinstance(start, dict)
    assert set(start) == {"python_s", "import_s", "process_group_s", "load_s", "of_it_checks_s",
                          "of_it_weights_s", "of_it_kernels_s",
                          "of_it_capture_s"}  # fmt: skip
    assert min(start.values()) >= 0


def test_bench_counts_the_bytes_of_a_step(alone: dict[str, object]) -> None:
    memory, decode = alone["memory"], alone["decode"]
    assert isinstance(memory, dict)
    assert isinstance(decode, list)
    vocab, dim, n_layers, n_kv_heads, head_dim = 32768, 64, 2, 2, 16
    embedding = vocab * dim * 4
    kv = 2 * n_layers * n_kv_heads * head_dim * 4
    assert memory["kv_bytes_per_token"] == kv
    for row in decode:
        expected = memory["weights_bytes"] - embedding + row["batch"] * row["context"] * kv
        assert row["bytes_per_step"] == expected


def test_bench_measures_one_share_alone(
    run: Run, tiny_folder: Path, alone: dict[str, object]
) -> None:
    share = measured(run, tiny_folder, "--shard_of", 2)
    assert (share["world_size"], share["shard_of"]) == (1, 2)
    assert share["memory"]["weights_bytes"] < 0.6 * alone["memory"]["weights_bytes"]  # type: ignore[index]


@pytest.mark.parametrize(("n_ranks", "cold"), [(1, []), (1, ["--cold"]), (2, ["--cold"])])
def test_bench_measures_loading(run: Run, tiny_folder: Path, n_ranks: int, cold: list[str]) -> None:
    done = run("bench", tiny_folder, "--loading", "--peer", "safetensors", "--json", *cold,
               "--device", "cpu", "--nproc_per_node", n_ranks)  # fmt: skip
    assert (done.code, done.err) == (0, "")
    result = json.loads(done.out)
    size = sum(path.stat().st_size for path in tiny_folder.glob("*.safetensors"))
    assert (result["world_size"], result["files_bytes"]) == (n_ranks, size)
    assert result["cold"] is bool(cold)
    assert result["bytes_wanted"] == size
    assert size / n_ranks * 0.9 < result["share_bytes"] <= size
    assert result["ours_bytes_per_s"] == pytest.approx(size / result["ours_s"])
    share = result["ours_bytes_per_s"] / result["plain_read_bytes_per_s"]
    assert result["share_of_lower_ceiling"] == pytest.approx(share)
    assert min(result["read_once_s"], result["safetensors_s"]) > 0


def test_bench_measures_answers_of_a_schema_beside_free_text(on_two: dict[str, object]) -> None:
    kept = on_two["json_schema"]
    assert isinstance(kept, dict)
    assert set(kept) == {
        "context", "tokens", "ms_per_token", "free_ms_per_token", "mask_ms", "mask_ms_p99",
    }  # fmt: skip
    assert kept["context"] + 96 == 512  # what the tiny model's context has room for
    assert kept["tokens"] >= 100
    assert min(kept["ms_per_token"], kept["free_ms_per_token"]) > 0
    assert kept["mask_ms"] > 0


def test_bench_refuses_a_schema_before_it_measures(
    run: Run, tiny_folder: Path, tmp_path: Path
) -> None:
    schema = tmp_path / "schema.json"
    schema.write_text('{"type": "nothing"}')
    done = run("bench", tiny_folder, *SMALL, "--json_schema", schema)
    assert (done.code, done.out) == (1, "")
    assert "not a JSON schema" in done.err
    assert len(done.err.splitlines()) == 1


@pytest.mark.parametrize(("suffix", "has_schema"), [(".svg", False), (".png", True)])
def test_bench_prints_and_draws_its_figures(
    run: Run, tiny_folder: Path, tmp_path: Path, schema_file: Path, suffix: str, has_schema: bool
) -> None:
    picture = tmp_path / f"figures{suffix}"
    schema = ("--json_schema", schema_file) if has_schema else ()
    done = run("bench", tiny_folder, *SMALL, "--plot", picture, *schema)
    assert done.code == 0, done.err
    assert "time to first token" in done.out
    assert ("answers kept to a schema" in done.out) == has_schema
    assert picture.read_bytes()[:5] in (b"<?xml", b"\x89PNG\r")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--plot", "figures.txt"), "--plot"),
        (("--plot", "no/such/folder.svg"), "no such folder"),
        (("--shard_of", "1"), "--shard_of"),
        (("--batches", "0"), "--batches"),
        (("--contexts", "long"), "--contexts"),
        (("--peer", "vllm"), "--peer"),
        (("--loading", "--json_schema", "person.json"), "--json_schema"),
    ],
)
def test_bench_refuses_what_it_cannot_measure(
    run: Run, tiny_folder: Path, words: tuple[str, ...], said: str
) -> None:
    done = run("bench", tiny_folder, "--device", "cpu", *words)
    assert done.code == 2
    assert said in done.err
    assert done.out == ""
