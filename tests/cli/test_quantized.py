"""A quantized folder answers as the folder of floats that it means, on any number of ranks."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from mistral_chat import LLM, SamplingParams
from mistral_chat.model.args import TransformerArgs
from mistral_chat.model.weight import QuantizedMatrix
from tests.conftest import Run, shipped_tokenizer, write_params
from tests.model import quantized_files
from tests.model.quantized_files import FORMATS, write_folder
from tests.model.test_hf import config_of

ARGS = replace(quantized_files.SHAPE, vocab_size=32768, max_seq_len=128, rope_theta=1e6)
PROMPT = ("--prompt", "The capital", "--temperature", 0, "--max_tokens", 6, "--device", "cpu")
SAID: dict[str, dict[str, Any]] = {
    "native-fp8": {"qformat_weight": "fp8_e4m3", "qscheme_act": "TENSOR"},
    "awq": {"quant_method": "awq", "bits": 4, "group_size": 32, "zero_point": True},
}


def write_rest(folder: Path, write_shape: Callable[[], Any]) -> Path:
    write_shape()
    shutil.copy(shipped_tokenizer(), folder / "tokenizer.model.v3")
    return folder


@pytest.fixture(params=SAID)
def pair(
    request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> tuple[Path, Path]:
    """A quantized folder and the one of floats that it means."""
    monkeypatch.setattr(quantized_files, "SHAPE", ARGS)
    name: str = request.param
    ours, floats = tmp_path / name, tmp_path / "floats"
    ours.mkdir()
    floats.mkdir()
    save_file(write_folder(ours, FORMATS[name]), floats / "consolidated.safetensors")

    def write_config(args: TransformerArgs) -> None:
        config = config_of(args, quantization_config=SAID[name])
        (ours / "config.json").write_text(json.dumps(config))

    if FORMATS[name].layout == "hf":
        write_rest(ours, lambda: write_config(ARGS))
    else:
        write_rest(ours, lambda: write_params(ours, ARGS, quantization=SAID[name]))
    return ours, write_rest(floats, lambda: write_params(floats, ARGS))


def test_answers_are_those_of_what_is_meant(pair: tuple[Path, Path], run: Run) -> None:
    ours, floats = pair
    wanted = run(floats, *PROMPT)
    assert wanted.code == 0, wanted.err
    for n_ranks in (1, 3):
        got = run(ours, *PROMPT, "--nproc_per_node", n_ranks)
        assert got.code == 0, got.err
        assert got.out == wanted.out
    refused = run(ours, *PROMPT, "--quantization", "int8")
    assert refused.code == 2
    (line,) = refused.error_lines
    assert "--quantization int8: the checkpoint is stored as" in line


def test_python_takes_the_same_settings(tiny_folder: Path) -> None:
    greedy = SamplingParams(temperature=0, max_tokens=6)
    texts = []
    for ranks in (1, 2):
        with LLM(
            tiny_folder, device="cpu", nproc_per_node=ranks, quantization="int4",
            kv_cache_dtype="fp8",
        ) as llm:  # fmt: skip
            weight = llm.engine.runner.model.blocks[0].feed_forward.w2
            assert isinstance(weight, QuantizedMatrix)
            assert llm.engine.runner.cache.dtype == torch.float8_e4m3fn
            (answer,) = llm.generate("The capital of France", greedy)
            texts.append(answer.text)
    assert texts[0] == texts[1]
