"""Quantized matrices on a GPU: kernels in bfloat16, which the interpreter lacks, and loading."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch.nn import functional as F

from mistral_chat.kernels import fused, ops
from mistral_chat.kernels.elementwise import Scaled
from mistral_chat.kernels.quantize import quantize
from mistral_chat.model.formats import as_asked
from mistral_chat.model.operations import Alone
from mistral_chat.model.sharding import Shard
from mistral_chat.model.transformer import Transformer
from mistral_chat.model.weight import QuantizedMatrix
from tests.conftest import folder_of, load_weights, random_weights
from tests.kernels.test_quantized import KINDS, draw, draw_quantized
from tests.model.formats.test_formats import held, part
from tests.model.quantized_files import FORMATS, SHAPE, Format, write_folder

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU"),
]
CUDA = torch.device("cuda")


@pytest.mark.parametrize(("kind", "group", "zeros"), KINDS)
@pytest.mark.parametrize("n_rows", [1, 2, 9, 17, 32])
@pytest.mark.parametrize("gated", [False, True])
def test_kernels_in_bfloat16_are_the_reference(
    kind: str, group: int, zeros: bool, n_rows: int, gated: bool
) -> None:
    n_in = 1152
    weight = draw_quantized(600, n_in, kind, group, zeros)
    x = draw(n_rows, n_in, dtype=torch.bfloat16)
    squares = x.float().square().view(n_rows, 2, -1).sum(-1)
    got = (fused.gated if gated else fused.linear)(Scaled(x, squares, 1e-5), weight)
    scaled = x.float() * torch.rsqrt(squares.sum(1, keepdim=True) / n_in + 1e-5)
    wanted = scaled @ weight.dequantize(torch.float32).t()
    if gated:
        gate, up = wanted.chunk(2, -1)
        wanted = F.silu(gate) * up
    # numbers are exact in bfloat16, sums are float32, the result is rounded once: 2^-9
    torch.testing.assert_close(got.float(), wanted, rtol=2**-8, atol=2e-3)


@pytest.mark.parametrize(("kind", "group", "zeros"), KINDS)
def test_many_rows_are_the_reference(
    kind: str, group: int, zeros: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ops, "GPU_BLOCK_NUMBERS", 100 * 1152)  # several blocks
    weight = draw_quantized(600, 1152, kind, group, zeros)
    x = draw(70, 1152, dtype=torch.bfloat16)
    wanted = x.float() @ weight.dequantize(torch.float32).t()
    # dequantized numbers are rounded as well, each by 2^-9, and their errors average out
    got = ops.linear(x, weight).float()
    torch.testing.assert_close(got, wanted, rtol=2**-6, atol=2e-2)


@pytest.mark.parametrize("form", FORMATS.values(), ids=FORMATS)
def test_loading_gives_what_the_format_means(tmp_path: Path, form: Format) -> None:
    meant = write_folder(tmp_path, form)
    for rank in range(2):
        with CUDA:
            model = Transformer(form.args, Shard(form.args, 2, rank), Alone())
        load_weights(model, folder_of(tmp_path, form.args).headers, 4)
        for name, placement in model.placements().items():
            assert torch.equal(held(model, placement).cpu(), part(meant[name], placement)), name


@pytest.mark.parametrize("kind", ["fp8", "int8", "int4"])
def test_quantizing_while_loading_is_quantizing(tmp_path: Path, kind: str) -> None:
    weights = random_weights(SHAPE, torch.bfloat16)
    save_file(weights, tmp_path / "consolidated.safetensors")
    args = as_asked(SHAPE, kind)  # type: ignore[arg-type]
    with CUDA:
        model = Transformer(args)
    load_weights(model, folder_of(tmp_path, SHAPE).headers, 4)
    for name, placement in model.placements().items():
        if placement.held is not None:
            with CUDA:
                wanted = QuantizedMatrix(placement.held, *placement.shape).quantized
            quantize(weights[name].to(CUDA), wanted)
            got = model.quantized(placement).dequantize(torch.float32)
            assert torch.equal(got, wanted.dequantize(torch.float32))
