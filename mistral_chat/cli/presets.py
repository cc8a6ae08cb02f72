"""The flags that a preset sets: its keys held against the table, its values read as a flag's are.

Knows the table's form and none of its flags.
"""

import argparse
import difflib
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mistral_chat.config import Preset
from mistral_chat.errors import UsageError

if TYPE_CHECKING:
    from mistral_chat.cli.flags import Flag

__all__ = ["values_of"]


def values_of(preset: Preset, path: Path | None, flags: Mapping[str, "Flag"]) -> dict[str, Any]:
    """What a preset gives to flags, by name.

    Args:
        preset: as read.
        path: names it in errors.
        flags: by name; each says which of a preset's tables it belongs to.

    Raises:
        UsageError: a key that no flag of its table has, or a value that the flag does not take.
    """
    values: dict[str, Any] = {}
    for table, entries in (("run", preset.run), ("generation", preset.generation)):
        for name, value in entries.items():
            flag = flags.get(name)
            if flag is None or flag.table != table:
                known = [f.name for f in flags.values() if f.table == table]
                close = difflib.get_close_matches(name, known, n=1)
                hint = f"did you mean {close[0]}?" if close else f"expected {', '.join(known)}"
                raise UsageError(f"--config {path}: unknown key {name} in [{table}]: {hint}")
            try:
                values[name] = _read(flag, value)
            except argparse.ArgumentTypeError as error:
                raise UsageError(f"--config {path}: [{table}] {name}: {error}") from error
    return values


def _read(flag: "Flag", value: Any) -> Any:
    if flag.convert is None:
        if not isinstance(value, bool):
            raise argparse.ArgumentTypeError(f"{value!r} is neither true nor false")
        return value
    if flag.repeats:
        listed = value if isinstance(value, list) else [value]
        return [flag.convert(str(entry)) for entry in listed]
    return flag.convert(str(value))
