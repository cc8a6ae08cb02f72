"""A model's folder, looked up once: layout, shape, end tokens, tokenizer, weights' headers.

Everything that the folder must hold is checked here, before a byte of weights is read. Knows file
names; what keys of params.json mean is in `args`, config.json's and tensors' names are in `hf`.
Imports no torch for safetensors files, so that a folder is judged before ranks are started.
"""

import errno
import os
import re
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from mistral_chat.config import EngineConfig, LoadFormat
from mistral_chat.errors import CheckpointError, TokenizerError, shown
from mistral_chat.files import is_there, read_json, read_json_object
from mistral_chat.model import formats, hf
from mistral_chat.model.args import TransformerArgs
from mistral_chat.model.checkpoint import Headers, WeightFiles, find_files
from mistral_chat.model.sharding import Shard, placements
from mistral_chat.model.values import MOST_POSITIONS

__all__ = ["ModelFolder", "choose_layout"]

MOST_END_IDS = 64
# Names that mistral-common takes for a tokenizer's, with the template versions that it knows and
# m1 for pictures. Written out, since this layer does not import it; a test compares the two.
_TOKENIZER = re.compile(r".*tekken.*\.json|.*\.model(\.v(1|2|3|7|11|13|15)(m1)?)?", re.DOTALL)


@dataclass(frozen=True, kw_only=True)
class ModelFolder:
    """One model on a disk. What is looked up lazily is looked up once and kept.

    Made by `open` or, with all its files checked, by `checked`; then handed on, so that no file is
    read twice. A process has one for each model.

    Args:
        path: the folder; None for dummy weights of a preset's shape.
        layout: decides the names of the files of weights and of their tensors.
        args: the model's shape.
        end_ids: tokens that end an answer, beside the tokenizer's own.
    """

    path: Path | None
    layout: hf.Layout
    args: TransformerArgs
    end_ids: frozenset[int] = frozenset()

    @classmethod
    def open(cls, config: EngineConfig) -> "ModelFolder":
        """Read the small JSON files of a config's folder, or take the preset's shape.

        Where params.json and config.json are both there they must agree on what both say. The
        context length is params.json's, else that of a config.json beside it.

        Raises:
            UsageError: --quantization of what is quantized already.
            CheckpointError: no folder that can be listed, no such file, not JSON, a key or value
                not supported, an end token that is none, two files that disagree, or a preset's
                table that is no shape.
        """
        path = config.model
        if path is None:
            assert config.shape is not None
            try:
                args = TransformerArgs.from_dict(config.shape)
            except CheckpointError as error:
                raise CheckpointError(f"--config, table [model]: {error}") from error
            args = formats.as_asked(args, config.quantization)
            return cls(path=None, layout="consolidated", args=args)
        _check_folder(path)
        found = {
            name: read_json_object(path / name, CheckpointError)
            for name in hf.SHAPE_FILES.values()
            if is_there(path / name)
        }
        layout = choose_layout(path, config.load_format)
        args = _read_shape(path, layout, found)
        end_ids = _read_end_ids(path, found.get("config.json"), args.vocab_size)
        args = formats.as_asked(args, config.quantization)
        return cls(path=path, layout=layout, args=args, end_ids=end_ids)

    @classmethod
    def checked(
        cls, config: EngineConfig, n_ranks: int = 1, *, needs_text: bool = True
    ) -> "ModelFolder":
        """Open a config's folder, and refuse what small files and headers show cannot be run.

        It takes a fraction of a second, starting ranks 2 to 20 seconds. Only headers of torch.save
        files are left for later, since reading them imports torch.

        Args:
            config: what to load.
            n_ranks: how many ranks share the model.
            needs_text: a tokenizer is needed, too.

        Raises:
            CheckpointError: the folder, its shape or its weights.
            TokenizerError: no tokenizer, or several.
            DeviceError: more ranks than can share the model.
            UsageError: a longer context than the model knows.
        """
        folder = cls.open(config)
        Shard(folder.args, n_ranks)
        config.require_positions(folder.args.max_seq_len)
        if needs_text:
            _ = folder.tokenizer_file
        reads_weights = folder.path is not None and config.load_format != "dummy"
        if reads_weights and folder.weights.are_safetensors:
            _ = folder.headers
        return folder

    @cached_property
    def tokenizer_file(self) -> Path | None:
        """The tokenizer; None without a folder.

        `tokenizer.model` beside a versioned `tokenizer.model.vN` is Hugging Face's copy of it and
        does not count.

        Raises:
            TokenizerError: none, or more than one.
        """
        if self.path is None:
            return None
        try:
            names = sorted(
                path.name
                for path in self.path.iterdir()
                if _TOKENIZER.fullmatch(path.name) and path.is_file()
            )
        except OSError as error:
            raise TokenizerError(f"{self.path} cannot be read ({error.strerror})") from error
        names = [name for name in names if name != "tokenizer.model"] or names
        if not names:
            raise TokenizerError(
                f"{self.path}: the tokenizer is missing; expected tekken.json or "
                f"tokenizer.model.vN (Hugging Face's tokenizer.json is never read)"
            )
        if len(names) > 1:
            raise TokenizerError(
                f"{self.path}: found {len(names)} tokenizers ({', '.join(names)}); expected one: "
                f"remove or move the others"
            )
        return self.path / names[0]

    @cached_property
    def weights(self) -> WeightFiles:
        """The files of weights, as `WeightFiles.find` gives and refuses them."""
        assert self.path is not None
        return WeightFiles.find(self.path, self.layout)

    @cached_property
    def headers(self) -> Headers:
        """Where each tensor of the weights is stored, as `Headers.read` gives and refuses it."""
        return Headers.read(self.weights, placements(Shard(self.args), self.layout))


