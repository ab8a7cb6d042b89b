"""Which tensors go to kernels: those on a GPU whose heads have the right channels, contiguous."""

from __future__ import annotations

import torch

from longtake.kernels.head_dims import fits_kernels
from tests.kernels.test_codec import OnCuda


def test_only_what_kernels_can_read_fits() -> None:
    here = torch.zeros(5, 2, 64)
    there = here.as_subclass(OnCuda)
    assert fits_kernels(there) and fits_kernels(there, torch.zeros(7, 128).as_subclass(OnCuda))
    assert not fits_kernels(here) and not fits_kernels(there, here)
    assert not fits_kernels(torch.zeros(5, 96).as_subclass(OnCuda))
    assert not fits_kernels(torch.zeros(64, 64).T.as_subclass(OnCuda))
