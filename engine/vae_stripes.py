"""VAE decoding spread over the ranks of a gang: each decodes a stripe of rows, equal to the decode of the whole.

The decoder's first layers stand at the latents' own size, where one of them attends over the whole frame. They are a
few hundredths of the work, so every rank computes them whole. Behind them there are 3x3 convolutions only: each stage
is given the rows that the stripe's pixels depend on, its own and a few beyond, which a neighbour computes as well. No
rank needs another's rows, no seam can be seen, and nothing but finished frames travels, through host memory::

    rank 0   emitter -> StripedDecoder --latents--> all        rows 0..15    -+
    rank 1                      StripeWorker (a thread)        rows 16..29   -+- frames to rank 0
    rank 2                      ...

Rank 0 says what is decoded and when, so that the others need not know why. Why rows are computed twice rather than
exchanged: docs/decisions/0010-gangs.md. Knows AutoencoderKLWan's layers (diffusers 0.42).

Shapes: C channels, F latent frames, H and W latent rows and columns; N video frames, Y and X pixels high and wide; y
rows of this rank's stripe.
"""

from __future__ import annotations

import contextlib
import threading
from functools import partial
from typing import Any

import torch
from diffusers import AutoencoderKLWan
from diffusers.models.autoencoders.autoencoder_kl_wan import (
    WanCausalConv3d,
    WanDecoder3d,
    WanResample,
    WanResidualUpBlock,
)
from torch import Tensor, nn

from longtake.engine.gang import Gang
from longtake.engine.mesh import Axis, share, wait
from longtake.engine.vae import StreamingDecoder
from longtake.kernels.errors import ConfigError

_DECODE, _WARM_UP, _RESET, _END = "decode", "warm_up", "reset", "end"