def choose_layout(folder: Path, load_format: LoadFormat = "auto") -> hf.Layout:
    """The layout that a folder is read in: Mistral's own if all of it is there.

    Args:
        folder: a model folder.
        load_format: `consolidated` and `hf` are taken at their word.
    """
    if load_format == "consolidated" or load_format == "hf":
        return load_format
    ours, theirs = find_files(folder, "consolidated"), find_files(folder, "hf")
    params, config = (is_there(folder / name) for name in hf.SHAPE_FILES.values())
    if params and ours:
        return "consolidated"
    if config and theirs:
        return "hf"
    # Neither is complete: go by what is there, so that the error names what is missing.
    if params or ours:
        return "consolidated"
    return "hf" if config or theirs else "consolidated"


def _check_folder(folder: Path) -> None:
    """Refuse a path that is not a folder, or whose files cannot be looked at."""
    expected = "params.json or config.json"
    try:
        with os.scandir(folder) as entries:
            next(entries, None)
        if not os.access(folder, os.X_OK):  # a right that listing does not need
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
    except NotADirectoryError:
        wrong = f"is a file; expected the folder that holds {expected}"
    except FileNotFoundError:
        raise CheckpointError(
            f"{folder}: no such folder; expected a model folder with {expected}"
        ) from None
    except (OSError, ValueError) as error:  # ValueError: a NUL byte in the name
        reason = error.strerror if isinstance(error, OSError) else str(error)
        wrong = f"cannot be read ({reason}); expected a model folder with {expected}"
    else:
        return
    raise CheckpointError(f"{folder} {wrong}")


def _read_shape(
    folder: Path, layout: hf.Layout, found: dict[str, dict[str, Any]]
) -> TransformerArgs:
    """The shape in a layout's file, compared with the other layout's file if both are there."""
    path = folder / hf.SHAPE_FILES[layout]
    if not found and (gguf := sorted(folder.glob("*.gguf"))):
        raise CheckpointError(
            f"{folder}: {gguf[0].name} is a GGUF file, which is not supported; expected Mistral's "
            f"format or Hugging Face's (quantized: FP8, compressed-tensors, AWQ or GPTQ)"
        )
    if path.name not in found:
        raise CheckpointError(
            f"{folder}: {path.name} is missing (found {', '.join(found) or 'none'}); expected "
            f"a folder in Mistral's format (params.json, consolidated safetensors, tokenizer) or "
            f"Hugging Face's (config.json, model safetensors, tokenizer)"
        )
    config = found.get("config.json", {})
    params = found[path.name] if layout == "consolidated" else hf.to_params(path, config)
    try:
        args = TransformerArgs.from_dict(params)
    except CheckpointError as error:
        said = hf.in_config_words(str(error)) if layout == "hf" else error
        raise CheckpointError(f"{path}: {said}") from error
    positions = hf.text_config(config).get("max_position_embeddings")
    if args.max_seq_len is None and type(positions) is int and 2 <= positions <= MOST_POSITIONS:
        args = replace(args, max_seq_len=positions)
    if len(found) == 2 and (faults := hf.disagreements(found["params.json"], config)):
        raise CheckpointError(
            f"{folder}: {'; '.join(faults)}; expected one shape: remove the file that is not "
            f"this model's"
        )
    return args


def _read_end_ids(folder: Path, config: dict[str, Any] | None, vocab_size: int) -> frozenset[int]:
    """The `eos_token_id`s of config.json and generation_config.json: a number, a list or none.

    A fine-tuned model may end its answers with a token of its own.
    """
    ids = frozenset(_ids_of(folder / "config.json", config or {}, vocab_size))
    generation = folder / "generation_config.json"
    if is_there(generation):
        said = read_json(generation, CheckpointError)
        if not isinstance(said, dict):
            raise CheckpointError(f"{generation}: found {shown(said)}, expected a JSON object")
        ids |= set(_ids_of(generation, said, vocab_size))
    return ids


def _ids_of(path: Path, config: dict[str, Any], vocab_size: int) -> list[int]:
    said: Any = config.get("eos_token_id")
    ids = said if isinstance(said, list) else [] if said is None else [said]
    if len(ids) > MOST_END_IDS or not all(type(i) is int and 0 <= i < vocab_size for i in ids):
        raise CheckpointError(
            f"{path}: eos_token_id is {shown(said)}: expected an id from 0 to {vocab_size - 1}, a "
            f"list of them, or null"
        )
    return ids
