"""Write a checkpoint of a preset's shape, of as many layers as asked for, at random.

`python -m tests.scripts.write_checkpoint configs/large-2407.toml DIR --layers 30` writes some 84 GB
of bfloat16 in shards as the published ones, with params.json, for measuring how fast it loads. The
numbers are one random block over and over; a model of them computes, and says nothing of sense.
"""

import argparse
import json
import math
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from mistral_chat.config import read_preset
from mistral_chat.model.args import TransformerArgs
from mistral_chat.model.sharding import Shard, placements

SHARD_BYTES = 5 * 10**9
PART_BYTES = 2**28


def random_block(n: int = 2**22) -> bytes:
    """bfloat16 numbers of the size that weights have."""
    values = np.random.default_rng(7).standard_normal(n, np.float32) * 0.01
    return (values.view(np.uint32) >> 16).astype(np.uint16).tobytes()


def write(path: Path, shapes: dict[str, tuple[int, ...]], block: memoryview) -> None:
    header: dict[str, object] = {}
    end = 0
    for name, shape in shapes.items():
        begin, end = end, end + 2 * math.prod(shape)
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    start = 8 + len(text)
    path.write_bytes(len(text).to_bytes(8, "little") + text)
    os.truncate(path, start + end)

    def fill(first: int) -> None:
        fd = os.open(path, os.O_WRONLY)
        at, stop = first, min(end, first + PART_BYTES)
        while at < stop:
            skip = at % len(block)
            at += os.pwrite(fd, block[skip : skip + stop - at], start + at)
        os.close(fd)

    with ThreadPoolExecutor(16) as pool:
        list(pool.map(fill, range(0, end, PART_BYTES)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("preset", type=Path)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--layers", type=int)
    asked = parser.parse_args()
    shape = dict(read_preset(asked.preset).shape or {})
    if asked.layers:
        shape["n_layers"] = asked.layers
    asked.folder.mkdir(parents=True)
    files: list[dict[str, tuple[int, ...]]] = [{}]
    size = 0
    for name, placement in placements(Shard(TransformerArgs.from_dict(shape))).items():
        n_bytes = 2 * math.prod(placement.shape)
        if size + n_bytes > SHARD_BYTES:
            files.append({})
            size = 0
        files[-1][name] = placement.shape
        size += n_bytes
    block = memoryview(random_block())
    for n, shapes in enumerate(files, 1):
        name = f"consolidated-{n:05}-of-{len(files):05}.safetensors"
        write(asked.folder / name, shapes, block)
    (asked.folder / "params.json").write_text(json.dumps(shape))


if __name__ == "__main__":
    main()