class Stripe:
    """Makes a VAE's decoder compute a stripe of rows: cuts what its stages are given, and what it returns.

    Args:
        decoder: changed in place.
        index: of the stripe.
        count: stripes of a frame.
    """

    def __init__(self, decoder: WanDecoder3d, index: int, count: int) -> None:
        self._stages, self._index, self._count = stages(decoder), index, count
        self._cuts: list[slice] = []
        for number, stage in enumerate(self._stages):
            stage.register_forward_pre_hook(partial(self._cut_input, number))
        decoder.register_forward_hook(self._cut_output)

    def of(self, num_rows: int) -> range:
        """This stripe of a frame of so many latent rows; what is decoded from now on has as many.

        Raises:
            ConfigError: there are fewer rows than stripes.
        """
        if num_rows < self._count:
            raise ConfigError(f"{num_rows} latent rows cannot be decoded by {self._count} processes")
        own = dealt(num_rows, self._index, self._count)
        scale, given, self._cuts = 1, range(num_rows), []
        for stage, reach in zip(self._stages, reaches(self._stages), strict=True):
            needed = range(max(given.start, own.start * scale - reach), min(given.stop, own.stop * scale + reach))
            self._cuts.append(slice(needed.start - given.start, needed.stop - given.start))
            factor = 2 if _upsamples(stage) else 1
            scale, given = factor * scale, range(factor * needed.start, factor * needed.stop)
        self._cuts.append(slice(own.start * scale - given.start, own.stop * scale - given.start))
        return own

    def _cut_input(self, number: int, stage: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        return inputs[0][..., self._cuts[number], :], *inputs[1:]

    def _cut_output(self, decoder: nn.Module, inputs: tuple[Any, ...], video: Tensor) -> Tensor:
        return video[..., self._cuts[-1], :]


def dealt(num_rows: int, index: int, count: int) -> range:
    """The rows of a stripe, at least one: at the frame's edges, where only one neighbour's are needed, a few more.

    A neighbour costs Wan2.1's decoder as much work as 2.2 rows (floating point operations at 60 x 104 latents).
    """
    more = min(2, (num_rows - count) // 2)
    inner = share(num_rows - 2 * more, index, count)
    return range(more + inner.start if index else 0, more + inner.stop if index < count - 1 else num_rows)


def stages(decoder: WanDecoder3d) -> list[nn.Module]:
    """What follows the layers of the latents' size, in parts as small as a shortcut around them allows."""
    found: list[nn.Module] = []
    for block in decoder.up_blocks:
        found += [block] if isinstance(block, WanResidualUpBlock) else [*block.resnets, *(block.upsamplers or ())]
    return found


def reaches(stages: list[nn.Module]) -> list[int]:
    """Rows beyond a stripe's own, at their own size, that the decoder's stages need on either side.

    Each 3x3 convolution of a stage's own size needs one more; one behind its upsampling half a row, rounded up.
    """
    reach, found = 1, list[int]()  # the last convolution, behind all stages
    for stage in reversed(stages):
        if _upsamples(stage):
            reach = (reach + 2) // 2
        convolutions = [m for m in stage.modules() if isinstance(m, WanCausalConv3d) and m.kernel_size[1] > 1]
        reach += len(convolutions)
        found.insert(0, reach)
    return found


def _upsamples(stage: nn.Module) -> bool:
    return any(isinstance(module, WanResample) for module in stage.modules())


def gather(frames_NyX3: Tensor, axis: Axis, num_rows: int, own: range) -> Tensor:
    """Stripes to whole frames [N, Y, X, 3] in host memory on the axis's first rank; no rows elsewhere.

    Args:
        frames_NyX3: this rank's.
        axis: all ranks, on a group for tensors in host memory.
        num_rows: latent rows of a frame.
        own: those of this rank.
    """
    send_yNX3 = frames_NyX3.transpose(0, 1).contiguous()
    on_host = torch.empty(send_yNX3.shape, dtype=torch.uint8, pin_memory=send_yNX3.is_cuda).copy_(send_yNX3)
    scale, first = len(on_host) // len(own), axis.index == 0
    counts = [scale * len(dealt(num_rows, rank, axis.size)) if first else 0 for rank in range(axis.size)]
    to = [len(on_host)] + [0] * (axis.size - 1)
    rows_YNX3 = wait(torch.ops._c10d_functional.all_to_all_single(on_host, counts, to, axis.group))
    return rows_YNX3.transpose(0, 1).contiguous()


class _Striped(StreamingDecoder):
    """A decoder of this rank's stripes, with what makes frames of them."""

    def __init__(self, vae: AutoencoderKLWan, axis: Axis) -> None:
        super().__init__(vae)
        self._axis = axis
        self._stripe = Stripe(vae.decoder, axis.index, axis.size)

    def decode(self, latents_CFHW: Tensor) -> Tensor:
        num_rows = latents_CFHW.shape[2]
        own = self._stripe.of(num_rows)
        return gather(super().decode(latents_CFHW), self._axis, num_rows, own)

    def warm_up(self, latents_CFHW: Tensor) -> None:
        self._stripe.of(latents_CFHW.shape[2])
        super().warm_up(latents_CFHW)


class StripedDecoder(_Striped):
    """A StreamingDecoder whose work is shared by a gang; made on rank 0, with a StripeWorker on every other one.

    Args:
        vae: of this rank; its decoder computes stripes from now on.
        axis: all ranks of the gang, on a group of their own for tensors in host memory.
        gang: tells the other ranks what to decode.
    """

    def __init__(self, vae: AutoencoderKLWan, axis: Axis, gang: Gang) -> None:
        super().__init__(vae, axis)
        self._gang = gang

    def decode(self, latents_CFHW: Tensor) -> Tensor:
        """As StreamingDecoder's: whole frames, in host memory."""
        self._gang.post((_DECODE, latents_CFHW.cpu()))
        return super().decode(latents_CFHW)

    def warm_up(self, latents_CFHW: Tensor) -> None:
        self._gang.post((_WARM_UP, latents_CFHW.cpu()))
        super().warm_up(latents_CFHW)

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
        self._decoder, self._gang = _Striped(vae, axis), gang
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
            self._decoder.warm_up(latents_CFHW)
        else:
            self._decoder.decode(latents_CFHW)
