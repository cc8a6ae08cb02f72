"""What `mistral-chat bench` prints: some lines of text, then a table for each kind of figure.

Knows the object of `--json`; measures nothing.
"""

import sys
from collections.abc import Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

__all__ = ["build_of", "loading_text", "quality_text", "text_of"]


Figures = tuple[str, Sequence[str], Sequence[Sequence[str]]]  # title, headings, rows


def build_of(result: dict[str, Any]) -> str:
    """Which build measured: its checkout's commit, else its version."""
    return f"commit {result['commit']}" if result["commit"] else f"version {result['version']}"


def text_of(result: dict[str, Any], verify_context: int) -> str:
    """The figures as text.

    Args:
        result: the object of `--json`.
        verify_context: positions before the tokens of a verify step.
    """
    return _text(_lines(result), _tables(result, verify_context))


def loading_text(result: dict[str, Any]) -> str:
    """The figures of `--loading` as text.

    Args:
        result: the object of `--json`.
    """
    plain = result["plain_read_bytes_per_s"]
    rows = [
        ("this program", result["ours_s"], result["ours_bytes_per_s"]),
        ("ceiling: reading the files", result["files_bytes"] / plain, plain),
    ]
    if copy := result.get("copy_bytes_per_s"):
        rows.append(("ceiling: copies to the GPUs", result["bytes_wanted"] / copy, copy))
    if once := result.get("read_once_s"):
        rows.append(("reading the files, one thread", once, result["files_bytes"] / once))
    if theirs := result.get("safetensors_s"):
        rows.append(("safetensors, get_slice", theirs, result["safetensors_bytes_per_s"]))
    cells = [(name, f"{seconds:.2f}", f"{speed / 1e9:.2f}") for name, seconds, speed in rows]
    return _text(
        f"{result['device']}, {result['world_size']} rank(s), {build_of(result)}\n"
        f"{result['files']} file(s), {result['files_bytes'] / 1e9:.2f} GB, "
        f"{'not in' if result['cold'] else 'in'} the system's cache; "
        f"{result['threads_a_rank']} thread(s) a rank\n"
        f"{result['share_of_lower_ceiling']:.0%} of the lower ceiling; host memory besides: "
        f"{result['host_bytes_beside'] / 2**20:,.0f} MiB a rank",
        [("loading", ["", "s", "GB/s"], cells)],
    )


def quality_text(result: dict[str, Any]) -> str:
    """The figures of `--quality` as text.

    Args:
        result: the object of `--json`.
    """
    rows = [("perplexity", f"{result['perplexity']:.4f}")]
    if "kl" in result:
        rows += [
            ("perplexity of the other run", f"{result['reference_perplexity']:.4f}"),
            ("divergence from it (KL), nats a token", f"{result['kl']:.5f}"),
            ("  99 of 100 tokens are below", f"{result['kl_p99']:.5f}"),
            ("the same token most likely", f"{result['same_top']:.2%}"),
        ]
    return _text(
        f"{result['device']}, {result['world_size']} rank(s), {result['dtype']}, "
        f"{build_of(result)}\n{result['tokens']:,} tokens predicted in {result['windows']} windows",
        [("quality", ["", "figure"], rows)],
    )


def _text(lines: str, tables: Sequence[Figures]) -> str:
    console = Console(file=sys.stdout, highlight=False)
    with console.capture() as capture:
        console.print(lines, soft_wrap=True)
        for title, names, rows in tables:
            table = Table(title=title)
            for name in names:
                table.add_column(name, justify="right" if name else "left")
            for row in rows:
                table.add_row(*row)
            console.print(table)
    return capture.get().rstrip("\n")


def _lines(result: dict[str, Any]) -> str:
    start, memory = result["start"], result["memory"]
    parts = ", ".join(
        f"{k.removesuffix('_s').replace('_', ' ')} {v:.2f} s" for k, v in start.items()
    )
    whole = sum(seconds for part, seconds in start.items() if not part.startswith("of_it"))
    share = f", one rank's share of {result['shard_of']}" if result["shard_of"] else ""
    return (
        f"{result['device']}, {result['world_size']} rank(s){share}, {result['dtype']}, "
        f"{result['threads']} thread(s) a rank, torch {result['torch']}, "
        f"{build_of(result)}\n"
        f"decode: {result['path']}\n"
        f"ceilings of a rank: reads {result['read_gb_per_s']:.1f} GB/s, matmuls "
        f"{result['product_tflop_per_s']:.3g} TFLOP/s\n"
        f"start: {whole:.2f} s ({parts})\n"
        f"a rank holds {memory['weights_bytes'] / 1e9:.2f} GB of weights, "
        f"{memory['kv_bytes'] / 1e9:.2f} GB of KV ({memory['kv_bytes_per_token']:,} bytes a "
        f"token) for a context of {memory['max_seq_len']:,}"
        + (
            f", and {memory['graphs_and_workspace_bytes'] / 1e9:.2f} GB besides"
            if "used_bytes" in memory
            else ""
        )
    )


def _tables(result: dict[str, Any], verify_context: int) -> list[Figures]:
    competitor = result.get("peer", {"decode": [], "name": None})
    theirs = {row["context"]: row["ms_per_token"] for row in competitor["decode"]}
    decode = []
    for row in result["decode"]:
        cells = [
            str(row["batch"]),
            f"{row['context']:,}",
            f"{row['ms_per_token']:.2f}",
            f"{row['tokens_per_s']:.1f}",
            f"{row['bytes_per_step'] / 1e9:.3f}",
            f"{row['share_of_read_ceiling']:.0%}",
        ]
        if theirs:
            known = row["batch"] == 1 and row["context"] in theirs
            cells.append(f"{theirs[row['context']]:.2f}" if known else "")
        decode.append(cells)
    names = ["sequences", "context", "ms a step", "tokens/s", "GB a step and rank",
             "of the read ceiling"]  # fmt: skip
    if theirs:
        names.append(f"{competitor['name']}, ms")
    first = [
        (f"{row['prompt']:,}", f"{row['first_token_s'] * 1e3:.1f}", f"{row['tflop_per_s']:.3g}",
         f"{row['share_of_product_ceiling']:.0%}")
        for row in result["first_token"]
    ]  # fmt: skip
    verify = [
        (str(row["tokens"]), f"{row['ms']:.2f}", f"{row['of_one_token']:.3f}")
        for row in result.get("verify", [])
    ]
    sums = [(path, f"{us:.1f}") for path, us in result["sum_us"].items()]
    first_names = ["prompt", "ms", "TFLOP/s a rank", "of the matmul ceiling"]
    tables: list[Figures] = [
        ("decode", names, decode),
        ("time to first token", first_names, first),
    ]
    if verify:
        title = f"step that scores several tokens, context {verify_context}"
        tables.append((title, ["tokens", "ms", "of one token"], verify))
    if kept := result.get("json_schema"):
        overhead = kept["ms_per_token"] - kept["free_ms_per_token"]
        row = [f"{kept[name]:.2f}" for name in ("ms_per_token", "free_ms_per_token")]
        row += [f"{overhead:.2f}", f"{kept['mask_ms']:.2f}", f"{kept['mask_ms_p99']:.2f}"]
        title = f"{kept['tokens']} tokens of answers kept to a schema, context {kept['context']:,}"
        headings = ["ms a token", "free text", "more", "masks alone", "99 of 100 under"]
        tables.append((title, headings, [row]))
    if sums:
        tables.append(("sum of one row over ranks, residual, norm", ["path", "us"], sums))
    return tables
