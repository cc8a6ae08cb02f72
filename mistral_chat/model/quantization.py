"""How a checkpoint stores its matrices, where they are not floats: what its configuration says.

Knows the words of params.json's `quantization` and of config.json's `quantization_config`; which
stored tensors those make is in `formats`. Reads no files.
"""

import re
from collections.abc import Callable, Collection
from dataclasses import dataclass
from itertools import combinations
from typing import Any, Literal

from mistral_chat.errors import CheckpointError, named, shown
from mistral_chat.model.hf import MATRICES, PREFIXES

__all__ = ["Method", "Quantization", "WeightKind", "from_config", "from_params"]

# gptq-v2 stores zeros as they are; while-loading has floats, which a rank quantizes as it reads.
Method = Literal[
    "native-fp8", "hf-fp8", "compressed-tensors", "awq", "gptq", "gptq-v2", "while-loading"
]
WeightKind = Literal["fp8", "int8", "int4"]

MOST_PATTERNS = 10_000
# Regular expressions that end soon on any name: nothing repeats a group, few things repeat at all.
_QUICK = re.compile(r"(?:[\w./^$|()-]|\\[.dw]|\[[\w-]*\]|\.[*+])*", re.ASCII)
MOST_REPEATS = 3


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


def from_params(table: object) -> Quantization:
    """Read params.json's `quantization`: FP8 with a scale a tensor.

    Raises:
        CheckpointError: another format; named.
    """
    said = _object("quantization", table)
    weight, activations = said.pop("qformat_weight", None), said.pop("qscheme_act", None)
    if weight != "fp8_e4m3":
        raise CheckpointError(f"qformat_weight {shown(weight)} is not supported: expected fp8_e4m3")
    if activations not in ("TENSOR", "NO_SCALES", None):
        raise CheckpointError(
            f"qscheme_act {shown(activations)} is not supported: expected TENSOR or NO_SCALES"
        )
    _refuse_unknown("quantization", said)
    return Quantization(
        method="native-fp8", kind="fp8", per_tensor=True,
        static_activations=activations == "TENSOR",
    )  # fmt: skip


def from_config(table: object, n_layers: object) -> Quantization:
    """Read config.json's `quantization_config`.

    Args:
        table: its value.
        n_layers: of the model, to say which matrices are left as they are.

    Raises:
        CheckpointError: another method, or a way of one that cannot be read; named.
    """
    said = _object("quantization_config", table)
    method = said.get("quant_method")
    layers = n_layers if type(n_layers) is int and 0 < n_layers <= 1000 else 0
    readers = {
        "fp8": _hf_fp8,
        "compressed-tensors": _compressed_tensors,
        "awq": _awq,
        "gptq": _gptq,
    }
    if not isinstance(method, str) or method not in readers:
        raise CheckpointError(
            f"quant_method {shown(method)} is not supported: expected {', '.join(readers)}"
        )
    return readers[method](said, layers)


def _hf_fp8(said: dict[str, Any], n_layers: int) -> Quantization:
    if said.get("weight_block_size") is not None:
        raise CheckpointError(
            f"weight_block_size {shown(said['weight_block_size'])} is not supported: expected null "
            f"(a scale a tensor)"
        )
    scheme = said.get("activation_scheme", "dynamic")
    if scheme not in ("static", "dynamic"):
        raise CheckpointError(
            f"activation_scheme {shown(scheme)} is not supported: expected static or dynamic"
        )
    return Quantization(
        method="hf-fp8", kind="fp8", per_tensor=True, static_activations=scheme == "static",
        kept=_kept(said.get("modules_to_not_convert"), n_layers, _parts),
    )  # fmt: skip


def _compressed_tensors(said: dict[str, Any], n_layers: int) -> Quantization:
    """https://github.com/neuralmagic/compressed-tensors, `QuantizationConfig`."""
    groups = said.get("config_groups")
    if not isinstance(groups, dict) or len(groups) != 1:
        raise CheckpointError(
            f"config_groups is {shown(groups)}: expected one group of matrices that are stored "
            f"alike"
        )
    group = _object("config_groups", next(iter(groups.values())))
    weights = _object("weights", group.get("weights"))
    bits, kind = weights.get("num_bits"), weights.get("type", "int")
    strategy, size = weights.get("strategy"), weights.get("group_size")
    if strategy is None:  # as the library fills it in
        strategy = "group" if isinstance(size, int) and size > 0 else "tensor"
    symmetric, form = weights.get("symmetric", True), said.get("format")
    if weights.get("actorder") not in (None, False, "weight", "static"):
        raise CheckpointError(
            f"actorder {shown(weights['actorder'])} is not supported: expected null or weight"
        )
    for name in ("sparsity_config", "transform_config"):
        value = said.get(name)
        is_none = not value or (isinstance(value, dict) and value.get("format") == "dense")
        if not is_none:
            raise CheckpointError(f"{name} {shown(value)} is not supported: expected none")
    kept = _kept(said.get("ignore"), n_layers, _patterns)
    kept |= _all_matrices(n_layers) - _kept(group.get("targets"), n_layers, _patterns, {"Linear"})
    if (kind, bits) == ("float", 8):
        if strategy not in ("tensor", "channel") or symmetric is not True:
            raise CheckpointError(
                f"fp8 weights of strategy {shown(strategy)} are not supported: expected tensor or "
                f"channel, symmetric"
            )
        activations = group.get("input_activations")
        is_static = isinstance(activations, dict) and activations.get("dynamic") is False
        return Quantization(
            method="compressed-tensors", kind="fp8", per_tensor=strategy == "tensor",
            static_activations=is_static, kept=kept,
        )  # fmt: skip
    is_whole = kind == "int" and bits in (4, 8) and form == "pack-quantized"
    if not is_whole or strategy not in ("group", "channel"):
        raise CheckpointError(
            f"format {shown(form)} of {shown(bits)} bits ({shown(kind)}, {shown(strategy)}) is not "
            f"supported: expected fp8, or pack-quantized int4 or int8 by group or channel"
        )
    return Quantization(
        method="compressed-tensors", kind="int4" if bits == 4 else "int8",
        group_size=_group_size(size) if strategy == "group" else 0,
        has_zeros=symmetric is not True, kept=kept,
    )  # fmt: skip


