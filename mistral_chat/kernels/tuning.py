"""Shipped kernel configurations: what was fastest on an H200, and a rule for other shapes.

No search at run time. Plain integers; the figures behind them stand in BENCHMARKS.md.
"""

from dataclasses import dataclass
from functools import lru_cache

import torch

__all__ = [
    "MOST_ROWS",
    "Attend",
    "FewRows",
    "OneRow",
    "attend_config",
    "early_launch",
    "few_quantized_rows_config",
    "few_rows_config",
    "has_fp8",
    "one_quantized_row_config",
    "one_row_config",
    "shared_memory",
    "splits",
]

MOST_ROWS = 32  # of a step of few rows: its kernels, graphs and peer memory have room for them


@dataclass(frozen=True, slots=True)
class OneRow:
    """How a matrix-vector matmul is divided.

    Args:
        rows: matrix rows of a program.
        cols: columns that it takes at a time; a power of two.
        warps: of 32 threads.
    """

    rows: int
    cols: int
    warps: int


@dataclass(frozen=True, slots=True)
class FewRows:
    """How a matmul of few rows is divided.

    Args:
        rows: matrix rows of a program.
        cols: columns of a pipeline stage.
        stages: of the pipeline.
        warps: of 32 threads.
    """

    rows: int
    cols: int
    stages: int
    warps: int


@dataclass(frozen=True, slots=True)
class Attend:
    """How attention to a long cache is divided.

    Args:
        block: positions of a tile.
        stages: of its pipeline.
        warps: of 32 threads.
        per_processor: programs for each multiprocessor, about.
    """

    block: int
    stages: int
    warps: int
    per_processor: int


# (n_out, n_in) -> fastest of 15 divisions inside a whole decode step on an H200: Large-2407's
# shards of 2 and of 8 ranks and Mistral-7B-v0.3's whole matrices; w1 with w3, qkv, w2, wo, output.
# A matmul alone, repeated, ranks them otherwise: what counts is how it follows the one before.
_ONE_ROW = {
    (14336, 12288): OneRow(1, 2048, 2),
    (7168, 12288): OneRow(2, 2048, 2),
    (12288, 14336): OneRow(2, 4096, 4),
    (12288, 6144): OneRow(1, 2048, 4),
    (16384, 12288): OneRow(4, 2048, 4),
    (3584, 12288): OneRow(1, 1024, 2),
    (1792, 12288): OneRow(1, 2048, 4),
    (12288, 3584): OneRow(4, 1024, 2),
    (12288, 1536): OneRow(2, 2048, 4),
    (4096, 12288): OneRow(4, 2048, 8),
    (14336, 4096): OneRow(1, 4096, 8),
    (6144, 4096): OneRow(2, 2048, 8),
    (4096, 14336): OneRow(2, 4096, 4),
    (4096, 4096): OneRow(2, 2048, 8),
    (32768, 4096): OneRow(1, 4096, 8),
}
# The same for 8 rows, of some 40 divisions of a matmul alone. None: cuBLAS is faster.
_FEW_ROWS = {
    (7168, 12288): FewRows(64, 256, 3, 4),
    (12288, 6144): FewRows(64, 64, 6, 4),
    (14336, 12288): FewRows(128, 128, 3, 4),
    (12288, 14336): FewRows(64, 64, 6, 4),
    (16384, 12288): FewRows(64, 128, 4, 4),
    (1792, 12288): None,
    (12288, 1536): FewRows(64, 128, 3, 4),
    (3584, 12288): FewRows(32, 256, 4, 4),
    (12288, 3584): FewRows(64, 128, 3, 4),
    (4096, 12288): FewRows(32, 256, 6, 4),
    (6144, 4096): FewRows(64, 128, 6, 4),
    (4096, 4096): FewRows(64, 128, 6, 4),
    (14336, 4096): FewRows(64, 128, 4, 4),
    (4096, 14336): FewRows(32, 256, 6, 4),
    (32768, 4096): FewRows(128, 128, 3, 4),
}
LEAST_PROGRAMS = 96  # below this cuBLAS, which divides the columns too, keeps more of the chip busy


