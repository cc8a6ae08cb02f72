"""Command lines up to where ranks would be started, one after another in one process.

Reads a JSON list of command lines from a file, prints a JSON list of what became of each: its code
(STARTS where ranks would have been started), stdout, stderr, what stdin was left at, and which
modules that take long to import it had imported.
"""

import contextlib
import io
import json
import os
import sys
from pathlib import Path
from typing import Any

STARTS = 77
SLOW = ("torch", "transformers", "rich", "prompt_toolkit", "mistral_common.tokens")


def _run(argv: list[str]) -> dict[str, Any]:
    from mistral_chat.cli.main import main

    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    out, err = (io.TextIOWrapper(io.BytesIO(), encoding="utf-8") for _ in "12")
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = main(argv)
    texts = []
    for stream in (out, err):
        stream.flush()
        texts.append(stream.buffer.getvalue().decode())  # type: ignore[attr-defined]
    slow = [name for name in SLOW if name in sys.modules]
    return {"code": code, "out": texts[0], "err": texts[1], "slow": slow}


def main() -> None:
    from mistral_chat.cli import start

    def launch(*_: object) -> int:
        return STARTS

    start.launch = launch
    done = [_run(argv) for argv in json.loads(Path(sys.argv[1]).read_text())]
    print(json.dumps(done))


if __name__ == "__main__":
    main()
