"""The plain passes between a VAE's convolutions, against the layers whose place they take."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from longtake.kernels.vae_layers import add, bordered, normed, pairs, phases, spread


def test_normed_is_bias_norm_and_silu_behind_the_past() -> None:
    torch.manual_seed(0)
    x, past, bias, gamma = torch.randn(3, 4, 5, 6), torch.randn(2, 4, 5, 6), torch.randn(6), torch.randn(6)
    active = F.silu(F.normalize(x + bias, dim=-1) * 2.5 * gamma)
    buffer, last = normed(x, bias, gamma, 2.5, past)
    torch.testing.assert_close(buffer[:, 1:-1, 1:-1], torch.cat((past, active)))
    torch.testing.assert_close(last, active[1:])
    assert buffer.count_nonzero() == buffer[:, 1:-1, 1:-1].count_nonzero()  # the border is of zeros
    _, last = normed(x[:1], None, gamma, 2.5, past)
    torch.testing.assert_close(last[0], past[1])


def test_phases_are_the_convolution_after_an_upsampling() -> None:
    torch.manual_seed(0)
    x, weight, bias = torch.randn(2, 5, 4, 3), torch.randn(7, 5, 3, 3), torch.randn(7)
    want = F.conv2d(F.interpolate(x, scale_factor=2, mode="nearest-exact"), weight, bias, padding=1)
    buffer = bordered(x.permute(0, 2, 3, 1)[:, :, :, None], None)
    four = F.conv2d(buffer.permute(0, 3, 1, 2), phases(weight)).permute(0, 2, 3, 1).unflatten(-1, (4, -1))
    torch.testing.assert_close(spread(four, bias).permute(0, 3, 1, 2), want, rtol=1e-5, atol=1e-5)


def test_frames_that_share_channels_come_apart() -> None:
    x, bias = torch.randn(2, 3, 4, 2, 5), torch.randn(2, 5)
    frames = bordered(x, bias)
    assert frames.shape == (4, 5, 6, 5)
    torch.testing.assert_close(frames[3, 1:-1, 1:-1], x[1, :, :, 1] + bias[1])


def test_add_rounds_once() -> None:
    x, residual = torch.full((1, 1), 256.0).bfloat16(), torch.full((1, 1), 1.0).bfloat16()
    add(x, torch.ones(1, dtype=torch.bfloat16), residual)
    assert x.item() == 258  # 256 + 1 alone rounds back to 256


def test_pairs_of_columns_are_convolved_to_pairs() -> None:
    torch.manual_seed(0)
    x, weight = torch.randn(1, 5, 4, 6, 8), torch.randn(7, 5, 3, 3, 3)
    in_pairs = x.permute(0, 2, 3, 4, 1).unflatten(3, (-1, 2)).flatten(4).permute(0, 4, 1, 2, 3)
    made = F.conv3d(in_pairs, pairs(weight)).permute(0, 2, 3, 4, 1).unflatten(4, (2, -1)).flatten(3, 4)
    torch.testing.assert_close(made.permute(0, 4, 1, 2, 3), F.conv3d(x, weight), rtol=1e-5, atol=1e-4)
