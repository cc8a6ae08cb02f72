"""Counts the GPUs that torch would see by asking the driver: importing torch takes seconds."""

import ctypes
import re
from functools import cache
from importlib import util
from pathlib import Path

__all__ = ["visible_gpus"]

_BUILT_FOR = re.compile(r"^(cuda|hip)\b[^=\n]*=\s*(\S+)", re.MULTILINE)


@cache
def visible_gpus() -> int:
    """GPUs that torch can use here: 0 without a driver, or if torch is built for CPU only.

    `CUDA_VISIBLE_DEVICES` is respected.
    """
    built_for = _torch_is_built_for()
    if "cuda" in built_for:
        return _count_by_driver()
    if "hip" in built_for:  # ROCm, which has another driver
        import torch

        return torch.cuda.device_count() if torch.cuda.is_available() else 0
    return 0


def _torch_is_built_for() -> frozenset[str]:
    """What the installed torch was built for, from its version file: cuda, hip or neither."""
    spec = util.find_spec("torch")
    if spec is None or spec.origin is None:
        return frozenset()
    text = (Path(spec.origin).parent / "version.py").read_text(encoding="utf-8")
    return frozenset(name for name, value in _BUILT_FOR.findall(text) if value != "None")


def _count_by_driver() -> int:
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:  # no driver is installed
        return 0
    count = ctypes.c_int(0)
    # If the driver fails here (no GPU, or a kernel module of another version), torch has no GPUs
    # either, and reports why.
    if driver.cuInit(0) != 0 or driver.cuDeviceGetCount(ctypes.byref(count)) != 0:
        return 0
    return count.value
