"""Compiles the kernels of quantized matrices for GPUs that need not be there; prints how many."""

import itertools
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from mistral_chat.kernels import fit_int4, linear_quantized

TYPES = {"x_ptr": "*bf16", "out_ptr": "*bf16", "data_ptr": "*u8", "eps": "fp32"}
COUNTS = ("n_out", "n_in", "n_rows", "n_groups", "GROUP")
# kind, columns of a group of 4,096, zeros
KINDS = (("fp8", 4096, False), ("int8", 4096, False), ("int4", 128, True))


def compile_kernel(kernel: Any, capability: int, **constants: Any) -> None:
    """Down to the GPU's instructions; raises what Triton or the assembler says."""
    names = kernel.arg_names
    types = {
        name: "constexpr"
        if name in constants
        else TYPES.get(name, "i32" if name in COUNTS else "*fp32" if "_ptr" in name else "fp32")
        for name in names
    }
    if constants.get("KIND") == "int4":
        types["zero_ptr"] = "*u8"
    by_place = {(names.index(name),): value for name, value in constants.items()}
    source = ASTSource(fn=kernel, signature=types, constexprs=by_place, attrs={})
    early = {"launch_pdl": True} if constants.get("PDL") else {}
    triton.compile(source, target=GPUTarget("cuda", capability, 32), options=early)


def main() -> None:
    n_compiled = 0
    for capability, (kind, group, zeros) in itertools.product((80, 90), KINDS):
        same = {"KIND": kind, "HAS_ZERO": zeros, "NATIVE": capability >= 89}
        step = same | {"SLICES": 4, "GATED": True, "PDL": capability >= 90}
        width = min(group, 1024)
        kernels = linear_quantized
        compile_kernel(
            kernels._one_row, capability, **step, n_in=1024, GROUP=width, ROWS=1, WIDTH=width,
            CHUNKS=1024 // width,
        )  # fmt: skip
        compile_kernel(
            kernels._few_rows, capability, **step, GROUPED=group < 4096, T=16, ROWS=64, COLS=128,
            STAGES=3, IEEE=False, ASM=True,
        )  # fmt: skip
        compile_kernel(kernels._dequantize, capability, **same, CHUNKS=4096 // width, WIDTH=width)
        n_compiled += 3
    compile_kernel(fit_int4._fit, 90, GROUP=128, ROWS=16, COLS=128, STEPS=2)
    print(n_compiled + 1)


if __name__ == "__main__":
    main()
