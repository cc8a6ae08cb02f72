"""What `mistral-chat inspect` prints: lines on the model, and a table of what ranks would hold.

As wide as the terminal where there is one. Knows the object of `--json`; computes nothing.
"""

import sys
import textwrap
from collections.abc import Sequence
from itertools import groupby
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from mistral_chat.cli.console.printing import clean
from mistral_chat.cli.console.terminal import is_fancy, is_terminal

__all__ = ["text_of"]

PLAIN_COLUMNS = 200
NAME_COLUMNS = 13


def text_of(result: dict[str, Any]) -> str:
    """The result as text.

    Args:
        result: the object of `--json`.
    """
    fancy = is_fancy(sys.stdout)
    console = Console(file=sys.stdout, highlight=False, no_color=not fancy,
                      width=None if fancy else PLAIN_COLUMNS)  # fmt: skip
    table = _table(result["plans"], box.HEAVY_HEAD if fancy else None)
    with console.capture() as capture:
        for name, text in _lines(result):
            text = clean(text) if is_terminal(sys.stdout) else text
            shown = _folded(text, console.width - NAME_COLUMNS) if fancy else text
            console.print(f"{name:<{NAME_COLUMNS}}{shown}", markup=False, soft_wrap=True)
        console.print()
        if fancy and _columns(console, table) > console.width:
            console.print("Figures of memory in GB:\n")
            table = _table(result["plans"], box.SIMPLE_HEAVY, unit="")
            # Figures are never cut: a terminal that is narrower still folds the lines itself.
            console.width = max(console.width, _columns(console, table))
        console.print(table)
    return "\n".join(line.rstrip() for line in capture.get().rstrip().splitlines())


def _columns(console: Console, table: Table) -> int:
    """How wide a table is that has all the room it wants."""
    return console.measure(table, options=console.options.update(width=10_000)).maximum


def _folded(text: str, columns: int) -> str:
    """A text in lines of so many columns, the later ones under the first; words stay whole."""
    lines = textwrap.wrap(text, max(1, columns), break_long_words=False, break_on_hyphens=False)
    return f"\n{' ' * NAME_COLUMNS}".join(lines)


def _lines(result: dict[str, Any]) -> list[tuple[str, str]]:
    shape, weights, tokenizer = result["shape"], result["weights"], result["tokenizer"]
    parts = [
        f"{shape['n_layers']} layers",
        f"dim {shape['dim']:,}",
        f"{shape['n_heads']} heads of {shape['head_dim']} ({shape['n_kv_heads']} for KV)",
        f"hidden {shape['hidden_dim']:,}",
        f"vocabulary {shape['vocab_size']:,}" + (" (tied)" if shape["tied_embeddings"] else ""),
    ]
    if shape["sliding_window"]:
        parts.append(f"sliding window {shape['sliding_window']}")
    if shape["max_seq_len"]:
        parts.append(f"{shape['max_seq_len']:,} positions")
    if yarn := shape["yarn"]:
        original = yarn["original_max_position_embeddings"]
        parts.append(f"YaRN x{yarn['factor']:g} from {original:,}")
    if scaling := shape["llama_4_scaling"]:
        parts.append(f"llama-4 scaling {scaling['beta']:g}")
    if shape["vision_encoder"]:
        parts.append("text side of a model that sees pictures")
    lines = [
        ("model", result["model"]),
        ("architecture", ", ".join(parts)),
        ("parameters", f"{result['parameters']:,} ({result['parameters'] / 1e9:.2f} B)"),
    ]
    if weights:
        files = f"{weights['files']} file" + ("s" if weights["files"] > 1 else "")
        kinds = ", ".join(weights["dtypes"])
        on_disk = f"{weights['layout']}, {files}, {_gb(weights['bytes'])} on disk ({kinds})"
        lines.append(("weights", on_disk))
    if quantization := shape["quantization"]:
        lines.append(("quantized", _quantization(quantization)))
    if tokenizer:
        lines.append(("tokenizer", f"{tokenizer['file']} ({tokenizer['version']})"))
    where = {"cpu": "the CPU", "cuda": "GPUs"}[result["device"]]
    if result["assumed_gpu_bytes"]:
        where += f" with {_gb(result['assumed_gpu_bytes'])} free (assumed)"
    n = result["max_batch_size"]
    lines.append(("planned for", f"{result['dtype']} on {where}, {n} sequence{'s'[: n > 1]}"))
    return lines


def _quantization(said: dict[str, Any]) -> str:
    """How the matrices of the layers are stored."""
    scales = "a row"
    if said["per_tensor"]:
        scales = "a tensor"
    elif said["group_size"]:
        scales = f"{said['group_size']} columns"
    zeros = " with zero points" if said["has_zeros"] else ""
    kept = f", {len(said['kept'])} matrices as floats" if said["kept"] else ""
    return f"{said['kind']}, a scale for {scales}{zeros} ({said['method']}){kept}"


def _table(plans: Sequence[dict[str, Any]], frame: box.Box | None, unit: str = " GB") -> Table:
    """One row for ranks that hold the same and have the same."""
    narrow = not unit
    table = Table(box=frame, show_edge=not narrow, padding=(0, 0, 0, 1) if narrow else (0, 1))
    # Words that 80 columns hold; `longest` is the longest context that fits.
    for name in ("ranks", "rank", "weights", "KV", "context", "work", "free", "fits", "longest"):
        table.add_column(name, justify="right")
    for plan in plans:
        for _, same in groupby(plan["ranks"], key=lambda row: {**row, "rank": None}):
            rows = list(same)
            row, last = rows[0], rows[-1]["rank"]
            missing = f"{_billions(row['missing_bytes'])}{unit} short"
            table.add_row(
                str(plan["world_size"]),
                str(row["rank"]) if row["rank"] == last else f"{row['rank']}-{last}",
                _billions(row["weights_bytes"]) + unit,
                _billions(row["kv_bytes"]) + unit,
                f"{plan['context']:,}",
                _billions(row["workspace_bytes"]) + unit,
                _billions(row["free_bytes"]) + unit,
                "yes" if row["fits"] else f"no, {missing}" if unit else missing,
                f"{row['longest_context']:,}" if row["longest_context"] else "none",
            )
    return table


def _billions(n_bytes: int) -> str:
    return f"{n_bytes / 1e9:,.2f}"


def _gb(n_bytes: int) -> str:
    return f"{_billions(n_bytes)} GB"
