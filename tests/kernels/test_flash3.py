"""FlashAttention-3 behind our scales and centres: its operator written out plainly; on Hopper, the real one."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from longtake.kernels import attention_fp8, flash3
from longtake.kernels.attention import attend_reference
from longtake.kernels.attention_path import Flash3Fp8Path, make_path
from longtake.kernels.codec import BlockGeometry, make_codec
from longtake.kernels.errors import ConfigError
from longtake.kernels.rotary import apply_rotary, rotary_table
from longtake.kernels.scaling import calibrate, unscaled

CPU = torch.device("cpu")


def plain_operator(
    q_BTHD: Tensor,
    k_BXHD: Tensor,
    v_BXHD: Tensor,
    *,
    softmax_scale: float,
    num_splits: int,
    q_descale: Tensor | None = None,
    k_descale: Tensor | None = None,
    v_descale: Tensor | None = None,
) -> tuple[Tensor, ...]:
    """What FlashAttention-3's forward computes; scales are [B, H]."""
    assert 1 <= num_splits <= 256 and softmax_scale == q_BTHD.shape[-1] ** -0.5

    def load(x: Tensor, scale: Tensor | None) -> Tensor:
        assert x.stride(-1) == 1
        return x[0].transpose(0, 1).float() * (1.0 if scale is None else scale[0][:, None, None])

    out_HTD, lse_HT = attend_reference(load(q_BTHD, q_descale), load(k_BXHD, k_descale), load(v_BXHD, v_descale))
    kind = torch.bfloat16 if q_BTHD.dtype == torch.float8_e4m3fn else q_BTHD.dtype
    return out_HTD.transpose(0, 1)[None].to(kind), lse_HT[None], torch.empty(0), torch.empty(0)


