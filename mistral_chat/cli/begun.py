"""The beginning of a command: when it was, and the line that says at once what is being started.

A command that starts ranks hands its beginning on to them, so that figures count from Enter.
Imports nothing heavy.
"""

import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Self

from mistral_chat.cli.console import printing
from mistral_chat.cli.console.terminal import is_terminal
from mistral_chat.engine.ranks.launch import launched_rank, launched_ranks
from mistral_chat.errors import one_line

if TYPE_CHECKING:
    from mistral_chat.cli.requests import ModelRequest

__all__ = ["Begun", "name_of", "say_what_starts"]

HANDED_ON = "MISTRAL_CHAT_BEGUN"
OWN_START_S = 1.0  # what is older was another program, which this one took the place of (exec)


@dataclass(frozen=True, kw_only=True)
class Begun:
    """When and by whom this process was begun.

    Args:
        at: when the command was, in `time.monotonic()`, which all processes of a machine share.
        by_us: this is a rank that our own command started, after it had checked and said what
            there was to.
    """

    at: float
    by_us: bool = False

    @classmethod
    def now(cls) -> Self:
        """Of this process; to be called once, early."""
        handed_on = os.environ.pop(HANDED_ON, None)
        if handed_on is not None and launched_rank() is not None:
            return cls(at=float(handed_on), by_us=True)
        return cls(at=time.monotonic() - _age_s())

    @contextmanager
    def handed_on(self) -> Iterator[None]:
        """A block whose child processes are ranks of this command."""
        os.environ[HANDED_ON] = repr(self.at)
        try:
            yield
        finally:
            del os.environ[HANDED_ON]


def _age_s() -> float:
    """Seconds since the system started this process, Python's own start included; 0 if unknown."""
    try:
        fields = Path("/proc/self/stat").read_text().rpartition(")")[2].split()
        born = int(fields[19]) / os.sysconf("SC_CLK_TCK")
        age = time.clock_gettime(time.CLOCK_BOOTTIME) - born
    except (OSError, ValueError, IndexError, AttributeError):  # no Linux
        return 0.0
    return age if 0 <= age <= OWN_START_S else 0.0


def say_what_starts(request: "ModelRequest", begun: Begun, *, quiet: bool = False) -> None:
    """Say it at a terminal, at once: importing torch and reading weights take a while."""
    if begun.by_us or quiet or not is_terminal(sys.stderr):
        return
    n_ranks: int | None = launched_ranks()
    if launched_rank() is None:  # else GPUs are counted first, which takes longer than this line
        n_ranks = request.nproc_per_node or (1 if request.engine.device == "cpu" else None)
    ranks = f"{n_ranks} ranks of " if n_ranks is not None and n_ranks > 1 else ""
    device = request.engine.device
    where = "" if device == "auto" else f" on {device}"
    line = f"mistral-chat: starting {ranks}{name_of(request.engine.model)}{where} ..."
    printing.note(one_line(line), dim=True)


def name_of(model: Path | None) -> str:
    """What people call a model: its repository in the hub's cache, else its folder."""
    if model is None:
        return "dummy weights"
    home = model.parent.parent.name
    if model.parent.name == "snapshots" and home.startswith("models--"):
        return home.removeprefix("models--").replace("--", "/")
    return model.resolve().name
