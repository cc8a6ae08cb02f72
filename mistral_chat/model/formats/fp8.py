"""FP8 (E4M3) with a scale for the whole matrix or a row: W = number * scale.

Mistral's own files, Hugging Face's and compressed-tensors' differ in names alone. Hugging Face's
`weight_scale_inv` multiplies all the same. Scales of activations, and of keys and values beside
their module's matrices, may be there and are not used.
"""

from dataclasses import replace

from mistral_chat.model.placement import Packing, Placement, Table
from mistral_chat.model.quantization import Method, Quantization

__all__ = ["stored"]

_SCALE: dict[Method, str] = {
    "native-fp8": "qscale_weight",
    "hf-fp8": "weight_scale_inv",
    "compressed-tensors": "weight_scale",
}
_UNUSED: dict[Method, str] = {
    "native-fp8": "qscale_act",
    "hf-fp8": "activation_scale",
    "compressed-tensors": "input_scale",
}


def stored(stem: str, placement: Placement, quantization: Quantization) -> Table:
    """The tensors of one matrix."""
    weight = replace(placement, held=None)
    n_out = placement.shape[0]
    scale = replace(weight, target=f"{placement.target}.scale", check="scale")
    if quantization.per_tensor:
        scale = replace(
            scale,
            shape=(),
            other_shapes=((1,), (1, 1)),
            rows=range(1),
            cols=None,
            half_split=0,
            packing=Packing(repeated=len(placement.rows)),
        )
    else:
        scale = replace(scale, shape=(n_out, 1), other_shapes=((n_out,),), cols=range(1))
    unused = replace(
        scale, shape=(), other_shapes=((1,), (1, 1)), target="", check="nothing", optional=True
    )
    module = stem.rpartition(".")[0]
    table = {f"{module}.{x}_fake_quantizer.qscale_act": unused for x in ("q", "k", "v", "kv")}
    return table | {
        f"{stem}.weight": replace(weight, target=f"{placement.target}.data", types=("F8_E4M3",)),
        f"{stem}.{_SCALE[quantization.method]}": scale,
        f"{stem}.{_UNUSED[quantization.method]}": unused,
    }
