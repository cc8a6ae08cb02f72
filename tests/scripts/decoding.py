"""What ranks with an open decoder saw, for comparing them with one.

`torchrun ... -m tests.scripts.decoding OUT` writes OUT/RANK.pt; `collect` gives the same in this
process. Everything is float32 on CPU.
"""

import os
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from mistral_chat.config import SamplingParams
from mistral_chat.engine.collectives import collective_of
from mistral_chat.engine.engine import Engine, Request, Token
from mistral_chat.engine.ranks.group import Group
from mistral_chat.engine.ranks.launch import current_group
from mistral_chat.engine.runner import Runner
from mistral_chat.engine.step import Chunk, Step
from mistral_chat.model.args import TransformerArgs
from mistral_chat.model.sharding import Shard
from mistral_chat.model.transformer import Transformer

# 9 heads in 3 groups: (3, 2) and (1, 3) on two ranks. A prime vocabulary.
ODD = TransformerArgs(
    dim=40, n_layers=2, head_dim=12, hidden_dim=88, n_heads=9, n_kv_heads=3,
    norm_eps=1e-5, vocab_size=131,
)  # fmt: skip
SHAPES = {"odd": ODD, "window": replace(ODD, sliding_window=5, rope_theta=1e6)}


def requests() -> list[Request]:
    """Of every sort: greedy and not, ended by themselves, by a stop, cancelled, by the context."""
    lengths = (9, 1, 17, 4, 12)
    prompts = [[(7 * n + 31 * i) % 131 for i in range(length)] for n, length in enumerate(lengths)]
    settings = [
        SamplingParams(temperature=0, max_tokens=12),
        SamplingParams(temperature=1.4, max_tokens=25, seed=3),
        SamplingParams(temperature=0.9, top_k=30, top_p=0.9, seed=4),
        SamplingParams(temperature=2, max_tokens=20, seed=5),
        SamplingParams(temperature=1, max_tokens=9, seed=6, logprobs=1),
    ]
    stops = [frozenset[int]()] * 3 + [frozenset(range(0, 131, 9)), frozenset()]
    banned: list[tuple[int, ...]] = [(), tuple(range(0, 131, 4)), (), (), ()]
    return [
        Request(ids=ids, params=params, stop_ids=stop, banned_ids=ban)
        for ids, params, stop, ban in zip(prompts, settings, stops, banned, strict=True)
    ]


def answers(engine: Engine) -> list[list[tuple[int, str | None]]]:
    asked = requests()
    said: list[list[tuple[int, str | None]]] = [[] for _ in asked]
    for index, event in engine.generate_many(asked):
        if isinstance(event, Token):
            said[index].append((event.id, event.finish_reason))
            if index == 1 and len(said[1]) == 7:
                asked[1].cancelled = True
    return said


def lead(runner: Runner) -> dict[str, Any]:
    engine = Engine(runner)
    seen: dict[str, Any] = {"tokens": answers(engine)}
    assert runner.decoder is not None
    seen["asked"] = runner.decoder._next  # places of its ring that have been filled
    logits = []
    for chunks in ((Chunk(0, 0, (5, 6, 7, 8)),), (Chunk(1, 0, (3,)), Chunk(0, 4, (9,)))):
        scores = runner.run(Step(chunks, "all"))
        assert scores is not None
        logits.append(scores.clone())
    seen["logits"] = torch.cat(logits)
    runner.group.send(None)
    return seen


def run_shape(group: Group, args: TransformerArgs, *, decoder: bool) -> Runner:
    shard = Shard(args, group.world_size, group.rank)
    model = Transformer(args, shard, collective_of(group, shard))
    model.init_weights(3)
    runner = Runner(model, group, max_batch_size=3, max_seq_len=40, chunk_size=8)
    if decoder:
        runner.open_decoder()
    return runner


def collect(group: Group) -> dict[str, Any]:
    seen: dict[str, Any] = {}
    for way in ("node memory", "gloo"):
        groups = group._process_groups
        if way == "gloo":
            if groups is not None:
                groups.node_memory = None  # what ranks on several nodes do
        elif groups is None or groups.node_memory is None:
            continue
        seen[way] = {}
        for name, args in SHAPES.items():
            runner = run_shape(group, args, decoder=True)
            here: dict[str, Any] = {"path": runner.path}
            if group.is_leader:
                here |= lead(runner)
            else:
                runner.follow()
            if group.world_size == 1:
                here["without"] = answers(Engine(run_shape(group, args, decoder=False)))
            seen[way][name] = here
    return seen


def main(out: Path) -> None:
    group = current_group()
    torch.save(collect(group), out / f"{group.rank}.pt")
    group.close()


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(Path(sys.argv[1]))
    # gloo's threads now and then outlive the interpreter and abort it (torch 2.13).
    sys.stdout.flush()
    os._exit(0)
