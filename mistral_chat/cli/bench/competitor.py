"""transformers with the same weights, as a competitor in speed and a reference for results.

It is not a dependency of the project: it is imported here, on demand.
"""

import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mistral_chat.cli.bench.measure import WARM_UP, prompt
from mistral_chat.engine.runner import Runner
from mistral_chat.errors import CheckpointError, UsageError
from mistral_chat.model import hf
from mistral_chat.model.args import DEFAULT_MAX_SEQ_LEN
from mistral_chat.model.sharding import Shard
from mistral_chat.model.transformer import Transformer

__all__ = ["as_transformers", "decode_beside", "half_split"]


def half_split(weight: Tensor, head_dim: int) -> Tensor:
    """Rows of wq or wk from adjacent pairs (Mistral) to first and second halves (transformers).

    Args:
        weight: (heads * head_dim, dim).
        head_dim: rows of a head.
    """
    heads = weight.view(-1, head_dim // 2, 2, weight.shape[1])
    return heads.transpose(1, 2).reshape(weight.shape)


def as_transformers(model: Transformer) -> Any:
    """A `LlamaForCausalLM` with the weights of a loaded model, in its type and on its device.

    Args:
        model: the whole model, on one rank.

    Raises:
        CheckpointError: a sliding window, which this comparison does not cover.
    """
    from transformers import LlamaConfig, LlamaForCausalLM

    args = model.args
    if any(args.window_by_layer):
        raise CheckpointError("--peer transformers does not cover sliding windows")
    assert model.shard == Shard(model.args)
    config = LlamaConfig(
        vocab_size=args.vocab_size,
        hidden_size=args.dim,
        intermediate_size=args.hidden_dim,
        num_hidden_layers=args.n_layers,
        num_attention_heads=args.n_heads,
        num_key_value_heads=args.n_kv_heads,
        head_dim=args.head_dim,
        rms_norm_eps=args.norm_eps,
        max_position_embeddings=args.max_seq_len or DEFAULT_MAX_SEQ_LEN,
        tie_word_embeddings=args.tied_embeddings,
        rope_parameters={
            "rope_type": "default",
            "rope_theta": float(args.theta),
        },
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=None,
    )
    with torch.device("meta"):
        llama = LlamaForCausalLM(config)
    llama = nn.Module.to_empty(nn.Module.to(llama, model.dtype), device=model.device)
    with torch.device(model.device):  # its rotary buffers are computed when it is made
        llama.model.rotary_emb = type(llama.model.rotary_emb)(config=config)
    state = _translated(model)
    if args.tied_embeddings:
        state["lm_head.weight"] = state["model.embed_tokens.weight"]
    llama.load_state_dict(state, strict=True)
    return nn.Module.eval(llama)


def _translated(model: Transformer) -> dict[str, Tensor]:
    state = {}
    for name, placement in model.placements().items():
        weight = model.destination(placement)
        if name.endswith((".wq.weight", ".wk.weight")):
            weight = half_split(weight, model.args.head_dim)
        state[hf.stored_name(name)] = weight
    return state


def decode_beside(
    folder: Path | None, runner: Runner, contexts: Sequence[int], n_tokens: int
) -> dict[str, Any]:
    """Milliseconds a token of transformers: same weights, type, threads and contexts.

    Args:
        folder: the model's.
        runner: the whole model, on one rank.
        contexts: to decode at, as far as they fit.
        n_tokens: to decode at each.

    Raises:
        UsageError: there is no folder, or the weights lie on several ranks.
        CheckpointError: a model that this comparison does not cover.
    """
    if runner.group.world_size > 1 or folder is None:
        raise UsageError("--peer transformers compares one rank on a model folder")
    import transformers

    model = as_transformers(runner.model)
    decode = []
    for context in contexts:
        assert runner.plan is not None
        if context + n_tokens > runner.plan.max_seq_len:
            continue
        ids = torch.tensor([prompt(runner, context - n_tokens // 2)], device=model.device)
        at = []
        with torch.inference_mode():
            out = model(ids, use_cache=True, logits_to_keep=1)
            for _ in range(n_tokens + WARM_UP):
                token = out.logits[:, -1:].argmax(-1)
                int(token)
                at.append(time.perf_counter())
                out = model(token, past_key_values=out.past_key_values, use_cache=True)
        steps = [b - a for a, b in zip(at[WARM_UP:], at[WARM_UP + 1 :], strict=False)]
        decode.append({"context": context, "ms_per_token": statistics.median(steps) * 1e3})
    return {"name": f"transformers {transformers.__version__}", "decode": decode}
