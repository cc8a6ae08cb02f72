"""What every rank saw of the same work, for comparing any number of ranks with one.

`torchrun ... -m tests.scripts.ranks OUT MODEL...` writes OUT/RANK.pt; `collect` gives the same in
this process. Everything is float32 on CPU.
"""

import os
import random
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mistral_chat.config import EngineConfig, SamplingParams
from mistral_chat.engine.collectives import GroupCollective
from mistral_chat.engine.engine import Engine, Request, Token
from mistral_chat.engine.ranks.group import Group
from mistral_chat.engine.ranks.launch import current_group
from mistral_chat.engine.runner import Runner
from mistral_chat.engine.start_up import load_runner
from mistral_chat.engine.step import Chunk, Step
from mistral_chat.errors import CheckpointError, MistralChatError
from mistral_chat.generate import generate
from mistral_chat.model.args import TransformerArgs
from mistral_chat.model.operations import Alone
from mistral_chat.transformer import Transformer

# 9 heads in 3 groups, head_dim that is not dim / n_heads, a prime vocabulary.
ODD = TransformerArgs(
    dim=72,
    n_layers=2,
    head_dim=10,
    hidden_dim=200,
    n_heads=9,
    n_kv_heads=3,
    norm_eps=1e-5,
    vocab_size=1031,
    max_seq_len=256,
)
SHAPES = {
    "untied": ODD,
    "tied with windows by layer": replace(ODD, tied_embeddings=True, sliding_window=[7, None]),
    "window": replace(ODD, sliding_window=9),
    "one query a KV head": replace(ODD, n_heads=4, n_kv_heads=4),
}
SAMPLED = replace(ODD, max_batch_size=3)  # the first shape, as it is loaded
SLOW_WAY = ("untied",)  # shapes that also run over gloo
N_BIG = 700_001  # numbers: more than two pieces of a node's shared memory


def draw_ids(n: int, seed: int = 0) -> tuple[int, ...]:
    rng = random.Random(seed)
    return tuple(rng.randrange(ODD.vocab_size) for _ in range(n))


def steps() -> list[Step]:
    """Whole, then the same in chunks beside another sequence, then rewound; one is long."""
    ids, other, longer = draw_ids(25), draw_ids(40, 1), draw_ids(150, 2)
    return [
        Step((Chunk(0, 0, ids),), "all"),
        Step((Chunk(1, 0, ids[:10]), Chunk(2, 0, other[:17])), "all"),
        Step((Chunk(2, 17, other[17:18]), Chunk(1, 10, ids[10:])), "all"),
        Step((Chunk(0, 25, other[:3]), Chunk(1, 25, other[3:4]), Chunk(2, 18, ids[:1])), "last"),
        Step((Chunk(1, 4, other[:9]),), "none"),
        Step((Chunk(1, 13, ids[:2]),), "all"),
        Step((Chunk(0, 0, longer),), "last"),
    ]


def requests(temperature: float) -> list[Request]:
    return [
        Request(
            ids=list(draw_ids(length, seed)),
            params=SamplingParams(temperature=temperature, max_tokens=3 + seed % 4, seed=seed),
            banned_ids=(1, 2, 3),
        )
        for seed, length in enumerate((9, 1, 70, 4, 30, 12, 2))
    ]


def answers(engine: Engine, temperature: float) -> list[list[int]]:
    asked = requests(temperature)
    said: list[list[int]] = [[] for _ in asked]
    for index, event in engine.generate_many(asked):
        if isinstance(event, Token):
            said[index].append(event.id)
    return said


def lead(runner: Runner) -> dict[str, Any]:
    seen: dict[str, Any] = {"logits": [runner.run(step) for step in steps()]}
    engine = Engine(runner)
    seen["greedy"] = answers(engine, 0.0)
    if runner.model.args == SAMPLED:
        seen["greedy again"] = answers(engine, 0.0)  # now from what the cache holds
        seen["sampled"] = [answers(engine, 1.3) for _ in range(2)]
    runner.group.send(None)
    return seen


