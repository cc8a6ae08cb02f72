"""Load one rank's share of a checkpoint and print how much the peak memory grew, and the share.

Run as `python -m tests.scripts.load_share FOLDER DTYPE`. Names and shapes are Mistral's or, where
the file has Hugging Face's name, theirs, which are not checked here.
"""

import re
import sys
from pathlib import Path

import torch

from mistral_chat.model.args import TransformerArgs
from mistral_chat.model.checkpoint import local_bytes
from mistral_chat.model.operations import Alone
from mistral_chat.model.sharding import Shard
from mistral_chat.model.transformer import Transformer
from tests.conftest import folder_of, load_weights

ARGS = TransformerArgs(
    dim=1024,
    n_layers=5,
    head_dim=128,
    hidden_dim=4096,
    n_heads=8,
    n_kv_heads=4,
    norm_eps=1e-5,
    vocab_size=40_960,
)
WORLD_SIZE, RANK = 4, 1


def peak_bytes() -> int:
    """Highest resident memory of this process so far; pages of mapped files count."""
    status = Path("/proc/self/status").read_text()
    found = re.search(r"VmHWM:\s+(\d+) kB", status)
    assert found
    return int(found[1]) * 1024


def main(folder: Path, dtype: torch.dtype) -> None:
    torch.ones(8) @ torch.ones(8)  # what libraries set up once is not loading's
    before = peak_bytes()
    torch.set_default_dtype(dtype)
    model = Transformer(ARGS, Shard(ARGS, WORLD_SIZE, RANK), Alone())
    load_weights(model, folder_of(folder, ARGS).headers)
    assert all(float(p.abs().max()) == 0 for p in model.parameters())  # all pages are there
    print(peak_bytes() - before, local_bytes(model.placements().values(), dtype))


if __name__ == "__main__":
    main(Path(sys.argv[1]), getattr(torch, sys.argv[2]))
