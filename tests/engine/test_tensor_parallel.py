"""The sharded model against the whole one, on every kind of mesh; weights read slice by slice."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from longtake.engine.config import ModelConfig, Precision
from longtake.engine.fp8_linear import is_fp8
from longtake.engine.gang import join
from longtake.engine.mesh import ALONE, Axis, Mesh, MeshShape, open_mesh, parse_mesh
from longtake.engine.model import Block, CausalWan
from longtake.engine.random_model import write_random_model
from longtake.engine.tensor_parallel import ShardedWan, _hidden
from longtake.engine.weights import load_transformer, read_spec
from longtake.kernels.errors import ConfigError
from tests.engine.gangs import run_ranks

# float32 sums in another order, over the layers; outputs are of order 1.
TOLERANCE = 2e-5

CONFIG = ModelConfig(
    num_heads=4, head_dim=16, num_layers=2, ffn_dim=90, text_dim=24, freq_dim=32, in_channels=4, out_channels=4
)
FRAMES, ROWS, COLUMNS = 2, 3, 5  # 15 tokens a latent frame: no gang divides them
MESHES = ("tp=4", "sp=4", "tp=2,sp=2", "tp=4,norms", "tp=2,sp=2,norms")


def random_weights() -> dict[str, Tensor]:
    torch.manual_seed(5)
    weights = {}
    for name, tensor in CausalWan(CONFIG).state_dict().items():
        scale = 0.3 if tensor.ndim == 1 else tensor[0].numel() ** -0.5
        weights[name] = torch.randn_like(tensor) * scale
    return weights


def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Plain attention of a block to itself; tokens in any order give the same, so order is told by a ramp on v."""
    ramp = torch.linspace(0, 1, v.shape[1])[None, :, None, None]
    q, k, v = (x.transpose(1, 2) for x in (q, k, v * ramp))
    return torch.nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2) + ramp


def inputs() -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(6)
    latents = torch.randn(1, CONFIG.in_channels, FRAMES, 2 * ROWS, 2 * COLUMNS)
    return latents, torch.tensor([[900.0, 300.0]]), torch.randn(1, 7, CONFIG.text_dim)


def flow(model: CausalWan) -> Tensor:
    latents, times, text = inputs()
    with torch.inference_mode():
        result: Tensor = model(latents, times, model.text_context(text), attend)
    return result


def sharded(text: str) -> ShardedWan:
    mesh = open_mesh(parse_mesh(text))
    with torch.device("meta"):
        model = ShardedWan(CONFIG, mesh)
    parts = {name: model.own_part(name, tensor) for name, tensor in random_weights().items()}
    model.load_state_dict(parts, assign=True)
    return model.eval().requires_grad_(False)


def on_every_mesh(rank: int, meshes: tuple[str, ...]) -> list[dict[str, Any]]:
    with join() as gang:
        found = []
        for text in meshes:
            model = sharded(text)
            context = model.text_context(inputs()[2])
            found.append(
                {
                    "flow": flow(model).numpy(),
                    "text heads": context[0][0].shape[1],
                    "layer weights": sum(p.numel() for p in model.blocks.parameters()),
                }
            )
        gang.any(False)
        return found


def test_sharded_equals_whole() -> None:
    whole = CausalWan(CONFIG)
    whole.load_state_dict(random_weights())
    expected = flow(whole)
    ranks = run_ranks(on_every_mesh, 4, MESHES)
    assert all(isinstance(found, list) for found in ranks), ranks
    for index, text in enumerate(MESHES):
        flows = [torch.from_numpy(found[index]["flow"]) for found in ranks]
        torch.testing.assert_close(flows[0], expected, rtol=0, atol=TOLERANCE)
        assert all(torch.equal(flows[0], other) for other in flows), f"{text}: ranks differ"
        tp = parse_mesh(text).tp
        assert {found[index]["text heads"] for found in ranks} == {CONFIG.num_heads // tp}
        total = sum(p.numel() for p in whole.blocks.parameters())
        assert all(found[index]["layer weights"] < total / tp * 1.15 for found in ranks)


def compiled(rank: int) -> Any:
    with join() as gang:
        model = sharded("tp=2,norms")
        for block in model.blocks:
            assert isinstance(block, Block)
            for half in ("before", "after"):
                setattr(block, half, torch.compile(getattr(block, half), backend="aot_eager", fullgraph=True))
        result = flow(model)
        gang.any(False)
        return result.numpy()


@pytest.mark.slow
def test_layers_compile_whole_with_their_collectives() -> None:
    whole = CausalWan(CONFIG)
    whole.load_state_dict(random_weights())
    for found in run_ranks(compiled, 2):
        torch.testing.assert_close(torch.from_numpy(found), flow(whole), rtol=0, atol=TOLERANCE)


def loaded(folder: Path, mesh: Mesh, precision: Precision = Precision.FP8) -> CausalWan:
    spec = read_spec(str(folder))
    spec = replace(spec, weights=replace(spec.weights, precision=precision))
    return load_transformer(spec, torch.device("cpu"), torch.float32, mesh)


def in_fp8(rank: int, folder: Path, text: str) -> Any:
    with join() as gang:
        model = loaded(folder, open_mesh(parse_mesh(text)))
        result = flow(model)
        gang.any(False)
        return is_fp8(model), result.numpy()


@pytest.mark.parametrize(("text", "tolerance"), [("sp=2", 1e-3), ("tp=2", 0.07), ("tp=2,norms", 0.07)])
def test_fp8_weights(text: str, tolerance: float, tmp_path: Path) -> None:
    """A sum in another order may round to another number of 8 bits; with tp scales are of fewer columns as well."""
    folder = write_random_model(tmp_path / "model", transformer=CONFIG)
    whole, exact = flow(loaded(folder, ALONE)), flow(loaded(folder, ALONE, Precision.MODEL))

    def error(found: Tensor, expected: Tensor) -> float:
        return float((found - expected).norm() / expected.norm())

    ranks = run_ranks(in_fp8, 2, folder, text)
    for rounded, found in ranks:
        assert rounded and torch.equal(torch.from_numpy(found), torch.from_numpy(ranks[0][1]))
        assert error(torch.from_numpy(found), whole) < tolerance
        assert error(torch.from_numpy(found), exact) < 1.2 * error(whole, exact)


def test_hidden_channels_are_dealt_in_sixteens() -> None:
    for tp in (2, 3, 4, 6, 12):
        deals = [_hidden(8960, Axis(index=index, size=tp)) for index in range(tp)]
        assert [channel for own in deals for channel in own] == list(range(8960))
        assert all(len(own) % 16 == 0 for own in deals) and max(map(len, deals)) - min(map(len, deals)) <= 16


def test_a_mesh_of_one_is_the_whole_model() -> None:
    model = ShardedWan(CONFIG, ALONE)
    model.load_state_dict(random_weights())
    whole = CausalWan(CONFIG)
    whole.load_state_dict(random_weights())
    assert torch.equal(flow(model), flow(whole))
    assert model.heads == range(4)


def test_heads_that_do_not_divide() -> None:
    with pytest.raises(ConfigError, match="cannot share 4 heads"):
        ShardedWan(CONFIG, replace(ALONE, shape=MeshShape(sp=3)))
