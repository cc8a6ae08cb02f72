"""Which ids end an answer, beside the tokenizer's own: what config.json and its kin say.

A fine-tuned model may end its answers with a token of its own. Knows nothing of tokenizers.
"""

from pathlib import Path
from typing import Any

from mistral_chat.errors import CheckpointError, shown
from mistral_chat.files import is_there, read_json

__all__ = ["read_end_ids"]

FILES = ("config.json", "generation_config.json")
MOST_IDS = 64


def read_end_ids(folder: Path, vocab_size: int) -> frozenset[int]:
    """The `eos_token_id`s of a folder: one number or a list in either file, or none.

    Args:
        folder: of the model.
        vocab_size: of the model.

    Raises:
        CheckpointError: an id that the model does not have, or what is no id.
    """
    found: set[int] = set()
    for path in (folder / name for name in FILES):
        if is_there(path):
            found.update(_ids_of(path, vocab_size))
    return frozenset(found)


def _ids_of(path: Path, vocab_size: int) -> list[int]:
    config = read_json(path, CheckpointError)
    if not isinstance(config, dict):
        raise CheckpointError(f"{path}: found {shown(config)}, expected a JSON object")
    said: Any = config.get("eos_token_id")
    ids = said if isinstance(said, list) else [] if said is None else [said]
    if len(ids) > MOST_IDS or not all(type(i) is int and 0 <= i < vocab_size for i in ids):
        raise CheckpointError(
            f"{path}: eos_token_id is {shown(said)}: expected an id from 0 to {vocab_size - 1}, a "
            f"list of them, or null"
        )
    return ids
