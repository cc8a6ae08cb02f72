"""YaRN and llama-4 scaling: transformers' numbers, at positions short and far."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from mistral_chat.errors import CheckpointError
from mistral_chat.model.args import TransformerArgs
from mistral_chat.model.cache import KVCache
from mistral_chat.model.operations import Alone, Span
from mistral_chat.model.rope import QueryScaling, Yarn, frequencies
from mistral_chat.model.sharding import Shard
from mistral_chat.model.transformer import Transformer
from tests.conftest import load_weights, open_folder

# What config.json of these models says of RoPE (FP8's body: 128 of head, theta 1e6).
OF_MODELS: dict[str, dict[str, Any]] = {
    "Devstral-2-123B": {
        "rope_theta": 1e6, "factor": 64.0, "original_max_position_embeddings": 4096,
        "beta_fast": 4.0, "beta_slow": 1.0, "mscale": 1.0, "mscale_all_dim": 0.0,
    },
    "Ministral-3-8B": {
        "rope_theta": 1e6, "factor": 16.0, "original_max_position_embeddings": 16384,
        "beta_fast": 32.0, "beta_slow": 1.0, "mscale": 1.0, "mscale_all_dim": 1.0,
        "llama_4_scaling_beta": 0.1,
    },
    "neither scale": {
        "rope_theta": 1e4, "factor": 8.0, "original_max_position_embeddings": 512,
    },
    "both scales": {
        "rope_theta": 1e4, "factor": 8.0, "original_max_position_embeddings": 2048,
        "mscale": 0.7, "mscale_all_dim": 0.3,
    },
    "attention_factor": {
        "rope_theta": 1e4, "factor": 2.0, "original_max_position_embeddings": 4096,
        "attention_factor": 1.3,
    },
}  # fmt: skip
LONGEST = 262_144


def test_frequencies_are_cut_where_devstral_2_cuts_them() -> None:
    yarn = Yarn(factor=64, original_max_position_embeddings=4096, beta_fast=4)
    plain, slowed = frequencies(128, 1e6), frequencies(128, 1e6, yarn)
    ratios = [fast / slow for fast, slow in zip(plain, slowed, strict=True)]
    assert ratios[:24] == [1.0] * 24  # 23 of 64 pairs, and the one where the ramp begins
    assert ratios[31:] == pytest.approx([64.0] * 33)
    assert all(1 < ratio < 64 for ratio in ratios[24:31])


@pytest.mark.parametrize("model", OF_MODELS)
@pytest.mark.parametrize("head_dim", [8, 128])
def test_frequencies_and_magnitude_are_those_of_transformers(model: str, head_dim: int) -> None:
    from transformers import MistralConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    said = OF_MODELS[model]
    config = MistralConfig(
        hidden_size=head_dim, num_attention_heads=1, head_dim=head_dim,
        max_position_embeddings=LONGEST, rope_parameters={"rope_type": "yarn"} | said,
    )  # fmt: skip
    wanted, magnitude = ROPE_INIT_FUNCTIONS["yarn"](config, torch.device("cpu"))
    args = args_of(said, head_dim=head_dim)
    assert args.yarn is not None
    ours = torch.tensor(frequencies(head_dim, args.theta, args.yarn))
    torch.testing.assert_close(ours, wanted, rtol=1e-6, atol=0)
    assert args.yarn.magnitude == pytest.approx(magnitude)


def config_of(said: dict[str, Any], *, head_dim: int, where: str, kind: str) -> dict[str, Any]:
    rope = {"rope_type": "yarn", "type": "yarn"} | said
    theta = rope.pop("rope_theta") if where == "rope_scaling" else None
    return {
        "architectures": [kind], "hidden_act": "silu", "hidden_size": 16,
        "intermediate_size": 20, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "head_dim": head_dim, "rms_norm_eps": 1e-5, "vocab_size": 97,
        "max_position_embeddings": LONGEST, "sliding_window": WINDOW,
        "tie_word_embeddings": False, where: rope,
    } | ({"rope_theta": theta} if theta else {})  # fmt: skip


WINDOW = 8


def args_of(
    said: dict[str, Any],
    *,
    head_dim: int = 8,
    where: str = "rope_parameters",
    kind: str = "Ministral3ForCausalLM",
) -> TransformerArgs:
    from mistral_chat.model import hf

    config = config_of(said, head_dim=head_dim, where=where, kind=kind)
    return TransformerArgs.from_dict(hf.to_params(Path("config.json"), config))


def saved_by_transformers(folder: Path, said: dict[str, Any]) -> Any:
    """A small random model of transformers' own, written by it."""
    from transformers import Ministral3Config, Ministral3ForCausalLM

    rope = {"rope_type": "yarn", "llama_4_scaling_beta": 0.0} | said
    torch.manual_seed(5)
    model = Ministral3ForCausalLM(
        Ministral3Config(
            vocab_size=97, hidden_size=16, intermediate_size=20, num_hidden_layers=2,
            num_attention_heads=4, num_key_value_heads=2, head_dim=8, rms_norm_eps=1e-5,
            max_position_embeddings=LONGEST, sliding_window=WINDOW, tie_word_embeddings=False,
            rope_parameters=rope, initializer_range=0.5, attn_implementation="eager",
        )
    ).eval()  # fmt: skip
    model.save_pretrained(folder)
    return model


