"""The causal Wan transformer: one class for every size of the family, by configuration.

Parameters carry the names of diffusers' ``WanTransformer3DModel``, so a hub-layout folder loads without renames. What
differs from that class: modulation is per latent frame, self-attention is handed to the caller (who owns history,
positions and masks), and there is no table of positions, hence no length limit.

Shape legend: B batch, C latent channels, F latent frames, Y and X latent rows and columns, S tokens of a latent frame,
T = F*S tokens, M model width, H heads, D head dim, E text width, K text tokens.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from longtake.engine.compiling import compile_function
from longtake.engine.config import ModelConfig
from longtake.kernels.fp8_rows import Rounded, add_norm_round_rows

# attend(layer, q_BTHD, k_BTHD, v_BTHD) -> out_BTHD; q and k are normed and not yet rotated.
Attend: TypeAlias = Callable[[int, Tensor, Tensor, Tensor], Tensor]
# What a projection takes: tokens [B, T, M], or in FP8 their rounded rows.
Rows: TypeAlias = Tensor | Rounded
# Cross-attention keys and values of one prompt, one [B, H, K, D] pair a layer.
TextContext: TypeAlias = list[tuple[Tensor, Tensor]]


def sinusoid(timesteps: Tensor, dim: int) -> Tensor:
    """Sinusoidal timestep embedding, cosines first.

    Args:
        timesteps: float [...], in 0..1000.
        dim: even width of the embedding.

    Returns:
        float32 [..., dim]: cat(cos, sin) of ``timestep * 10000 ** (-i / (dim / 2))``.
    """
    half = dim // 2
    exponent = torch.arange(half, dtype=torch.float32, device=timesteps.device) * (-math.log(10000.0) / half)
    angle = timesteps.float()[..., None] * exponent.exp()
    return torch.cat((angle.cos(), angle.sin()), dim=-1)


class TimestepEmbedding(nn.Module):
    """Linear, SiLU, linear; kept in float32."""

    def __init__(self, freq_dim: int, dim: int) -> None:
        super().__init__()
        self.linear_1 = nn.Linear(freq_dim, dim)
        self.linear_2 = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.linear_2(F.silu(self.linear_1(x)))
        return out


class TextEmbedding(nn.Module):
    """Linear, GELU-tanh, linear: text width E to model width M."""

    def __init__(self, text_dim: int, dim: int) -> None:
        super().__init__()
        self.linear_1 = nn.Linear(text_dim, dim)
        self.linear_2 = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.linear_2(F.gelu(self.linear_1(x), approximate="tanh"))
        return out


class ConditionEmbedder(nn.Module):
    """Timestep to modulation, text to model width."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.freq_dim = config.freq_dim
        self.time_embedder = TimestepEmbedding(config.freq_dim, config.dim)
        self.time_proj = nn.Linear(config.dim, 6 * config.dim)
        self.text_embedder = TextEmbedding(config.text_dim, config.dim)

    def time(self, timesteps_BF: Tensor) -> tuple[Tensor, Tensor]:
        """Time embedding and modulation.

        Args:
            timesteps_BF: float [B, F].

        Returns:
            (temb [B, F, M], modulation [B, F, 6, M]), both float32.
        """
        dtype = self.time_proj.weight.dtype
        temb = self.time_embedder(sinusoid(timesteps_BF, self.freq_dim).to(self.time_embedder.linear_1.weight.dtype))
        projected = self.time_proj(F.silu(temb.to(dtype)))
        return temb.float(), projected.float().unflatten(-1, (6, -1))


