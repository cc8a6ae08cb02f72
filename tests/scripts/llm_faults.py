"""An `LLM` of two ranks that is interrupted, shared, forked and cut, for `tests/chat`.

`python -m tests.scripts.llm_faults MODEL` prints a line for each thing that held.
"""

import os
import signal
import sys
import threading
import time
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

import psutil
import pytest

from mistral_chat import LLM, SamplingParams
from mistral_chat.errors import RankLostError, UsageError

LONG = SamplingParams(temperature=0, max_tokens=400)
SHORT = SamplingParams(temperature=0, max_tokens=12)
PROMPTS = ("one", "two words", "and three words", "four")


def _ids(llm: LLM, prompt: str) -> tuple[int, ...]:
    return llm.generate(prompt, SHORT)[0].token_ids


def _later(call: Any, after_s: float) -> None:
    threading.Timer(after_s, call).start()


def _signal_soon(number: int, after_s: float = 0.2) -> None:
    _later(lambda: os.kill(os.getpid(), number), after_s)


def interrupts(llm: LLM, expected: dict[str, tuple[int, ...]]) -> None:
    n_interrupted = 0
    for n in range(12):
        _signal_soon(signal.SIGINT, 0.01 + 0.017 * n)
        try:
            llm.generate("go on", LONG)
            time.sleep(1)  # the answer was quicker
        except KeyboardInterrupt:
            n_interrupted += 1
        assert _ids(llm, PROMPTS[n % 4]) == expected[PROMPTS[n % 4]]
    print("interrupted", n_interrupted, flush=True)


def threads(llm: LLM, expected: dict[str, tuple[int, ...]]) -> None:
    wrong: list[str] = []

    def ask(prompt: str) -> None:
        for _ in range(3):
            if _ids(llm, prompt) != expected[prompt]:
                wrong.append(prompt)

    asking = [threading.Thread(target=ask, args=(prompt,)) for prompt in PROMPTS]
    for each in asking:
        each.start()
    for each in asking:
        each.join()
    assert not wrong
    print("threads", flush=True)


def two_in_one_thread(llm: LLM, expected: dict[str, tuple[int, ...]]) -> None:
    streaming = iter(llm.conversation().send("hello", LONG))
    next(streaming)
    with pytest.raises(UsageError, match="on its way in this thread"):
        _ids(llm, "one")
    del streaming
    assert _ids(llm, "one") == expected["one"]
    print("one at a time", flush=True)


def forked(llm: LLM, expected: dict[str, tuple[int, ...]]) -> None:
    child = os.fork()
    if not child:
        with pytest.raises(UsageError, match="forked"):
            llm.generate("one", SHORT)
        llm.close()
        sys.exit(7)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
    assert _ids(llm, "one") == expected["one"]
    print("forked", flush=True)


def closed_by_a_signal(llm: LLM) -> None:
    workers = psutil.Process().children()
    assert workers
    signal.signal(signal.SIGALRM, lambda signum, frame: llm.close())
    signal.setitimer(signal.ITIMER_REAL, 0.2)
    with pytest.raises(UsageError, match="closed"):
        llm.generate("go on", LONG)
    assert not psutil.Process().children()
    print("closed by a signal", flush=True)


def cut(llm: LLM) -> None:
    """A handler that raises, in the midst of a step, as a time limit may."""

    def give_up(signum: int, frame: FrameType | None) -> NoReturn:  # noqa: ARG001
        raise TimeoutError

    forward = llm.engine.runner.forward

    def slow(*args: Any) -> Any:
        os.kill(os.getpid(), signal.SIGALRM)
        return forward(*args)

    signal.signal(signal.SIGALRM, give_up)
    llm.engine.runner.forward = slow  # type: ignore[method-assign]
    with pytest.raises(TimeoutError):
        llm.generate("go on", LONG)
    with pytest.raises(RankLostError, match="TimeoutError cut a step short"):
        llm.generate("go on", LONG)
    print("cut", flush=True)


def main(folder: Path) -> None:
    with LLM(folder, nproc_per_node=2, device="cpu") as llm:
        expected = {prompt: _ids(llm, prompt) for prompt in PROMPTS}
        for scene in (interrupts, threads, two_in_one_thread, forked):
            scene(llm, expected)
        closed_by_a_signal(llm)
    with LLM(folder, nproc_per_node=2, device="cpu") as llm:
        cut(llm)
    assert not psutil.Process().children()
    print("closed", flush=True)
    _later(lambda: [each.kill() for each in psutil.Process().children()], 0.5)
    with pytest.raises(RankLostError, match="rank 1 was ended by SIGKILL before all ranks had met"):
        LLM(folder, nproc_per_node=2, device="cpu")
    print("not waited for", flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