@pytest.mark.parametrize("model", OF_MODELS)
def test_a_model_of_transformers_is_the_same_here_at_near_and_far_positions(
    tmp_path: Path, model: str
) -> None:
    theirs = saved_by_transformers(tmp_path, OF_MODELS[model])
    opened = open_folder(tmp_path)
    ours = Transformer(opened.args, Shard(opened.args), Alone())
    load_weights(ours, opened.headers)
    # Angles are up to 262,144 radians in float32, where a frequency that is rounded otherwise by
    # 1 part in 2^24 turns by a 64th more. The test above compares frequencies.
    theirs.model.rotary_emb.inv_freq.copy_(ours.rope.frequencies)
    tokens = torch.randint(97, (40,), generator=torch.Generator().manual_seed(3))
    for start in (0, 4_070, 100_000, 131_060, LONGEST - 40):
        scored = run_at(ours, tokens, start)
        with torch.inference_mode():
            positions = torch.arange(start, start + len(tokens))[None]
            wanted = theirs(tokens[None], position_ids=positions, use_cache=False).logits[0]
        # What stands before `start` reaches through a window in each of two layers.
        clean = 0 if start == 0 else 2 * WINDOW
        torch.testing.assert_close(scored[clean:], wanted[clean:], rtol=0, atol=3e-4)


@torch.inference_mode()
def run_at(model: Transformer, tokens: Tensor, start: int) -> Tensor:
    """Logits of tokens that begin at a position, in chunks of two lengths."""
    cache = KVCache(model.shard, 1, start + len(tokens), model.dtype, model.device)
    for stored in (cache.k, cache.v):
        stored.zero_()
    parts, at = [], 0
    for n in (23, 1, 16):
        logits = model(tokens[at : at + n], [Span(0, start + at, n)], cache, "all")
        assert logits is not None
        parts.append(logits)
        at += n
    return torch.cat(parts)


@pytest.mark.parametrize("model", OF_MODELS)
def test_rope_is_read_from_either_place(model: str) -> None:
    said = OF_MODELS[model]
    found = {
        (args.yarn, args.llama_4_scaling, args.theta)
        for where in ("rope_parameters", "rope_scaling")
        for kind in ("MistralForCausalLM", "Ministral3ForCausalLM")
        for args in (args_of(said, where=where, kind=kind),)
    }
    assert len(found) == 1


@pytest.mark.parametrize(
    ("apply_scale", "mscale_all_dim"), [(True, 0.0), (False, 1.0), (None, None), (None, 0.0)]
)
def test_both_layouts_say_the_same_magnitude(
    apply_scale: bool | None, mscale_all_dim: float | None
) -> None:
    native = {"original_max_position_embeddings": 4096, "factor": 64, "beta": 4, "alpha": 1}
    theirs = OF_MODELS["Devstral-2-123B"] | {"mscale_all_dim": mscale_all_dim}
    yarn = Yarn.from_params(native | {"apply_scale": apply_scale})
    assert yarn == args_of(theirs).yarn
    assert yarn.magnitude == (1.0 if apply_scale is False else 0.1 * math.log(64) + 1)


@pytest.mark.parametrize(
    ("table", "said"),
    [
        ({"factor": 64}, "original_max_position_embeddings in yarn is missing"),
        ([64], r"yarn is \[64\]: expected an object"),
        ({"apply_scale": 1}, "apply_scale is 1: expected true or false"),
        ({"factor": 0.9}, "factor is 0.9: expected a number from 1"),
        ({"factor": "64"}, "factor is '64'"),
        ({"factor": math.nan}, "factor is nan"),
        ({"factor": 10**400}, "factor is a number of more"),
        ({"original_max_position_embeddings": 0}, "original_max_position_embeddings is 0"),
        ({"original_max_position_embeddings": 2.5}, "original_max_position_embeddings is 2.5"),
        ({"beta": 0}, "beta_fast is 0"),
        ({"alpha": -1}, "beta_slow is -1"),
        ({"gamma": 1}, "gamma in yarn is not supported"),
    ],
)
def test_a_yarn_that_makes_no_sense_is_refused_by_name(table: Any, said: str) -> None:
    whole = {"original_max_position_embeddings": 4096, "factor": 64}
    if isinstance(table, dict) and table != {"factor": 64}:
        table = whole | table
    with pytest.raises(CheckpointError, match=said):
        Yarn.from_params(table)


def test_llama_4_scaling_of_zero_is_none() -> None:
    said = {"original_max_position_embeddings": 8192, "beta": 0}
    assert QueryScaling.from_params(said) is None
    with pytest.raises(CheckpointError, match="beta is -1"):
        QueryScaling.from_params(said | {"beta": -1})


def test_yarn_of_a_params_file_is_compared_with_a_config_beside_it(tmp_path: Path) -> None:
    from tests.conftest import TINY, write_params

    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": 1e6}
    config = {"rope_parameters": rope}
    native = {"original_max_position_embeddings": 16, "factor": 4}
    write_params(tmp_path, TINY, yarn=native)
    (tmp_path / "consolidated.safetensors").touch()
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=r"rope_type is .default. in config\.json"):
        open_folder(tmp_path)
    said = {"rope_type": "yarn", "factor": 5.0, "original_max_position_embeddings": 16}
    config["rope_parameters"] |= said
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=r"factor is 4 in params\.json, factor is 5.0 in con"):
        open_folder(tmp_path)
    config["rope_parameters"]["factor"] = 4.0
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert open_folder(tmp_path).args.yarn == Yarn.from_params(native)