def one_row_config(n_out: int, n_in: int, gated: bool, dtype: torch.dtype) -> OneRow:
    """For one row of `n_in` with `n_out` results; a rule where nothing was measured."""
    if dtype.itemsize == 2 and (n_out, n_in) in _ONE_ROW:
        return _ONE_ROW[n_out, n_in]
    cols = min(2048, 1 << (n_in - 1).bit_length())
    rows = 1 if gated or dtype.itemsize > 2 else 2
    return OneRow(rows, cols, max(1, rows * cols // 1024))


def few_rows_config(n_out: int, n_in: int, gated: bool, dtype: torch.dtype) -> FewRows | None:
    """For a few rows of `n_in` with `n_out` results each; None leaves them to cuBLAS."""
    if dtype == torch.float32:
        return FewRows(32, 32, 2, 4) if gated else None
    if (n_out, n_in) in _FEW_ROWS:
        return _FEW_ROWS[n_out, n_in]
    if n_out // 64 >= LEAST_PROGRAMS:
        return FewRows(64, 128, 4, 4)
    return FewRows(32, 128, 4, 4) if n_out // 32 >= LEAST_PROGRAMS or gated else None


# (kind, n_out, n_in) -> fastest of 4 to 6 divisions of a matmul alone on an H200: 123B's whole
# matrices, qkv, wo, w1 with w3, w2.
_ONE_QUANTIZED_ROW = {
    ("fp8", 14336, 12288): OneRow(4, 1024, 4),
    ("fp8", 12288, 12288): OneRow(4, 1024, 4),
    ("fp8", 28672, 12288): OneRow(1, 2048, 4),
    ("fp8", 12288, 28672): OneRow(2, 2048, 4),
    ("int4", 14336, 12288): OneRow(1, 2048, 2),
    ("int4", 12288, 12288): OneRow(1, 2048, 2),
    ("int4", 28672, 12288): OneRow(1, 4096, 4),
    ("int4", 12288, 28672): OneRow(1, 4096, 4),
}


def one_quantized_row_config(n_out: int, n_in: int, gated: bool, kind: str) -> OneRow:
    """For one row and a quantized matrix; `cols` are numbers. A rule where nothing was measured."""
    if (kind, n_out, n_in) in _ONE_QUANTIZED_ROW:
        return _ONE_QUANTIZED_ROW[kind, n_out, n_in]
    cols = min(4096 if kind == "int4" else 2048, 1 << (n_in - 1).bit_length())
    rows = 1 if gated else 2
    return OneRow(rows, cols, max(1, rows * cols // 1024))


def few_quantized_rows_config(n_out: int) -> FewRows:
    """For a few rows and a quantized matrix; `cols` are numbers."""
    return FewRows(64 if n_out // 64 >= LEAST_PROGRAMS else 32, 128, 4, 4)


def attend_config(dtype: torch.dtype) -> Attend:
    """For keys and values of a type: the fastest at 32k of 14 inside a whole step on an H200."""
    return Attend(32, 2, 4, 1) if dtype.itemsize > 2 else Attend(64, 2, 4, 4)


def splits(n_programs: int, n_wanted: int) -> int:
    """Parts of the context that one group of heads is divided into: a power of two.

    Args:
        n_programs: there would be without.
        n_wanted: programs in all; as near below as can be, as far as 128 parts.
    """
    least = max(1, n_wanted // n_programs)
    return min(128, 1 << (least.bit_length() - 1))


@lru_cache
def shared_memory(device: torch.device) -> int:
    """Bytes of shared memory that one program may take."""
    if device.type != "cuda":
        return 1 << 20  # Triton's interpreter has no limit
    properties = torch.cuda.get_device_properties(device)
    return int(properties.shared_memory_per_block_optin)  # type: ignore[attr-defined, unused-ignore]


@lru_cache
def has_fp8(device: torch.device) -> bool:
    """Whether a device converts FP8 by itself, which came with sm_89."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 9)


@lru_cache
def early_launch(device: torch.device) -> dict[str, bool]:
    """Launch options with which a kernel starts before the one before it has ended, if it can.

    Programmatic dependent launch came with sm_90.
    """
    if device.type == "cuda" and torch.cuda.get_device_capability(device)[0] >= 9:
        return {"launch_pdl": True}
    return {}
