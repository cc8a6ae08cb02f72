"""Without a GPU, Triton's kernels run in its interpreter, on tensors of the CPU."""

import os

import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read when a kernel is defined, so before any import
    from tests.interpreter import patch_once

    patch_once()
