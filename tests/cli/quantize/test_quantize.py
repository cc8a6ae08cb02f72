"""`mistral-chat quantize`: what it writes is what it chose, whole after any interruption."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from mistral_chat.cli.quantize import plan as planning
from mistral_chat.cli.quantize import run as quantize_run
from mistral_chat.cli.quantize import write
from mistral_chat.cli.requests import QuantizeRequest
from mistral_chat.errors import CheckpointError, MistralChatError, UsageError
from mistral_chat.kernels.quantize import quantize
from mistral_chat.kernels.weight import DTYPES, Kind, Quantized
from mistral_chat.model.args import TransformerArgs
from mistral_chat.model.operations import Alone
from mistral_chat.model.rope import QueryScaling, Yarn
from mistral_chat.model.sharding import Shard, placements
from mistral_chat.model.transformer import Transformer
from tests.conftest import Run, load_weights, open_folder, random_weights, shipped_tokenizer
from tests.conftest import write_params as write_shape
from tests.model.quantized_files import SHAPE
from tests.model.test_hf import config_of, their_state

KINDS: tuple[Any, ...] = ("fp8", "int8", "int4")
ARGS = replace(SHAPE, max_seq_len=128, rope_theta=1e6)
YARN = Yarn(factor=4.0, original_max_position_embeddings=32, magnitude=1.25)
SCALED = replace(
    ARGS, yarn=YARN, llama_4_scaling=QueryScaling(beta=0.1, original_max_position_embeddings=32)
)
SHARD_BYTES = 100_000


@pytest.fixture(autouse=True)
def _small_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    assert planning.plan.__defaults__
    monkeypatch.setattr(planning.plan, "__defaults__", (SHARD_BYTES,))


def write_source(folder: Path, args: TransformerArgs, layout: str, tokenizer: bool = False) -> Path:
    """A checkpoint of floats at random."""
    folder.mkdir()
    weights = random_weights(args, torch.bfloat16)
    if layout == "hf":
        save_file(their_state(weights, args), folder / "model.safetensors")
        config = config_of(args, eos_token_id=[2, 7])
        if args.yarn is not None:
            config["rope_parameters"] = {
                "rope_type": "yarn", "rope_theta": args.rope_theta, "factor": 4.0,
                "original_max_position_embeddings": 32, "attention_factor": 1.25,
                "llama_4_scaling_beta": 0.1,
            }  # fmt: skip
        (folder / "config.json").write_text(json.dumps(config))
    else:
        changes: dict[str, Any] = {}
        if args.yarn is not None:
            changes["yarn"] = {
                "original_max_position_embeddings": 32, "factor": 4.0, "beta": 32.0, "alpha": 1.0,
                "apply_scale": True,
            }  # fmt: skip
        save_file(weights, folder / "consolidated.safetensors")
        write_shape(folder, args, **changes)
    if tokenizer:
        shutil.copy(shipped_tokenizer(), folder / "tokenizer.model.v3")
    else:
        (folder / "tekken.json").write_text("{}")
    (folder / "SYSTEM_PROMPT.txt").write_text("Be brief.")
    return folder


def ask(source: Path, folder: Path, kind: Any) -> QuantizeRequest:
    return QuantizeRequest(model=source, folder=folder, quantization=kind, device="cpu")


def make(source: Path, folder: Path, kind: Any) -> Path:
    assert quantize_run.run(ask(source, folder, kind)) == 0
    return folder


def chosen(floats: Tensor, kind: Kind, group: int) -> Tensor:
    """What `quantize` makes of a whole matrix in one piece."""
    n, k = floats.shape
    groups = k // group if group else 1
    zero = torch.zeros(n, groups, dtype=torch.uint8) if kind == "int4" else None
    data = torch.zeros(n, k // 2 if kind == "int4" else k).to(DTYPES[kind])
    into = Quantized(kind, data, torch.zeros(n, groups), zero)
    quantize(floats, into, torch.bfloat16)
    assert torch.equal(into.scale, into.scale.bfloat16().float())
    return into.dequantize(torch.float32)


def meant(args: TransformerArgs, kind: Kind, group: int) -> dict[str, Tensor]:
    """The floats that a quantized model has, in Mistral's names and order."""
    weights: dict[str, Tensor] = random_weights(args, torch.bfloat16)
    table = placements(Shard(args))
    return {
        name: chosen(weight, kind, group) if table[name].kind in ("column", "row") else weight
        for name, weight in weights.items()
    }


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("layout", ["consolidated", "hf"])
@pytest.mark.parametrize("args", [ARGS, SCALED, replace(ARGS, tied_embeddings=True)])
def test_folder_reads_back_what_was_chosen(
    tmp_path: Path, kind: Any, layout: str, args: TransformerArgs
) -> None:
    source = open_folder(write_source(tmp_path / "source", args, layout))
    folder = make(tmp_path / "source", tmp_path / "made", kind)
    opened = open_folder(folder)
    assert opened.args.quantization is not None
    assert opened.args == replace(source.args, quantization=opened.args.quantization)
    assert opened.end_ids == source.end_ids
    assert (folder / "SYSTEM_PROMPT.txt").read_text() == "Be brief."
    assert opened.tokenizer_file == folder / "tekken.json"
    group = opened.args.quantization.group_size
    assert group == (64 if kind == "int4" else 0)
    floats = meant(args, kind, group)
    for world_size in (1, 3):
        shard = Shard(opened.args, world_size, world_size - 1)
        model = Transformer(opened.args, shard, Alone())
        load_weights(model, opened.headers)
        for name, placed in model.placements().items():
            part = floats[name][placed.rows.start : placed.rows.stop]
            if placed.cols is not None:
                part = part[:, placed.cols.start : placed.cols.stop]
            if placed.held is None:
                got = model.destination(placed)
            else:
                got = model.quantized(placed).dequantize(torch.float32)
            assert torch.equal(got.float(), part.float()), name


