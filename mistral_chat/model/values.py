"""Values of a model's JSON files: within their bounds, or refused by name. Knows no files."""

from typing import Any

from mistral_chat.errors import CheckpointError, named, shown

__all__ = ["MOST_POSITIONS", "read_table", "require_flag", "require_number", "require_whole"]

MOST_POSITIONS = 1 << 24  # RoPE's angles are float32, which holds every whole number up to here


def require_number(name: str, value: object, least: float, most: float) -> float:
    """A number within bounds.

    Raises:
        CheckpointError: it is something else; named.
    """
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not least <= value <= most:
        raise CheckpointError(
            f"{name} is {shown(value)}: expected a number from {least:g} to {most:g}"
        )
    return value


def require_whole(name: str, value: object, least: int, most: int) -> int:
    """A whole number within bounds.

    Raises:
        CheckpointError: it is something else; named.
    """
    if not isinstance(value, int) or isinstance(value, bool) or not least <= value <= most:
        raise CheckpointError(
            f"{name} is {shown(value)}: expected a whole number of at least {least} and at most "
            f"{most:,}"
        )
    return value


def read_table(name: str, table: object, keys: dict[str, str], required: int) -> dict[str, Any]:
    """A JSON object's values under our names.

    Args:
        name: of the object, for errors.
        table: what the file has.
        keys: ours by theirs, required ones first; null is absent.
        required: how many of them must be there.

    Raises:
        CheckpointError: it is no object, lacks a key, or has one that is unknown.
    """
    if not isinstance(table, dict):
        raise CheckpointError(f"{name} is {shown(table)}: expected an object")
    said = {key: value for key, value in table.items() if value is not None}
    unknown = sorted(said.keys() - keys.keys())
    if unknown:
        raise CheckpointError(
            f"{', '.join(map(named, unknown[:8]))} in {name} is not supported: not a key we know"
        )
    missing = [key for key in list(keys)[:required] if key not in said]
    if missing:
        raise CheckpointError(f"{', '.join(missing)} in {name} is missing")
    return {ours: said[theirs] for theirs, ours in keys.items() if theirs in said}


def require_flag(name: str, value: object) -> bool:
    """True or false.

    Raises:
        CheckpointError: it is something else; named.
    """
    if not isinstance(value, bool):
        raise CheckpointError(f"{name} is {shown(value)}: expected true or false")
    return value
