"""Rows in e4m3 by their own largest value (plain twins; the kernel: test_twins)."""

from __future__ import annotations

import torch

from longtake.kernels.fp8_rows import gelu_round_rows, round_rows


def test_rows_keep_their_scale() -> None:
    rounded, scale = round_rows(torch.tensor([[0.0, 0.0], [1e4, -5.0], [1e-30, 2e-30]]))
    assert rounded.dtype == torch.float8_e4m3fn
    back = rounded.float() * scale
    assert torch.equal(back[0], torch.zeros(2)) and back.isfinite().all()
    assert back[1, 0] == 1e4


def test_gelu_is_not_rounded_in_between() -> None:
    x = (3 * torch.randn(5, 96, generator=torch.Generator().manual_seed(0))).bfloat16()
    rounded, scale = gelu_round_rows(x)
    want = torch.nn.functional.gelu(x.double(), approximate="tanh")
    assert rounded.shape == x.shape and scale.shape == (5, 1) and scale.dtype == torch.float32
    torch.testing.assert_close(scale.double(), want.abs().amax(1, keepdim=True) / 448, rtol=1e-5, atol=0)
    assert ((rounded.double() * scale - want).abs() <= want.abs() / 16 + scale * 2**-10).all()
