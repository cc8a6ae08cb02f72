"""Sampling settings as the chat's `/set` changes and `/show` prints them."""

from dataclasses import fields, replace

from mistral_chat.config import SamplingParams
from mistral_chat.errors import UsageError

__all__ = ["SETTABLE", "sampling_line", "set_sampling"]

SETTABLE = ("max_tokens", "temperature", "top_p", "top_k", "min_p", "seed", "stop")
UNSET = ("none", "default", "-")
_WHOLE = ("max_tokens", "top_k", "seed")


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
        defaults = {field.name: field.default for field in fields(SamplingParams)}
        return replace(params, **{name: defaults[name]})  # type: ignore[arg-type]
    if name == "stop":
        return replace(params, stop=(*params.stop, value))
    try:
        number = int(value) if name in _WHOLE else float(value)
    except ValueError:
        kind = "whole number" if name in _WHOLE else "number"
        raise UsageError(f"/set {name}: {value!r} is no {kind}") from None
    return replace(params, **{name: number})  # type: ignore[arg-type]


def sampling_line(params: SamplingParams) -> str:
    """Return all settings on one line."""
    values = {name: getattr(params, name) for name in SETTABLE}
    values["stop"] = list(params.stop) or None
    return ", ".join(f"{name} {'-' if v is None else v}" for name, v in values.items())