def _awq(said: dict[str, Any], n_layers: int) -> Quantization:
    bits = said.get("bits", said.get("w_bit", 4))
    if bits != 4:
        raise CheckpointError(f"bits {shown(bits)} of awq is not supported: expected 4")
    version = said.get("version", "gemm")
    if not isinstance(version, str) or version.lower() != "gemm":
        raise CheckpointError(f"version {shown(version)} of awq is not supported: expected gemm")
    if said.get("zero_point", True) is not True:
        raise CheckpointError("zero_point false of awq is not supported: expected true")
    return Quantization(
        method="awq", kind="int4", group_size=_group_size(said.get("group_size", 128)),
        has_zeros=True, kept=_kept(said.get("modules_to_not_convert"), n_layers, _parts),
    )  # fmt: skip


def _gptq(said: dict[str, Any], n_layers: int) -> Quantization:
    bits = said.get("bits")
    if bits not in (4, 8):
        raise CheckpointError(f"bits {shown(bits)} of gptq is not supported: expected 4 or 8")
    if said.get("desc_act") not in (None, False):
        raise CheckpointError("desc_act (act-order) of gptq is not supported: expected false")
    form = said.get("checkpoint_format", "gptq")
    if form not in ("gptq", "gptq_v2"):
        raise CheckpointError(
            f"checkpoint_format {shown(form)} of gptq is not supported: expected gptq or gptq_v2"
        )
    if said.get("dynamic"):
        raise CheckpointError("dynamic of gptq is not supported: expected one format for all")
    size = said.get("group_size", 128)
    return Quantization(
        method="gptq" if form == "gptq" else "gptq-v2", kind="int4" if bits == 4 else "int8",
        group_size=0 if size == -1 else _group_size(size), has_zeros=True,
        kept=_kept(said.get("modules_in_block_to_not_quantize"), n_layers, _parts),
    )  # fmt: skip


def _group_size(size: object) -> int:
    if type(size) is not int or not 32 <= size <= 1 << 20 or size % 32:
        raise CheckpointError(f"group_size is {shown(size)}: expected a multiple of 32")
    return size


def _object(name: str, table: object) -> dict[str, Any]:
    if not isinstance(table, dict):
        raise CheckpointError(f"{name} is {shown(table)}: expected an object")
    return dict(table)


def _refuse_unknown(name: str, said: dict[str, Any]) -> None:
    unknown = ", ".join(named(key) for key, value in sorted(said.items()) if value is not None)
    if unknown:
        raise CheckpointError(f"{unknown} in {name} is not supported: not a key we know")


def _all_matrices(n_layers: int) -> frozenset[str]:
    return frozenset(f"layers.{n}.{matrix}" for n in range(n_layers) for matrix in MATRICES)


def _kept(
    patterns: object,
    n_layers: int,
    matcher: Callable[[list[str]], Callable[[str], bool]],
    classes: Collection[str] = (),
) -> frozenset[str]:
    """The matrices that a list of names or patterns means.

    Args:
        patterns: the list; None is none.
        n_layers: of the model.
        matcher: gives whether a module's name is meant by one of the patterns.
        classes: names of modules' classes that stand for all matrices.
    """
    if patterns is None:
        return frozenset()
    if not isinstance(patterns, list) or not all(isinstance(p, str) for p in patterns):
        raise CheckpointError(f"{shown(patterns)}: expected a list of modules' names")
    if len(patterns) > MOST_PATTERNS:
        raise CheckpointError(f"{len(patterns):,} names of modules: more than a model has")
    if any(pattern in classes for pattern in patterns):
        return _all_matrices(n_layers)
    matches = matcher(patterns)
    return frozenset(
        f"layers.{layer}.{ours}"
        for layer in range(n_layers)
        for ours, theirs in MATRICES.items()
        if matches(f"layers.{layer}.{ours}")
        or any(matches(f"{prefix}layers.{layer}.{theirs}") for prefix in PREFIXES)
    )


def _parts(patterns: list[str]) -> Callable[[str], bool]:
    """A module is meant by its name, and by whole parts of it: `self_attn`, `layers.3`."""
    known = set(patterns)

    def matches(name: str) -> bool:
        parts = name.split(".")
        return any(".".join(parts[i:j]) in known for i, j in combinations(range(len(parts) + 1), 2))

    return matches


def _patterns(patterns: list[str]) -> Callable[[str], bool]:
    """A module is meant by its name, or by a regular expression for the beginning of it."""
    known = {pattern for pattern in patterns if not pattern.startswith("re:")}
    expressions = [_compile(p.removeprefix("re:")) for p in patterns if p not in known]
    return lambda name: name in known or any(e.match(name) for e in expressions)


def _compile(expression: str) -> re.Pattern[str]:
    is_quick = len(expression) <= 200 and _QUICK.fullmatch(expression)
    if not is_quick or expression.count("*") + expression.count("+") > MOST_REPEATS:
        raise CheckpointError(f"the pattern {shown(expression)} is not supported: too complex")
    try:
        return re.compile(expression)
    except re.error as error:
        raise CheckpointError(f"the pattern {shown(expression)} is malformed: {error}") from error