@pytest.fixture
def plain(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(flash3, "_operator", lambda: plain_operator)
    yield


def relative(got: Tensor, want: Tensor) -> float:
    return float((got.float() - want.float()).norm() / want.float().norm())


def inputs(device: torch.device, dim: int = 64) -> tuple[Tensor, Tensor, Tensor]:
    """q_HTD, k_HXD, v_HXD bfloat16: heads of different loudness, an offset in K and in V."""
    g = torch.Generator().manual_seed(0)
    loud = torch.tensor([0.25, 1.0, 4.0])[:, None, None]
    q, k, v = (torch.randn(3, n, dim, generator=g) for n in (150, 700, 700))
    k[:, :, 5] += 40
    v = (v + 0.3) * loud
    return q.to(device, torch.bfloat16), k.to(device, torch.bfloat16), v.to(device, torch.bfloat16)


def check_fp8(device: torch.device, dim: int) -> None:
    q, k, v = inputs(device, dim)
    want, want_lse = attend_reference(q.float(), k.float(), v.float())
    scalings = calibrate(k.transpose(0, 1)), calibrate(v.transpose(0, 1))
    queries = flash3.quantise(q, calibrate(q.transpose(0, 1), centred=False), scalings[0])
    k8, v8 = (scaling.store(x) for scaling, x in zip(scalings, (k, v), strict=True))
    out, lse = flash3.attend_fp8(queries, k8, v8, *scalings)
    assert out.dtype == torch.bfloat16
    centre = scalings[1].centre_HD[:, None]
    # e4m3 rounds by 0.026 on average, q, k and v each
    assert relative(out.float() - centre, want - centre) < 0.08
    assert (lse - want_lse).abs().max() < 0.08


def test_scales_and_centres_are_undone(plain: None) -> None:
    check_fp8(CPU, 64)


def test_dense_attention_is_attention(plain: None) -> None:
    q, k, v = inputs(CPU)
    out, lse = flash3.attend(q, k, v)
    want, want_lse = attend_reference(q, k, v)
    assert torch.equal(out, want) and torch.equal(lse, want_lse)


def test_a_path_attends_history_and_own_block(plain: None) -> None:
    g = torch.Generator().manual_seed(1)
    q, k, v = (torch.randn(n, 2, 64, generator=g) for n in (180, 540, 540))
    codec = make_codec("fp32", BlockGeometry(num_tokens=180, head_dim=64))
    arena = torch.zeros(2, 2, codec.payload_bytes, dtype=torch.uint8)
    for block in range(2):
        rows = slice(180 * block, 180 * block + 180)
        codec.encode(k[rows], v[rows], arena[block])
    path = Flash3Fp8Path(codec, 2, 540, torch.float32, CPU)
    own = rotary_table([6, 7, 8], 6, 10, 64)
    path.begin(q, k[360:], v[360:], own)
    path.write_history(arena, torch.arange(2, dtype=torch.int32), rotary_table(range(6), 6, 10, 64))
    path.write_own(360)
    out, _ = path.attend(540)
    turned = apply_rotary(k, rotary_table(range(9), 6, 10, 64)).transpose(0, 1)
    want, _ = attend_reference(apply_rotary(q, own).transpose(0, 1), turned, v.transpose(0, 1))
    assert out.dtype == torch.float32 and relative(out, want) < 0.08
    assert path.num_bytes == 2 * 2 * 544 * 64
    path.finish()
    with pytest.raises(AssertionError, match=r"begin\(\) comes first"):
        path.attend(540)


@pytest.mark.parametrize(("dtype", "flash"), [(torch.bfloat16, True), (torch.float32, False)])
def test_dense_history_is_attended_by_it_where_it_is(
    dtype: torch.dtype, flash: bool, plain: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    codec = make_codec("bf16", BlockGeometry(num_tokens=180, head_dim=64))
    results, calls = [], 0

    def counted(*arguments: Any, **scales: Any) -> tuple[Tensor, ...]:
        nonlocal calls
        calls += 1
        return plain_operator(*arguments, **scales)

    monkeypatch.setattr(flash3, "_operator", lambda: counted)
    for there in (False, True):
        monkeypatch.setattr(flash3, "available", lambda device, dim, there=there: there)
        path = make_path("dense", codec, 2, 540, dtype, CPU)
        q, k, v = (torch.randn(180, 2, 64, generator=torch.Generator().manual_seed(n)).to(dtype) for n in range(3))
        path.begin(q, k, v, rotary_table([6, 7, 8], 6, 10, 64))
        path.write_own(0)
        results.append(path.attend(180))
        assert calls == (flash and there)
    assert results[1][0].dtype == dtype and relative(results[1][0], results[0][0]) < 1e-2
    torch.testing.assert_close(results[0][1], results[1][1], rtol=0, atol=1e-2)


def test_it_is_refused_where_it_is_not() -> None:
    codec = make_codec("int4", BlockGeometry(num_tokens=180, head_dim=64))
    assert not flash3.available(CPU, 64)
    with pytest.raises(ConfigError, match="Hopper"):
        make_path("fp8", codec, 2, 540, torch.bfloat16, CPU, use_flash3=True)


def test_partial_results_are_counted() -> None:
    # 2 and 8 splits, each with 128 channels and an lse for every query and head, in float32
    assert flash3.partial_bytes(12, 4680, 128, 32_760) == 2 * 12 * 4680 * 129 * 4
    assert flash3.partial_bytes(12, 4680, 128, 131_040) == 8 * 12 * 4680 * 129 * 4
    assert flash3.partial_bytes(12, 4680, 128, 1000) == 0
    codec = make_codec("int4", BlockGeometry(num_tokens=180, head_dim=64))
    path = Flash3Fp8Path(codec, 2, 20_000, torch.bfloat16, torch.device("meta"))
    assert path.partial_bytes(180) == flash3.partial_bytes(2, 180, 64, 20_000) > 0


def test_splits_bound_what_is_summed_in_the_tensor_core() -> None:
    for keys in (0, 1, 16384, 16385, 32_760, 131_040):
        splits = flash3.fp8_splits(12, 4680, 128, keys)
        assert splits >= 1 and keys <= 16384 * splits
        assert splits <= 4 * max(1, -(-keys // 16384))
    assert flash3.fp8_splits(12, 4680, 128, 10**9) == 256


def test_more_splits_fill_a_gpu_that_few_heads_leave_idle() -> None:
    assert [flash3.fp8_splits(heads, 4680, 128, 32_760) for heads in (12, 3)] == [2, 7]
    assert flash3.fp8_splits(2, 180, 64, 540) == 1  # merging costs more than it gains


def test_sizes_alone_decide_the_splits(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def operator(q: Tensor, k: Tensor, v: Tensor, *, num_splits: int, **scales: Tensor | float) -> tuple[Tensor, ...]:
        asked.append(num_splits)
        return q.bfloat16(), torch.zeros(1, q.shape[2], q.shape[1]), torch.empty(0), torch.empty(0)

    monkeypatch.setattr(flash3, "_operator", lambda: operator)
    scaling = unscaled(2, 64, CPU)
    queries = flash3.quantise(torch.randn(2, 5, 64), scaling, scaling)
    for keys in (100, 40_000):
        rows = torch.zeros(2, keys, 64).to(torch.float8_e4m3fn)
        flash3.attend_fp8(queries, rows, rows, scaling, scaling)
        flash3.attend_fp8(queries, rows, rows, scaling, scaling, num_splits=7)
        flash3.attend(*(x.bfloat16() for x in (torch.randn(2, 5, 64), rows.float(), rows.float())))
    assert asked == [1, 7, 1, flash3.fp8_splits(2, 5, 64, 40_000), 7, 1] and asked[3] >= 3


@pytest.mark.gpu
def test_the_real_one_sums_over_many_keys() -> None:
    device = torch.device("cuda")
    if not flash3.available(device, 128):
        pytest.skip("FlashAttention-3 is not installed, or this is no Hopper GPU")
    g = torch.Generator(device).manual_seed(0)
    q, k, v = (torch.randn(2, n, 128, generator=g, device=device).bfloat16() for n in (256, 131_072, 131_072))
    v = 1 + v / 2  # sums that grow: around zero little is cut off
    scalings = calibrate(k.transpose(0, 1)), calibrate(v.transpose(0, 1), centred=False)
    queries = flash3.quantise(q, calibrate(q.transpose(0, 1), centred=False), scalings[0])
    k8, v8 = (scaling.store(x) for scaling, x in zip(scalings, (k, v), strict=True))
    want, _ = attend_reference(q, k, v)
    split, lse = flash3.attend_fp8(queries, k8, v8, *scalings)
    again, lse_again = flash3.attend_fp8(queries, k8, v8, *scalings)
    assert torch.equal(split, again) and torch.equal(lse, lse_again)
    whole, _ = flash3.attend_fp8(queries, k8, v8, *scalings, num_splits=1)
    assert relative(split, want) < 0.5 * relative(whole, want)


@pytest.mark.gpu
@pytest.mark.parametrize("mean", [0.0, 0.5])
def test_over_many_keys_the_real_one_is_as_good_as_its_twin(mean: float) -> None:
    """Scaled by the last block's tokens, as a path does it."""
    device = torch.device("cuda")
    if not flash3.available(device, 128):
        pytest.skip("FlashAttention-3 is not installed, or this is no Hopper GPU")
    g = torch.Generator(device).manual_seed(0)
    q, k, v = (torch.randn(2, n, 128, generator=g, device=device).bfloat16() for n in (256, 131_072, 131_072))
    v = v + mean
    scalings = calibrate(k[:, -4680:].transpose(0, 1)), calibrate(v[:, -4680:].transpose(0, 1))
    queries = flash3.quantise(q, calibrate(q.transpose(0, 1), centred=False), scalings[0])
    k8, v8 = (scaling.store(x) for scaling, x in zip(scalings, (k, v), strict=True))
    want, _ = attend_reference(q.float(), k.float(), v.float())
    out, lse = flash3.attend_fp8(queries, k8, v8, *scalings)
    again, lse_again = flash3.attend_fp8(queries, k8, v8, *scalings)
    assert torch.equal(out, again) and torch.equal(lse, lse_again)
    twin, _ = attention_fp8.attend_reference(q, attention_fp8.Fp8Scratch(k_HXD=k8, v_HXD=v8), *scalings, 131_072)
    error, plain = ((x.float() - want).square().mean().sqrt() for x in (out, twin))
    # the twin sums in float32, the tensor core keeps some 14 bits; a mean left in the values would make it 50 times
    assert error < 4 * plain, f"{error} instead of {plain}"


@pytest.mark.gpu
@pytest.mark.parametrize("dim", [64, 128])
def test_the_real_one(dim: int) -> None:
    device = torch.device("cuda")
    if not flash3.available(device, dim):
        pytest.skip("FlashAttention-3 is not installed, or this is no Hopper GPU")
    check_fp8(device, dim)
    q, k, v = inputs(device, dim)
    scalings = calibrate(k.transpose(0, 1)), calibrate(q.transpose(0, 1), centred=False)
    made, twin = flash3.quantise(q, *scalings[::-1]), flash3.quantise_reference(q, *scalings[::-1])
    assert (made.q_HTD.float() == twin.q_HTD.float()).float().mean() > 0.999
    torch.testing.assert_close(made.shift_HT, twin.shift_HT, rtol=1e-4, atol=1e-3)
    out, lse = flash3.attend(q, k, v)
    want, want_lse = attend_reference(q, k, v)
    torch.testing.assert_close(out, want, rtol=0.02, atol=0.02)
    torch.testing.assert_close(lse, want_lse, rtol=1e-3, atol=1e-3)
