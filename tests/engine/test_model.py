"""The model against diffusers' own class, and its rollout against a computation that keeps no cache."""

from __future__ import annotations

import pytest
import torch
from diffusers import WanTransformer3DModel
from torch import Tensor

from longtake.engine.config import ModelConfig
from longtake.engine.model import CausalWan
from longtake.kernels.attention import attend
from longtake.kernels.rotary import apply_rotary, rotary_table

# float32 rounding over a few layers, summed in another order; outputs are of order 1.
TOLERANCE = 2e-5

CONFIGS = [
    ModelConfig(num_heads=2, head_dim=64, num_layers=3, ffn_dim=160, text_dim=48),
    ModelConfig(num_heads=3, head_dim=32, num_layers=2, ffn_dim=64, text_dim=24, in_channels=4, out_channels=4),
    ModelConfig(num_heads=1, head_dim=128, num_layers=1, ffn_dim=256, text_dim=32, freq_dim=64),
]


def twin(config: ModelConfig) -> tuple[WanTransformer3DModel, CausalWan]:
    """diffusers' class with random weights everywhere, and ours with the same ones."""
    theirs = WanTransformer3DModel(
        **{key: value for key, value in config.to_hub().items() if not key.startswith("_")}
    ).eval()
    generator = torch.Generator().manual_seed(0)
    for parameter in theirs.parameters():
        scale = 0.3 if parameter.ndim == 1 else parameter[0].numel() ** -0.5
        parameter.data.normal_(generator=generator).mul_(scale)
    ours = CausalWan(config).eval()
    ours.load_state_dict(theirs.state_dict(), strict=True)
    return theirs, ours


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("per_frame_time", [False, True])
def test_equals_diffusers_without_history(config: ModelConfig, per_frame_time: bool) -> None:
    theirs, ours = twin(config)
    torch.manual_seed(1)
    frames, rows, columns = 4, 6, 5
    latents = torch.randn(1, config.in_channels, frames, 2 * rows, 2 * columns)
    text = torch.randn(1, 7, config.text_dim)
    text[:, 4:] = 0  # padding: zero and attended
    times = torch.tensor([[900.0, 10.0, 500.0, 0.0]]) if per_frame_time else torch.full((1, frames), 625.0)
    rotary = rotary_table(range(frames), rows, columns, config.head_dim, torch.device("cpu"))

    def attend_block(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k = apply_rotary(q[0], rotary), apply_rotary(k[0], rotary)
        out, _ = attend(q.transpose(0, 1), k.transpose(0, 1), v[0].transpose(0, 1))
        return out.transpose(0, 1)[None]

    with torch.no_grad():
        flow = ours(latents, times, ours.text_context(text), attend_block)
        their_times = times.repeat_interleave(rows * columns, dim=1) if per_frame_time else times[:, 0]
        expected = theirs(latents, their_times, text, return_dict=False)[0]
    assert flow.shape == latents.shape
    torch.testing.assert_close(flow, expected, rtol=0, atol=TOLERANCE)


def test_full_size_names_and_shapes() -> None:
    """825 tensors at 1.3B, the very names and shapes of diffusers' class."""
    from longtake.engine.config import WAN_1_3B

    with torch.device("meta"):
        ours = CausalWan(WAN_1_3B).state_dict()
        theirs = WanTransformer3DModel(
            **{key: value for key, value in WAN_1_3B.to_hub().items() if not key.startswith("_")}
        ).state_dict()
    assert len(ours) == 825
    assert {name: tensor.shape for name, tensor in ours.items()} == {n: t.shape for n, t in theirs.items()}