class Attention(nn.Module):
    """Projections and full-width RMS norms of one attention; the attention itself is elsewhere."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        dim = config.dim
        self.num_heads = config.num_heads
        self.to_q = nn.Linear(dim, dim)
        self.to_k = nn.Linear(dim, dim)
        self.to_v = nn.Linear(dim, dim)
        self.to_out = nn.ModuleList([nn.Linear(dim, dim)])
        self.norm_q = nn.RMSNorm(dim, eps=config.eps)
        self.norm_k = nn.RMSNorm(dim, eps=config.eps)

    def split(self, x: Tensor) -> Tensor:
        """[B, T, M] -> [B, T, H, D], a view."""
        return x.view(*x.shape[:-1], self.num_heads, -1)

    def query(self, x: Rows) -> Tensor:
        """Normed queries [B, T, H, D] of ``x`` [B, T, M]."""
        return self.split(self.norm_q(self.to_q(x)))

    def key_value(self, x: Rows) -> tuple[Tensor, Tensor]:
        """Normed keys and plain values, each [B, T, H, D], of ``x`` [B, T, M]."""
        return self.split(self.norm_k(self.to_k(x))), self.split(self.to_v(x))

    def query_key_value(self, x: Rows) -> tuple[Tensor, Tensor, Tensor]:
        """Normed queries and keys and plain values, each [B, T, H, D], of the same ``x`` [B, T, M]."""
        return self.query(x), *self.key_value(x)


class GELUProjection(nn.Module):
    """The first matrix of the feed-forward, with its GELU-tanh."""

    def __init__(self, dim: int, ffn_dim: int) -> None:
        super().__init__()
        self.proj = nn.Linear(dim, ffn_dim)
        self.gelu: nn.Module = nn.GELU(approximate="tanh")

    def forward(self, x: Rows) -> Tensor:
        out: Tensor = self.gelu(self.proj(x))
        return out


class FeedForward(nn.Module):
    """Two matrices and a GELU-tanh; ``net.1`` stands where diffusers has its dropout, so that names agree."""

    def __init__(self, dim: int, ffn_dim: int) -> None:
        super().__init__()
        self.net = nn.ModuleList([GELUProjection(dim, ffn_dim), nn.Identity(), nn.Linear(ffn_dim, dim)])

    def forward(self, x: Rows) -> Tensor:
        out: Tensor = self.net[2](self.net[0](x))
        return out


def scaled_norm(x_BTM: Tensor, factor_BFM: Tensor, shift_BFM: Tensor, eps: float) -> Tensor:
    """LayerNorm in float32, then ``* factor + shift``, per latent frame.

    Args:
        x_BTM: [B, T, M], any float dtype; T is a multiple of F.
        factor_BFM, shift_BFM: float32 [B, F, M].
        eps: of the norm.

    Returns:
        [B, T, M] in the dtype of ``x_BTM``.
    """
    num_frames = factor_BFM.shape[1]
    x_BFSM = F.layer_norm(x_BTM.float(), x_BTM.shape[-1:], eps=eps).unflatten(1, (num_frames, -1))
    modulated: Tensor = x_BFSM * factor_BFM[:, :, None] + shift_BFM[:, :, None]
    return modulated.flatten(1, 2).to(x_BTM.dtype)


def gated_add(x_BTM: Tensor, update_BTM: Tensor, gate_BFM: Tensor) -> Tensor:
    """``x + update * gate`` in float32, gate per latent frame; returns the dtype of ``x_BTM``."""
    update: Tensor = update_BTM.float().unflatten(1, (gate_BFM.shape[1], -1)) * gate_BFM[:, :, None]
    return (x_BTM.float() + update.flatten(1, 2)).to(x_BTM.dtype)


class Block(nn.Module):
    """One transformer layer, cut in two where self-attention happens.

    ``before`` and ``after`` hold no state and are compiled apart on CUDA; all layers share one compiled graph each.
    With ``rounds``, for linear layers in FP8, norms give rounded rows.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.eps = config.eps
        self.rounds = False
        self.attn1 = Attention(config)
        self.attn2 = Attention(config)
        self.norm2 = nn.LayerNorm(config.dim, eps=config.eps)
        self.ffn = FeedForward(config.dim, config.ffn_dim)
        self.scale_shift_table = nn.Parameter(torch.randn(1, 6, config.dim) / config.dim**0.5)

    def modulation(self, mod_BF6M: Tensor) -> tuple[Tensor, ...]:
        """Shift, scale, gate of the attention, then of the feed-forward, each float32 [B, F, M]."""
        return (self.scale_shift_table.float() + mod_BF6M).unbind(2)

    def before(self, x_BTM: Tensor, mod_BF6M: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """q, k, v [B, T, H, D]: normed, not rotated."""
        shift, scale, *_ = self.modulation(mod_BF6M)
        _, normed = self.add_norm(x_BTM, None, None, scale, shift)
        return self.attn1.query_key_value(normed)

    def after(
        self,
        x_BTM: Tensor,
        attended_BTHD: Tensor,
        mod_BF6M: Tensor,
        k_BHKD: Tensor,
        v_BHKD: Tensor,
        text_mask: Tensor | None,
    ) -> Tensor:
        """Output projection, cross-attention and feed-forward; returns the next [B, T, M]."""
        _, _, gate, ffn_shift, ffn_scale, ffn_gate = self.modulation(mod_BF6M)
        attended = self.attn1.to_out[0](attended_BTHD.flatten(2))
        weight, bias = self.norm2.weight.float()[None, None], self.norm2.bias.float()[None, None]
        x, normed = self.add_norm(x_BTM, attended, gate, weight, bias, around_one=False)
        q_BHTD = self.attn2.query(normed).transpose(1, 2)
        crossed = F.scaled_dot_product_attention(q_BHTD, k_BHKD, v_BHKD, text_mask).transpose(1, 2).flatten(2)
        x, normed = self.add_norm(x, self.attn2.to_out[0](crossed), None, ffn_scale, ffn_shift)
        return gated_add(x, self.ffn(normed), ffn_gate)

    def add_norm(
        self,
        x_BTM: Tensor,
        update_BTM: Tensor | None,
        gate_BFM: Tensor | None,
        scale_BGM: Tensor,
        shift_BGM: Tensor,
        *,
        around_one: bool = True,
    ) -> tuple[Tensor, Rows]:
        """``x + update * gate`` (1 where there is none), and its norm ``* (1 + scale) + shift``, or without the 1.

        G is F, or 1: all tokens alike.
        """
        if self.rounds:
            of_groups = (gate_BFM, scale_BGM, shift_BGM)
            gate, scale, shift = (None if one is None else one.expand(len(x_BTM), -1, -1) for one in of_groups)
            assert scale is not None and shift is not None
            return add_norm_round_rows(x_BTM, update_BTM, gate, scale, shift, self.eps, around_one=around_one)
        x = x_BTM
        if update_BTM is not None:
            x = x + update_BTM if gate_BFM is None else gated_add(x, update_BTM, gate_BFM)
        return x, scaled_norm(x, 1 + scale_BGM if around_one else scale_BGM, shift_BGM, self.eps)


class CausalWan(nn.Module):
    """The denoiser: noisy latents of a block, in the presence of a history that the caller attends to.

    With one block over all frames and an ``attend`` without history it computes what diffusers'
    ``WanTransformer3DModel`` does (time modulation in float32, as there).
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.patch_embedding = nn.Conv3d(config.in_channels, config.dim, config.patch_size, stride=config.patch_size)
        self.condition_embedder = ConditionEmbedder(config)
        self.blocks = nn.ModuleList([Block(config) for _ in range(config.num_layers)])
        self.proj_out = nn.Linear(config.dim, config.out_channels * math.prod(config.patch_size))
        self.scale_shift_table = nn.Parameter(torch.randn(1, 2, config.dim) / config.dim**0.5)

    def cast(self, dtype: torch.dtype) -> CausalWan:
        """Convert the weights to ``dtype``, in place, but for what the family keeps in float32.

        Those are the timestep embedder, the modulation tables and the affine norm, as in diffusers.
        """
        self.to(dtype)
        self.condition_embedder.time_embedder.float()
        self.scale_shift_table.data = self.scale_shift_table.data.float()
        for block in self.blocks:
            assert isinstance(block, Block)
            block.norm2.float()
            block.scale_shift_table.data = block.scale_shift_table.data.float()
        return self

    def compile_layers(self) -> None:
        """Compile the two halves of a layer; needs CUDA and Triton, shapes must then stay the same."""
        for block in self.blocks:
            assert isinstance(block, Block)
            block.before = compile_function(block.before)  # type: ignore[method-assign]
            block.after = compile_function(block.after)  # type: ignore[method-assign]

    def text_context(self, embeds_BKE: Tensor) -> TextContext:
        """Cross-attention keys and values of a prompt, computed once and read by every pass under it.

        Args:
            embeds_BKE: text encoder output [B, K, E], zero after the true length; padding is attended, as the family
                was trained.

        Returns:
            One (k, v) pair of [B, H, K, D] a layer.
        """
        text = self.condition_embedder.text_embedder(embeds_BKE.to(self.proj_out.weight.dtype))
        pairs = (block.attn2.key_value(text) for block in self.blocks)  # type: ignore[union-attr, operator]
        return [(k.transpose(1, 2).contiguous(), v.transpose(1, 2).contiguous()) for k, v in pairs]

    def forward(
        self,
        latents_BCFYX: Tensor,
        timesteps_BF: Tensor,
        context: TextContext,
        attend: Attend,
        text_mask_B1TK: Tensor | None = None,
    ) -> Tensor:
        """Predict the flow ``noise - clean`` of a block.

        Args:
            latents_BCFYX: noisy latents [B, C, F, Y, X], in the dtype of the weights; Y and X multiples of the patch.
            timesteps_BF: float [B, F], sigma * 1000 of each latent frame.
            context: from :meth:`text_context`.
            attend: self-attention, called once a layer in layer order.
            text_mask_B1TK: bool, which text tokens each token sees, where a clip holds several prompts; None: all.

        Returns:
            Flow [B, C, F, Y, X] in the dtype of the weights.
        """
        temb, mod_BF6M = self.condition_embedder.time(timesteps_BF)
        grid = self.patch_embedding(latents_BCFYX)
        x = self.take_share(grid.flatten(2).transpose(1, 2).contiguous(), grid.shape[2])
        for layer, (block, (k_text, v_text)) in enumerate(zip(self.blocks, context, strict=True)):
            assert isinstance(block, Block)
            attended = attend(layer, *block.before(x, mod_BF6M))
            x = block.after(x, attended, mod_BF6M, k_text, v_text, text_mask_B1TK)
        shift, scale = (self.scale_shift_table.float() + temb[:, :, None]).unbind(2)
        x = self.proj_out(scaled_norm(x, 1 + scale, shift, self.config.eps))
        return self.unpatchify(self.join_shares(x, math.prod(grid.shape[2:]), grid.shape[2]), grid.shape[2:])

    @property
    def heads(self) -> range:
        """The heads that ``attend`` is given; all of them unless the model is sharded."""
        return range(self.config.num_heads)

    @property
    def exchange_bytes(self) -> int:
        """Device memory, not the caching allocator's, that other ranks write into; none unless the model is sharded."""
        return 0

    def sum_ranks(self, x: Tensor) -> Tensor:
        """The sum of what each rank computed from its heads, the same on all; ``x`` unless the model is sharded."""
        return x

    def take_share(self, x_BTM: Tensor, num_frames: int) -> Tensor:
        """The tokens that this process computes outside attention; all of them unless the model is sharded."""
        return x_BTM

    def join_shares(self, x_BTP: Tensor, num_tokens: int, num_frames: int) -> Tensor:
        """All tokens again from what each process computed; the inverse of :meth:`take_share`."""
        return x_BTP

    def unpatchify(self, x_BTP: Tensor, grid: torch.Size) -> Tensor:
        """[B, T, pt*py*px*C] -> [B, C, F, Y, X] for a token grid of (frames, rows, columns)."""
        parts: Tensor = x_BTP.unflatten(2, (*self.config.patch_size, self.config.out_channels)).unflatten(
            1, tuple(grid)
        )
        # B f h w pt py px C -> B C f pt h py w px
        return parts.permute(0, 7, 1, 4, 2, 5, 3, 6).flatten(6, 7).flatten(4, 5).flatten(2, 3)
