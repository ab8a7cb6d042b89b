"""Merged tokens and spatial splits."""

from __future__ import annotations

import math

import pytest
import torch

from longtake.kernels.attention import attend, merge
from longtake.kernels.codec import BlockGeometry, PairCodec, Side, make_codec, make_tensor_codec
from longtake.kernels.errors import ConfigError
from longtake.kernels.forms import make_form, merge_tokens
from longtake.kernels.rotary import HeadRotary, Rotary, apply_rotary, axis_pairs, rotary_table
from longtake.kernels.spatial import centre_tokens

GRID = (4, 6)
GEOMETRY = BlockGeometry(num_tokens=2 * 24, head_dim=64, grid=GRID)


def draw(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


def test_merged_tokens_are_means_of_windows() -> None:
    x_THD = draw(48, 2, 64)
    merged = merge_tokens(x_THD, GRID, (2, 3))
    frames = x_THD.reshape(2, 4, 6, 2, 64)
    assert merged.shape == (2 * 2 * 2, 2, 64)
    torch.testing.assert_close(merged[5], frames[1, 0:2, 3:6].mean(dim=(0, 1)))


@pytest.mark.parametrize("window", [(2, 1), (2, 3), (4, 6)])
def test_equal_tokens_merge_exactly(window: tuple[int, int]) -> None:
    """Keys that turn with time alone, equal in each window: attention over mean tokens with their mass is the same."""
    form = make_form("fp32", GEOMETRY, window)
    assert form.mass == window[0] * window[1] and form.num_tokens * form.mass == 48
    (rows, columns), (high, wide) = GRID, window
    few = draw(2, rows // high, columns // wide, 2, 2, 64)
    k, v = few.repeat_interleave(high, 1).repeat_interleave(wide, 2).reshape(48, 2, 2, 64).unbind(1)
    k[..., 2 * axis_pairs(64)[0] :] = 0
    q, own_k, own_v = (draw(10 + i, 2, 64).transpose(0, 1) for i in (0, 5, 5))
    page = torch.zeros((1, 2, form.codec.payload_bytes), dtype=torch.uint8)
    form.encode(0, k, v, page[0])
    k_out, v_out = torch.empty(2, 2, form.num_tokens, 64).unbind(0)
    positions = [3, 4]
    form.codec.materialise(
        page, torch.zeros(1, dtype=torch.int32), form.rotary(positions, torch.device("cpu")), k_out, v_out
    )
    out, lse = attend(q, k_out, v_out)
    found, _ = merge(out, lse + math.log(form.mass), *attend(q, own_k, own_v))
    turned = apply_rotary(k, rotary_table(positions, *GRID, 64)).transpose(0, 1)
    want, _ = attend(q, torch.cat((turned, own_k), 1), torch.cat((v.transpose(0, 1), own_v), 1))
    torch.testing.assert_close(found, want, rtol=0, atol=1e-5)


def test_merged_tokens_stand_in_the_middle() -> None:
    """Turning a merged token by its table is turning it by the mean of its tokens' positions."""
    table = make_form("fp32", GEOMETRY, (2, 3)).rotary([0], torch.device("cpu"))
    assert isinstance(table, Rotary) and table.tokens_per_frame == 4
    pairs = axis_pairs(64)[1]
    angle = torch.atan2(table.spatial_SQ2[..., 1], table.spatial_SQ2[..., 0])[:, [0, pairs]]
    torch.testing.assert_close(angle[:, 0], torch.tensor([0.5, 0.5, 2.5, 2.5]))
    torch.testing.assert_close(angle[:, 1].cos(), torch.tensor([1.0, 4.0, 1.0, 4.0]).cos())


def test_one_base_for_all_heads_or_one_each() -> None:
    form = make_form("fp32", GEOMETRY)
    one, two = (form.rotary([0, 7], torch.device("cpu"), thetas) for thetas in ((10000.0,), (10000.0, 300.0)))
    assert isinstance(one, Rotary) and isinstance(two, HeadRotary)
    assert torch.equal(two.heads[0].temporal_YP2, one.temporal_YP2)
    assert not torch.equal(two.heads[1].temporal_YP2, one.temporal_YP2)
    assert torch.equal(two.heads[1].spatial_SQ2, one.spatial_SQ2)


def test_a_window_that_does_not_divide_the_frame_is_named() -> None:
    with pytest.raises(ConfigError, match=r"merged by 3 x 2 in frames of 4 x 6; rows by one of \[1, 2, 4\]"):
        make_form("fp32", GEOMETRY, (3, 2))


def test_a_spatial_split_has_each_codecs_error_where_it_belongs() -> None:
    codec = make_codec("rtn4+rtn2", GEOMETRY)
    assert isinstance(codec, PairCodec)
    centre = centre_tokens(*GRID)
    assert centre == [1 * 6 + 1, 8, 9, 10, 13, 14, 15, 16]
    x_HTD = draw(2, 48, 64)
    section = codec.k.pack(x_HTD)
    found = codec.k.unpack(section)
    inner = torch.tensor([frame * 24 + token for frame in range(2) for token in centre])
    outer = torch.tensor([token for token in range(48) if token not in inner.tolist()])
    for tokens, name in ((inner, "rtn4"), (outer, "rtn2")):
        alone = make_tensor_codec(name, BlockGeometry(num_tokens=len(tokens), head_dim=64), Side.K)
        assert torch.equal(found[:, tokens], alone.unpack(alone.pack(x_HTD[:, tokens])))
    parts = (16 * (64 // 2 + 4) + 32 * (64 // 4 + 4)) * 2
    assert codec.payload_bytes == parts


def test_spatial_names() -> None:
    mixed = make_codec("k=rtn4+rtn2,v=kivi4+kivi2", GEOMETRY)
    assert mixed.payload_bytes > 0
    with pytest.raises(ConfigError, match="unknown codec 'rtn3'"):
        make_codec("rtn4+rtn3", GEOMETRY)
    with pytest.raises(ConfigError, match="two codecs"):
        make_codec("rtn4+rtn2+rtn2", GEOMETRY)
    with pytest.raises(ConfigError, match="rows and columns"):
        make_codec("rtn4+rtn2", BlockGeometry(num_tokens=48, head_dim=64))
    with pytest.raises(ConfigError, match="no number of frames"):
        BlockGeometry(num_tokens=50, head_dim=64, grid=GRID)
