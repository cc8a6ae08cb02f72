"""Quantized checkpoints, written by each format's published rule, and the matrices that they mean.

Written apart from the package: numbers are placed one by one as the rule says, and what they mean
is computed from the numbers, not from the file.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from mistral_chat.model import hf
from mistral_chat.model.args import TransformerArgs
from mistral_chat.model.quantization import Quantization
from tests.conftest import random_weights

Weights = dict[str, Tensor]
Write = Callable[[Tensor, Quantization, torch.Generator], tuple[Weights, Tensor]]

SHAPE = TransformerArgs(
    dim=128,
    n_layers=2,
    head_dim=32,
    hidden_dim=192,
    n_heads=6,
    n_kv_heads=3,
    norm_eps=1e-5,
    vocab_size=100,
    max_seq_len=64,
)


def draw(generator: torch.Generator, low: int, high: int, *shape: int) -> Tensor:
    return torch.randint(low, high, shape, generator=generator, dtype=torch.int64)


def draw_scales(generator: torch.Generator, unit: float, *shape: int) -> Tensor:
    return unit * (0.5 + torch.rand(shape, generator=generator))


def pack(numbers: Tensor, bits: int, order: tuple[int, ...] = ()) -> Tensor:
    """Neighbours of a row in an int32, `order[p]` at place p from the low bits."""
    per = 32 // bits
    order = order or tuple(range(per))
    words = torch.zeros(len(numbers), numbers.shape[1] // per, dtype=torch.int64)
    for place, neighbour in enumerate(order):
        words |= numbers[:, neighbour::per] << (bits * place)
    return torch.where(words >= 1 << 31, words - (1 << 32), words).to(torch.int32)


def fp8(suffix: str, activations: str) -> Write:
    def write(
        shape: Tensor, quantization: Quantization, generator: torch.Generator
    ) -> tuple[Weights, Tensor]:
        n, k = shape.tolist()
        numbers = torch.randn(n, k, generator=generator).mul(100).to(torch.float8_e4m3fn)
        scale = draw_scales(generator, k**-0.5 / 100, *(() if quantization.per_tensor else (n, 1)))
        scale = scale.to(torch.bfloat16)
        tensors = {"weight": numbers, suffix: scale}
        if quantization.static_activations:
            tensors[activations] = torch.ones(())
        return tensors, numbers.float() * scale.float()

    return write


def compressed_tensors(
    shape: Tensor, quantization: Quantization, generator: torch.Generator
) -> tuple[Weights, Tensor]:
    bits, numbers, scale, zero, meant = whole(shape, quantization, generator)
    tensors = {
        "weight_packed": pack(numbers, bits),
        "weight_scale": scale,
        "weight_shape": shape,
    }
    if quantization.has_zeros:
        tensors["weight_zero_point"] = pack(zero.t(), bits).t().contiguous()
    return tensors, meant


def awq(
    shape: Tensor, quantization: Quantization, generator: torch.Generator
) -> tuple[Weights, Tensor]:
    _, numbers, scale, zero, meant = whole(shape, quantization, generator)
    order = (0, 2, 4, 6, 1, 3, 5, 7)
    tensors = {
        "qweight": pack(numbers.t(), 4, order),
        "qzeros": pack(zero.t(), 4, order),
        "scales": scale.t().contiguous(),
    }
    return tensors, meant


def gptq(
    shape: Tensor, quantization: Quantization, generator: torch.Generator
) -> tuple[Weights, Tensor]:
    bits, numbers, scale, zero, meant = whole(shape, quantization, generator)
    k = numbers.shape[1]
    stored_zero = zero if quantization.method == "gptq-v2" else (zero - 1) % (1 << bits)
    tensors = {
        "qweight": pack(numbers, bits).t().contiguous(),
        "qzeros": pack(stored_zero.t(), bits),
        "scales": scale.t().contiguous(),
        "g_idx": (torch.arange(k) // (quantization.group_size or k)).to(torch.int32),
    }
    return tensors, meant


def whole(
    shape: Tensor, quantization: Quantization, generator: torch.Generator
) -> tuple[int, Tensor, Tensor, Tensor, Tensor]:
    """Bits, numbers from 0 on, scales, zeros, and what they mean: W = (number - zero) * scale."""
    n, k = shape.tolist()
    bits = 4 if quantization.kind == "int4" else 8
    group = quantization.group_size or k
    numbers = draw(generator, 0, 1 << bits, n, k)
    scale = draw_scales(generator, k**-0.5 / (1 << bits - 2), n, k // group).to(torch.float16)
    zero = torch.full((n, k // group), 1 << bits - 1)
    if quantization.has_zeros:
        zero = draw(generator, 0, 1 << bits, n, k // group)
    meant = torch.empty(n, k)
    for g in range(k // group):
        cols = slice(g * group, (g + 1) * group)
        meant[:, cols] = (numbers[:, cols] - zero[:, g : g + 1]) * scale[:, g : g + 1].float()
    return bits, numbers, scale, zero, meant


@dataclass(frozen=True)
class Format:
    """One kind of checkpoint."""

    layout: hf.Layout
    write: Write
    quantization: Quantization

    @property
    def args(self) -> TransformerArgs:
        return replace(SHAPE, quantization=self.quantization)


def _named(kind: str, method: str, **settings: object) -> Quantization:
    return Quantization(method=method, kind=kind, **settings)  # type: ignore[arg-type]


CT_FP8 = fp8("weight_scale", "input_scale")
NATIVE = fp8("qscale_weight", "qscale_act")
HF_FP8 = fp8("weight_scale_inv", "activation_scale")
CT = "compressed-tensors"
FORMATS = {
    "native-fp8": Format(
        "consolidated",
        NATIVE,
        _named("fp8", "native-fp8", per_tensor=True, static_activations=True),
    ),
    "hf-fp8": Format(
        "hf", HF_FP8, _named("fp8", "hf-fp8", per_tensor=True, static_activations=True)
    ),
    "ct-fp8-tensor": Format(
        "hf", CT_FP8, _named("fp8", CT, per_tensor=True, static_activations=True)
    ),
    "ct-fp8-row": Format("hf", CT_FP8, _named("fp8", CT)),
    "ct-fp8-row-consolidated": Format("consolidated", CT_FP8, _named("fp8", CT)),
    "ct-int4-group": Format("hf", compressed_tensors, _named("int4", CT, group_size=32)),
    "ct-int4-zeros": Format(
        "hf", compressed_tensors, _named("int4", CT, group_size=64, has_zeros=True)
    ),
    "ct-int4-row": Format("hf", compressed_tensors, _named("int4", CT)),
    "ct-int8-row": Format("hf", compressed_tensors, _named("int8", CT)),
    "ct-int8-zeros": Format(
        "hf", compressed_tensors, _named("int8", CT, group_size=32, has_zeros=True)
    ),
    "awq": Format("hf", awq, _named("int4", "awq", group_size=32, has_zeros=True)),
    "gptq": Format("hf", gptq, _named("int4", "gptq", group_size=32, has_zeros=True)),
    "gptq-v2": Format("hf", gptq, _named("int4", "gptq-v2", group_size=32, has_zeros=True)),
    "gptq-symmetric": Format("hf", gptq, _named("int4", "gptq", group_size=64)),
    "gptq-int8-row": Format("hf", gptq, _named("int8", "gptq", has_zeros=True)),
}


def write_folder(
    folder: Path, form: Format, seed: int = 0, change: Callable[[Weights], None] | None = None
) -> Weights:
    """A checkpoint at random.

    Returns:
        what it means: every tensor by Mistral's name and in Mistral's order, in floats.
    """
    stored, meant = make(form, seed)
    if change is not None:
        change(stored)
    stem = "model" if form.layout == "hf" else "consolidated"
    save_file({n: t.contiguous() for n, t in stored.items()}, folder / f"{stem}.safetensors")
    return meant


def make(form: Format, seed: int) -> tuple[Weights, Weights]:
    generator = torch.Generator().manual_seed(seed)
    stored: Weights = {}
    meant = random_weights(SHAPE)
    for name, weight in meant.items():
        stem = name.removesuffix(".weight")
        theirs = hf.stored_name(name).removesuffix(".weight") if form.layout == "hf" else stem
        if not stem.startswith("layers.") or weight.dim() == 1:
            stored[f"{theirs}.weight"] = weight
            continue
        if stem in form.quantization.kept:
            stored[f"{theirs}.weight"] = in_halves(weight) if is_turned(stem, form) else weight
            continue
        tensors, floats = form.write(torch.tensor(weight.shape), form.quantization, generator)
        stored |= {f"{theirs}.{suffix}": tensor for suffix, tensor in tensors.items()}
        if is_turned(stem, form):
            back = torch.empty_like(floats)
            back[torch.tensor(half_split_order(len(floats)))] = floats
            floats = back
        meant[name] = floats
    return stored, meant


def is_turned(stem: str, form: Format) -> bool:
    """Whether Hugging Face has a matrix's rows in halves."""
    return form.layout == "hf" and stem.endswith((".wq", ".wk"))


def half_split_order(n_rows: int) -> list[int]:
    """Our row at each of Hugging Face's."""
    size = SHAPE.head_dim
    return [
        head * size + 2 * pair + element
        for head in range(n_rows // size)
        for element in (0, 1)
        for pair in range(size // 2)
    ]


def in_halves(weight: Tensor) -> Tensor:
    return weight[half_split_order(len(weight))]
