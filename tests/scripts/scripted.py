"""The real command, whose model is made to say given texts: `scripted ANSWERS.json GAP_S MODEL ..`.

Prompts are run, steps are sent and tokens go the whole way to the terminal; only the choice of
each token is the script's. An answer that is cut short is followed by the next one.
"""

import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from torch import Tensor

from mistral_chat.chat.tokenizer import Tokenizer
from mistral_chat.cli.main import main
from mistral_chat.config import SamplingParams
from mistral_chat.engine import engine
from mistral_chat.engine.sampling import Choice


def script(answers: list[list[int]], gap_s: float) -> None:
    """Have every answer be the next one of a list, a token each `gap_s`."""
    rest = iter(answers)
    ids: Iterator[int] = iter(())
    generate = engine.Engine.generate

    def generate_next(
        self: engine.Engine, request: engine.Request
    ) -> Iterator[engine.Prefill | engine.Token]:
        nonlocal ids
        ids = iter(next(rest))
        yield from generate(self, request)

    def choose_next(
        logits: Tensor,  # noqa: ARG001
        params: SamplingParams,  # noqa: ARG001
        banned: Tensor | None,  # noqa: ARG001
        uniform: float,  # noqa: ARG001
    ) -> Choice:
        time.sleep(gap_s)
        return Choice(next(ids), None, ())

    engine.Engine.generate = generate_next  # type: ignore[method-assign]
    engine.choose = choose_next


if __name__ == "__main__":
    _, path, gap_s, *words = sys.argv
    tokenizer = Tokenizer.from_folder(Path(words[0]))
    texts = json.loads(Path(path).read_text())
    script(
        [[*tokenizer.raw.encode(t, bos=False, eos=False), tokenizer.eos_id] for t in texts],
        float(gap_s),
    )
    sys.exit(main(words))
