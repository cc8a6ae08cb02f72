"""Ranks of one node that are forked: what a launcher tells them, without the launcher."""

import os
import secrets
import tempfile
from pathlib import Path

from tests.conftest import command_env
from tests.warm import Warm, warm

__all__ = ["places_of", "run_ranks"]


def places_of(n_ranks: int) -> list[dict[str, str]]:
    """The variables of each rank of a run of its own."""
    run = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    run |= {"TORCHELASTIC_RUN_ID": secrets.token_hex(8)}
    run |= {"WORLD_SIZE": str(n_ranks), "LOCAL_WORLD_SIZE": str(n_ranks)}
    return [run | {"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(n_ranks)]


def run_ranks(module: str, *words: str | Path, n_ranks: int, forks: Warm | None = None) -> None:
    """Run a module on ranks until all of them have ended well.

    Args:
        module: with a `__main__`.
        words: of the command line.
        n_ranks: number of ranks.
        forks: the process that forks them.
    """
    typed = [str(word) for word in words]
    with tempfile.TemporaryFile() as out, open(os.devnull) as nothing:  # noqa: PTH123
        streams = [nothing.fileno(), out.fileno(), out.fileno()]
        ranks = [
            (forks or warm()).start(module, typed, command_env(**place), streams)
            for place in places_of(n_ranks)
        ]
        try:
            codes = [rank.wait(400) for rank in ranks]
        finally:
            for rank in ranks:  # the others would wait for one that has failed
                rank.kill()
        out.seek(0)
        assert codes == [0] * n_ranks, out.read().decode()[-3000:]
