"""The real command on the real model, whose answers are written beforehand.

    python -m tests.scripts.scripted ANSWERS.json GAP_S MODEL WORDS
    python -m tests.scripts.scripted - GAP_S WORDS

ANSWERS.json is a list of answers, each a text or a list of texts and marks such as "[TOOL_CALLS]".
Steps run as ever; only the scores of the next scripted token are raised above all others, and that
takes GAP_S. An answer that is cut short is followed by the next one, the last by empty ones. `-`
leaves answers as they are: each step, of whatever command, takes GAP_S longer, and that is all.
"""

import json
import sys
import time
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from mistral_chat.chat.tokenizer import Tokenizer
from mistral_chat.cli.main import main
from mistral_chat.engine.engine import Engine, Request
from mistral_chat.engine.runner import Runner
from mistral_chat.engine.step import Step
from tests.conftest import open_folder


def ids_of(tokenizer: Tokenizer, parts: list[str]) -> list[int]:
    ids: list[int] = []
    for part in parts:
        if part.startswith("[") and part.endswith("]") and part[1:-1].replace("_", "").isupper():
            ids.append(tokenizer.raw.get_special_token(part))
        else:
            ids += tokenizer.raw.encode(part, bos=False, eos=False)
    return [*ids, tokenizer.eos_id]


def play(answers: list[str | list[str]], gap_s: float, folder: Path) -> None:
    """Have every answer from now on be the next of the script; then empty ones."""
    tokenizer = Tokenizer.from_folder(open_folder(folder))
    listed = [[answer] if isinstance(answer, str) else answer for answer in answers]
    left = deque(ids_of(tokenizer, parts) for parts in listed)
    script: deque[int] = deque()
    run, generate = Runner.run, Engine.generate

    def generate_next(self: Engine, request: Request) -> Iterator[Any]:
        script.clear()
        script.extend(left.popleft() if left else [tokenizer.eos_id])
        return generate(self, request)

    def run_scripted(self: Runner, step: Step) -> torch.Tensor | None:
        logits = run(self, step)
        if logits is not None:
            time.sleep(gap_s)
            logits = logits.clone()  # it may be an inference tensor
            logits[-1, script.popleft() if script else tokenizer.eos_id] = 1e4
        return logits

    Engine.generate = generate_next  # type: ignore[method-assign]
    Runner.run = run_scripted  # type: ignore[method-assign]


def slow_down(gap_s: float) -> None:
    """Have every step from now on take so much longer."""
    run = Runner.run

    def run_slowly(self: Runner, step: Step) -> torch.Tensor | None:
        time.sleep(gap_s)
        return run(self, step)

    Runner.run = run_slowly  # type: ignore[method-assign]


if __name__ == "__main__":
    _, answers, gap_s, *words = sys.argv
    if answers == "-":
        slow_down(float(gap_s))
    else:
        play(json.loads(Path(answers).read_text()), float(gap_s), Path(words[0]))
    sys.exit(main(words))
