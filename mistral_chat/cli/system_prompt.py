"""The system prompt that comes with a model: SYSTEM_PROMPT.txt beside its weights.

It is offered and used only when asked for. Imports nothing heavy.
"""

import re
from datetime import date, timedelta
from pathlib import Path

from mistral_chat.cli.begun import name_of
from mistral_chat.cli.console.texts import read_text_file
from mistral_chat.errors import PromptError
from mistral_chat.files import is_there

__all__ = ["DEFAULT", "default_system", "has_default"]

DEFAULT = "default"  # the value of --system and /system that stands for the file
FILE = "SYSTEM_PROMPT.txt"


def has_default(model: Path | None) -> bool:
    """Return whether a model's folder has a system prompt."""
    return model is not None and is_there(model / FILE)


def default_system(model: Path | None, today: date | None = None) -> str:
    """Read the model's system prompt and fill in {name}, {today} and {yesterday}.

    Other text in braces, such as JSON, stays as it is.

    Args:
        model: the model's folder; None for dummy weights.
        today: the date; None is this day's.

    Raises:
        PromptError: there is no such file, or it cannot be read.
    """
    if model is None or not has_default(model):
        raise PromptError(
            f"--system {DEFAULT}: {model or 'dummy weights'} has no {FILE}: expected one beside "
            f"the weights, or another system prompt (--system TEXT, --system_file PATH)"
        )
    day = today or date.today()
    values = {
        "name": name_of(model).rpartition("/")[2],
        "today": day.isoformat(),
        "yesterday": (day - timedelta(days=1)).isoformat(),
    }
    text = read_text_file(model / FILE)
    return re.sub(r"\{(name|today|yesterday)\}", lambda found: values[found[1]], text)
