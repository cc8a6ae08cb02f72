"""Which stored tensors make up a quantized matrix, and what their bits mean: a table a format.

A format says, for one matrix of a checkpoint, the name, shape and types of each tensor, the part of
it that this rank reads, and how its numbers become ours (`Packing`). Reading, sharding and checking
know no formats. Imports no torch.
"""

import math
from typing import TYPE_CHECKING

from mistral_chat.errors import CheckpointError
from mistral_chat.model.formats import fp8, packed
from mistral_chat.model.placement import INT4_UNIT, Held, Placement, Table
from mistral_chat.model.quantization import Quantization

if TYPE_CHECKING:
    from mistral_chat.model.args import TransformerArgs

__all__ = ["check", "held", "row_unit", "stored"]

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
    return math.lcm(quantization.group_size or 1, unit)


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
    if quantization.kind != "fp8" and args.head_dim % INT32_UNIT:
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
        case (("native-fp8" | "hf-fp8" | "compressed-tensors"), "fp8"):
            return fp8.stored(stem, placement, quantization)
        case "compressed-tensors", _:
            return packed.compressed_tensors(stem, placement, quantization)
        case "awq", "int4":
            return packed.awq(stem, placement, quantization)
        case (("gptq" | "gptq-v2"), ("int4" | "int8")):
            return packed.gptq(stem, placement, quantization)
    raise CheckpointError(f"{quantization.method} with {quantization.kind} is not supported")
