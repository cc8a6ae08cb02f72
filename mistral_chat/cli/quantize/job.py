"""A folder that a quantized checkpoint is written into: whose it is, and what of it is done.

`quantize.json` says which model it is made of, and how. config.json comes last, so that a folder
without it is no model. Imports no torch.
"""

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mistral_chat.cli.console.durable import sync_folder
from mistral_chat.cli.console.locks import lock
from mistral_chat.cli.quantize.plan import Plan, PlannedShard
from mistral_chat.errors import CheckpointError, UsageError
from mistral_chat.files import is_there, read_json
from mistral_chat.model.folder import ModelFolder
from mistral_chat.model.hf_config import config_of
from mistral_chat.model.stored import read_header

__all__ = ["UNFINISHED", "Job", "put_in_place"]

JOB = "quantize.json"
UNFINISHED = ".part"
INDEX = "model.safetensors.index.json"
# What may lie beside weights and is copied; Hugging Face's tokenizer is for other programs.
COPIED = (
    "generation_config.json",
    "SYSTEM_PROMPT.txt",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
)
SPARE_BYTES = 64 << 20  # tokenizers, headers, and what else the disk is wanted for


@dataclass(frozen=True, kw_only=True)
class Job:
    """One checkpoint that is written.

    Args:
        source: the model of floats.
        plan: what is written.
        folder: where to.
    """

    source: ModelFolder
    plan: Plan
    folder: Path

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Make the folder, or go on with it, and keep other processes out.

        Raises:
            UsageError: it holds something else, or another job's files.
            CheckpointError: another process writes it.
            OSError: it cannot be made.
        """
        if self.folder.exists() and not self.folder.is_dir():
            raise UsageError(f"{self.folder} is a file: expected a folder, or a name that is free")
        missing = [each for each in (self.folder, *self.folder.parents) if not each.exists()]
        self.folder.mkdir(parents=True, exist_ok=True)
        for made in missing:
            sync_folder(made.parent)
        handle = os.open(self.folder, os.O_RDONLY | os.O_DIRECTORY)
        try:
            if not lock(handle):
                raise CheckpointError(
                    f"{self.folder} is written by another process: wait for it, or name another "
                    f"folder"
                )
            self._take()
            yield
        finally:
            os.close(handle)

    def _take(self) -> None:
        names = sorted(path.name for path in self.folder.iterdir())
        unfinished = [name for name in names if name.endswith(UNFINISHED)]
        if JOB not in names:
            if names and names != [f"{JOB}{UNFINISHED}"]:
                raise UsageError(
                    f"{self.folder} is not empty ({names[0]}): expected a new folder, or one that "
                    f"this command began"
                )
        elif found := self._differs(read_json(self.folder / JOB, CheckpointError)):
            raise UsageError(
                f"{self.folder} is another job's ({found}): name another folder, or remove it"
            )
        for name in unfinished:
            (self.folder / name).unlink()
        if JOB not in names:
            self._write_json(JOB, self._said)

    @property
    def _said(self) -> dict[str, Any]:
        """What tells this job from others."""
        assert self.source.path is not None
        paths = sorted({tensor.path for tensor in self.source.headers.tensors.values()})
        status = {path.name: path.stat() for path in paths}
        return {
            "source": str(self.source.path.resolve()),
            "files": {name: [at.st_size, at.st_mtime_ns] for name, at in status.items()},
            "quantization": self.plan.quantization.kind,
            "group_size": self.plan.quantization.group_size,
            "shards": len(self.plan.shards),
        }

    def _differs(self, told: object) -> str | None:
        if not isinstance(told, dict):
            return f"{JOB} is no object"
        ours = self._said
        if told.get("source") != ours["source"]:
            return f"of {str(told.get('source'))[-80:]}"
        for name in ("quantization", "group_size", "shards"):
            if told.get(name) != ours[name]:
                return f"{name} {str(told.get(name))[:40]}"
        return None if told.get("files") == ours["files"] else "the model has changed since"

    @property
    def is_done(self) -> bool:
        """Whether all of it was written."""
        return is_there(self.folder / "config.json") and not self.left()

    def left(self) -> list[PlannedShard]:
        """The files of weights that are not there whole."""
        return [shard for shard in self.plan.shards if not self._is_whole(shard)]

    def _is_whole(self, shard: PlannedShard) -> bool:
        path = self.folder / shard.file
        if not is_there(path):
            return False
        try:
            found, faults = read_header(path)
        except CheckpointError:
            return False
        return not faults and shard.tensors == {
            name: (tensor.dtype, tensor.shape) for name, tensor in found.items()
        }

    def require_room(self, left: list[PlannedShard]) -> None:
        """Refuse a disk that is too small.

        Raises:
            CheckpointError: with what is free and what is needed.
        """
        replaced = [self.folder / shard.file for shard in left]
        free = shutil.disk_usage(self.folder).free
        free += sum(path.stat().st_size for path in replaced if is_there(path))
        needed = sum(shard.n_bytes for shard in left) + SPARE_BYTES
        if free < needed:
            raise CheckpointError(
                f"{self.folder} has {free / 1e9:,.1f} GB free and {needed / 1e9:,.1f} GB are "
                f"needed: make room, or name a folder on another disk"
            )

    def finish(self) -> None:
        """Write what stands beside the weights; config.json last.

        Raises:
            OSError: it cannot be written.
        """
        weight_map = {name: shard.file for shard in self.plan.shards for name in shard.tensors}
        about = {"metadata": {"total_size": self.plan.n_bytes}}
        self._write_json(INDEX, about | {"weight_map": dict(sorted(weight_map.items()))})
        assert self.source.path is not None
        others = [self.source.path / name for name in COPIED]
        tokenizer = self.source.tokenizer_file
        for path in [*([tokenizer] if tokenizer else []), *others]:
            if is_there(path):
                self._put(path.name, path.read_bytes())
        config = config_of(self.plan.args)
        ids = sorted(self.source.end_ids)
        if ids:
            config["eos_token_id"] = ids[0] if len(ids) == 1 else ids
        self._write_json("config.json", config)

    def _write_json(self, name: str, value: dict[str, Any]) -> None:
        self._put(name, (json.dumps(value, indent=2) + "\n").encode())

    def _put(self, name: str, data: bytes) -> None:
        unfinished = self.folder / f"{name}{UNFINISHED}"
        unfinished.write_bytes(data)
        put_in_place(unfinished, self.folder / name)


def put_in_place(unfinished: Path, path: Path) -> None:
    """Give a file that is written its name, so that a power cut leaves all of it or nothing."""
    handle = os.open(unfinished, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
    unfinished.rename(path)
    sync_folder(path.parent)
