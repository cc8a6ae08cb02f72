"""mistral-inference's `Transformer` and `generate` over our sharded model.

A script that uses them runs in one process or, unchanged, under torchrun, where every rank calls
the same functions with the same arguments and gets the same results. Token ids only.
"""

from pathlib import Path

import torch

from mistral_chat.config import EngineConfig, SamplingParams
from mistral_chat.engine.collectives import collective_of
from mistral_chat.engine.ranks.launch import current_group
from mistral_chat.engine.runner import Runner
from mistral_chat.engine.sampling import Draws, allowed_words, check_finite, choose, log_probability
from mistral_chat.engine.start_up import load_model
from mistral_chat.engine.step import Chunk, Step
from mistral_chat.model import transformer as model_layer
from mistral_chat.model.args import TransformerArgs
from mistral_chat.model.sharding import Shard

__all__ = ["Transformer", "TransformerArgs", "generate"]

TOP_P = 0.8  # as mistral-inference's generate


class Transformer(model_layer.Transformer):
    """The model, or this rank's share of it under torchrun.

    `Transformer(args)` has random weights, drawn with torch's default generator as it stands on
    rank 0; `.to(device, dtype)` moves them.

    Args:
        args: the shape.
        random_weights: False leaves the weights uninitialized, to be loaded.

    Raises:
        DeviceError: more ranks than query heads.
    """

    def __init__(self, args: TransformerArgs, *, random_weights: bool = True) -> None:
        group = current_group()
        shard = Shard(args, group.world_size, group.rank)
        super().__init__(args, shard, collective_of(group, shard))
        if random_weights:
            self.init_weights(group.share(int(torch.randint(2**62, ()))))

    @staticmethod
    def from_folder(
        folder: Path | str,
        max_batch_size: int = 1,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> "Transformer":
        """Load a model folder in Mistral's format; each rank reads its own slices.

        Args:
            folder: with params.json and consolidated weights.
            max_batch_size: most prompts of one `generate`.
            device: None is this rank's GPU where there are any, else the CPU.
            dtype: None is bfloat16 on GPUs, float32 on CPU.

        Raises:
            CheckpointError: the folder cannot be used, and why.
            DeviceError: a device or number of ranks that cannot be.
            NotEnoughMemoryError: it does not fit.
        """
        config = EngineConfig(
            model=Path(folder),
            device="auto" if device is None else torch.device(device).type,  # type: ignore[arg-type]
            dtype="auto" if dtype is None else str(dtype).removeprefix("torch."),  # type: ignore[arg-type]
            max_batch_size=max_batch_size,
        )

        def make(args: TransformerArgs) -> Transformer:
            return Transformer(args, random_weights=False)

        return load_model(config, current_group(), make)[0]


@torch.inference_mode()
def generate(
    encoded_prompts: list[list[int]],
    model: Transformer,
    *,
    max_tokens: int,
    temperature: float,
    chunk_size: int | None = None,
    eos_id: int | None = None,
) -> tuple[list[list[int]], list[list[float]]]:
    """Continue a batch of prompts of any lengths, as mistral-inference does.

    All prompts are decoded together until each has chosen `eos_id`, or up to `max_tokens`; one
    that chose it earlier goes on meanwhile.

    Args:
        encoded_prompts: ids, at most `max_batch_size` prompts, none empty.
        model: every rank's share of the same model.
        max_tokens: most tokens for each prompt; 0 only scores the prompts.
        temperature: 0 takes the most likely token; else tokens are sampled with top_p 0.8.
        chunk_size: most tokens of one prompt in a forward pass; None is all.
        eos_id: the end token; not returned for a single prompt.

    Returns:
        tokens: the chosen ids of each prompt, equally many; an empty list if none were chosen.
        logprobs: for each prompt the log-probabilities of its tokens after the first, then of the
            chosen ones.

    Raises:
        CheckpointError: the model's logits are NaN or infinite.
        ValueError: no prompts, an empty one, more than max_batch_size, ids that the model does
            not have, or a negative max_tokens.
    """
    n_prompts = len(encoded_prompts)
    if not 1 <= n_prompts <= model.args.max_batch_size:
        raise ValueError(
            f"{n_prompts} prompts: expected 1 to max_batch_size ({model.args.max_batch_size})"
        )
    if not all(encoded_prompts):
        raise ValueError("an empty prompt: expected at least one token, such as <s>")
    ids = [token for prompt in encoded_prompts for token in prompt]
    if min(ids) < 0 or max(ids) >= model.args.vocab_size:
        raise ValueError(f"ids {min(ids)} to {max(ids)}: expected 0 to {model.args.vocab_size - 1}")
    if max_tokens < 0:
        raise ValueError(f"max_tokens is {max_tokens}: expected at least 0")
    longest = max(len(prompt) for prompt in encoded_prompts)
    group = current_group()
    runner = Runner(
        model,
        group,
        max_batch_size=n_prompts,
        max_seq_len=longest + max_tokens,
        chunk_size=chunk_size or longest,
    )
    results: tuple[list[list[int]], list[list[float]]] | None = None
    if group.is_leader:
        logprobs, last = _prefill(runner, encoded_prompts)
        tokens = _decode(runner, encoded_prompts, last, logprobs, max_tokens, temperature, eos_id)
        group.send(None)
        results = (tokens, logprobs)
    else:
        runner.follow()
    all_tokens, all_logprobs = group.share(results)
    return all_tokens, all_logprobs


def _prefill(
    runner: Runner, prompts: list[list[int]]
) -> tuple[list[list[float]], list[torch.Tensor]]:
    """Run all prompts in chunks; the log-probabilities of their tokens, and the last logits."""
    logprobs: list[list[float]] = [[] for _ in prompts]
    last: list[torch.Tensor] = [torch.empty(0) for _ in prompts]
    for start in range(0, max(map(len, prompts)), runner.chunk_size):
        parts = {i: p[start : start + runner.chunk_size] for i, p in enumerate(prompts)}
        chunks = [Chunk(i, start, tuple(part)) for i, part in parts.items() if part]
        logits = runner.run(Step(tuple(chunks), "all"))
        assert logits is not None
        for chunk, rows in zip(chunks, logits.split([len(c.tokens) for c in chunks]), strict=True):
            check_finite(rows)
            prompt = prompts[chunk.slot]
            following = prompt[start + 1 : start + 1 + len(rows)]
            logprobs[chunk.slot] += log_probability(
                rows[: len(following)], torch.tensor(following, dtype=torch.int64)
            )
            last[chunk.slot] = rows[-1].clone()
    return logprobs, last


def _decode(
    runner: Runner,
    prompts: list[list[int]],
    last: list[torch.Tensor],
    logprobs: list[list[float]],
    max_tokens: int,
    temperature: float,
    eos_id: int | None,
) -> list[list[int]]:
    """Choose up to `max_tokens` tokens for every prompt; extends `logprobs`."""
    params = SamplingParams(temperature=temperature, top_p=TOP_P, logprobs=0)
    draws = Draws(int(torch.randint(2**62, ())))
    tokens: list[list[int]] = [[] for _ in prompts]
    finished = [False] * len(prompts)
    allowed = allowed_words(runner.model.args.vocab_size, ())
    for n_chosen in range(max_tokens):
        choices = [choose(row, params, allowed, draws.next()) for row in last]
        finished = [f or c.id == eos_id for f, c in zip(finished, choices, strict=True)]
        if all(finished):
            break
        for i, choice in enumerate(choices):
            assert choice.logprob is not None
            tokens[i].append(choice.id)
            logprobs[i].append(choice.logprob)
        if n_chosen + 1 < max_tokens:
            step = Step(
                tuple(
                    Chunk(i, len(prompt) + n_chosen, (tokens[i][-1],))
                    for i, prompt in enumerate(prompts)
                )
            )
            logits = runner.run(step)
            assert logits is not None
            last = list(logits)
    return tokens if tokens[0] else []
