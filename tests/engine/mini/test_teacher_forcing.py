"""Training sees what a rollout sees: the doubled sequence against the engine's own block-by-block passes."""

from __future__ import annotations

import torch
from torch import Tensor

from longtake.engine.attention import HistoryAttention
from longtake.engine.config import ModelConfig
from longtake.engine.history import Plan
from longtake.engine.mini.teacher_forcing import Layout, Rotations, block_mask, make_attend
from longtake.engine.model import CausalWan
from longtake.kernels.attention_path import DensePath
from longtake.kernels.codec import BlockGeometry
from longtake.kernels.forms import make_form
from longtake.offload.cache import CacheBudget, KVCache
from longtake.offload.shape import ModelKVShape

CPU = torch.device("cpu")


def test_noisy_copy_equals_a_rollout_pass() -> None:
    torch.manual_seed(0)
    config = ModelConfig(num_heads=2, head_dim=32, num_layers=2, ffn_dim=64, text_dim=8, in_channels=4, out_channels=4)
    layout = Layout(num_blocks=3, block_frames=2, rows=3, columns=4)
    model = CausalWan(config).eval().requires_grad_(False)
    for parameter in model.parameters():
        parameter.normal_().mul_(0.3 if parameter.ndim == 1 else parameter[0].numel() ** -0.5)
    clean = torch.randn(1, 4, 6, 6, 8)
    noise = torch.randn_like(clean)
    starts = torch.tensor([[5, 11, 40]])
    sigmas = torch.tensor([0.9, 0.5, 0.2])
    sigma_frames = sigmas.repeat_interleave(2)
    noisy = torch.lerp(clean, noise, sigma_frames[None, None, :, None, None])
    texts = [model.text_context(torch.randn(1, 5, 8)) for _ in range(2)]
    beat_of_block = [0, 1, 1]

    # one doubled pass; both prompts' tokens side by side, each block sees its own
    both = [tuple(torch.cat(parts, dim=2) for parts in zip(*pair, strict=True)) for pair in zip(*texts, strict=True)]
    beats = torch.tensor(beat_of_block).repeat_interleave(layout.block_tokens).repeat(2)
    text_mask = (beats[:, None] == torch.tensor([0] * 5 + [1] * 5)[None])[None, None]
    attend = make_attend(*Rotations(layout, 32, CPU)(starts), block_mask(layout, CPU))
    times = torch.cat((torch.zeros(6), 1000 * sigma_frames))[None]
    flow = model(torch.cat((clean, noisy), dim=2), times, both, attend, text_mask)[:, :, 6:]

    # block by block, as a rollout does
    form = make_form("fp32", BlockGeometry(num_tokens=layout.block_tokens, head_dim=32, grid=(3, 4)))
    codec = form.codec
    shape = ModelKVShape(num_layers=2, num_heads=2, codec=codec)
    cache = KVCache(shape=shape, device=CPU, budget=CacheBudget(num_blocks=3))
    path = DensePath(codec, 2, 4 * layout.block_tokens, torch.float32, CPU)
    for block in range(3):
        plan = Plan(
            block=block,
            start=int(starts[0, block]),
            blocks=tuple(range(block)),
            starts=tuple(int(s) for s in starts[0, :block]),
        )
        context = texts[beat_of_block[block]]
        frames = slice(2 * block, 2 * block + 2)
        with cache.prepare(plan.blocks) as reading:
            history = HistoryAttention(plan, reading, [form], 2, path, CPU)
            single = model(noisy[:, :, frames], torch.full((1, 2), float(1000 * sigmas[block])), context, history)
            torch.testing.assert_close(flow[:, :, frames], single, rtol=0, atol=2e-5)
            commit = cache.begin_commit(block)
            model(clean[:, :, frames], torch.zeros(1, 2), context, history.committing(commit))
            commit.complete()


def test_mask_of_three_blocks() -> None:
    from longtake.engine.mini.teacher_forcing import visible

    layout = Layout(num_blocks=3, block_frames=1, rows=1, columns=1)
    index = torch.arange(6)
    seen: Tensor = visible(layout)(index, index, index[:, None], index[None, :])
    assert seen.int().tolist() == [
        [1, 0, 0, 0, 0, 0],
        [1, 1, 0, 0, 0, 0],
        [1, 1, 1, 0, 0, 0],
        [0, 0, 0, 1, 0, 0],
        [1, 0, 0, 0, 1, 0],
        [1, 1, 0, 0, 0, 1],
    ]
