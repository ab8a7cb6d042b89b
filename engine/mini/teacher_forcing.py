"""Teacher forcing over many blocks at once: what the causal model sees in training is what it sees in a rollout.

A sequence holds n blocks twice, clean and noisy, in one pass::

              clean 0 .. n-1    noisy 0 .. n-1
    clean i   clean <= i        -                  the commit pass of block i
    noisy i   clean <  i        noisy i            a denoising pass of block i

Both copies of a block stand at the same position in time, and every noisy block has its own noise level (diffusion
forcing, arXiv 2407.01392; the doubled sequence is that of CausVid, arXiv 2412.07772).

Shape legend: B batch, C channels, F latent frames of n blocks, Y, X latent rows and columns, T tokens of the doubled
sequence, H heads, D head dim.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

from longtake.engine.model import Attend
from longtake.kernels.rotary import axis_pairs, rotary_table

Mask = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """Sizes of a training sequence: blocks of ``block_frames`` latent frames of ``rows * columns`` tokens."""

    num_blocks: int
    block_frames: int
    rows: int
    columns: int

    @property
    def block_tokens(self) -> int:
        """Tokens of one block."""
        return self.block_frames * self.rows * self.columns

    @property
    def num_tokens(self) -> int:
        """Tokens of the doubled sequence."""
        return 2 * self.num_blocks * self.block_tokens


def visible(layout: Layout) -> Mask:
    """The mask above as a flex-attention ``mask_mod`` (batch, head, query token, key token) -> bool."""
    half, size = layout.num_blocks * layout.block_tokens, layout.block_tokens

    def mask_mod(b: Tensor, h: Tensor, query: Tensor, key: Tensor) -> Tensor:
        query_noisy, key_noisy = query >= half, key >= half
        query_block, key_block = query % half // size, key % half // size
        to_clean = ~key_noisy & ((key_block < query_block) | (~query_noisy & (key_block == query_block)))
        return to_clean | (key_noisy & query_noisy & (key_block == query_block))

    return mask_mod


def block_mask(layout: Layout, device: torch.device) -> BlockMask | Tensor:
    """The mask, the same for every batch: for flex attention on a GPU, dense bool [T, T] on a CPU (which has no
    backward pass of flex attention)."""
    if device.type == "cpu":
        index = torch.arange(layout.num_tokens)
        return visible(layout)(index, index, index[:, None], index[None, :])
    return create_block_mask(visible(layout), None, None, layout.num_tokens, layout.num_tokens, device=str(device))


def rotate(x_BTHD: Tensor, cos_B1TP: Tensor, sin_B1TP: Tensor) -> Tensor:
    """RoPE on interleaved pairs; returns [B, H, T, D] in the dtype of ``x``."""
    pairs = x_BTHD.transpose(1, 2).float().unflatten(-1, (-1, 2))
    real, imag = pairs.unbind(-1)
    turned = torch.stack((real * cos_B1TP - imag * sin_B1TP, real * sin_B1TP + imag * cos_B1TP), dim=-1)
    return turned.flatten(-2).to(x_BTHD.dtype)


class Rotations:
    """Cosines and sines of a batch of sequences whose blocks stand anywhere in time."""

    def __init__(self, layout: Layout, head_dim: int, device: torch.device) -> None:
        self._layout = layout
        spatial = rotary_table([0], layout.rows, layout.columns, head_dim, device).spatial_SQ2
        num_temporal = axis_pairs(head_dim)[0]
        self._spatial_SQ2 = spatial
        self._frequency_P = 10000.0 ** (-torch.arange(num_temporal, device=device, dtype=torch.float64) / num_temporal)

    def __call__(self, starts_BN: Tensor) -> tuple[Tensor, Tensor]:
        """(cos, sin), float32 [B, 1, T, D/2], for blocks whose first latent frames stand at ``starts_BN`` (int)."""
        layout = self._layout
        frames = torch.arange(layout.block_frames, device=starts_BN.device)
        positions_BF = (starts_BN[:, :, None] + frames).flatten(1).repeat(1, 2).double()
        angle_BFP = positions_BF[..., None] * self._frequency_P
        temporal_BFP2 = torch.stack((angle_BFP.cos(), angle_BFP.sin()), dim=-1).float()
        batch, num_frames = positions_BF.shape
        tokens = self._spatial_SQ2.shape[0]
        table = torch.cat(
            (
                temporal_BFP2[:, :, None].expand(-1, -1, tokens, -1, -1),
                self._spatial_SQ2.expand(batch, num_frames, -1, -1, -1),
            ),
            dim=3,
        ).flatten(1, 2)[:, None]
        return table[..., 0].contiguous(), table[..., 1].contiguous()


class Geometry:
    """A layout with its mask, and the positions of its blocks; kept on one device.

    Args:
        layout: of the sequences.
        head_dim: of the model.
        device: of the masks and tables.
    """

    def __init__(self, layout: Layout, head_dim: int, device: torch.device) -> None:
        self.layout = layout
        self.rotations = Rotations(layout, head_dim, device)
        self.mask = block_mask(layout, device)


def make_attend(cos_B1TP: Tensor, sin_B1TP: Tensor, mask: BlockMask | Tensor) -> Attend:
    """Self-attention of the doubled sequence, for ``CausalWan.forward``."""

    def attend(layer: int, q_BTHD: Tensor, k_BTHD: Tensor, v_BTHD: Tensor) -> Tensor:
        q, k = rotate(q_BTHD, cos_B1TP, sin_B1TP), rotate(k_BTHD, cos_B1TP, sin_B1TP)
        v = v_BTHD.transpose(1, 2).to(q.dtype)
        if isinstance(mask, Tensor):
            return F.scaled_dot_product_attention(q, k, v, mask).transpose(1, 2)
        out = flex_attention(q, k, v, block_mask=mask)
        assert isinstance(out, Tensor)
        return out.transpose(1, 2)

    return attend
