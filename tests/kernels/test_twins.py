"""Triton kernels but the codecs' against their plain twins: interpreted on the CPU, real on a GPU."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

from longtake.kernels.attention import merge_reference
from longtake.kernels.rotary import apply_rotary
from longtake.kernels.scaling import calibrate_reference, centre_step
from tests.kernels.twins import close, close_fp8, run_interpreted, structured, tables

ATTENDED = [  # queries, keys, channels; steps of 128 keys: full ones and a part of one, full ones, a part
    (180, 540, 64),
    (77, 130, 128),
    (77, 256, 128),
    (77, 100, 64),
    (4680, 9360, 128),
]


def check_scaling(tokens: int, dim: int, device: str, dtype: torch.dtype) -> None:
    """One, two and three tensors a launch; stores of two alike, and of values with tokens contiguous."""
    from longtake.kernels import scaling_triton

    x = structured(tokens, 3, dim, device, dtype)
    tensors = [x, (x * 3 - 1).transpose(0, 1).contiguous().transpose(0, 1), x * 9]
    for count, num_centred in ((1, 1), (1, 0), (2, 2), (2, 0), (3, 2)):
        found = scaling_triton.calibrate(tensors[:count], num_centred)
        assert len(found) == count
        for index, (got, tensor) in enumerate(zip(found, tensors, strict=False)):
            want = calibrate_reference(tensor, centred=index < num_centred)
            apart_HD = (got.centre_HD - want.centre_HD).abs()  # a mean midway between two steps may go either way
            assert (apart_HD <= centre_step(tensor.float().abs().amax(0))).all()
            assert (apart_HD > 0).float().mean() < 0.01
            assert torch.equal(got.scale_H, want.scale_H)
    for turned in (False, True):
        shapes = ((3, tokens + 16, dim), (3, dim, tokens + 16) if turned else (3, tokens + 16, dim))
        keys, values = (
            (tensor, calibrate_reference(tensor), torch.full(shape, torch.nan, device=device).to(torch.float8_e4m3fn))
            for tensor, shape in zip(tensors, shapes, strict=False)
        )
        if turned:
            values = (*values[:2], values[2].mT)
        scaling_triton.store(keys, values, 8)
        for tensor, scaling, out in (keys, values):
            close_fp8(out[:, 8 : 8 + tokens], scaling.store(tensor.transpose(0, 1)))
            assert out[:, :8].float().isnan().all() and out[:, 8 + tokens :].float().isnan().all()


def check_attend_fp8(queries: int, keys: int, dim: int, device: str, dtype: torch.dtype) -> None:
    """The scratch's rows that are not in use are NaN."""
    from longtake.kernels import attention_fp8, attention_fp8_triton

    heads = 2
    g = torch.Generator().manual_seed(keys)
    k, v = (torch.randn(keys, heads, dim, generator=g).to(device, dtype) + 2 for _ in range(2))
    q = torch.randn(queries, heads, dim, generator=g).to(device, dtype).transpose(0, 1)
    scalings = calibrate_reference(k), calibrate_reference(v)
    scratch = attention_fp8.fp8_scratch(heads, keys + 9, dim, torch.device(device))
    for rows in (scratch.k_HXD, scratch.v_HXD):
        rows.copy_(torch.full(rows.shape, torch.nan, device=device))
    scratch.k_HXD[:, :keys] = scalings[0].store(k.transpose(0, 1))
    scratch.v_HXD[:, :keys] = scalings[1].store(v.transpose(0, 1))
    want, want_lse = attention_fp8.attend_reference(q, scratch, *scalings, keys)
    got, lse = attention_fp8_triton.attend(q, scratch.k_HXD, scratch.v_HXD, *scalings, keys)
    close(got, want, "attention" if device == "cuda" else "attention interpreted")
    torch.testing.assert_close(lse, want_lse, rtol=0, atol=0.05)