def run_models(group: Group, models: dict[str, Path]) -> dict[str, Any]:
    seen: dict[str, Any] = {}
    for name, folder in models.items():
        config = EngineConfig(
            model=folder,
            device="cpu",
            dtype="float32",
            max_batch_size=3,
            max_seq_len=200,
            chunk_size=64,
        )
        runner = load_runner(config, group)
        if group.is_leader:
            seen[name] = lead(runner)
        else:
            runner.follow()
    return seen


def exchange(group: Group) -> dict[str, Any]:
    """Sums, columns side by side, shared values: each rank brings what its number says."""
    rank, world_size = group.rank, group.world_size
    whole = torch.arange(5 * 11, dtype=torch.float32).view(5, 11)
    sizes = [11 // world_size + (r < 11 % world_size) for r in range(world_size)]
    mine = whole.split(sizes, dim=1)[rank].contiguous()
    big = torch.randn(N_BIG, generator=torch.Generator().manual_seed(rank))

    def summed(tensor: torch.Tensor) -> torch.Tensor:
        if world_size > 1:
            with group.collectives() as groups:
                groups.all_reduce(tensor)
        return tensor

    collective = GroupCollective(group, tuple(sizes)) if world_size > 1 else Alone()

    seen: dict[str, Any] = {
        "sum": summed(torch.tensor([1.0, 10.0**rank, float(rank)])),
        "sum of one": summed(torch.tensor(2.0 + rank).view(1)),
        "big sum": summed(big),
        "bfloat16 sum": summed(torch.full((3, 4), 1 + rank, dtype=torch.bfloat16)),
        "columns": collective.gather_columns(mine),
        "share": group.share({"rank": rank, "text": "é" * 1000} if group.is_leader else None),
        "minimum": group.minimum(10 - rank),
    }
    with group.together():
        seen["together"] = "went well"
    return seen


def run_generate(group: Group) -> dict[str, Any]:
    """What a script of mistral-inference's would do; each rank has another seed until told."""
    torch.manual_seed(100 + group.rank)
    model = Transformer(replace(ODD, max_batch_size=3))
    prompts = [list(draw_ids(n, n)) for n in (3, 11, 1)]
    seen = {"greedy": generate(prompts, model, max_tokens=6, temperature=0.0, chunk_size=4)}
    torch.manual_seed(7 + group.rank)
    seen["sampled"] = generate(prompts, model, max_tokens=6, temperature=1.0)
    seen["scored"] = generate(prompts, model, max_tokens=0, temperature=0.0)
    return seen


def fail_together(group: Group) -> list[str]:
    """The last two ranks fail for reasons of their own; rank 0 never does."""
    try:
        with group.together():
            if group.rank >= max(1, group.world_size - 2):
                raise CheckpointError(f"rank {group.rank} found a fault")
    except MistralChatError as error:
        return [type(error).__name__, str(error)]
    return []


def collect(models: dict[str, Path]) -> dict[str, Any]:
    group = current_group()
    seen: dict[str, Any] = {}
    groups = group._process_groups
    for way in ("node memory", "gloo"):
        chosen = models if way == "node memory" else {name: models[name] for name in SLOW_WAY}
        seen[way] = {
            "used": groups is not None and groups.node_memory is not None,
            "models": run_models(group, chosen),
            "exchange": exchange(group),
            "generate": run_generate(group),
        }
        if groups is not None:
            groups.node_memory = None  # what ranks on several nodes do
    return seen


def main(out: Path, folders: list[Path]) -> None:
    group = current_group()
    seen = collect({folder.name: folder for folder in folders})
    torch.save(seen, out / f"{group.rank}.pt")
    failed = fail_together(group)
    torch.save(seen | {"failed": failed}, out / f"{group.rank}.pt")
    group.minimum(0)  # nobody ends before all have
    group.close()


def sum_of_big(world_size: int) -> Tensor:
    parts = [
        torch.randn(N_BIG, generator=torch.Generator().manual_seed(r)) for r in range(world_size)
    ]
    return torch.stack(parts).double().sum(0)


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(Path(sys.argv[1]), [Path(word) for word in sys.argv[2:]])
    # gloo's threads now and then outlive the interpreter and abort it (torch 2.13).
    sys.stdout.flush()
    os._exit(0)
