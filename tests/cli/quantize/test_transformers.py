"""transformers, through compressed-tensors, computes with a quantized folder what we do."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from mistral_chat.model.args import TransformerArgs
from mistral_chat.model.operations import Alone
from mistral_chat.model.sharding import Shard
from mistral_chat.model.transformer import Transformer
from tests.cli.quantize.test_quantize import ARGS, KINDS, SCALED, make, write_source
from tests.conftest import load_weights, open_folder
from tests.model.test_hf import logits

SHAPES = {
    "plain": (ARGS, "MistralForCausalLM"),
    "yarn and llama-4 scaling": (SCALED, "Ministral3ForCausalLM"),
    "yarn": (replace(SCALED, llama_4_scaling=None), "Ministral3ForCausalLM"),
    "window": (replace(ARGS, sliding_window=16), "MistralForCausalLM"),
    "windows of some layers": (replace(ARGS, sliding_window=[None, 16]), "MinistralForCausalLM"),
    "tied": (replace(ARGS, tied_embeddings=True), "MistralForCausalLM"),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", SHAPES)
def test_transformers_computes_the_same(tmp_path: Path, kind: Any, shape: str) -> None:
    from transformers import AutoModelForCausalLM

    args: TransformerArgs
    args, name = SHAPES[shape]
    folder = make(write_source(tmp_path / "source", args, "consolidated"), tmp_path / "made", kind)
    theirs, info = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, output_loading_info=True
    )
    assert type(theirs).__name__ == name
    assert not any(info.values())
    # beyond YaRN's original context of 32, and windows of 16
    tokens = torch.randint(args.vocab_size, (100,), generator=torch.Generator().manual_seed(3))
    opened = open_folder(folder)
    model = Transformer(opened.args, Shard(opened.args), Alone())
    load_weights(model, opened.headers)
    ours = logits(model, tokens)
    with torch.inference_mode():
        wanted = theirs(tokens[None]).logits[0]
    # int4 is dequantized to bfloat16 there, which rounds each weight by 1 / 512 at most and moves
    # logits by 1 / 280 of the largest; all else is float32 in another order
    most = float(wanted.abs().max())
    atol = most * (1 / 128 if kind == "int4" else 1e-5)
    torch.testing.assert_close(ours, wanted, rtol=0, atol=atol)