def check_queries(tokens: int, dim: int, device: str, dtype: torch.dtype) -> None:
    from longtake.kernels import flash3
    from longtake.kernels.attention_fp8_triton import quantise_queries

    q_HTD = torch.randn(tokens, 3, dim, device=device, dtype=dtype).transpose(0, 1) * 5
    q_scaling, k_scaling = calibrate_reference(q_HTD.transpose(0, 1)), calibrate_reference(q_HTD.transpose(0, 1) + 1)
    want = flash3.quantise_reference(q_HTD, q_scaling, k_scaling)
    q8_HTD, shift_HT = quantise_queries(q_HTD, q_scaling.scale_H, k_scaling.centre_HD)
    close_fp8(q8_HTD, want.q_HTD)
    torch.testing.assert_close(shift_HT, want.shift_HT, rtol=1e-4, atol=1e-4)


def check_gelu_rows(rows: int, width: int, device: str, dtype: torch.dtype) -> None:
    from longtake.kernels.fp8_rows import gelu_round_rows_reference
    from longtake.kernels.fp8_rows_triton import gelu_round_rows

    x = 3 * torch.randn(rows, width, generator=torch.Generator().manual_seed(width)).to(device, dtype)
    x[0, :] = 0
    x[1, -1], x[1, 0] = 300, -300  # the largest stands last; GELU of the other is 0
    (got, got_scale), (want, want_scale) = (of(x) for of in (gelu_round_rows, gelu_round_rows_reference))
    torch.testing.assert_close(got_scale, want_scale, rtol=1e-5, atol=0)
    assert got.shape == want.shape and got.dtype == want.dtype and not got[0].float().any()
    close_fp8(got, want)


def check_norm_rows(rows: int, width: int, device: str, dtype: torch.dtype) -> None:
    """With and without what is added before, and its gate; groups of rows with factors of their own."""
    from longtake.kernels.fp8_rows import add_norm_round_rows_reference
    from longtake.kernels.fp8_rows_triton import add_norm_round_rows

    draw = torch.Generator().manual_seed(width)
    x, update = (torch.randn(rows, width, generator=draw).to(device, dtype) for _ in range(2))
    gate, factor, shift = torch.randn(3, 3, width, generator=draw).to(device).unbind(1)  # rows that stand apart
    x[0] = 0
    for more, by, groups in ((None, None, 3), (update, None, 3), (update, gate, 3), (update, gate, 1)):
        given = (x, more, by, factor[:groups], shift[:groups], 1e-6)
        both = (add_norm_round_rows, add_norm_round_rows_reference)
        (sums, got), (want_sums, want) = (of(*given, around_one=groups > 1) for of in both)
        close(sums, want_sums, "float32" if dtype == torch.float32 else "bfloat16")
        torch.testing.assert_close(got.scale, want.scale, rtol=1e-5 if dtype == torch.float32 else 2**-7, atol=0)
        close_fp8(got.rows, want.rows, equal=0.97)


def check_norm_silu(channels: int, device: str, dtype: torch.dtype) -> None:
    from longtake.kernels.norm_silu_triton import normalise

    x_NC = torch.randn(3 * 5 * 7, channels, device=device, dtype=dtype)
    x_NC[4] = 0
    gamma_C = torch.rand(channels, device=device, dtype=dtype)
    unit = x_NC.float() / x_NC.float().norm(dim=1, keepdim=True).clamp_min(1e-12)
    want_NC = torch.nn.functional.silu(unit * channels**0.5 * gamma_C.float())
    out_NC = torch.full_like(x_NC, torch.nan)
    normalise(x_NC, gamma_C, out_NC, channels**0.5, 1e-24)
    close_vae(out_NC, want_NC)


