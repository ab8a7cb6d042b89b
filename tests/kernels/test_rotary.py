from __future__ import annotations

import pytest
import torch

from longtake.kernels.errors import ConfigError
from longtake.kernels.rotary import HeadRotary, apply_rotary, apply_rotary_pair, axis_pairs, rotary_table


def complex_twin(
    x_THD: torch.Tensor, positions: list[float], height: int, width: int, theta: float = 10000.0
) -> torch.Tensor:
    """RoPE as complex multiplication in float64, one angle for each token and pair; ``theta`` of the time axis."""
    head_dim = x_THD.shape[-1]
    pairs = axis_pairs(head_dim)
    tokens = [(t, r, c) for t in positions for r in range(height) for c in range(width)]
    angle = torch.cat(
        [
            torch.tensor([p[axis] for p in tokens], dtype=torch.float64)[:, None]
            * (theta if axis == 0 else 10000.0) ** (-torch.arange(n, dtype=torch.float64) / n)
            for axis, n in enumerate(pairs)
        ],
        dim=1,
    )
    turned = (
        torch.view_as_complex(x_THD.double().reshape(*x_THD.shape[:-1], -1, 2))
        * torch.polar(torch.ones_like(angle), angle)[:, None]
    )
    return torch.view_as_real(turned).flatten(-2)


@pytest.mark.parametrize(("head_dim", "pairs"), [(128, (22, 21, 21)), (64, (12, 10, 10)), (16, (4, 2, 2))])
def test_split_of_pairs(head_dim: int, pairs: tuple[int, int, int]) -> None:
    assert axis_pairs(head_dim) == pairs


@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("positions", [[0, 1, 2], [7, 3, 100000.5]])
def test_equals_complex_multiplication(head_dim: int, positions: list[float]) -> None:
    x = torch.randn(len(positions) * 3 * 5, 2, head_dim, generator=torch.Generator().manual_seed(0))
    got = apply_rotary(x, rotary_table(positions, 3, 5, head_dim))
    # angles are reduced in float64, cosines rounded once to float32: a few float32 ulps at any position
    torch.testing.assert_close(got.double(), complex_twin(x, positions, 3, 5), rtol=0, atol=2e-6)


def test_batch_and_dtype_are_kept() -> None:
    x = torch.randn(2, 12, 3, 64).bfloat16()
    rotary = rotary_table([5], 3, 4, 64)
    got = apply_rotary(x, rotary)
    assert got.dtype == torch.bfloat16 and got.shape == x.shape and got.is_contiguous()
    torch.testing.assert_close(got[1], apply_rotary(x[1], rotary))


def test_frames_are_views_of_the_same_tables() -> None:
    rotary = rotary_table([0, 1, 2, 3], 2, 2, 64)
    part = rotary.frames(1, 2)
    assert part.num_tokens == 8
    torch.testing.assert_close(part.temporal_YP2, rotary_table([1, 2], 2, 2, 64).temporal_YP2)


def test_heads_that_turn_at_other_speeds() -> None:
    thetas, positions = (10000.0, 2000.0, 18000.0), [7, 3, 100000.5]
    x = torch.randn(2, 45, 3, 64, generator=torch.Generator().manual_seed(0))
    rotary = HeadRotary(heads=tuple(rotary_table(positions, 3, 5, 64, theta=theta) for theta in thetas))
    got = apply_rotary(x, rotary)
    assert got.shape == x.shape and got.is_contiguous()
    for head, theta in enumerate(thetas):
        want = complex_twin(x[1, :, head : head + 1], positions, 3, 5, theta)
        torch.testing.assert_close(got[1, :, head : head + 1].double(), want, rtol=0, atol=2e-6)
    with pytest.raises(ConfigError, match="tables for 3 heads do not fit 2 heads"):
        apply_rotary(x[:, :, :2], rotary)


def test_wrong_size_is_named() -> None:
    with pytest.raises(ConfigError, match="12 tokens x 64"):
        apply_rotary(torch.randn(11, 1, 64), rotary_table([0], 3, 4, 64))


@pytest.mark.gpu
def test_tables_reach_a_gpu_without_a_wait() -> None:
    device = torch.device("cuda")
    rotary_table([0, 1, 2], 3, 5, 64, device)  # pins memory, and makes the table that is kept: both wait
    torch.cuda.synchronize()
    torch.cuda._sleep(1_000_000_000)
    busy = torch.cuda.Event()
    busy.record()
    rotary = rotary_table([7, 3, 100000.5], 3, 5, 64, device)
    assert not busy.query()
    want = rotary_table([7, 3, 100000.5], 3, 5, 64)
    assert torch.equal(rotary.temporal_YP2.cpu(), want.temporal_YP2)
    assert torch.equal(rotary.spatial_SQ2.cpu(), want.spatial_SQ2)


def test_a_pair_turns_as_each_alone() -> None:
    x, y = torch.randn(2, 36, 3, 64, generator=torch.Generator().manual_seed(0))
    table = rotary_table([5, 6], 3, 6, 64)
    for turned, alone in zip(apply_rotary_pair(x, y, table), (x, y), strict=True):
        assert torch.equal(turned, apply_rotary(alone, table))
