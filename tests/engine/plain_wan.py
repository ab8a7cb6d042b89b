"""An independent, plain Wan: original tensor names, complex RoPE in float64, dense K/V, no class, no cache.

Written from the published description of the architecture, not from longtake's model: the judge of loaders and loops.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from longtake.engine.config import ModelConfig

State = dict[str, Tensor]
KV = list[tuple[Tensor, Tensor]]  # a layer: k before RoPE and v, [T, H, D]


def original_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the original checkpoints."""
    dim, ffn, text = config.dim, config.ffn_dim, config.text_dim
    patch = config.patch_size
    shapes: dict[str, tuple[int, ...]] = {
        "patch_embedding.weight": (dim, config.in_channels, *patch),
        "patch_embedding.bias": (dim,),
        "head.modulation": (1, 2, dim),
    }

    def linear(name: str, out: int, inner: int) -> None:
        shapes[f"{name}.weight"], shapes[f"{name}.bias"] = (out, inner), (out,)

    linear("text_embedding.0", dim, text)
    linear("text_embedding.2", dim, dim)
    linear("time_embedding.0", dim, config.freq_dim)
    linear("time_embedding.2", dim, dim)
    linear("time_projection.1", 6 * dim, dim)
    linear("head.head", config.out_channels * patch[0] * patch[1] * patch[2], dim)
    for i in range(config.num_layers):
        shapes[f"blocks.{i}.modulation"] = (1, 6, dim)
        for attn in ("self_attn", "cross_attn"):
            for part in "qkvo":
                linear(f"blocks.{i}.{attn}.{part}", dim, dim)
            for part in "qk":
                shapes[f"blocks.{i}.{attn}.norm_{part}.weight"] = (dim,)
        shapes[f"blocks.{i}.norm3.weight"] = shapes[f"blocks.{i}.norm3.bias"] = (dim,)
        linear(f"blocks.{i}.ffn.0", ffn, dim)
        linear(f"blocks.{i}.ffn.2", dim, ffn)
    return shapes


def random_state(config: ModelConfig, seed: int = 0) -> State:
    """Random weights of about trained size, under the original names."""
    generator = torch.Generator().manual_seed(seed)
    state = {}
    for name, shape in original_shapes(config).items():
        scale = 0.3 if len(shape) == 1 or "modulation" in name else torch.Size(shape[1:]).numel() ** -0.5
        state[name] = torch.randn(shape, generator=generator) * scale
        if name.endswith(("attn.norm_q.weight", "attn.norm_k.weight")):
            state[name] += 1.5  # attention that is far from uniform, so that positions and history matter
    return state