@pytest.mark.parametrize("kind", KINDS)
def test_shards_hold_whole_layers_where_they_fit(tmp_path: Path, kind: Any) -> None:
    folder = make(write_source(tmp_path / "source", ARGS, "hf"), tmp_path / "made", kind)
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    files = sorted(folder.glob("model-*.safetensors"))
    assert sorted(set(index["weight_map"].values())) == [path.name for path in files]
    assert len(files) > 1
    sizes = [sum(t.nbytes for t in load_file(path).values()) for path in files]
    assert sum(sizes) == index["metadata"]["total_size"]
    layer_bytes = 7 * 128 * 192 * (1 if kind != "int4" else 0.5)
    if layer_bytes < SHARD_BYTES:
        of_layer = [name for name in index["weight_map"] if name.startswith("model.layers.1.")]
        assert len({index["weight_map"][name] for name in of_layer}) == 1


class Stopped(BaseException):
    """Stands for a kill."""


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("failure", [KeyboardInterrupt, Stopped, OSError(28, "No space left")])
def test_resumed_is_uninterrupted_byte_for_byte(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    kind: Any,
    failure: Any,
) -> None:
    source = write_source(tmp_path / "source", ARGS, "consolidated")
    whole = make(source, tmp_path / "whole", kind)
    folder = tmp_path / "made"
    n_before = 1
    real = write.save_file

    def save(tensors: Any, path: Path, **about: Any) -> None:
        real(tensors, path, **about)
        if len(list(folder.glob("model-*.safetensors"))) == n_before:
            raise failure

    monkeypatch.setattr(write, "save_file", save)
    if failure is KeyboardInterrupt:
        assert quantize_run.run(ask(source, folder, kind)) == 130
        (line,) = capfd.readouterr().err.splitlines()
        assert "interrupted with 1 of " in line
        assert line.endswith(f"mistral-chat quantize {source} {folder} --quantization {kind} "
                             f"--device cpu")  # fmt: skip
    elif failure is Stopped:
        with pytest.raises(Stopped):
            quantize_run.run(ask(source, folder, kind))
    else:
        with pytest.raises(CheckpointError, match="No space left; the same command goes on"):
            quantize_run.run(ask(source, folder, kind))
    with pytest.raises(CheckpointError, match=r"config\.json is missing"):
        open_folder(folder)
    kept = {path: path.stat().st_mtime_ns for path in folder.glob("model-*.safetensors")}
    assert len(kept) == n_before
    (folder / "model-00002-of-00009.safetensors.part").write_bytes(b"of a kill")
    monkeypatch.setattr(write, "save_file", real)
    make(source, folder, kind)
    assert {path: path.stat().st_mtime_ns for path in kept} == kept
    assert contents(folder) == contents(whole)
    before = contents(folder)
    make(source, folder, kind)
    assert contents(folder) == before
    assert "is whole already" in capfd.readouterr().out


def test_damaged_file_is_written_again(tmp_path: Path) -> None:
    source = write_source(tmp_path / "source", ARGS, "hf")
    folder = make(source, tmp_path / "made", "int8")
    before = contents(folder)
    path = folder / f"model-00002-of-{len(list(folder.glob('model-*.safetensors'))):05}.safetensors"
    path.write_bytes(path.read_bytes()[:-7])
    make(source, folder, "int8")
    assert contents(folder) == before


