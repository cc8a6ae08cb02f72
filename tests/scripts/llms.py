"""A program that opens many LLMs with two ranks: one after another, at once, after a failed one.

`python -m tests.scripts.llms DEVICE N_IN_A_ROW FOLDER BROKEN` prints a JSON object a step.
"""

import ctypes
import gc
import json
import sys
import threading
from pathlib import Path
from typing import Any

import torch

from mistral_chat import LLM, SamplingParams
from mistral_chat.errors import MistralChatError

GREEDY = SamplingParams(temperature=0, max_tokens=6, ignore_eos=True)


def open_llm(device: Any, folder: str) -> LLM:
    return LLM(folder, device=device, dtype="float32", nproc_per_node=2, max_seq_len=128)


def held(device: str) -> dict[str, int]:
    """What this process holds of what a group needs."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # what the allocator keeps for later is not held
    status = Path("/proc/self/status").read_text()
    memory = 0
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        free, total = torch.cuda.mem_get_info()
        memory = total - free
    return {
        "threads": threading.active_count(),
        "tasks": len([*Path("/proc/self/task").iterdir()]),
        "files": len([*Path("/proc/self/fd").iterdir()]),
        "shared": Path("/proc/self/maps").read_text().count("memfd:mistral-chat"),
        "resident_kb": int(status.split("VmRSS:")[1].split()[0]),
        "device_bytes": memory,
    }


def say(**said: Any) -> None:
    print(json.dumps(said), flush=True)


def main(device: str, n_in_a_row: int, folder: str, broken: str) -> None:
    for _ in range(n_in_a_row):
        with open_llm(device, folder) as llm:
            said = llm.generate("Hello", GREEDY)[0].token_ids
        say(step="in a row", said=said, held=held(device))
    kept = llm  # a closed one holds nothing of its ranks
    try:
        open_llm(device, broken)
    except MistralChatError as error:
        say(step="failed", error=type(error).__name__, held=held(device))
    with open_llm(device, folder) as first, open_llm(device, folder) as second:
        for turn in range(3):
            said = [llm.generate("Hello", GREEDY)[0].token_ids for llm in (first, second)]
            say(step=f"two at once, {turn}", said=said)
        first.close()
        say(step="the one left", said=[second.generate("Hello", GREEDY)[0].token_ids])
    say(step="at the end", held=held(device))
    try:
        kept.generate("Hello", GREEDY)
    except MistralChatError as error:
        say(step="closed", error=type(error).__name__)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), *sys.argv[3:])
