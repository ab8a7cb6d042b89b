from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor

from longtake.kernels.codec import BlockGeometry, PairCodec, make_codec
from longtake.kernels.transform import (
    DEEPEST,
    ERRORS,
    MOST_DEPTH,
    TransformCodec,
    depths,
    pack_stream,
    plan,
    tile_of,
    unpack_stream,
)

MINI = BlockGeometry(num_tokens=180, head_dim=64, grid=(6, 10))
WAN = BlockGeometry(num_tokens=4680, head_dim=128, grid=(30, 52))


def relative_error(codec: TransformCodec, x_TD: Tensor) -> float:
    got = codec.unpack(codec.pack(x_TD[None]))[0]
    return float((got - x_TD).norm() / (x_TD - x_TD.mean(0)).norm())


def smooth(geometry: BlockGeometry, seed: int) -> Tensor:
    """Channels that are one slow wave each over the block's frames, rows and columns, about a mean: [T, D]."""
    assert geometry.grid is not None
    draw = torch.Generator().manual_seed(seed)
    sides = (geometry.num_tokens // math.prod(geometry.grid), *geometry.grid)
    place_T3 = torch.tensor(list(itertools.product(*(range(n) for n in sides)))) / torch.tensor(sides)
    wave_3D = 2 * torch.rand(3, geometry.head_dim, generator=draw)
    return torch.sin(place_T3 @ wave_3D + 6 * torch.rand(geometry.head_dim, generator=draw)) + torch.randn(
        geometry.head_dim, generator=draw
    )


@pytest.mark.parametrize(
    ("extent", "tile"),
    [((3, 30, 52), (3, 5, 4)), ((3, 6, 10), (3, 3, 5)), ((1, 1, 77), (1, 1, 11)), ((1, 1, 1), (1, 1, 1))],
)
def test_tiles_are_long_every_way(extent: tuple[int, int, int], tile: tuple[int, int, int]) -> None:
    assert tile_of(extent) == tile


@pytest.mark.parametrize("geometry", [MINI, WAN], ids=["mini", "wan"])
def test_tokens_that_look_like_their_neighbours_cost_little(geometry: BlockGeometry) -> None:
    """At 2 bits: smooth channels keep their shape far better than noise does, and better than without a grid."""
    codec = TransformCodec(geometry, 2.0)
    noise = torch.randn(geometry.num_tokens, geometry.head_dim, generator=torch.Generator().manual_seed(0))
    blind = TransformCodec(BlockGeometry(num_tokens=geometry.num_tokens, head_dim=geometry.head_dim), 2.0)
    x_TD = smooth(geometry, 1)
    assert relative_error(codec, x_TD) < 0.15 * relative_error(codec, noise)
    assert relative_error(codec, x_TD) < 0.5 * relative_error(blind, x_TD)


def test_more_bits_leave_less_error() -> None:
    x_TD = smooth(MINI, 2) + 0.3 * torch.randn(180, 64, generator=torch.Generator().manual_seed(2))
    errors = [relative_error(TransformCodec(MINI, bits), x_TD) for bits in (1.0, 2.0, 3.0, 4.0, 5.0)]
    assert all(less < 0.75 * more for more, less in itertools.pairwise(errors)), errors


def test_one_token_tiles_and_far_too_few_bits_still_decode() -> None:
    x_TD = torch.tensor([[1.0, -2.0, 3.0, 0.5]])
    assert torch.isfinite(
        TransformCodec(BlockGeometry(num_tokens=1, head_dim=4), 2.0).unpack(
            TransformCodec(BlockGeometry(num_tokens=1, head_dim=4), 2.0).pack(x_TD[None])
        )
    ).all()


@pytest.mark.parametrize("most_depth", [MOST_DEPTH, DEEPEST])
@pytest.mark.parametrize("num_bits", [0, 1, 37, 150, 239, 240, 279, 280, 1000])
def test_a_tiles_bits_are_all_spent_on_what_takes_away_most_error(num_bits: int, most_depth: int) -> None:
    """Against trying, one bit after the other, which takes away most."""
    draw = torch.Generator().manual_seed(num_bits)
    exponent_FD = torch.randint(0, 12, (5, 8), generator=draw)
    depth_FD = depths(exponent_FD, plan(exponent_FD, num_bits, most_depth), most_depth)
    assert depth_FD.sum() == min(num_bits, most_depth * 40) and depth_FD.max() <= most_depth

    def left(depth: list[int]) -> float:
        exponents: list[int] = exponent_FD.flatten().tolist()
        return sum((ERRORS[b] * 0.5**n for b, n in zip(depth, exponents, strict=True)), 0.0)

    greedy = [0] * 40
    for _ in range(min(num_bits, most_depth * 40)):
        tried = [
            left([b + (i == j) for i, b in enumerate(greedy)]) if greedy[j] < most_depth else math.inf
            for j in range(40)
        ]
        greedy[tried.index(min(tried))] += 1
    assert left(depth_FD.flatten().tolist()) == pytest.approx(left(greedy), rel=1e-12)


def test_streams_hold_codes_of_any_width_without_gaps() -> None:
    draw = torch.Generator().manual_seed(0)
    depth_FD = torch.randint(0, DEEPEST + 1, (7, 5), generator=draw)
    codes_KFD = (torch.rand(3, 7, 5, generator=draw) * 2.0**depth_FD).floor()
    num_bytes = -(-int(depth_FD.sum()) // 8)
    stream_KB = pack_stream(codes_KFD, depth_FD, num_bytes)
    for codes_FD, stream_B in zip(codes_KFD, stream_KB, strict=True):
        text = "".join(
            format(int(code), f"0{int(depth)}b")[::-1]
            for code, depth in zip(codes_FD.flatten(), depth_FD.flatten(), strict=True)
            if depth
        )
        want = [int(text[i : i + 8][::-1], 2) for i in range(0, len(text), 8)]
        assert stream_B.tolist() == want
    assert torch.equal(unpack_stream(stream_KB, depth_FD), codes_KFD)


def test_values_get_more_bits_than_keys() -> None:
    for name, bits in (("tc2", 2.33), ("tc3", 3.0), ("tc4", 4.0)):
        codec = make_codec(name, WAN)
        assert isinstance(codec, PairCodec)
        assert bits - 0.01 < codec.bits_per_element <= bits
        assert codec.v.num_bytes - codec.k.num_bytes == pytest.approx(2 / 3 * 4680 * 128 / 8, rel=0.01)
