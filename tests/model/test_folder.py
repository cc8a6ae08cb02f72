"""A model folder: which files make it up, and that each is looked up once and handed on."""

import os
import shutil
from collections import Counter
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from mistral_common.tokens.tokenizers.base import TokenizerVersion
from mistral_common.tokens.tokenizers.image import MultiModalVersion
from mistral_common.tokens.tokenizers.sentencepiece import is_sentencepiece
from mistral_common.tokens.tokenizers.tekken import is_tekken

from mistral_chat import LLM
from mistral_chat.cli import start
from mistral_chat.config import EngineConfig
from mistral_chat.engine import start_up
from mistral_chat.engine.ranks.group import Group, Place
from mistral_chat.errors import CheckpointError, TokenizerError
from mistral_chat.model import checkpoint, folder, hf
from mistral_chat.model.args import TransformerArgs
from mistral_chat.model.checkpoint import Headers
from mistral_chat.model.folder import ModelFolder
from mistral_chat.model.loading import Reading
from mistral_chat.model.transformer import Transformer
from tests.conftest import TINY, open_folder
from tests.model.test_hf import write_hf

Counts = Counter[str]


@pytest.fixture
def counts(monkeypatch: pytest.MonkeyPatch) -> Counts:
    """How often each file is opened, by name, and each function that looks things up is called."""
    counted: Counts = Counter()
    really_open = os.open

    def note_open(path: Any, *rest: Any, **named: Any) -> int:
        counted[Path(path).name] += 1
        return really_open(path, *rest, **named)

    def note_calls(module: Any, name: str) -> None:
        called = getattr(module, name)

        def note(*rest: Any, **named: Any) -> Any:
            counted[name] += 1
            return called(*rest, **named)

        monkeypatch.setattr(module, name, note)

    monkeypatch.setattr(os, "open", note_open)
    for name in ("choose_layout", "_read_shape", "_read_end_ids"):
        note_calls(folder, name)
    note_calls(checkpoint, "read_header")
    note_calls(hf, "disagreements")
    return counted


def test_a_load_opens_each_file_once_and_those_of_weights_once_more(
    counts: Counts, broken_folder: Path
) -> None:
    (broken_folder / "config.json").write_text('{"eos_token_id": 2}')
    (broken_folder / "generation_config.json").write_text('{"eos_token_id": [2, 9]}')
    config = EngineConfig(model=broken_folder, device="cpu")
    checked = ModelFolder.checked(config)
    loaded = start.load(config, checked, Group(Place()), 0.0, quiet=True)
    assert loaded.tokenizer.end_ids == {2, 9}
    for name in ("params.json", "config.json", "generation_config.json", "tokenizer.model.v3"):
        assert counts[name] == 1, name
    assert counts["consolidated.safetensors"] == 2  # its header, and its weights
    for name in ("choose_layout", "read_header", "_read_shape", "_read_end_ids", "disagreements"):
        assert counts[name] == 1, name


def test_a_program_opens_each_file_once_and_those_of_weights_once_more(
    counts: Counts, tiny_folder: Path
) -> None:
    with LLM(tiny_folder, device="cpu"):
        assert counts["params.json"] == counts["tokenizer.model.v3"] == 1
        assert counts["consolidated.safetensors"] == 2
        assert counts["choose_layout"] == counts["read_header"] == 1