def check_vae_layers(channels: int, device: str, dtype: torch.dtype) -> None:
    """The passes between a VAE's convolutions, on frames of odd sizes."""
    from longtake.kernels import vae_layers, vae_layers_triton

    def noise(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, device=device).to(dtype)

    gamma_C, bias_C, scale = noise(channels), noise(channels), channels**0.5
    for frames, height, width in ((1, 5, 3), (2, 1, 35), (4, 3, 70)):
        x = noise(frames, height, width, channels)
        x[0, 0, 0] = 0
        past = noise(2, height, width, channels)
        for bias in (None, bias_C):
            buffer = x.new_full((2 + frames, height + 2, width + 2, channels), torch.nan)
            last = torch.full_like(past, torch.nan)
            vae_layers_triton.normed(x, bias, gamma_C, scale, past, buffer, last)
            want_buffer, want_last = vae_layers.normed(x.cpu(), on_cpu(bias), gamma_C.cpu(), scale, past.cpu())
            close_vae(buffer, want_buffer)
            close_vae(last, want_last)
        for parts, bias in ((1, None), (2, noise(2, channels))):
            x = noise(frames, height, width, parts, channels)
            buffer = x.new_full((frames * parts, height + 2, width + 2, channels), torch.nan)
            vae_layers_triton.bordered(x, bias, buffer)
            close_vae(buffer, vae_layers.bordered(x.cpu(), on_cpu(bias)))
        x = noise(frames, height + 1, width + 1, 4, channels)
        out = x.new_full((frames, 2 * height, 2 * width, channels), torch.nan)
        vae_layers_triton.spread(x, bias_C, out)
        close_vae(out, vae_layers.spread(x.cpu(), bias_C.cpu()))
        x, residual = noise(2 * height * width, channels), past.flatten(0, 2)
        want = x.cpu().clone()
        vae_layers_triton.add(x, bias_C, residual)
        vae_layers.add(want, bias_C.cpu(), residual.cpu())
        close_vae(x, want)


def on_cpu(tensor: torch.Tensor | None) -> torch.Tensor | None:
    return None if tensor is None else tensor.cpu()


def close_vae(got: torch.Tensor, want: torch.Tensor) -> None:
    """A few ulps in float32; in bfloat16 one, where float32 results a few ulps apart round to neighbours."""
    rtol, atol = (1e-5, 1e-5) if got.dtype == torch.float32 else (8e-3, 1e-3)
    torch.testing.assert_close(got.float(), want.to(got.device).float(), rtol=rtol, atol=atol)


def check_rotate(tokens: int, dim: int, device: str, dtype: torch.dtype) -> None:
    from longtake.kernels import rotary_triton

    x = structured(tokens, 3, dim, device, dtype)
    rotary = tables(tokens, 1, dim, device)
    got = rotary_triton.rotate(x, rotary)[0]
    want = apply_rotary(x.cpu(), tables(tokens, 1, dim, "cpu")).to(device)
    close(got, want, str(dtype).removeprefix("torch."))
    assert torch.equal(rotary_triton.rotate(x[:, 1:2], rotary)[0], got[:, 1:2])
    other = (x + 1).transpose(0, 1).contiguous().transpose(0, 1)
    both = rotary_triton.rotate(x, rotary, other)
    assert torch.equal(both[0], got) and torch.equal(both[1], rotary_triton.rotate(other, rotary)[0])


def check_merge(dim: int, device: str, dtype: torch.dtype) -> None:
    from longtake.kernels import attention_triton

    g = torch.Generator().manual_seed(dim)
    a, b = (torch.randn(77, 3, dim, generator=g).to(device, dtype).transpose(0, 1) for _ in range(2))
    lse_a, lse_b = (20 * torch.randn(3, 77, generator=g).to(device) for _ in range(2))
    lse_a[:, :5] = -torch.inf
    lse_b[:, 3:9] = -torch.inf
    got, got_lse = attention_triton.merge(a, lse_a, b, lse_b)
    want, want_lse = merge_reference(a, lse_a, b, lse_b)
    close(got, want, str(dtype).removeprefix("torch."))
    assert torch.equal(got_lse.isneginf(), want_lse.isneginf())
    torch.testing.assert_close(got_lse, want_lse, rtol=1e-6, atol=1e-5)


