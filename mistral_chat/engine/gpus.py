"""How many GPUs torch would see, asked of the driver: importing torch to count takes seconds."""

import ctypes
import re
from functools import cache
from importlib import util
from pathlib import Path

__all__ = ["visible_gpus"]

_BUILT_FOR = re.compile(r"^(cuda|hip)\b[^=\n]*=\s*(\S+)", re.MULTILINE)


@cache
def visible_gpus() -> int:
    """GPUs that torch can use here: none without a driver, or where torch is built for CPUs.

    `CUDA_VISIBLE_DEVICES` counts as it does for torch.
    """
    built_for = _torch_is_built_for()
    if "cuda" in built_for:
        return _count_by_driver()
    if "hip" in built_for:  # its driver is another one
        import torch

        return torch.cuda.device_count() if torch.cuda.is_available() else 0
    return 0


def _torch_is_built_for() -> frozenset[str]:
    """cuda, hip or neither: what the installed torch says of itself in its version file."""
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
    # A driver that cannot start (no GPU, another version than its kernel module) has no GPUs for
    # torch either, which then says why.
    if driver.cuInit(0) != 0 or driver.cuDeviceGetCount(ctypes.byref(count)) != 0:
        return 0
    return count.value
