"""Films of a batch of worlds at once, block after block, as training and its previews need them.

The same computation as a rollout of the engine (few-step sampler, clean commit pass, a sink and a window of recent
blocks at relative positions), with plain keys and values instead of the encoded cache. The keys stand rotated::

    slot     0      1 .. count-1        count
    holds    sink   recent blocks       the block in work, overwritten by each of its passes

Shape legend: B films, C latent channels, F latent frames of a block, Y, X latent rows and columns, T tokens of a block,
H heads, D head dim, P pairs of a head, L slots' tokens, E text width, K text tokens of all prompts.
"""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from longtake.engine.mini.teacher_forcing import Layout, rotate
from longtake.engine.model import CausalWan
from longtake.kernels.rotary import rotary_table

Noise = Callable[[tuple[int, ...]], Tensor]


class Player:
    """A copy of a transformer for inference, in bfloat16 on CUDA, refilled from the one that is trained."""

    def __init__(self, transformer: CausalWan, device: torch.device, *, compiled: bool = False) -> None:
        self.model = copy.deepcopy(transformer).requires_grad_(False).eval().to(device)
        if device.type == "cuda":
            self.model.cast(torch.bfloat16)
        if compiled:
            self.model.compile_layers()

    @torch.no_grad()
    def refill(self, transformer: CausalWan) -> None:
        """Take over the weights of ``transformer``."""
        for mine, other in zip(self.model.parameters(), transformer.parameters(), strict=True):
            mine.copy_(other)


class Film:
    """A batch of films in the making.

    Args:
        model: the transformer, in the dtype that it is to compute in.
        layout: sizes of a block.
        embeds_BKE: text embeddings of each film's prompts, side by side.
        num_prompts: of a film; K is a multiple of it.
        sigmas: noise levels of the sampler's steps.
        window: history blocks attended, the first one of the film among them.
        noise: shape -> standard normal noise on the device of ``embeds_BKE``; for tests.
    """

    def __init__(
        self,
        model: CausalWan,
        layout: Layout,
        embeds_BKE: Tensor,
        num_prompts: int,
        sigmas: tuple[float, ...],
        window: int,
        noise: Noise | None = None,
    ) -> None:
        config = model.config
        self._model, self._layout, self._sigmas, self._window = model, layout, sigmas, window
        self._device, self._dtype = embeds_BKE.device, model.proj_out.weight.dtype
        self._noise: Noise = noise or (lambda shape: torch.randn(shape, device=self._device))
        with torch.no_grad():
            self._context = model.text_context(embeds_BKE)
        num_text = embeds_BKE.shape[1]
        self._prompt_of_token_K = torch.arange(num_text, device=self._device) // (num_text // num_prompts)
        self._batch = embeds_BKE.shape[0]
        self._shape = (
            self._batch,
            config.in_channels,
            layout.block_frames,
            layout.rows * config.patch_size[1],
            layout.columns * config.patch_size[2],
        )
        size = (self._batch, config.num_heads, (window + 2) * layout.block_tokens, config.head_dim)
        self._keys = [torch.empty(size, dtype=self._dtype, device=self._device) for _ in range(config.num_layers)]
        self._values = [torch.empty_like(keys) for keys in self._keys]
        self._sink: list[Tensor] = [torch.empty(0)] * config.num_layers  # keys of the first block, not rotated
        self._count = 0  # blocks held
        self.num_blocks = 0
        self._now = self._tables(0)  # of the block in work

    @torch.no_grad()
    def step(self, prompt_B: Tensor) -> Tensor:
        """Make the next block of each film under prompt number ``prompt_B``; returns it, float32 [B, C, F, Y, X]."""
        clean: Tensor | None = None
        for sigma in self._sigmas:
            fresh = self._noise(self._shape)
            noisy = fresh if clean is None else torch.lerp(clean, fresh, sigma)
            clean = noisy - sigma * self.flow(noisy, sigma, prompt_B)
        assert clean is not None
        self.push(clean, prompt_B)
        return clean

    @torch.no_grad()
    def flow(self, noisy_BCFYX: Tensor, sigma: float, prompt_B: Tensor) -> Tensor:
        """One pass of the block in work: its flow, float32 [B, C, F, Y, X]."""
        tables, tokens = self._now, self._layout.block_tokens
        end = (self._count + 1) * tokens

        def attend(layer: int, q_BTHD: Tensor, k_BTHD: Tensor, v_BTHD: Tensor) -> Tensor:
            if self._count == 0:
                self._sink[layer] = k_BTHD.clone()
            keys, values = self._keys[layer], self._values[layer]
            keys[:, :, end - tokens : end] = rotate(k_BTHD, *tables)
            values[:, :, end - tokens : end] = v_BTHD.transpose(1, 2)
            q = rotate(q_BTHD, *tables)
            return F.scaled_dot_product_attention(q, keys[:, :, :end], values[:, :, :end]).transpose(1, 2)

        times = torch.full((self._batch, self._layout.block_frames), 1000 * sigma, device=self._device)
        mask = (prompt_B[:, None] == self._prompt_of_token_K)[:, None, None].expand(-1, -1, tokens, -1)
        flow: Tensor = self._model(noisy_BCFYX.to(self._dtype), times, self._context, attend, mask)
        return flow.float()

    @torch.no_grad()
    def push(self, clean_BCFYX: Tensor, prompt_B: Tensor) -> None:
        """Commit a block: the next ones attend it."""
        self.flow(clean_BCFYX, 0.0, prompt_B)
        self._count += 1
        self.num_blocks += 1
        self._now = self._tables(self.num_blocks * self._layout.block_frames)
        if self._count > self._window:
            self._slide()

    def _slide(self) -> None:
        """Forget the oldest block after the sink, and place the sink right before the recent ones."""
        tokens, frames = self._layout.block_tokens, self._layout.block_frames
        kept = slice(2 * tokens, self._count * tokens)
        self._count -= 1
        tables = self._tables((self.num_blocks - self._count) * frames)
        for keys, values, sink in zip(self._keys, self._values, self._sink, strict=True):
            for held in (keys, values):
                held[:, :, tokens : self._count * tokens] = held[:, :, kept].clone()
            keys[:, :, :tokens] = rotate(sink, *tables)

    def _tables(self, start: int) -> tuple[Tensor, Tensor]:
        """Cosines and sines of a block that starts at latent frame ``start``: float32 [1, 1, T, P] each."""
        layout = self._layout
        frames = range(start, start + layout.block_frames)
        table = rotary_table(frames, layout.rows, layout.columns, self._model.config.head_dim, self._device)
        num_tokens = layout.rows * layout.columns
        pairs = torch.cat(
            (
                table.temporal_YP2[:, None].expand(-1, num_tokens, -1, -1),
                table.spatial_SQ2[None].expand(layout.block_frames, -1, -1, -1),
            ),
            dim=2,
        ).flatten(0, 1)[None, None]
        return pairs[..., 0], pairs[..., 1]
