"""inspect says what a run would do: the same plan, the same refusals, and no weight read."""

import json
import re
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pexpect
import pytest
import torch
from safetensors.torch import save_file

from mistral_chat.chat.llm import LLM
from mistral_chat.cli.inspect import run as inspect
from mistral_chat.cli.inspect import text as inspect_text
from mistral_chat.cli.main import request_of
from mistral_chat.config import EngineConfig
from mistral_chat.engine.memory import plan_memory
from mistral_chat.engine.ranks.group import Group, Place
from mistral_chat.engine.start_up import load_runner
from mistral_chat.errors import NotEnoughMemoryError, TokenizerError
from mistral_chat.model.args import TransformerArgs
from mistral_chat.model.sharding import Shard, placements
from tests.conftest import ROOT, TINY, Run, command_env, make_folder, random_weights

GB = 10**9
LARGE = ("--config", ROOT / "configs" / "large-2407.toml", "--load_format", "dummy")


Inspect = Callable[..., dict[str, Any]]


@pytest.fixture
def inspected(capsys: pytest.CaptureFixture[str]) -> Inspect:
    """What `--json` says, from this process: torch takes longer to import than all the rest."""

    def inspect_folder(*words: object) -> dict[str, Any]:
        assert inspect.run(request_of(["inspect", *map(str, words), "--json"])) == 0
        out, err = capsys.readouterr()
        assert err == ""
        result: dict[str, Any] = json.loads(out)
        return result

    return inspect_folder


