"""A model's folder and a number of ranks, judged before a process is started or torch imported.

All of it is judged again while loading, by the same functions: what is here costs a fraction of a
second, a start 2 to 20. Knows nothing of prompts.
"""

from pathlib import Path

from mistral_chat.cli.repository import is_tokenizer
from mistral_chat.cli.suggestions import require_model
from mistral_chat.config import EngineConfig
from mistral_chat.model.args import args_of
from mistral_chat.model.checkpoint import check_tensors, find_weights, read_headers
from mistral_chat.model.sharding import Shard, placements

__all__ = ["check_model"]


def check_model(config: EngineConfig, n_ranks: int = 1, *, needs_text: bool = True) -> None:
    """Refuse a model that cannot be run, as far as its small files and its headers tell.

    Args:
        config: what to load.
        n_ranks: how many are to share it.
        needs_text: a tokenizer is needed, too.

    Raises:
        CheckpointError: the folder, its shape or its weights.
        TokenizerError: no tokenizer, or several.
        DeviceError: more ranks than can share the model.
        UsageError: a longer context than the model knows.
    """
    require_model(config.model)
    args = args_of(config)
    shard = Shard(args, n_ranks)
    config.require_positions(args.max_seq_len)
    folder = config.model
    if folder is None:
        return
    if needs_text:
        _check_tokenizer(folder)
    if config.load_format == "dummy":
        return
    files = find_weights(folder, config.load_format)
    if all(path.suffix == ".safetensors" for path in files):  # a pickle's header takes torch
        headers = read_headers(folder, config.load_format)
        check_tensors(folder, headers, placements(shard, headers.layout))


def _check_tokenizer(folder: Path) -> None:
    """One of a known name is enough to go on; otherwise the library that reads it says more."""
    named = [path.name for path in folder.iterdir() if is_tokenizer(path.name) and path.is_file()]
    if len([name for name in named if name != "tokenizer.model"] or named) != 1:
        from mistral_chat.chat.tokenizer import find_tokenizer

        find_tokenizer(folder)
