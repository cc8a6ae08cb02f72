"""`mistral-chat bench --loading`: how fast weights come from the disk, beside its ceilings.

Measures in every rank; rank 0 prints. Knows nothing of decoding.
"""

import json
from typing import TYPE_CHECKING, Any

from mistral_chat.config import EngineConfig

if TYPE_CHECKING:
    from mistral_chat.engine.ranks.group import Group

__all__ = ["run"]


def run(
    config: EngineConfig,
    group: "Group",
    about: dict[str, Any],
    *,
    shard_of: int | None,
    cold: bool,
    competitor: bool,
    as_json: bool,
) -> None:
    """Measure and print.

    Args:
        config: which folder, device and type.
        group: the ranks.
        about: device, commit and command, for the head of the result.
        shard_of: measure one rank's share of so many.
        cold: forget the files before each reading.
        competitor: measure safetensors, too.
        as_json: one object instead of a table.

    Raises:
        MistralChatError: the folder cannot be read.
    """
    from mistral_chat.cli.bench.measure_loading import measure_loading

    result = about | measure_loading(
        config, group, shard_of=shard_of, cold=cold, competitor=competitor
    )
    if group.is_leader:
        print(json.dumps(result) if as_json else _text(result))


def _text(result: dict[str, Any]) -> str:
    from rich.console import Console
    from rich.table import Table

    from mistral_chat.cli.bench.tables import build_of

    table = Table(title="loading")
    for name in ("", "s", "GB/s"):
        table.add_column(name, justify="left" if not name else "right")
    rows = [("this program", result["ours_s"], result["ours_bytes_per_s"])]
    plain = result["plain_read_bytes_per_s"]
    rows.append(("ceiling: reading the files", result["files_bytes"] / plain, plain))
    if copy := result.get("copy_bytes_per_s"):
        rows.append(("ceiling: copies to the GPUs", result["bytes_wanted"] / copy, copy))
    if once := result.get("read_once_s"):
        rows.append(("reading the files, one thread", once, result["files_bytes"] / once))
    if theirs := result.get("safetensors_s"):
        rows.append(("safetensors, get_slice", theirs, result["safetensors_bytes_per_s"]))
    for name, seconds, speed in rows:
        table.add_row(name, f"{seconds:.2f}", f"{speed / 1e9:.2f}")
    console = Console(highlight=False)
    with console.capture() as capture:
        console.print(
            f"{result['device']}, {result['world_size']} rank(s), {build_of(result)}\n"
            f"{result['files']} file(s), {result['files_bytes'] / 1e9:.2f} GB, "
            f"{'not in' if result['cold'] else 'in'} the system's cache; "
            f"{result['threads_a_rank']} thread(s) a rank\n"
            f"{result['share_of_lower_ceiling']:.0%} of the lower ceiling; host memory besides: "
            f"{result['host_bytes_beside'] / 2**20:,.0f} MiB a rank",
            soft_wrap=True,
        )
        console.print(table)
    return capture.get().rstrip("\n")