def test_a_rank_but_the_first_takes_rank_0s_word_for_where_tensors_lie(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    write_hf(tmp_path, replace(TINY, rope_theta=1e4))
    config = EngineConfig(model=tmp_path, device="cpu")

    def make(args: TransformerArgs) -> Transformer:
        return Transformer(args)

    first, _ = start_up.load_model(config, Group(Place()), make)
    told = open_folder(tmp_path).headers.to_json()
    monkeypatch.setattr(Group, "is_leader", False)
    monkeypatch.setattr(Group, "share", lambda group, value: told)
    monkeypatch.setattr(checkpoint, "read_header", lambda path: pytest.fail("a header is read"))
    second, _ = start_up.load_model(config, Group(Place()), make)
    for mine, theirs in zip(second.parameters(), first.parameters(), strict=True):
        assert torch.equal(mine, theirs)


def test_headers_survive_the_way_to_another_process(tiny_folder: Path) -> None:
    headers = open_folder(tiny_folder).headers
    assert Headers.from_json(headers.to_json(), tiny_folder) == headers


def fail_on_reading(monkeypatch: pytest.MonkeyPatch) -> None:
    def read(_: Reading) -> None:
        raise AssertionError("weights are read")

    monkeypatch.setattr(Reading, "start", read)


@pytest.mark.parametrize("by", ["command", "program"])
def test_a_folder_without_a_tokenizer_is_refused_before_weights_are_read(
    monkeypatch: pytest.MonkeyPatch, broken_folder: Path, by: str
) -> None:
    fail_on_reading(monkeypatch)
    config = EngineConfig(model=broken_folder, device="cpu")

    def load() -> None:
        if by == "program":
            LLM(broken_folder, device="cpu")
        else:
            start.load(config, ModelFolder.checked(config), Group(Place()), 0.0, quiet=True)

    with pytest.raises(AssertionError, match="weights are read"):
        load()
    (broken_folder / "tokenizer.model.v3").unlink()
    with pytest.raises(TokenizerError, match="tokenizer is missing"):
        load()
    with pytest.raises(TokenizerError, match="tokenizer is missing"):
        ModelFolder.checked(config)
    ModelFolder.checked(config, needs_text=False)  # as `bench` has it


def test_a_checked_folder_has_read_no_weights(
    monkeypatch: pytest.MonkeyPatch, counts: Counts, tiny_folder: Path
) -> None:
    fail_on_reading(monkeypatch)
    checked = ModelFolder.checked(EngineConfig(model=tiny_folder, device="cpu"))
    assert counts["consolidated.safetensors"] == 1  # the header
    assert checked.headers is checked.headers
    assert counts["read_header"] == 1


@pytest.mark.parametrize("load_format", ["auto", "dummy"])
def test_dummy_weights_need_no_files_of_weights(broken_folder: Path, load_format: Any) -> None:
    (broken_folder / "consolidated.safetensors").unlink()
    config = EngineConfig(model=broken_folder, device="cpu", load_format=load_format)
    if load_format == "dummy":
        assert ModelFolder.checked(config).args == TINY
        return
    with pytest.raises(CheckpointError, match="weights are missing"):
        ModelFolder.checked(config)


def test_a_shape_without_a_folder_has_neither_weights_nor_tokenizer() -> None:
    shape = asdict(TINY)
    config = EngineConfig(model=None, load_format="dummy", shape=shape)
    made = ModelFolder.checked(config)
    assert made.args == TINY
    assert made.path is made.tokenizer_file is None
    with pytest.raises(CheckpointError, match=r"--config, table \[model\]: dim is missing"):
        ModelFolder.open(
            EngineConfig(model=None, load_format="dummy", shape={**shape, "dim": None})
        )


def test_names_of_tokenizers_are_those_that_mistral_common_knows(tmp_path: Path) -> None:
    versions = [*TokenizerVersion.__members__, "v4", "v99", "v", "model"]
    pictures = ["", *MultiModalVersion.__members__, "m9", "m"]
    names = [f"tokenizer.model.{v}{m}" for v in versions for m in pictures]
    names += ["tokenizer.model", "other.model", ".model", "tokenizer.models", "tokenizer.json",
              "tekken.json", "tekken2.json", "a_tekken_b.json", "tekken.txt", "Tekken.json",
              "tekken.json.bak", "line\ntekken.json", "tokenizer.model.v3.bak"]  # fmt: skip
    for name in names:
        path = tmp_path / name
        path.touch()
        is_theirs = is_tekken(path) or is_sentencepiece(path)
        assert bool(folder._TOKENIZER.fullmatch(name)) is is_theirs, name


def test_a_folder_in_the_place_of_a_tokenizer_is_none(broken_folder: Path) -> None:
    (broken_folder / "tekken.json").mkdir()
    assert open_folder(broken_folder).tokenizer_file == broken_folder / "tokenizer.model.v3"
    shutil.copy(broken_folder / "tokenizer.model.v3", broken_folder / "tokenizer.model.v2")
    with pytest.raises(TokenizerError, match="found 2 tokenizers"):
        _ = open_folder(broken_folder).tokenizer_file


def test_a_folder_of_gguf_files_is_refused_by_that_name(tmp_path: Path) -> None:
    (tmp_path / "model.Q4_K_M.gguf").touch()
    with pytest.raises(CheckpointError, match=r"model.Q4_K_M.gguf is a GGUF file, which is not"):
        open_folder(tmp_path)