def check_restore(dim: int, device: str, dtype: torch.dtype) -> None:
    from longtake.kernels import attention_triton, flash3

    g = torch.Generator().manual_seed(dim)
    out = torch.randn(77, 3, dim, generator=g).to(device, dtype)
    lse, shift = (20 * torch.randn(3, 77, generator=g).to(device) for _ in range(2))
    centre = torch.randn(3, dim, generator=g).to(device)
    got, want = out.clone().transpose(0, 1), out.clone().transpose(0, 1)
    got_lse, want_lse = lse.clone(), lse.clone()
    attention_triton.restore(got, got_lse, centre, shift)
    flash3.restore_reference(want, want_lse, centre, shift)
    assert torch.equal(got, want) and torch.equal(got_lse, want_lse)
    assert not torch.equal(got, out.transpose(0, 1))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize(("tokens", "dim"), [(180, 64), (77, 128), (4680, 128)])
def test_rotation_kernel_equals_its_twin(tokens: int, dim: int, dtype: torch.dtype) -> None:
    check_rotate(tokens, dim, "cuda", dtype)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("dim", [64, 128])
def test_merge_and_restore_kernels_equal_their_twins(dim: int, dtype: torch.dtype) -> None:
    check_merge(dim, "cuda", dtype)
    check_restore(dim, "cuda", dtype)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize(("tokens", "dim"), [(180, 64), (77, 128), (4680, 128)])
def test_scaling_kernels_equal_their_twins(tokens: int, dim: int, dtype: torch.dtype) -> None:
    check_scaling(tokens, dim, "cuda", dtype)


@pytest.mark.gpu
@pytest.mark.parametrize(("queries", "keys", "dim"), ATTENDED)
def test_fp8_attention_kernel_equals_its_twin(queries: int, keys: int, dim: int) -> None:
    check_attend_fp8(queries, keys, dim, "cuda", torch.bfloat16)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_query_and_norm_kernels_equal_their_twins(dtype: torch.dtype) -> None:
    check_queries(4680, 128, "cuda", dtype)
    check_norm_silu(96, "cuda", dtype)
    check_norm_silu(384, "cuda", dtype)
    check_vae_layers(96, "cuda", dtype)
    check_vae_layers(384, "cuda", dtype)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("width", [96, 1024, 1536, 5120, 8960, 13824, 14336])
def test_row_kernels_equal_their_twins(width: int, dtype: torch.dtype) -> None:
    check_gelu_rows(77, width, "cuda", dtype)
    check_norm_rows(78, width, "cuda", dtype)


def test_interpreted_kernels_equal_their_twins() -> None:
    run_interpreted("tests.kernels.test_twins")


def test_every_kernel_compiles_for_sm_90_without_spills() -> None:
    pytest.importorskip("triton")
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "longtake.kernels.compile_check"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def main() -> None:
    """The interpreted run: few, small cases."""
    check_rotate(77, 128, "cpu", torch.float32)
    check_rotate(36, 64, "cpu", torch.float32)
    check_merge(64, "cpu", torch.float32)
    check_restore(64, "cpu", torch.float32)
    check_scaling(77, 64, "cpu", torch.float32)
    check_queries(77, 64, "cpu", torch.float32)
    for width in (1, 64, 96, 700):
        check_gelu_rows(5, width, "cpu", torch.float32)
        check_norm_rows(6, width, "cpu", torch.float32)
    check_norm_silu(24, "cpu", torch.float32)
    check_vae_layers(24, "cpu", torch.float32)
    check_vae_layers(192, "cpu", torch.float32)
    for keys in (150, 256, 100):
        check_attend_fp8(77, keys, 64, "cpu", torch.float32)
        print("ok attention", keys)


if __name__ == "__main__":
    main()
