"""The command as one rank whose reading of weights is disturbed, for the tests of `engine.loading`.

`python -m tests.scripts.disturbed PLAN WORDS` with RANK and the like set. PLAN is JSON:

    {"marks": FOLDER, "stall_s": SECONDS, "ranks": {RANK: {HOW: VALUE, ...}}}

From its fifth read on, a rank notes its process in FOLDER/RANK, and then: `delay_s` makes every
read take so long, `hang_s` one, `errno` fails, `truncate` cuts a file to 1,000 bytes and goes on.
`unlink` removes a file after the headers were checked; `hears_after_s` lets the lifeline learn of
lost ranks so late, when gloo has long failed.
"""

import errno
import json
import os
import sys
import threading
import time
from pathlib import Path
from typing import Any

from mistral_chat.cli.main import main
from mistral_chat.engine import loading as watching
from mistral_chat.engine.ranks.lifeline import Lifeline
from mistral_chat.model import loading

DISTURBED_READ = 5


def disturb(plan: dict[str, Any], rank: int) -> None:
    watching.STALL_S = plan["stall_s"]
    loading.CPU_PIECE_BYTES = 2**16  # many reads of a small model
    how = plan["ranks"].get(str(rank), {})
    mark = Path(plan["marks"]) / str(rank)
    whole, start, lost = os.preadv, loading.Reading.start, Lifeline._lost
    counting, n_reads = threading.Lock(), 0

    def read(fd: int, buffers: Any, offset: int) -> int:
        nonlocal n_reads
        with counting:
            n_reads += 1
            n = n_reads
        if n == DISTURBED_READ:
            if "truncate" in how:
                os.truncate(how["truncate"], 1000)
            mark.with_suffix(".new").write_text(str(os.getpid()))
            mark.with_suffix(".new").rename(mark)
            time.sleep(how.get("hang_s", 0))
        if n >= DISTURBED_READ:
            if "errno" in how:
                raise OSError(errno.EIO, os.strerror(errno.EIO))
            time.sleep(how.get("delay_s", 0))
        return whole(fd, buffers, offset)

    def start_without(reading: loading.Reading) -> None:
        if "unlink" in how:
            Path(how["unlink"]).unlink()
        start(reading)

    def lose_late(lifeline: Lifeline, lost_rank: int, reason: str) -> None:
        time.sleep(how.get("hears_after_s", 0))
        lost(lifeline, lost_rank, reason)

    os.preadv = read
    Lifeline._lost = lose_late  # type: ignore[method-assign]
    loading.Reading.start = start_without  # type: ignore[method-assign]


if __name__ == "__main__":
    disturb(json.loads(sys.argv[1]), int(os.environ["RANK"]))
    sys.exit(main(sys.argv[2:]))
