"""VAE decoding spread over the ranks of a gang: each decodes a stripe of rows, equal to the decode of the whole.

A convolution needs one row of either neighbour: it is exchanged before each of them, so nothing is computed twice and
no seam can be seen (a tile with overlap would be another picture: the decoder sees the whole frame). Its one attention
reads the keys and values of all rows. What a stripe's layers remember of earlier latents is the stripe's own, so the
decoder's state is split too.

    rank 0   emitter -> StripedDecoder --latents--> all        rows 0..14   -+
    rank 1                      StripeWorker (a thread)        rows 15..29  -+- halo rows -> frames to rank 0
    rank 2                      ...

Rank 0 says what is decoded and when, so that the others need not know why. Rows travel through host memory, over gloo:
the rollout's collectives are NCCL's, and those of a second thread would be a second order of them, in which each GPU
waits for what the other has not begun (docs/decisions/0010-gangs.md). Knows AutoencoderKLWan's layers (diffusers 0.42).

Shapes: C channels, F latent frames, H and W latent rows and columns, T frames inside the decoder; N video frames, Y and
X pixels high and wide; y rows of this rank's stripe.
"""

from __future__ import annotations

import contextlib
import threading
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKLWan
from diffusers.models.autoencoders.autoencoder_kl_wan import WanAttentionBlock, WanCausalConv3d
from torch import Tensor, nn

from longtake.engine.gang import Gang
from longtake.engine.mesh import Axis, share, wait
from longtake.engine.vae import StreamingDecoder
from longtake.kernels.errors import ConfigError

_DECODE, _WARM_UP, _RESET, _END = "decode", "warm_up", "reset", "end"


class Stripes:
    """How the rows of a frame are dealt to the ranks of an axis, and how they meet.

    Args:
        axis: the ranks that decode together, on a group for tensors in host memory.
    """

    def __init__(self, axis: Axis) -> None:
        self.axis = axis
        self.num_rows = 0

    def own(self, latents_CFHW: Tensor) -> Tensor:
        """This rank's rows of latents; what is decoded from now on has as many rows as these.

        Raises:
            ConfigError: there are fewer rows than ranks.
        """
        self.num_rows = latents_CFHW.shape[2]
        if self.num_rows < self.axis.size:
            raise ConfigError(f"{self.num_rows} latent rows cannot be decoded by {self.axis.size} processes")
        rows = share(self.num_rows, self.axis.index, self.axis.size)
        return latents_CFHW[:, :, rows.start : rows.stop]

    def fill_halo(self, x: Tensor) -> None:
        """Fill the outer rows of [..., 1 + y + 1, X] with the neighbours' nearest ones; the frame's edges stay."""
        size, index = self.axis.size, self.axis.index
        above, below = index > 0, index < size - 1
        splits = [int(abs(rank - index) == 1) for rank in range(size)]
        rows = [x[..., 1, :]] * above + [x[..., -2, :]] * below
        received = iter(self._exchange(torch.stack(rows), splits, splits))
        if above:
            x[..., 0, :] = next(received)
        if below:
            x[..., -1, :] = next(received)

    def all_rows(self, x: Tensor) -> Tensor:
        """This rank's rows [y, ...] to all rows of the frame, on every rank."""
        size = self.axis.size
        scale = x.shape[0] // len(share(self.num_rows, self.axis.index, size))
        counts = [scale * len(share(self.num_rows, rank, size)) for rank in range(size)]
        return self._exchange(x.repeat(size, *[1] * (x.ndim - 1)), [x.shape[0]] * size, counts)

    def to_first(self, x: Tensor) -> Tensor:
        """This rank's rows [y, ...] to all rows of the frame on the axis's first rank; no rows elsewhere."""
        size, index = self.axis.size, self.axis.index
        scale = x.shape[0] // len(share(self.num_rows, index, size))
        counts = [scale * len(share(self.num_rows, rank, size)) if index == 0 else 0 for rank in range(size)]
        return self._exchange(x, [x.shape[0]] + [0] * (size - 1), counts)

    def _exchange(self, send: Tensor, to: list[int], of: list[int]) -> Tensor:
        on_host = torch.empty(send.shape, dtype=send.dtype, pin_memory=send.is_cuda).copy_(send)
        started = torch.ops._c10d_functional.all_to_all_single(on_host, of, to, self.axis.group)
        return wait(started).to(send.device)


