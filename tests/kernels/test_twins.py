"""Every Triton kernel against its plain twin: interpreted on the CPU (in a process of its own), real on a GPU.

Outputs are filled with NaN first, arenas with 0xAB. The interpreter truncates bfloat16 stores, so there outputs are
float32.
"""

from __future__ import annotations

import itertools
import math
import os
import subprocess
import sys

import pytest
import torch

from longtake.kernels.attention import merge_reference
from longtake.kernels.codec import BlockGeometry, PairCodec, TensorCodec, make_codec
from longtake.kernels.dense import DenseCodec
from longtake.kernels.rotary import Rotary, apply_rotary, rotary_table
from longtake.kernels.rtn import RoundToNearest
from longtake.kernels.scaling import calibrate_reference

# name of a check -> (absolute tolerance as a share of the largest value, or as ONE_ULP of it, and the reason)
ONE_ULP = -1.0
TOLERANCE = {
    "encode": (0.0, "same operations in the same order, fused multiply-add switched off: equal bytes"),
    "copy": (0.0, "no arithmetic"),
    "float32": (2e-6, "materialise and RoPE use fused multiply-add: a few float32 ulps of the larger term"),
    "bfloat16": (ONE_ULP, "float32 results a few ulps apart may round to neighbours: one ulp of the largest"),
    "float8_e4m3fn": (ONE_ULP, "float32 results a few ulps apart may round to neighbours: one ulp of the largest"),
    "float8_e4m3fn interpreted": (0.5, "the interpreter loses the carry when it rounds up to a power of two"),
    "transform float32": (2**-10, "coefficients and cosines rounded to float16, 2^-12 each, summed over a tile"),
    "transform bfloat16": (ONE_ULP, "results that far apart often round to neighbours: one ulp of the largest"),
    "attention": (0.03, "queries and weights rounded to e4m3 relative to other maxima: 2^-4 each, averaged over keys"),
    "attention interpreted": (0.05, "also the interpreter's roundings to e4m3, see above; 100 keys average less"),
}
CODECS = ["fp32", "bf16", "int4", "rtn2", "int8"]  # encode to the same bytes as their references
TRANSFORMS = ["tc2", "tc3", "tc4"]
ALL_CODECS = [*CODECS, "lt2", *TRANSFORMS]
GRIDS = {180: (6, 10), 240: (10, 8), 4680: (30, 52)}  # of some numbers of tokens; others are taken for a line
ATTENDED = [  # queries, keys, channels; steps of 128 keys: full ones and a part of one, full ones, a part
    (180, 540, 64),
    (77, 130, 128),
    (77, 256, 128),
    (77, 100, 64),
    (4680, 9360, 128),
]


def close(got: torch.Tensor, want: torch.Tensor, check: str) -> None:
    spacing = torch.finfo(want.dtype).eps  # of the dtype's numbers from 1 to 2
    got, want = got.float(), want.float()
    assert not got.isnan().any(), "NaN: an element was not written, or a row that is not in use was read"
    share, reason = TOLERANCE[check]
    largest = want.abs().max().item()
    bound = spacing * 2.0 ** math.floor(math.log2(largest)) if share == ONE_ULP else share * largest
    error = (got - want).abs().max().item()
    assert error <= bound, f"{check}: error {error} above {bound}: {reason}"


def structured(tokens: int, heads: int, dim: int, device: str, dtype: torch.dtype) -> torch.Tensor:
    """[T, H, D] with outlier channels, one constant group, one row of zeros: a view of a wider tensor."""
    g = torch.Generator().manual_seed(tokens + dim)
    x = torch.randn(tokens, heads + 1, dim, generator=g)
    x[:, :, 5] *= 20.0
    x[3, :, :64] = 0.7
    x[4] = 0.0
    return x.to(device, dtype)[:, 1:]


def geometry(tokens: int, dim: int) -> BlockGeometry:
    return BlockGeometry(num_tokens=tokens, head_dim=dim, grid=GRIDS.get(tokens))


