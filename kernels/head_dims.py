"""Which tensors of heads the Triton kernels take."""

from __future__ import annotations

from torch import Tensor

HEAD_DIMS = (64, 128)  # those of mini and of Wan


def fits_kernels(*tensors: Tensor) -> bool:
    """Whether all are on a GPU, with so many channels in their last dim, contiguous."""
    return all(x.is_cuda and x.shape[-1] in HEAD_DIMS and x.stride(-1) == 1 for x in tensors)
