"""FP8 matrices: close to the layer they came from, half its bytes, and loaded on request."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from longtake.engine.config import WAN_14B, Precision, WeightsConfig
from longtake.engine.fp8_linear import Fp8Linear, has_fp8, quantise_linears
from longtake.engine.model import Block, CausalWan
from longtake.engine.weights import load_transformer
from longtake.kernels.fp8_rows import round_rows
from tests.engine.plain_wan import random_state
from tests.engine.test_tensor_files import spec_of

# e4m3 keeps 3 bits behind the point: at most 1/16 off an element, 2.6 % in the root mean square, of weight and input;
# 3.7 % of a product, and half as much again where few numbers are compared.
RELATIVE = 0.07


def relative(a: Tensor, b: Tensor) -> float:
    return float((a.float() - b.float()).norm().detach() / b.float().norm().detach())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bias", [True, False])
def test_close_to_the_layer(dtype: torch.dtype, bias: bool) -> None:
    torch.manual_seed(0)
    linear = nn.Linear(96, 40, bias=bias).to(dtype)
    x = torch.randn(2, 7, 96, dtype=dtype) * torch.logspace(-3, 3, 7)[:, None].to(dtype)
    out = Fp8Linear(linear)(x)
    assert (out.shape, out.dtype) == ((2, 7, 40), dtype)
    for row in range(7):
        assert relative(out[:, row], linear(x)[:, row]) < RELATIVE


def test_takes_gelu_before_it_rounds() -> None:
    torch.manual_seed(0)
    linear, x = nn.Linear(96, 40), 3 * torch.randn(7, 96)
    activated = nn.functional.gelu(x, approximate="tanh")
    assert torch.equal(Fp8Linear(linear, gelu=True)(x), Fp8Linear(linear)(activated))


def test_only_blocks_are_rounded_and_14b_halves() -> None:
    with torch.device("meta"):
        model = CausalWan(WAN_14B).cast(torch.bfloat16)
        before = sum(p.numel() * p.element_size() for p in model.parameters())
        quantise_linears(model)
    after = sum(p.numel() * p.element_size() for p in model.parameters())
    assert sum(isinstance(module, Fp8Linear) for module in model.modules()) == 10 * WAN_14B.num_layers
    assert 0.5 < after / before < 0.53
    assert type(model.proj_out) is nn.Linear and type(model.condition_embedder.time_proj) is nn.Linear


def test_loads_rounded(tmp_path: Path) -> None:
    (tmp_path / "transformer").mkdir()
    torch.save(random_state(spec_of(tmp_path, WeightsConfig()).transformer), tmp_path / "transformer" / "x.pt")
    spec = spec_of(tmp_path, WeightsConfig(files=("x.pt",)))
    plain = load_transformer(spec, torch.device("cpu"), torch.float32)
    rounded = load_transformer(
        replace(spec, weights=replace(spec.weights, precision=Precision.FP8)), torch.device("cpu"), torch.float32
    )
    torch.manual_seed(1)
    latents, text = torch.randn(1, 16, 2, 4, 6), torch.randn(1, 5, spec.transformer.text_dim)

    def flow(model: CausalWan) -> Tensor:
        with torch.no_grad():
            out: Tensor = model(latents, torch.full((1, 2), 500.0), model.text_context(text), lambda layer, q, k, v: v)
            return out

    assert 0 < relative(flow(rounded), flow(plain)) < RELATIVE


@pytest.mark.gpu
@pytest.mark.parametrize("rows", [1, 7, 4680])
def test_the_matrix_units_agree_with_the_plain_twin(rows: int) -> None:
    if not has_fp8(torch.device("cuda")):
        pytest.skip("no FP8 matrix units")
    torch.manual_seed(0)
    layer = Fp8Linear(nn.Linear(1536, 8960).to("cuda", torch.bfloat16))
    x = torch.randn(rows, 1536, device="cuda", dtype=torch.bfloat16)
    x_RI, scale_R1 = round_rows(x)
    assert layer.bias is not None
    expected = (x_RI.float() @ layer.weight.float().t()) * scale_R1 * layer.scale.t() + layer.bias.float()
    assert relative(layer(x), expected) < 0.005


@pytest.mark.gpu
def test_compiled_feed_forward_is_one_graph_and_agrees() -> None:
    if not has_fp8(torch.device("cuda")):
        pytest.skip("no FP8 matrix units")
    torch.manual_seed(0)
    model = CausalWan(replace(WAN_14B, num_layers=1, num_heads=5, ffn_dim=1792)).to("cuda").cast(torch.bfloat16)
    block, x = model.blocks[0], torch.randn(1, 77, 640, device="cuda", dtype=torch.bfloat16)
    assert isinstance(block, Block)
    with torch.no_grad():
        exact = block.ffn(x)
        quantise_linears(model)
        plain = block.ffn(x)
        compiled = torch.compile(block.ffn, dynamic=False, fullgraph=True)(x)
    assert relative(plain, exact) < RELATIVE and relative(compiled, plain) < 0.01