def test_other_folders_and_models_are_refused_in_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = write_source(tmp_path / "source", ARGS, "consolidated")
    folder = make(source, tmp_path / "made", "int8")
    other = write_source(tmp_path / "other", ARGS, "consolidated")
    file = tmp_path / "file"
    file.write_text("")

    def refused(kind: type[MistralChatError], words: str, *asked: Any) -> None:
        with pytest.raises(kind, match=words) as caught:
            quantize_run.run(ask(*asked))
        assert "\n" not in str(caught.value)
        assert len(str(caught.value)) <= 300 + len(str(tmp_path))

    refused(UsageError, r"is another job's \(quantization int8\)", source, folder, "fp8")
    refused(UsageError, r"is another job's \(of .*source\)", other, folder, "int8")
    refused(UsageError, "is not empty", other, source, "int8")
    refused(UsageError, "is a file", source, file, "int8")
    refused(CheckpointError, r"is stored as int8 \(compressed-tensors\) already", folder,
            tmp_path / "again", "int8")  # fmt: skip
    windows = replace(ARGS, sliding_window=[16, 32])
    mixed = write_source(tmp_path / "mixed", windows, "consolidated")
    refused(CheckpointError, "sliding_window differs", mixed, tmp_path / "new", "int8")
    (source / "consolidated.safetensors").touch()
    refused(UsageError, "the model has changed since", source, folder, "int8")
    monkeypatch.setattr("shutil.disk_usage", lambda _: shutil._ntuple_diskusage(9, 8, 1))  # type: ignore[attr-defined]
    refused(CheckpointError, "GB are needed: make room", source, tmp_path / "new", "int8")
    assert not (tmp_path / "again").exists()


def test_two_at_once_are_refused(tmp_path: Path) -> None:
    import fcntl
    import os

    source = write_source(tmp_path / "source", ARGS, "consolidated")
    (tmp_path / "made").mkdir()
    handle = os.open(tmp_path / "made", os.O_RDONLY)
    fcntl.flock(handle, fcntl.LOCK_EX)
    with pytest.raises(CheckpointError, match="is written by another process"):
        quantize_run.run(ask(source, tmp_path / "made", "fp8"))
    os.close(handle)


def test_numbers_that_are_not_finite_are_refused(tmp_path: Path) -> None:
    source = write_source(tmp_path / "source", ARGS, "hf")
    tensors = load_file(source / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][3, 4] = torch.inf
    save_file(tensors, source / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"layers\.1\.mlp\.up_proj holds numbers that are no"):
        quantize_run.run(ask(source, tmp_path / "made", "int8"))


def test_windows_of_some_layers_are_kept(tmp_path: Path) -> None:
    args = replace(ARGS, sliding_window=[None, 16])
    folder = make(write_source(tmp_path / "source", args, "consolidated"), tmp_path / "m", "int8")
    assert open_folder(folder).args.window_by_layer == (None, 16)
    config = json.loads((folder / "config.json").read_text())
    assert config["architectures"] == ["MinistralForCausalLM"]


@pytest.mark.parametrize("kind", KINDS)
def test_answers_are_those_of_the_chosen_floats(tmp_path: Path, run: Run, kind: Any) -> None:
    args = replace(ARGS, vocab_size=32768)
    source = write_source(tmp_path / "source", args, "consolidated", tokenizer=True)
    done = run("quantize", source, tmp_path / "made", "--quantization", kind, "--device", "cpu")
    assert done.code == 0, done.err
    assert f"{tmp_path / 'made'}: {kind}, " in done.out
    assert done.out.endswith(f"; mistral-chat {tmp_path / 'made'} --instruct\n")
    floats = write_source(tmp_path / "floats", args, "consolidated", tokenizer=True)
    weights = meant(args, kind, 64 if kind == "int4" else 0)
    save_file(weights, floats / "consolidated.safetensors")
    prompt = ("--prompt", "The capital", "--temperature", 0, "--max_tokens", 6, "--device", "cpu")
    wanted = run(floats, *prompt)
    assert wanted.code == 0, wanted.err
    for n_ranks in (1, 2):
        got = run(tmp_path / "made", *prompt, "--nproc_per_node", n_ranks)
        assert got.code == 0, got.err
        assert got.out == wanted.out


def test_wrong_words_are_refused(run: Run, tmp_path: Path) -> None:
    for words, said in (
        ((), "found nothing: expected MODEL DIR"),
        (("MODEL", "DIR"), "--quantization is missing: expected fp8, int8 or int4"),
        (("MODEL", "DIR", "--quantization", "int3"), "--quantization"),
    ):
        done = run("quantize", *words)
        assert done.code == 2
        (line,) = done.error_lines
        assert said in line
    done = run("quantize", tmp_path / "none", tmp_path / "dir", "--quantization", "int4")
    assert done.code == 1
    assert "no such folder" in done.err
