from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from longtake.engine.quality import psnr, ssim


def draw(seed: int) -> Tensor:
    return torch.randint(0, 256, (2, 17, 19, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


def test_psnr_by_hand() -> None:
    a = torch.full((2, 4, 4, 3), 100, dtype=torch.uint8)
    b = a.clone()
    b[1] += 10
    found = psnr(a, b)
    assert float(found[1]) == pytest.approx(20 * math.log10(25.5))
    assert float(found[0]) == pytest.approx(10 * math.log10(255**2 / 1e-3))


def test_ssim_window_by_window() -> None:
    """Against the definition, written out for one window after the other in float64."""
    a = draw(1)
    b = (a.float() * 0.7 + draw(2).float() * 0.3).to(torch.uint8)
    place = torch.arange(11, dtype=torch.float64) - 5
    bell = torch.exp(-place.square() / (2 * 1.5**2))
    weight = bell[:, None] * bell[None] / bell.sum() ** 2
    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    for frame in range(2):
        values = []
        for row in range(7):
            for column in range(9):
                for colour in range(3):
                    x, y = (v[frame, row : row + 11, column : column + 11, colour].double() for v in (a, b))
                    mx, my = (weight * x).sum(), (weight * y).sum()
                    vx, vy = (weight * (x - mx) ** 2).sum(), (weight * (y - my) ** 2).sum()
                    both = (weight * (x - mx) * (y - my)).sum()
                    values.append((2 * mx * my + c1) * (2 * both + c2) / ((mx**2 + my**2 + c1) * (vx + vy + c2)))
        assert float(ssim(a, b)[frame]) == pytest.approx(float(torch.stack(values).mean()), abs=1e-4)


def test_equal_frames_are_alike() -> None:
    torch.testing.assert_close(ssim(draw(3), draw(3)), torch.ones(2))
    assert float(ssim(draw(3), draw(4)).max()) < 0.2
