"""Which stored tensors make up a quantized matrix, and what their bits mean: a table a format.

A format says, for one matrix of a checkpoint, the name, shape and types of each tensor, the part of
it that this rank reads, and how its numbers become ours (`Packing`). Reading, sharding and checking
know no formats. Imports no torch.
"""

import math
from dataclasses import replace
from typing import TYPE_CHECKING

from mistral_chat.config import AskedQuantization
from mistral_chat.errors import CheckpointError, UsageError
from mistral_chat.model.formats import fp8, packed
from mistral_chat.model.placement import INT4_UNIT, Held, Placement, Table
from mistral_chat.model.quantization import Quantization

if TYPE_CHECKING:
    from mistral_chat.model.args import TransformerArgs

__all__ = ["as_asked", "check", "held", "row_unit", "stored"]

INT32_UNIT = 8  # rows and columns that lie in whole int32s, of 4 bits or of 8


def held(quantization: Quantization) -> Held:
    """How a rank holds a matrix of a checkpoint's."""
    always_zeros = quantization.method in (
        "awq",
        "gptq",
        "gptq-v2",
    )  # also where all are in the middle
    has_zeros = quantization.has_zeros or always_zeros
    return Held(quantization.kind, quantization.group_size, has_zeros)


def row_unit(quantization: Quantization) -> int:
    """Columns of a matrix that a rank has together: whole groups and whole stored numbers."""
    unit = {"fp8": 1, "int8": INT32_UNIT, "int4": INT4_UNIT}[quantization.kind]
    if quantization.kind == "int8" and quantization.method == "while-loading":
        unit = 1
    return math.lcm(quantization.group_size or 1, unit)


def as_asked(args: "TransformerArgs", asked: AskedQuantization) -> "TransformerArgs":
    """A model as `--quantization` says that ranks hold it.

    FP8 and int8 have a scale for a row of a rank's part, int4 one and a zero for each group of 128
    columns, or of the largest multiple of 32 below that divides all matrices.

    Raises:
        UsageError: the checkpoint is quantized already, or no group divides its matrices.
    """
    stored = args.quantization
    if asked == "auto":
        return args
    if stored is not None:
        raise UsageError(
            f"--quantization {asked}: the checkpoint is stored as {stored.kind} "
            f"({stored.method}): leave the flag out"
        )
    if asked == "none":
        return args
    group = 0
    if asked == "int4":
        whole = math.gcd(args.dim, args.n_heads * args.head_dim, args.hidden_dim)
        groups = [size for size in range(128, 0, -INT4_UNIT) if whole % size == 0]
        if not groups:
            raise UsageError(
                f"--quantization int4: no group of {INT4_UNIT} columns or more divides dim "
                f"({args.dim}), n_heads * head_dim ({args.n_heads * args.head_dim}) and hidden_dim "
                f"({args.hidden_dim}): use int8"
            )
        group = groups[0]
    how = Quantization(
        method="while-loading", kind=asked, group_size=group, has_zeros=asked == "int4"
    )
    return replace(args, quantization=how)


def check(args: "TransformerArgs", quantization: Quantization) -> None:
    """Refuse a model whose matrices are not whole groups.

    Raises:
        CheckpointError: names the size.
    """
    unit = row_unit(quantization)
    sizes = {
        "dim": args.dim,
        "n_heads * head_dim": args.n_heads * args.head_dim,
        "hidden_dim": args.hidden_dim,
    }
    for name, size in sizes.items():
        if size % unit:
            raise CheckpointError(
                f"{quantization.kind} in groups of {quantization.group_size or 'a row'} does not "
                f"divide {name} ({size}): expected a multiple of {unit}"
            )
    is_packed = quantization.kind != "fp8" and quantization.method != "while-loading"
    if is_packed and args.head_dim % INT32_UNIT:
        raise CheckpointError(
            f"{quantization.kind} with head_dim {args.head_dim} is not supported: expected a "
            f"multiple of {INT32_UNIT}"
        )


def stored(stem: str, placement: Placement, quantization: Quantization) -> Table:
    """The tensors that a checkpoint has for one matrix, with the parts that this rank reads.

    Args:
        stem: the matrix's name in the checkpoint, without `.weight`.
        placement: of the matrix as the model has it.
        quantization: of the checkpoint.
    """
    match quantization.method, quantization.kind:
        case "while-loading", _:
            return {f"{stem}.weight": placement}
        case (("native-fp8" | "hf-fp8" | "compressed-tensors"), "fp8"):
            return fp8.stored(stem, placement, quantization)
        case "compressed-tensors", _:
            return packed.compressed_tensors(stem, placement, quantization)
        case "awq", "int4":
            return packed.awq(stem, placement, quantization)
        case (("gptq" | "gptq-v2"), ("int4" | "int8")):
            return packed.gptq(stem, placement, quantization)
    raise CheckpointError(f"{quantization.method} with {quantization.kind} is not supported")
