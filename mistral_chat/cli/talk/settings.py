"""Sampling settings as the chat's `/set` changes and `/show` prints them."""

from dataclasses import replace
from typing import Any

from mistral_chat.cli.command_line import flags_of
from mistral_chat.config import SamplingParams
from mistral_chat.errors import UsageError

__all__ = ["SETTABLE", "sampling_line", "set_sampling"]

SETTABLE = {
    name: flag for name, flag in flags_of(SamplingParams).items() if flag.table == "generation"
}
UNSET = ("none", "default", "-")


def set_sampling(params: SamplingParams, words: str) -> SamplingParams:
    """Return the settings with one changed.

    Args:
        params: the current settings.
        words: a name and a value; `default` resets the setting, `stop` adds a text.

    Raises:
        UsageError: an unknown name, or a value out of range.
    """
    name, _, value = words.replace("=", " ", 1).partition(" ")
    name, value = name.removeprefix("--").replace("-", "_"), value.strip()
    if name not in SETTABLE or not value:
        raise UsageError(f"/set takes a name and a value; the names are {', '.join(SETTABLE)}")
    if value in UNSET:
        return replace(params, **{name: SETTABLE[name].default})
    try:
        read: Any = SETTABLE[name].read(value)
    except ValueError as error:
        raise UsageError(f"/set {name}: {error}") from None
    if SETTABLE[name].repeats:
        read = (*getattr(params, name), read)
    return replace(params, **{name: read})


def sampling_line(params: SamplingParams) -> str:
    """Return all settings on one line."""
    values = {name: getattr(params, name) for name in SETTABLE}
    values["stop"] = list(params.stop) or None
    return ", ".join(f"{name} {'-' if v is None else v}" for name, v in values.items())
