"""How a checkpoint stores its matrices, where they are not floats: what its configuration says.

Knows the words of params.json's `quantization` and of config.json's `quantization_config`; which
stored tensors those make is in `formats`. Reads no files.
"""

from dataclasses import dataclass
from typing import Literal

__all__ = ["Method", "Quantization", "WeightKind"]

# while-loading: floats in the files, which a rank quantizes as it reads them
Method = Literal["native-fp8", "hf-fp8", "compressed-tensors", "awq", "gptq", "while-loading"]
WeightKind = Literal["fp8", "int8", "int4"]


@dataclass(frozen=True, kw_only=True)
class Quantization:
    """What the numbers of a model's matrices are, and who wrote them.

    Embedding, output and norms are floats in all of these.

    Args:
        method: whose tensors, names and packing.
        kind: what a stored number is.
        group_size: neighbouring columns that share a scale; 0 is a whole row.
        per_tensor: one scale for the whole matrix (then `group_size` is 0).
        has_zeros: a zero point beside every scale.
        static_activations: the checkpoint also holds scales of activations; they are not used.
        kept: matrices that are stored as floats all the same: `layers.0.attention.wq` and so on.
    """

    method: Method
    kind: WeightKind
    group_size: int = 0
    per_tensor: bool = False
    has_zeros: bool = False
    static_activations: bool = False
    kept: frozenset[str] = frozenset()