def stripe(decoder: nn.Module, stripes: Stripes) -> None:
    """Make a VAE's decoder compute stripes, in place: every layer that looks beyond its rows asks the neighbours."""
    for module in decoder.modules():
        if isinstance(module, WanCausalConv3d):
            if module.kernel_size[1] > 1:
                module._conv_forward = partial(_bordered_conv, stripes)
        elif isinstance(module, WanAttentionBlock):
            module.forward = partial(_attention, module, stripes)
        elif isinstance(module, nn.Conv2d) and module.kernel_size[0] > 1:
            module._conv_forward = partial(_conv, module, stripes)  # type: ignore[method-assign]


def _bordered_conv(stripes: Stripes, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """The convolution itself, of a chunk that has its past before it and a border of zeros around each frame."""
    stripes.fill_halo(x)
    return F.conv3d(x, weight, bias)


def _conv(conv: nn.Conv2d, stripes: Stripes, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    if conv.padding != (0, 0):  # the fast decoder's frames come with their border
        x = F.pad(x, (1, 1, 1, 1))
    stripes.fill_halo(x)
    return F.conv2d(x, weight, bias)


def _attention(block: WanAttentionBlock, stripes: Stripes, x: Tensor) -> Tensor:
    batch, channels, frames, rows, columns = x.shape
    flat = x.permute(0, 2, 1, 3, 4).reshape(batch * frames, channels, rows, columns)
    q, k, v = block.to_qkv(block.norm(flat)).permute(2, 0, 3, 1).chunk(3, dim=-1)  # y, T, X, C
    k, v = stripes.all_rows(torch.cat((k, v), dim=-1)).chunk(2, dim=-1)
    q, k, v = (part.transpose(0, 1).flatten(1, 2)[:, None] for part in (q, k, v))
    out = F.scaled_dot_product_attention(q, k, v)[:, 0].transpose(1, 2)
    out = block.proj(out.reshape(batch * frames, channels, rows, columns))
    result: Tensor = out.view(batch, frames, channels, rows, columns).permute(0, 2, 1, 3, 4) + x
    return result


class StripedDecoder(StreamingDecoder):
    """A StreamingDecoder whose work is shared by a gang; made on rank 0, with a StripeWorker on every other one.

    Args:
        vae: of this rank; its decoder computes stripes from now on.
        axis: all ranks of the gang, on a group of their own for tensors in host memory.
        gang: tells the other ranks what to decode.
    """

    def __init__(self, vae: AutoencoderKLWan, axis: Axis, gang: Gang) -> None:
        super().__init__(vae)
        self._gang, self._stripes = gang, Stripes(axis)
        stripe(vae.decoder, self._stripes)

    def decode(self, latents_CFHW: Tensor) -> Tensor:
        """As StreamingDecoder's: whole frames."""
        self._gang.post((_DECODE, latents_CFHW.cpu()))
        frames_NyX3 = super().decode(self._stripes.own(latents_CFHW))
        return self._stripes.to_first(frames_NyX3.transpose(0, 1)).transpose(0, 1).contiguous()

    def warm_up(self, latents_CFHW: Tensor) -> None:
        self._gang.post((_WARM_UP, latents_CFHW.cpu()))
        super().warm_up(self._stripes.own(latents_CFHW))

    def reset(self) -> None:
        self._gang.post((_RESET, None))
        super().reset()

    def close(self) -> None:
        """End the other ranks' workers; nothing can be decoded any more."""
        self._gang.post((_END, None))


class StripeWorker:
    """Decodes this rank's stripes when rank 0 says so, in a thread and on a stream of its own, until the gang ends.

    Args:
        vae, axis, gang: as for StripedDecoder.
    """

    def __init__(self, vae: AutoencoderKLWan, axis: Axis, gang: Gang) -> None:
        self._decoder, self._gang, self._stripes = StreamingDecoder(vae), gang, Stripes(axis)
        stripe(vae.decoder, self._stripes)
        self._thread = threading.Thread(target=self._work, name="stripes", daemon=True)
        self._thread.start()

    def _work(self) -> None:
        cuda = self._decoder.vae.device.type == "cuda"
        stream = torch.cuda.Stream(self._decoder.vae.device) if cuda else None
        # an error is told to the gang, of which it is the end: its other threads raise it
        with contextlib.suppress(Exception), self._gang.guard(), torch.cuda.stream(stream):
            while (post := self._gang.receive_post()) is not None and post[0] != _END:
                self._do(*post)

    def join(self) -> None:
        """Wait until rank 0 has closed its decoder."""
        self._thread.join()

    def _do(self, what: str, latents_CFHW: Any) -> None:
        if what == _RESET:
            self._decoder.reset()
        elif what == _WARM_UP:
            self._decoder.warm_up(self._stripes.own(latents_CFHW))
        else:
            frames_NyX3 = self._decoder.decode(self._stripes.own(latents_CFHW))
            self._stripes.to_first(frames_NyX3.transpose(0, 1))