def tables(tokens: int, blocks: int, dim: int, device: str) -> Rotary:
    frames = next(f for f in (3, 7, 1) if tokens % f == 0)
    positions = [2.0 * i + 11 for i in range(frames * blocks)]
    return rotary_table(positions, 1, tokens // frames, dim, device)


def pack_fast(codec: TensorCodec, x_THD: torch.Tensor, out_HB: torch.Tensor) -> None:
    """By kernels where they give the reference's bytes."""
    if isinstance(codec, RoundToNearest):
        codec.pack_by_kernels(x_THD, out_HB)
    elif isinstance(codec, DenseCodec):
        codec.pack_into(x_THD, out_HB, [])
    else:
        codec.pack_plainly(x_THD, out_HB, [0] * x_THD.shape[1])


def check_codec(name: str, tokens: int, dim: int, device: str, out_dtype: torch.dtype) -> None:
    """Bytes of encode, rows of materialise with and without RoPE, from a strided arena into a strided scratch."""
    heads, blocks = 3, 2
    pair = make_codec(name, geometry(tokens, dim))
    assert isinstance(pair, PairCodec)
    codec = pair.k
    size = codec.num_bytes
    arena, arena_fast = (
        torch.full((4, heads, size + 32), 0xAB, dtype=torch.uint8, device=device)[:, :, 16:-16] for _ in range(2)
    )
    for slot in (3, 1):
        x = structured(tokens + slot, heads, dim, device, torch.float32 if device == "cpu" else torch.bfloat16)[slot:]
        codec.pack_plainly(x, arena[slot], [0] * heads)
        pack_fast(codec, x, arena_fast[slot])
        assert torch.equal(arena[slot], arena_fast[slot]), f"{name}: payloads differ"
    assert (arena_fast[[0, 2]] == 0xAB).all()

    slots = torch.tensor([3, 1], dtype=torch.int32, device=device)
    rows = blocks * tokens
    for rotary in (tables(tokens, blocks, dim, device), None):
        want, got = (
            torch.full((rows + 9, heads, dim + 64), torch.nan, dtype=out_dtype, device=device).transpose(0, 1)[
                ..., :dim
            ]
            for _ in range(2)
        )
        codec.unpack_plainly(arena, slots, rotary, want, None)
        codec.unpack_by_kernels(arena, slots, rotary, got, None)
        assert got[:, rows:].isnan().all(), "rows beyond the last were written"
        exact = name in ("fp32", "bf16") and rotary is None
        check = ("transform " if name in TRANSFORMS else "") + str(out_dtype).removeprefix("torch.")
        close(got[:, :rows], want[:, :rows], "copy" if exact else check)
        alone = torch.full_like(got, torch.nan)
        for head in range(heads):  # as where heads turn at other speeds
            codec.unpack_by_kernels(arena[:, head : head + 1], slots, rotary, alone[head : head + 1], None)
        assert torch.equal(alone[:, :rows], got[:, :rows])


def check_lt2_encode(tokens: int, dim: int, rank: int, device: str) -> None:
    """Fit: as good a model as the reference's. Quantise: nearly all the reference's bytes, given its model."""
    from longtake.kernels import lt2_triton
    from longtake.kernels.lt2 import LowRankTwoBit

    codec = LowRankTwoBit(BlockGeometry(num_tokens=tokens, head_dim=dim), rank=rank)
    g = torch.Generator().manual_seed(dim)
    x = torch.randn(tokens, 4, rank, generator=g) * torch.arange(rank, 0, -1) @ torch.randn(rank, dim, generator=g)
    x = (x + torch.randn(tokens, 4, dim, generator=g) + 9 * torch.randn(dim, generator=g)).to(device)[:, 1:]
    x = x if device == "cpu" else x.bfloat16()
    want = codec.pack(x.transpose(0, 1).float(), [0] * 3)
    got, fitted = torch.zeros_like(want), want.clone()
    lt2_triton.encode(x, got, codec)
    exact = x.transpose(0, 1).float()
    error, reference = ((codec.unpack(s) - exact).norm() / exact.norm() for s in (got, want))
    assert error <= 1.02 * reference, f"error {error}, the reference's {reference}"
    for name in ("codes", "coefficients", "gains"):
        codec.layout.view(fitted, name).zero_()
    lt2_triton.quantise(x, fitted, codec)
    for name in ("codes", "coefficients", "gains"):
        same = codec.layout.view(fitted, name).view(torch.uint8) == codec.layout.view(want, name).view(torch.uint8)
        # the interpreter rounds some gains to e4m3 otherwise, and those tokens' codes differ
        assert same.float().mean() > (0.99 if device == "cuda" or name == "coefficients" else 0.8), name


def check_transform_encode(name: str, tokens: int, dim: int, device: str, dtype: torch.dtype) -> None:
    """K and V at once, and alone: the same bytes, nearly the reference's given the same fit; a fit as good as its."""
    from longtake.kernels import transform_encode_triton
    from longtake.kernels.transform import TransformCodec, plan

    pair = make_codec(name, geometry(tokens, dim))
    assert isinstance(pair, PairCodec) and isinstance(pair.k, TransformCodec) and isinstance(pair.v, TransformCodec)
    codecs = (pair.k, pair.v)
    x = structured(tokens, 3, dim, device, dtype)
    wave = torch.sin(0.1 * torch.arange(tokens, device=device))[:, None, None].to(x.dtype)
    xs = (x + 3 * wave, (x + wave).transpose(0, 1).contiguous().transpose(0, 1))  # of other strides
    page = torch.full((3, pair.payload_bytes + 32), 0xAB, dtype=torch.uint8, device=device)
    transform_encode_triton.encode(xs, page[:, 16:-16], codecs)
    assert (page[:, :16] == 0xAB).all() and (page[:, -16:] == 0xAB).all(), "bytes beside the sections were written"
    for x, got, codec in zip(xs, page[:, 16:-16].split([codec.num_bytes for codec in codecs], 1), codecs, strict=True):
        alone = torch.zeros_like(got)
        transform_encode_triton.encode((x,), alone, (codec,))
        assert torch.equal(got, alone), "the same tensor gave other bytes"
        view = codec.layout.view
        exponent_HFD = view(got, "rows").long().unsqueeze(-1) + (view(got, "channels") & 15).unsqueeze(-2)
        plans = torch.stack([plan(n_FD, 8 * codec.tile_bytes) for n_FD in exponent_HFD])
        assert torch.equal(view(got, "plan"), plans)
        exact = x.transpose(0, 1).float()
        want = codec.pack(exact, [0] * 3)
        error, reference = ((codec.unpack(s) - exact).norm() / exact.norm() for s in (got, want))
        assert error <= 1.02 * reference, f"error {error}, the reference's {reference}"
        fitted = got.clone()
        for field in ("codes", "gains"):
            view(fitted, field).view(torch.uint8).zero_()
        for x_TD, section_B in zip(exact, fitted, strict=True):
            codec.quantise_head(x_TD, section_B)
        # a coefficient at the border of two codes, or a gain of two e4m3 numbers, may fall to the other side
        assert (got == fitted).float().mean() > 0.95


def check_fp8_rows(name: str, tokens: int, dim: int, device: str) -> None:
    """Materialise into e4m3 rows: keys with channels contiguous, values with tokens contiguous."""
    heads, blocks = 3, 2
    pair = make_codec(name, geometry(tokens, dim))
    assert isinstance(pair, PairCodec)
    x = structured(tokens, heads, dim, device, torch.float32)
    arena = torch.zeros(4, heads, pair.k.num_bytes, dtype=torch.uint8, device=device)
    for slot in (3, 1):
        pair.k.pack_into(x * slot, arena[slot], [0] * heads)
    scaling = calibrate_reference(x)
    slots = torch.tensor([3, 1], dtype=torch.int32, device=device)
    rows = blocks * tokens
    for rotary, shape in ((tables(tokens, blocks, dim, device), (rows + 16, dim)), (None, (dim, rows + 16))):
        want, got = (torch.full((heads, *shape), torch.nan, device=device).to(torch.float8_e4m3fn) for _ in range(2))
        if rotary is None:
            want, got = want.mT, got.mT
        pair.k.unpack_plainly(arena, slots, rotary, want, scaling)
        pair.k.unpack_by_kernels(arena, slots, rotary, got, scaling)
        assert got[:, rows:].float().isnan().all(), "rows beyond the last were written"
        close_fp8(got[:, :rows], want[:, :rows], 0.97 if name in TRANSFORMS else 0.999)


def close_fp8(got: torch.Tensor, want: torch.Tensor, equal: float = 0.999) -> None:
    """Nearly all equal, the others neighbours."""
    close(got, want, "float8_e4m3fn" if got.is_cuda else "float8_e4m3fn interpreted")
    assert (got.float() == want.float()).float().mean() > (equal if got.is_cuda else 0.9)


def check_scaling(tokens: int, dim: int, device: str, dtype: torch.dtype) -> None:
    """One, two and three tensors a launch; stores of one, of two alike, and of one with tokens contiguous."""
    from longtake.kernels import scaling_triton

    x = structured(tokens, 3, dim, device, dtype)
    tensors = [x, (x * 3 - 1).transpose(0, 1).contiguous().transpose(0, 1), x * 9]
    for count, num_centred in ((1, 1), (1, 0), (2, 2), (2, 0), (3, 2)):
        found = scaling_triton.calibrate(tensors[:count], num_centred)
        assert len(found) == count
        for index, (got, tensor) in enumerate(zip(found, tensors, strict=False)):
            want = calibrate_reference(tensor, centred=index < num_centred)
            torch.testing.assert_close(got.centre_HD, want.centre_HD, rtol=1e-5, atol=1e-5)
            assert torch.equal(got.scale_H, want.scale_H)
    scalings = [calibrate_reference(tensor) for tensor in tensors]
    for layouts in ((False,), (True,), (False, False), (False, True)):
        rows = []
        for turned, tensor, scaling in zip(layouts, tensors, scalings, strict=False):
            shape = (3, dim, tokens + 16) if turned else (3, tokens + 16, dim)
            out = torch.full(shape, torch.nan, device=device).to(torch.float8_e4m3fn)
            rows.append((tensor, scaling, out.mT if turned else out))
        scaling_triton.store(rows, 8)
        for tensor, scaling, out in rows:
            close_fp8(out[:, 8 : 8 + tokens], scaling.store(tensor.transpose(0, 1)))
            assert out[:, :8].float().isnan().all() and out[:, 8 + tokens :].float().isnan().all()


def check_attend_fp8(queries: int, keys: int, dim: int, values: str, device: str, dtype: torch.dtype) -> None:
    """values: "fp8" or "bf16"; the scratch's rows that are not in use are NaN."""
    from longtake.kernels import attention_fp8, attention_fp8_triton

    heads = 2
    g = torch.Generator().manual_seed(keys)
    k, v = (torch.randn(keys, heads, dim, generator=g).to(device, dtype) + 2 for _ in range(2))
    q = torch.randn(queries, heads, dim, generator=g).to(device, dtype).transpose(0, 1)
    scalings = calibrate_reference(k), calibrate_reference(v)
    fp8 = values == "fp8"
    scratch = attention_fp8.fp8_scratch(heads, keys + 9, dim, torch.device(device), values_fp8=fp8)
    for rows in (scratch.k_HXD, scratch.v_HXD):
        rows.copy_(torch.full(rows.shape, torch.nan, device=device))
    scratch.k_HXD[:, :keys] = scalings[0].store(k.transpose(0, 1))
    scratch.v_HXD[:, :keys] = scalings[1].store(v.transpose(0, 1)) if fp8 else v.transpose(0, 1)
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
@pytest.mark.parametrize("out_dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize(("tokens", "dim"), [(180, 64), (77, 128), (4680, 128), (77, 64)])
@pytest.mark.parametrize("name", ALL_CODECS)
def test_codec_kernels_equal_their_twins(name: str, tokens: int, dim: int, out_dtype: torch.dtype) -> None:
    check_codec(name, tokens, dim, "cuda", out_dtype)


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
@pytest.mark.parametrize(("tokens", "dim"), [(180, 64), (77, 128), (4680, 128)])
@pytest.mark.parametrize("name", ALL_CODECS)
def test_fp8_rows_equal_their_twins(name: str, tokens: int, dim: int) -> None:
    check_fp8_rows(name, tokens, dim, "cuda")


@pytest.mark.gpu
@pytest.mark.parametrize(("tokens", "dim", "rank"), [(180, 64, 2), (77, 128, 4), (4680, 128, 8)])
def test_lt2_encoder_is_as_good_as_its_twin(tokens: int, dim: int, rank: int) -> None:
    check_lt2_encode(tokens, dim, rank, "cuda")


@pytest.mark.gpu
@pytest.mark.parametrize(("tokens", "dim"), [(180, 64), (77, 128), (4680, 128)])
@pytest.mark.parametrize("name", TRANSFORMS)
def test_transform_encoder_is_as_good_as_its_twin(name: str, tokens: int, dim: int) -> None:
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        check_transform_encode(name, tokens, dim, "cuda", dtype)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize(("tokens", "dim"), [(180, 64), (77, 128), (4680, 128)])
def test_scaling_kernels_equal_their_twins(tokens: int, dim: int, dtype: torch.dtype) -> None:
    check_scaling(tokens, dim, "cuda", dtype)


@pytest.mark.gpu
@pytest.mark.parametrize("values", ["fp8", "bf16"])
@pytest.mark.parametrize(("queries", "keys", "dim"), ATTENDED)
def test_fp8_attention_kernel_equals_its_twin(queries: int, keys: int, dim: int, values: str) -> None:
    check_attend_fp8(queries, keys, dim, values, "cuda", torch.bfloat16)


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
@pytest.mark.parametrize("width", [96, 1024, 8960, 13824, 14336])
def test_gelu_kernel_equals_its_twin(width: int, dtype: torch.dtype) -> None:
    check_gelu_rows(77, width, "cuda", dtype)


@pytest.mark.gpu
@pytest.mark.parametrize("name", CODECS)
def test_wrapper_picks_kernels_and_gives_the_same_bytes_on_cpu_and_gpu(name: str) -> None:
    codec = make_codec(name, BlockGeometry(num_tokens=180, head_dim=64))
    pages = {}
    for device in ("cpu", "cuda"):
        k = structured(180, 4, 64, "cpu", torch.bfloat16).to(device)
        pages[device] = torch.zeros(4, codec.payload_bytes, dtype=torch.uint8, device=device)
        codec.encode(k, k * 2, pages[device], block=0, layer=0)
    assert torch.equal(pages["cpu"], pages["cuda"].cpu())


def test_interpreted_kernels_equal_their_twins() -> None:
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    pytest.importorskip("triton")
    done = subprocess.run([sys.executable, __file__], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_every_kernel_compiles_for_sm_90_without_spills() -> None:
    pytest.importorskip("triton")
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "longtake.kernels.compile_check"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def main() -> None:
    """The interpreted run: few, small cases."""
    for name in ALL_CODECS:
        for tokens, dim in ((240, 128), (77, 64)) if name in TRANSFORMS else ((77, 128), (36, 64)):
            check_codec(name, tokens, dim, "cpu", torch.float32)
            print("ok", name, tokens, dim)
    check_rotate(77, 128, "cpu", torch.float32)
    check_rotate(36, 64, "cpu", torch.float32)
    check_merge(64, "cpu", torch.float32)
    check_restore(64, "cpu", torch.float32)
    for rank in (2, 8):
        check_lt2_encode(77, 64, rank, "cpu")
        print("ok lt2", rank)
    for name, tokens, dim, dtype in (
        ("tc2", 180, 64, torch.float32),
        ("tc3", 77, 64, torch.float16),  # of bfloat16 matrices the interpreter multiplies the bits
        ("tc4", 240, 128, torch.float32),
    ):
        check_transform_encode(name, tokens, dim, "cpu", dtype)
        print("ok encode", name, tokens, dim)
    for tokens in (180, 77):
        check_fp8_rows("tc2", tokens, 64, "cpu")
    for name in ("bf16", "rtn2", "lt2"):
        check_fp8_rows(name, 36, 64, "cpu")
        print("ok fp8 rows", name)
    check_scaling(77, 64, "cpu", torch.float32)
    check_queries(77, 64, "cpu", torch.float32)
    for width in (1, 64, 96, 700):
        check_gelu_rows(5, width, "cpu", torch.float32)
    check_norm_silu(24, "cpu", torch.float32)
    check_vae_layers(24, "cpu", torch.float32)
    check_vae_layers(192, "cpu", torch.float32)
    for keys, values in itertools.product((150, 256, 100), ("fp8", "bf16")):
        check_attend_fp8(77, keys, 64, values, "cpu", torch.float32)
        print("ok attention", keys, values)


if __name__ == "__main__":
    main()