@pytest.fixture(scope="session")
def five_heads(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that five ranks can share, and eight cannot."""
    args = replace(TINY, n_heads=5, n_kv_heads=5)
    return make_folder(tmp_path_factory.mktemp("models") / "five", args)


def test_inspect_names_what_is_there(inspected: Inspect, tiny_folder: Path) -> None:
    result = inspected(tiny_folder, "--device", "cpu")
    assert result["parameters"] == TINY.n_params
    assert result["shape"]["n_kv_heads"] == TINY.n_kv_heads
    size = (tiny_folder / "consolidated.safetensors").stat().st_size
    assert result["weights"] == {"layout": "consolidated", "files": 1, "bytes": size,
                                 "dtypes": ["F32"]}  # fmt: skip
    assert result["tokenizer"] == {"file": "tokenizer.model.v3", "version": "v3 SentencePiece"}
    assert [plan["world_size"] for plan in result["plans"]] == [1, 2, 4]  # it has four heads


def test_inspect_refuses_a_tokenizer_that_a_run_refuses(
    inspected: Inspect, broken_folder: Path
) -> None:
    (broken_folder / "tokenizer.model.v3").rename(broken_folder / "tokenizer.model")
    for use in (inspected, lambda folder, *_: LLM(folder, device="cpu")):
        with pytest.raises(TokenizerError, match="rename it"):
            use(broken_folder, "--device", "cpu")


def test_inspect_counts_shards_and_pickles(inspected: Inspect, broken_folder: Path) -> None:
    (broken_folder / "consolidated.safetensors").unlink()
    weights = random_weights(TINY)
    names = sorted(weights)
    for n in range(3):
        part = {name: weights[name] for name in names[n::3]}
        save_file(part, broken_folder / f"consolidated-{n + 1:05}-of-00003.safetensors")
    got = inspected(broken_folder, "--device", "cpu")["weights"]
    assert (got["layout"], got["files"]) == ("consolidated", 3)
    for path in broken_folder.glob("*.safetensors"):
        path.unlink()
    torch.save(weights, broken_folder / "consolidated.00.pth")
    got = inspected(broken_folder, "--device", "cpu")["weights"]
    assert (got["layout"], got["files"]) == ("pth", 1)


@pytest.mark.parametrize("max_seq_len", [None, 100])
@pytest.mark.parametrize("max_batch_size", [1, 3])
def test_inspect_plans_what_a_run_plans(
    inspected: Inspect, tiny_folder: Path, max_seq_len: int | None, max_batch_size: int
) -> None:
    config = EngineConfig(
        model=tiny_folder, device="cpu", max_seq_len=max_seq_len, max_batch_size=max_batch_size
    )
    planned = load_runner(config, Group(Place())).plan
    assert planned is not None
    words: list[object] = [tiny_folder, "--device", "cpu", "--max_batch_size", max_batch_size]
    if max_seq_len:
        words += ["--max_seq_len", max_seq_len]
    (plan,) = inspected(*words, "--nproc_per_node", 1)["plans"]
    (row,) = plan["ranks"]
    assert plan["context"] == planned.max_seq_len
    assert row["weights_bytes"] == planned.weights
    assert row["kv_bytes_per_token"] == planned.kv_per_token
    assert row["kv_bytes"] == planned.kv_per_token * planned.max_seq_len
    assert row["workspace_bytes"] == planned.workspace
    assert plan["fits"]
    assert plan["longest_context"] == TINY.max_seq_len


LARGE_ARGS = TransformerArgs(
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


def admits(world_size: int, rank: int, free: int, max_seq_len: int) -> bool:
    """Whether a run of so many GPUs is not refused."""
    shard = Shard(LARGE_ARGS, world_size, rank)
    try:
        plan_memory(
            shard,
            placements(shard),
            dtype=torch.bfloat16,
            device=torch.device("cuda"),
            free=free,
            n_slots=1,
            chunk_size=min(2048, max_seq_len),
            max_seq_len=max_seq_len,
        )
    except NotEnoughMemoryError:
        return False
    return True


@pytest.mark.parametrize(
    ("n_ranks", "gb"), [(2, 141), (3, 85), (4, 64), (8, 80), (8, 40), (2, 124)]
)
def test_longest_context_is_the_last_that_a_run_admits(
    inspected: Inspect, n_ranks: int, gb: int
) -> None:
    words = (*LARGE, "--gpu_memory", f"{gb}GB", "--nproc_per_node", n_ranks)
    (plan,) = inspected(*words)["plans"]
    for row in plan["ranks"]:
        longest = row["longest_context"]
        assert row["free_bytes"] == gb * GB
        assert not longest or admits(n_ranks, row["rank"], gb * GB, longest)
        if longest < 131_072:
            assert not admits(n_ranks, row["rank"], gb * GB, max(2, longest + 1))
        needed = row["weights_bytes"] + row["kv_bytes"] + row["workspace_bytes"]
        assert row["fits"] == (row["missing_bytes"] == 0)
        assert row["missing_bytes"] == max(0, needed - gb * GB)
    assert plan["longest_context"] == min(row["longest_context"] for row in plan["ranks"])
    assert plan["fits"] == all(row["fits"] for row in plan["ranks"])


def test_context_that_was_asked_for_is_judged(run: Run, inspected: Inspect) -> None:
    common = (*LARGE, "--gpu_memory", "33GB", "--nproc_per_node", 8)
    (free,) = inspected(*common)["plans"]
    assert free["fits"]
    assert free["context"] == free["longest_context"] > 512
    (more,) = inspected(*common, "--max_seq_len", free["context"] + 1)["plans"]
    assert not more["fits"]
    assert more["longest_context"] == free["context"]
    assert 0 < more["ranks"][0]["missing_bytes"] <= more["ranks"][0]["kv_bytes_per_token"]
    # A reader wants the figures of what does not fit; that is no failure of this command.
    assert run("inspect", *common, "--max_seq_len", free["context"] + 1).code == 0


def test_large_model_has_its_known_figures(run: Run) -> None:
    done = run("inspect", *LARGE, "--gpu_memory", "141GB", "--nproc_per_node", "8")
    assert done.code == 0, done.err
    for text in ("122,610,069,504 (122.61 B)", "96 heads of 128 (8 for KV)", "131,072 positions",
                 "bfloat16 on GPUs with 141.00 GB free (assumed)", "30.66 GB", "0-7"):  # fmt: skip
        assert text in done.out


@pytest.mark.parametrize(
    ("text", "n_bytes"),
    [("80GB", 80 * GB), ("80 GB", 80 * GB), ("79.5GiB", int(79.5 * 2**30)), ("141000MB", 141 * GB)],
)
def test_gpu_memory_has_a_unit(
    inspected: Inspect, tiny_folder: Path, text: str, n_bytes: int
) -> None:
    result = inspected(tiny_folder, "--gpu_memory", text, "--nproc_per_node", 1)
    assert result["assumed_gpu_bytes"] == n_bytes
    assert result["plans"][0]["ranks"][0]["free_bytes"] == n_bytes
    assert (result["device"], result["dtype"]) == ("cuda", "bfloat16")


def test_dtype_of_the_weights_is_counted(inspected: Inspect, tiny_folder: Path) -> None:
    half, whole = (
        inspected(tiny_folder, "--device", "cpu", "--nproc_per_node", 1, "--dtype", dtype)
        for dtype in ("bfloat16", "float32")
    )
    assert 2 * half["plans"][0]["ranks"][0]["weights_bytes"] == 4 * TINY.n_params
    assert whole["plans"][0]["ranks"][0]["weights_bytes"] == 4 * TINY.n_params


def test_uneven_ranks_are_told_apart(run: Run, inspected: Inspect, five_heads: Path) -> None:
    words = (five_heads, "--device", "cpu")
    result = inspected(*words)
    assert [plan["world_size"] for plan in result["plans"]] == [1, 2, 4]
    two = result["plans"][1]["ranks"]
    assert two[0]["kv_bytes"] * 2 == two[1]["kv_bytes"] * 3
    out = run("inspect", *words, "--nproc_per_node", "2").out
    rows = [line.split()[:2] for line in out.splitlines()[-2:]]
    assert rows == [["2", "0"], ["2", "1"]]
    refused = run("inspect", *words, "--nproc_per_node", "6")
    assert refused.code == 1
    assert "5 query heads" in refused.err


def test_inspect_into_a_pipe_is_plain_and_unwrapped(run: Run, tiny_folder: Path) -> None:
    out = run("inspect", tiny_folder, "--device", "cpu").out
    assert out.isascii()
    assert "\x1b" not in out
    lines = out.splitlines()
    head = next(n for n, line in enumerate(lines) if line.lstrip().startswith("ranks"))
    rows = [line.split() for line in lines[head + 1 :]]
    # 96 hidden units in steps of 32 and of 16
    alike = [["1", "0"], ["2", "0"], ["2", "1"], ["4", "0-1"], ["4", "2-3"]]
    assert [row[:2] for row in rows] == alike
    assert {row[-1] for row in rows} == {"512"}


def test_inspect_gives_a_terminal_a_table(tiny_folder: Path) -> None:
    words = ["-m", "mistral_chat", "inspect", str(tiny_folder), "--device", "cpu"]
    env = command_env(TERM="xterm-256color", COLUMNS="140")
    child = pexpect.spawn(sys.executable, words, env=env, cwd=str(ROOT), encoding="utf-8",
                          dimensions=(40, 140), timeout=300)  # type: ignore[arg-type]  # fmt: skip
    child.expect(pexpect.EOF)
    child.close()
    assert child.exitstatus == 0
    assert "longest" in str(child.before)
    assert "━" in str(child.before)


@pytest.mark.parametrize(("columns", "unit"), [(60, ""), (80, ""), (100, ""), (120, " GB")])
def test_table_is_as_wide_as_the_terminal_and_cuts_no_figure(
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    columns: int,
    unit: str,
) -> None:
    shape = (ROOT / "configs" / "large-2407.toml").read_text()
    (tmp_path / "large.toml").write_text(re.sub(r"nproc_per_node = \d+\n", "", shape))
    monkeypatch.setattr(inspect_text, "is_fancy", lambda stream: True)
    monkeypatch.setenv("COLUMNS", str(columns))
    monkeypatch.setenv("TERM", "xterm-256color")
    words = ("--config", tmp_path / "large.toml", "--load_format", "dummy", "--gpu_memory", "80GB")
    assert inspect.run(request_of(["inspect", *map(str, words), "--dtype", "bfloat16"])) == 0
    lines = re.sub(r"\x1b\[[0-9;]*m", "", capsys.readouterr().out).splitlines()
    prose, table = lines[: lines.index("")], lines[lines.index("") + 1 :]
    assert max(map(len, lines)) <= max(columns, 80)
    assert max(map(len, prose)) <= columns
    assert "…" not in "".join(lines)
    assert re.sub(r"\s+", " ", " ".join(prose)).count("hidden 28,672, vocabulary 32,768") == 1
    rows = [re.split(r"\s*│\s*|\s{2,}", line.strip("│ ")) for line in table]
    no = "no, " if unit else ""
    assert [row for row in rows if len(row) == 9][-4:] == [
        [n, who, f"{weights}{unit}", f"{kv}{unit}", context, f"{work}{unit}", f"80.00{unit}",
         f"{no}{short}{unit} short" if short else "yes", longest]
        for n, who, weights, kv, context, work, short, longest in (
            ("1", "0", "245.22", "0.18", "512", "2.05", "167.45", "none"),
            ("2", "0-1", "122.61", "0.09", "512", "1.71", "44.42", "none"),
            ("4", "0-3", "61.31", "11.81", "131,072", "1.54", "", "131,072"),
            ("8", "0-7", "30.66", "5.91", "131,072", "1.46", "", "131,072"),
        )
    ]  # fmt: skip
    assert ("in GB" in "".join(table)) == (not unit)


@pytest.mark.parametrize("break_it", ["truncate", "tensors", "tokenizer", "params"])
def test_inspect_refuses_what_a_run_refuses(run: Run, broken_folder: Path, break_it: str) -> None:
    weights = broken_folder / "consolidated.safetensors"
    if break_it == "truncate":
        weights.write_bytes(weights.read_bytes()[:-1000])
    elif break_it == "tensors":
        tensors = random_weights(TINY)
        del tensors["norm.weight"]
        save_file(tensors, weights)
    elif break_it == "tokenizer":
        (broken_folder / "tokenizer.model.v3").unlink()
    else:
        (broken_folder / "params.json").write_text('{"dim": 64}')
    asked = run("inspect", broken_folder, "--device", "cpu")
    ran = run(broken_folder, "--device", "cpu", "--prompt", "Hi", "--max_tokens", "2")
    assert asked.code == ran.code == 1
    assert asked.out == ""
    assert asked.err.splitlines() == asked.error_lines == ran.error_lines


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--gpu_memory", "80"), "--gpu_memory"),
        (("--gpu_memory", "lots"), "--gpu_memory"),
        (("--gpu_memory", "80GB", "--device", "cpu"), "expected one of them"),
        (("--max_batch_size", "0"), "--max_batch_size"),
        (("--max_seq_len", "513", "--device", "cpu"), "the model knows 512 positions"),
        (("--nproc_per_node", "0"), "--nproc_per_node"),
        (("--gpu_memry", "1GB"), "did you mean --gpu_memory?"),
        (("--prompt", "x"), "unknown flag --prompt"),
    ],
)
def test_wrong_usage_of_inspect_is_code_2(
    run: Run, tiny_folder: Path, words: tuple[str, ...], said: str
) -> None:
    done = run("inspect", tiny_folder, *words)
    assert done.code == 2
    assert said in done.err
    assert done.err.splitlines() == done.error_lines
    assert done.out == ""


def test_inspect_answers_for_the_embedded_model(run: Run, embedded_folder: Path) -> None:
    done = run("inspect", embedded_folder)
    assert (done.code, done.err) == (0, "")
    assert "30 layers" in done.out


def test_inspect_speaks_once_under_torchrun(run: Run, tiny_folder: Path) -> None:
    done = run("inspect", tiny_folder, "--device", "cpu", torchrun=2)
    assert done.code == 0, done.err
    assert done.out.count("parameters") == 1
