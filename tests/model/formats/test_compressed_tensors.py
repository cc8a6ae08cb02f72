"""Matrices that the compressed-tensors library wrote are, element by element, what it reads back.

The same formats are written by their rule in test_formats.
"""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.model.formats.test_formats import assert_holds, load
from tests.model.quantized_files import Format, Quantization, Weights, write_folder

# kind, group (0 is a row, None the whole matrix), zeros
CASES = [
    ("int4", 32, False),
    ("int4", 64, True),
    ("int4", 0, True),
    ("int8", 0, False),
    ("int8", 32, True),
    ("fp8", 0, False),
    ("fp8", None, False),
]


def library_writes(kind: str, group: int | None, zeros: bool) -> Any:
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
    from compressed_tensors.quantization.utils import calculate_qparams

    args = QuantizationArgs(
        num_bits=4 if kind == "int4" else 8,
        type="float" if kind == "fp8" else "int",
        strategy="group" if group else "tensor" if group is None else "channel",
        group_size=group or None,
        symmetric=not zeros,
    )
    scheme = QuantizationScheme(targets=["Linear"], weights=args)
    form = "naive-quantized" if kind == "fp8" else "pack-quantized"
    compressor = BaseCompressor.get_value_from_registry(form)

    def write(shape: Tensor, _: Quantization, generator: torch.Generator) -> tuple[Weights, Tensor]:
        n, k = shape.tolist()
        weight = torch.randn(n, k, generator=generator) * k**-0.5
        grouped = weight.view(1, -1) if group is None else weight.view(n, -1, group or k)
        scale, zero = calculate_qparams(grouped.amin(-1), grouped.amax(-1), args)
        state = {"weight": weight, "weight_scale": scale, "weight_zero_point": zero}
        stored = compressor.compress(state, scheme)
        if not zeros:
            stored.pop("weight_zero_point", None)
        return stored, compressor.decompress(stored, scheme)["weight"].float()

    return write


@pytest.mark.parametrize(("kind", "group", "zeros"), CASES)
def test_what_the_library_wrote_is_what_it_reads(
    tmp_path: Path, kind: Any, group: int | None, zeros: bool
) -> None:
    quantization = Quantization(
        method="compressed-tensors",
        kind=kind,
        group_size=group or 0,
        has_zeros=zeros,
        per_tensor=group is None,
    )
    form = Format("hf", library_writes(kind, group, zeros), quantization)
    meant = write_folder(tmp_path, form)
    for world_size in (1, 2, 3):
        for rank in range(world_size):
            assert_holds(load(tmp_path, form, world_size, rank), meant)
