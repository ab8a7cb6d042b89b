"""Attention over FP8 rows, its scaling, and the two paths the engine picks from (plain twins; kernels: test_twins)."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from longtake.kernels import synthetic
from longtake.kernels.attention import attend_reference, merge
from longtake.kernels.attention_fp8 import attend_fp8, fp8_scratch
from longtake.kernels.attention_path import AttentionPath, make_path, path_names
from longtake.kernels.codec import BlockGeometry, make_codec
from longtake.kernels.errors import ConfigError
from longtake.kernels.rotary import apply_rotary, rotary_table
from longtake.kernels.scaling import Scaling, calibrate, calibrate_all, centre_step, unscaled

CPU = torch.device("cpu")
GRID = synthetic.Grid(frames=3, height=6, width=10)
MINI = BlockGeometry(num_tokens=180, head_dim=64)


def relative(got: Tensor, want: Tensor) -> float:
    return float((got.float() - want.float()).norm() / want.float().norm())


def inputs(offset: float) -> tuple[Tensor, Tensor, Tensor]:
    """q_HTD, k_XHD, v_XHD with a loud constant channel in K."""
    g = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(n, 3, 64, generator=g) for n in (77, 300, 300))
    k[:, :, 5] += offset
    return q.transpose(0, 1), k, v


def attend_scaled(q: Tensor, k: Tensor, v: Tensor, scalings: tuple[Scaling, Scaling]) -> list[Tensor]:
    scratch = fp8_scratch(3, 310, 64, CPU)
    for rows in (scratch.k_HXD, scratch.v_HXD):
        rows.copy_(torch.full(rows.shape, torch.nan))
    scratch.k_HXD[:, :300] = scalings[0].store(k.transpose(0, 1))
    scratch.v_HXD[:, :300] = scalings[1].store(v.transpose(0, 1))
    return list(attend_fp8(q, scratch, *scalings, 300))


def test_fp8_attention_is_close_to_exact() -> None:
    q, k, v = inputs(0.0)
    want, want_lse = attend_reference(q, k.transpose(0, 1), v.transpose(0, 1))
    out, lse = attend_scaled(q, k, v, (calibrate(k), calibrate(v)))
    assert not out.isnan().any()
    # e4m3 rounds by 2^-4 at most, 0.026 on average: q, k and v each add that, P less
    assert relative(out, want) < 0.06
    assert (lse - want_lse).abs().max() < 0.05


def test_centring_keeps_the_rounding_small_and_the_lse_right() -> None:
    q, k, v = inputs(100.0)
    want, want_lse = attend_reference(q, k.transpose(0, 1), v.transpose(0, 1))
    centred, lse = attend_scaled(q, k, v, (calibrate(k), calibrate(v)))
    plain, _ = attend_scaled(q, k, v, (calibrate(k, centred=False), calibrate(v, centred=False)))
    assert relative(centred, want) < 0.06 < 0.12 < relative(plain, want)
    torch.testing.assert_close(lse, want_lse, rtol=0.01, atol=0.05)


def test_scaling_is_a_power_of_two_with_room_and_survives_zeros() -> None:
    x = torch.randn(180, 2, 64, generator=torch.Generator().manual_seed(0)) * torch.tensor([1e-3, 1e3])[:, None]
    scaling = calibrate(x)
    assert torch.equal(scaling.scale_H.log2().round().exp2(), scaling.scale_H)
    stored = scaling.store(8 * (x.transpose(0, 1) - scaling.centre_HD[:, None]) + scaling.centre_HD[:, None])
    assert 200 < stored.float().abs().max() <= 448
    assert relative(scaling.load(scaling.store(x.transpose(0, 1))), x.transpose(0, 1)) < 0.03
    assert calibrate(torch.zeros(180, 2, 64)).scale_H.tolist() == [1.0, 1.0]
    assert torch.equal(unscaled(2, 64, CPU).load(stored), stored.float())


@pytest.mark.parametrize("mean", [0.5, 3.0])
def test_means_are_taken_away_and_no_rounding_is_common_to_all_tokens(mean: float) -> None:
    v = (torch.randn(37_440, 1, 64, generator=torch.Generator().manual_seed(0)) + mean).bfloat16().float()
    scaling = calibrate(v[:4680])
    assert ((scaling.centre_HD - v[:4680:9].mean(0)).abs() <= centre_step(v[:4680:9].abs().amax(0)) / 2).all()
    mean_HD = (scaling.load(scaling.store(v.transpose(0, 1))) - v.transpose(0, 1)).mean(1)
    # 0.026 on average, over 37,440 tokens; with the sample's mean itself as centre it is 0.001
    assert mean_HD.square().mean().sqrt() < 0.0003


def test_means_that_few_tokens_have_by_chance_are_left() -> None:
    v = torch.randn(4680, 1, 1024, generator=torch.Generator().manual_seed(0))
    v[:, :, 7] += 0.5
    assert calibrate(v).centre_HD[0].nonzero().tolist() == [[7]]


def test_calibration_of_several_is_that_of_each() -> None:
    _, k, v = inputs(3.0)
    alone = [calibrate(k), calibrate(v, centred=False)]
    for together, one in zip(calibrate_all((k, v), num_centred=1), alone, strict=True):
        assert torch.equal(together.centre_HD, one.centre_HD) and torch.equal(together.scale_H, one.scale_H)


def test_no_keys_and_wrong_shapes() -> None:
    q, k, v = inputs(0.0)
    scratch, scalings = fp8_scratch(3, 300, 64, CPU), (calibrate(k), calibrate(v))
    out, lse = attend_fp8(q, scratch, *scalings, 0)
    assert not out.any() and lse.isneginf().all()
    with pytest.raises(ConfigError, match="do not fit a scratch"):
        attend_fp8(q[:2], scratch, *scalings, 300)
    with pytest.raises(ConfigError, match="do not fit a scratch"):
        attend_fp8(q, scratch, *scalings, 305)


def run_path(path: AttentionPath, chunk: int, arena: Tensor, history: synthetic.History) -> Tensor:
    """Three blocks of history, `chunk` at a time, and the own block: what the engine does in a layer."""
    own = rotary_table([9, 10, 11], GRID.height, GRID.width, 64)
    path.begin(history.q_THD, history.k_NTHD[3], history.v_NTHD[3], own)
    out = lse = None
    for first in range(0, 3, chunk):
        slots = torch.arange(first, min(first + chunk, 3), dtype=torch.int32)
        frames = [3 * int(block) + frame for block in slots for frame in range(3)]
        path.write_history(arena, slots, rotary_table(frames, GRID.height, GRID.width, 64))
        rows = len(slots) * 180
        if first + chunk >= 3:
            path.write_own(rows)
            rows += 180
        part = path.attend(rows)
        out, lse = part if out is None or lse is None else merge(out, lse, *part)
    assert out is not None
    return out


@pytest.mark.parametrize("name", path_names())
@pytest.mark.parametrize("chunk", [1, 2, 3])
def test_paths_attend_history_and_own_block(name: str, chunk: int) -> None:
    history = synthetic.structured(GRID, blocks=4, heads=2, dim=64)
    codec = make_codec("fp32", MINI)
    arena = torch.zeros(3, 2, codec.payload_bytes, dtype=torch.uint8)
    for block in range(3):
        codec.encode(history.k_NTHD[block], history.v_NTHD[block], arena[block])
    path = make_path(name, codec, 2, 720, torch.float32, CPU)
    k_HXD = apply_rotary(history.k_NTHD.flatten(0, 1), rotary_table(range(12), 6, 10, 64)).transpose(0, 1)
    q_HTD = apply_rotary(history.q_THD, rotary_table([9, 10, 11], 6, 10, 64)).transpose(0, 1)
    want, _ = attend_reference(q_HTD, k_HXD, history.v_NTHD.flatten(0, 1).transpose(0, 1))
    got = run_path(path, chunk, arena, history)
    # structured queries are loud (scores of tens), so a rounding of 2^-4 moves weights between keys
    assert relative(got, want) < (1e-5 if name == "dense" else 0.12)


def test_paths_count_their_bytes_and_check_their_size() -> None:
    codec = make_codec("int4", MINI)
    rows = 2 * 180 * 64  # of FP8 scratches there is a multiple of 16
    assert make_path("dense", codec, 2, 360, torch.bfloat16, CPU).num_bytes == 2 * rows * 2 * 2
    assert make_path("fp8", codec, 2, 360, torch.bfloat16, CPU).num_bytes == 2 * 2 * 368 * 64
    with pytest.raises(ConfigError, match="two blocks"):
        make_path("fp8", codec, 2, 300, torch.bfloat16, CPU)
    with pytest.raises(ConfigError, match="did you mean 'fp8'"):
        make_path("fp9", codec, 2, 360, torch.bfloat16, CPU)
