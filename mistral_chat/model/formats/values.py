"""Numbers that say what a quantized matrix means, judged before any rank reads weights.

Only small tensors are read: a scale a row and less. Scales a group are judged while they are loaded
(`model.loading`), which reads them anyway. Imports no torch.
"""

import math
import os
from pathlib import Path
from typing import Any

from mistral_chat.errors import CheckpointError, named
from mistral_chat.files import open_regular
from mistral_chat.model.placement import Placement, Table
from mistral_chat.model.stored import TYPES, StoredTensor

__all__ = ["BAD_SCALE", "wrong_values"]

MOST_BYTES = 1 << 18  # of one tensor
BAD_SCALE = "expected scales that are positive and finite; fetch the file again"
_NUMPY = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": "<u2", "I32": "<i4", "I64": "<i8"}


def wrong_values(tensors: dict[str, StoredTensor], table: Table) -> list[str]:
    """What is wrong with the small tensors of quantized matrices; their shapes are right.

    Raises:
        CheckpointError: a file that cannot be read.
    """
    by_path: dict[Path, list[str]] = {}
    for name, placement in table.items():
        if placement.check != "nothing" and name in tensors:
            by_path.setdefault(tensors[name].path, []).append(name)
    faults = []
    for path, names in by_path.items():
        with open_regular(path, CheckpointError) as (fd, _):
            for name in sorted(names, key=lambda name: tensors[name].offset):
                tensor = tensors[name]
                n_bytes = math.prod(tensor.shape) * TYPES[tensor.dtype][1]
                if n_bytes <= MOST_BYTES or table[name].check == "order":
                    stored = os.pread(fd, n_bytes, tensor.offset)
                    wrong = _wrong(_numbers(stored, tensor.dtype), table[name])
                    if wrong is not None:
                        faults.append(f"{named(name)} in {path.name} {wrong}")
    return faults


def _numbers(stored: bytes, dtype: str) -> Any:
    import numpy as np

    numbers = np.frombuffer(stored, _NUMPY[dtype])
    if dtype == "BF16":
        return (numbers.astype("<u4") << 16).view("<f4")
    return numbers


def _wrong(numbers: Any, placement: Placement) -> str | None:
    import numpy as np

    expected = placement.expected
    if placement.check == "shape" and tuple(numbers.tolist()) != expected:
        return f"says {numbers.tolist()}: expected {list(expected)}, the shape of its matrix"
    if placement.check == "scale":
        bad = numbers[~(np.isfinite(numbers) & (numbers > 0))]
        if len(bad):
            return f"holds {bad[0]:g}: {BAD_SCALE}"
    if placement.check == "order" and (numbers != np.arange(len(numbers)) // expected[0]).any():
        return "has columns in another order (act-order), which is not supported"
    return None
