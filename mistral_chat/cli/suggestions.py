"""Words of a command line that are nearly right: a command's name, a model's folder or repository.

Looks at names on this machine's disk alone.
"""

import difflib
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import TypeVar

from mistral_chat.cli.repository import cached_repositories, is_name
from mistral_chat.errors import CheckpointError, shown
from mistral_chat.files import is_there

__all__ = ["near_command", "near_model", "require_model"]

MOST_NAMES = 5_000  # of a folder that are looked at
NEAR_COMMAND, NEAR_MODEL = 0.7, 0.6  # difflib's ratio

Place = TypeVar("Place")


def near_command(word: str, commands: Iterable[str]) -> str | None:
    """The command that a word was meant as; None where it may be a model."""
    if "/" in word or is_there(Path(word)):
        return None
    close = difflib.get_close_matches(word.lower(), commands, n=1, cutoff=NEAR_COMMAND)
    return close[0] if close else None


def near_model(word: str) -> str | None:
    """The model that a word was meant as, as it would be typed; None where none is near."""
    path = Path(word)
    places = {name.lower(): path.parent / name for name in _names_in(path.parent)}
    place = _nearest(path.name, places, _is_model)
    if place is not None:
        return str(place)
    if "/" in word and not is_name(word):
        return None
    cached = {name.lower(): name for name in cached_repositories()}
    if "/" not in word:
        cached = {key.partition("/")[2]: name for key, name in cached.items()}
    return _nearest(word, cached, lambda name: True)


def require_model(model: Path | None) -> None:
    """Refuse a MODEL that is not there; None is none that is asked for.

    Raises:
        CheckpointError: with the one that was meant, where one is near.
    """
    if model is None or is_there(model):
        return
    typed = str(model) if len(str(model)) <= 200 else shown(str(model), 200)
    if near := near_model(str(model)):
        expected = f"did you mean {near}?"
    elif any(character.isspace() for character in model.name):
        expected = 'expected MODEL first, then the text: mistral-chat MODEL "TEXT"'
    else:
        expected = "expected a model folder with params.json or config.json"
    raise CheckpointError(f"{typed}: no such folder; {expected}")


def _nearest(
    word: str, known: Mapping[str, Place], is_meant: Callable[[Place], bool]
) -> Place | None:
    close = difflib.get_close_matches(word.lower(), known, n=5, cutoff=NEAR_MODEL)
    return next((known[key] for key in close if is_meant(known[key])), None)


def _names_in(folder: Path) -> Iterator[str]:
    try:
        with os.scandir(folder) as entries:
            yield from (entry.name for entry in islice(entries, MOST_NAMES) if entry.is_dir())
    except (OSError, ValueError):
        return


def _is_model(folder: Path) -> bool:
    return any(is_there(folder / name) for name in ("params.json", "config.json"))
