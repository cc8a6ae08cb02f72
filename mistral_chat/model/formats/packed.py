"""int4 and int8 packed in int32, with a scale a row or a group: W = (number - zero) * scale.

compressed-tensors (pack-quantized) packs along a row and has our order of rows and columns; AWQ's
gemm format and GPTQ's store the transpose, AWQ packed along the outputs in an order of its own,
GPTQ along the inputs, with zeros one too small in its first version.

Shapes: N, K = rows and columns of the matrix; P = numbers in an int32; G = groups of a row.
"""

from dataclasses import replace

from mistral_chat.model.placement import Packing, Placement, Table
from mistral_chat.model.quantization import Quantization

__all__ = ["awq", "compressed_tensors", "gptq"]

_AWQ_ORDER = (0, 4, 1, 5, 2, 6, 3, 7)  # place of each of 8 outputs in an int32, from the low bits


def compressed_tensors(stem: str, placement: Placement, quantization: Quantization) -> Table:
    """Its `weight_packed` (N, K / P), `weight_scale` (N, G) and `weight_zero_point` (N / P, G)."""
    plain = replace(placement, held=None)
    bits = 4 if quantization.kind == "int4" else 8
    n, k, groups = _sizes(placement, quantization)
    rows, cols = placement.rows, _columns(placement)
    per = 32 // bits
    table = {
        f"{stem}.weight_packed": replace(
            plain,
            shape=(n, k // per),
            cols=_divided(cols, per),
            target=f"{plain.target}.data",
            types=("I32",),
            packing=Packing(bits=bits, to_int4=bits == 4),
        ),
        f"{stem}.weight_scale": replace(
            plain,
            shape=(n, len(groups)),
            cols=_local_groups(placement, quantization),
            target=f"{plain.target}.scale",
            check="scale",
        ),
        f"{stem}.weight_shape": replace(
            plain,
            shape=(2,),
            target="",
            types=("I64", "I32"),
            check="shape",
            expected=(n, k),
            optional=True,
        ),
    }
    if quantization.has_zeros:
        table[f"{stem}.weight_zero_point"] = replace(
            plain,
            shape=(n // per, len(groups)),
            rows=_divided(rows, per),
            cols=_local_groups(placement, quantization),
            target=f"{plain.target}.zero",
            types=("I32",),
            packing=Packing(bits=bits, down=True),
        )
    return table


def awq(stem: str, placement: Placement, quantization: Quantization) -> Table:
    """AWQ: qweight (K, N / 8), qzeros (G, N / 8), scales (G, N)."""
    plain = replace(placement, held=None)
    n, k, groups = _sizes(placement, quantization)
    eighths = _divided(placement.rows, 8)
    return _scales(stem, placement, quantization) | {
        f"{stem}.qweight": replace(
            plain,
            shape=(k, n // 8),
            rows=_columns(placement),
            cols=eighths,
            target=f"{plain.target}.data",
            types=("I32",),
            packing=Packing(bits=4, order=_AWQ_ORDER, transposed=True, to_int4=True),
        ),
        f"{stem}.qzeros": replace(
            plain,
            shape=(len(groups), n // 8),
            rows=_local_groups(placement, quantization),
            cols=eighths,
            target=f"{plain.target}.zero",
            types=("I32",),
            packing=Packing(bits=4, order=_AWQ_ORDER, transposed=True),
        ),
    }


def gptq(stem: str, placement: Placement, quantization: Quantization) -> Table:
    """GPTQ: qweight (K / P, N), qzeros (G, N / P), scales (G, N); g_idx (K,) in order."""
    plain = replace(placement, held=None)
    bits = 4 if quantization.kind == "int4" else 8
    n, k, groups = _sizes(placement, quantization)
    per = 32 // bits
    return _scales(stem, placement, quantization) | {
        f"{stem}.qweight": replace(
            plain,
            shape=(k // per, n),
            rows=_divided(_columns(placement), per),
            cols=placement.rows,
            target=f"{plain.target}.data",
            types=("I32",),
            packing=Packing(bits=bits, down=True, transposed=True, to_int4=bits == 4),
        ),
        f"{stem}.qzeros": replace(
            plain,
            shape=(len(groups), n // per),
            rows=_local_groups(placement, quantization),
            cols=_divided(placement.rows, per),
            target=f"{plain.target}.zero",
            types=("I32",),
            packing=Packing(bits=bits, transposed=True, add=int(quantization.method == "gptq")),
        ),
        f"{stem}.g_idx": replace(
            plain,
            shape=(k,),
            target="",
            types=("I32",),
            check="order",
            expected=(quantization.group_size or k,),
            optional=True,
        ),
    }


def _scales(stem: str, placement: Placement, quantization: Quantization) -> Table:
    """The scales of AWQ and GPTQ."""
    n, _, groups = _sizes(placement, quantization)
    scales = replace(
        placement,
        held=None,
        shape=(len(groups), n),
        rows=_local_groups(placement, quantization),
        cols=placement.rows,
        target=f"{placement.target}.scale",
        packing=Packing(transposed=True),
        check="scale",
    )
    return {f"{stem}.scales": scales}


def _sizes(placement: Placement, quantization: Quantization) -> tuple[int, int, range]:
    """N, K, and the groups of a row."""
    n, k = placement.shape
    return n, k, range(k // (quantization.group_size or k))


def _columns(placement: Placement) -> range:
    assert placement.cols is not None
    return placement.cols


def _local_groups(placement: Placement, quantization: Quantization) -> range:
    """Groups of the columns that this rank has."""
    group = quantization.group_size
    return _divided(_columns(placement), group) if group else range(1)


def _divided(numbers: range, by: int) -> range:
    assert numbers.start % by == 0, (numbers, by)
    assert numbers.stop % by == 0, (numbers, by)
    return range(numbers.start // by, numbers.stop // by)