def rope(x_THD: Tensor, positions: Sequence[float], rows: int, columns: int) -> Tensor:
    """Complex rotation: channel pairs of a head to time, row, column; 10000 ** (-i / n) within each."""
    dim = x_THD.shape[-1]
    sizes = [dim // 2 - 2 * (dim // 6), dim // 6, dim // 6]
    freqs = [10000.0 ** (-torch.arange(n, dtype=torch.float64) / n) for n in sizes]
    time = torch.tensor([float(p) for p in positions], dtype=torch.float64)[:, None, None, None] * freqs[0]
    row = torch.arange(rows, dtype=torch.float64)[None, :, None, None] * freqs[1]
    column = torch.arange(columns, dtype=torch.float64)[None, None, :, None] * freqs[2]
    shape = (len(positions), rows, columns, -1)
    angle = torch.cat([time.expand(shape), row.expand(shape), column.expand(shape)], dim=-1).flatten(0, 2)
    x = torch.view_as_complex(x_THD.double().unflatten(-1, (-1, 2)))
    return torch.view_as_real(x * torch.polar(torch.ones_like(angle), angle)[:, None]).flatten(-2).float()


def forward(
    state: State,
    config: ModelConfig,
    latents_CFYX: Tensor,
    timesteps: Sequence[float],
    text_KE: Tensor,
    positions: Sequence[float],
    history: Sequence[tuple[KV, Sequence[float]]] = (),
) -> tuple[Tensor, KV]:
    """Flow of some frames, and their keys and values.

    Args:
        timesteps, positions: one a latent frame.
        history: what is attended besides: K/V of blocks and the positions of their frames.
    """
    heads, dim, eps = config.num_heads, config.dim, config.eps
    _, frames, height, width = latents_CFYX.shape
    rows, columns = height // 2, width // 2

    def linear(name: str, x: Tensor) -> Tensor:
        return x @ state[f"{name}.weight"].float().T + state[f"{name}.bias"].float()

    def rms(name: str, x: Tensor) -> Tensor:
        return x * (x.pow(2).mean(-1, keepdim=True) + eps).rsqrt() * state[f"{name}.weight"].float()

    def norm(x: Tensor) -> Tensor:
        return (x - x.mean(-1, keepdim=True)) / (x.var(-1, correction=0, keepdim=True) + eps).sqrt()

    def per_frame(x_TM: Tensor, scale_F1M: Tensor, shift_F1M: Tensor | float = 0.0) -> Tensor:
        scaled: Tensor = x_TM.unflatten(0, (frames, -1)) * scale_F1M + shift_F1M
        return scaled.flatten(0, 1)

    def softmax_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        scores = torch.einsum("qhd,khd->hqk", q, k) * q.shape[-1] ** -0.5
        return torch.einsum("hqk,khd->qhd", scores.softmax(-1), v).flatten(1)

    weight, bias = state["patch_embedding.weight"].float(), state["patch_embedding.bias"].float()
    x = F.conv3d(latents_CFYX[None], weight, bias, stride=config.patch_size)
    x = x[0].flatten(1).T
    text = linear("text_embedding.2", F.gelu(linear("text_embedding.0", text_KE), approximate="tanh"))
    half = config.freq_dim // 2
    angle = torch.tensor(list(timesteps), dtype=torch.float64)[:, None] * 10000.0 ** (
        -torch.arange(half, dtype=torch.float64) / half
    )
    time = torch.cat([angle.cos(), angle.sin()], dim=1).float()
    time = linear("time_embedding.2", F.silu(linear("time_embedding.0", time)))
    modulation_F6M = linear("time_projection.1", F.silu(time)).unflatten(1, (6, dim))
    kept: KV = []
    for i in range(config.num_layers):
        b = f"blocks.{i}"
        shift, scale, gate, shift_f, scale_f, gate_f = (
            m[:, None] for m in (state[f"{b}.modulation"].float() + modulation_F6M).unbind(1)
        )
        y = per_frame(norm(x), 1 + scale, shift)
        q = rms(f"{b}.self_attn.norm_q", linear(f"{b}.self_attn.q", y)).unflatten(1, (heads, -1))
        k = rms(f"{b}.self_attn.norm_k", linear(f"{b}.self_attn.k", y)).unflatten(1, (heads, -1))
        v = linear(f"{b}.self_attn.v", y).unflatten(1, (heads, -1))
        kept.append((k, v))
        keys = [rope(kv[i][0], at, rows, columns) for kv, at in history] + [rope(k, positions, rows, columns)]
        values = [kv[i][1] for kv, _ in history] + [v]
        y = softmax_attention(rope(q, positions, rows, columns), torch.cat(keys), torch.cat(values))
        x = x + per_frame(linear(f"{b}.self_attn.o", y), gate)
        y = norm(x) * state[f"{b}.norm3.weight"].float() + state[f"{b}.norm3.bias"].float()
        q = rms(f"{b}.cross_attn.norm_q", linear(f"{b}.cross_attn.q", y)).unflatten(1, (heads, -1))
        k = rms(f"{b}.cross_attn.norm_k", linear(f"{b}.cross_attn.k", text)).unflatten(1, (heads, -1))
        v = linear(f"{b}.cross_attn.v", text).unflatten(1, (heads, -1))
        x = x + linear(f"{b}.cross_attn.o", softmax_attention(q, k, v))
        y = per_frame(norm(x), 1 + scale_f, shift_f)
        y = linear(f"{b}.ffn.2", F.gelu(linear(f"{b}.ffn.0", y), approximate="tanh"))
        x = x + per_frame(y, gate_f)
    shift, scale = (m[:, None] for m in (state["head.modulation"].float() + time[:, None]).unbind(1))
    x = linear("head.head", per_frame(norm(x), 1 + scale, shift))
    x = x.reshape(frames, rows, columns, 1, 2, 2, config.out_channels)
    return torch.einsum("fhwpqrc->cfphqwr", x).reshape(config.out_channels, frames, height, width), kept
