from __future__ import annotations

import pytest
import torch

from longtake.kernels.attention import attend, attend_reference, merge
from longtake.kernels.errors import ConfigError

# half types: one rounding of the output, and of P before P.V: an ulp of the type at values of about 1;
# float32: sums in another order, log-sum-exp near 10, and CUDA's kernel multiplies in three TF32 parts
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1.6e-2, torch.float16: 2e-3}
DTYPES = list(TOLERANCE)


def random_qkv(
    dtype: torch.dtype, device: str, *, t: int = 77, x: int = 123, heads: int = 3, dim: int = 64
) -> list[torch.Tensor]:
    """q, k, v as head-major views of token-major tensors, so strides are those of the engine."""
    g = torch.Generator().manual_seed(1)
    return [torch.randn(n, heads, dim, generator=g).to(device, dtype).transpose(0, 1) for n in (t, x, x)]


def check_attend(dtype: torch.dtype, device: str, **sizes: int) -> None:
    q, k, v = random_qkv(dtype, device, **sizes)
    out, lse = attend(q, k, v)
    want, want_lse = attend_reference(q.float(), k.float(), v.float())
    assert out.dtype == dtype and lse.dtype == torch.float32
    torch.testing.assert_close(out.float(), want, rtol=0, atol=TOLERANCE[dtype])
    torch.testing.assert_close(lse, want_lse, rtol=0, atol=TOLERANCE[dtype])


def check_merge(dtype: torch.dtype, device: str, **sizes: int) -> None:
    q, k, v = random_qkv(dtype, device, **sizes)
    want, want_lse = attend_reference(q.float(), k.float(), v.float())
    cut = k.shape[1] // 3
    out, lse = merge(*attend(q, k[:, :cut], v[:, :cut]), *attend(q, k[:, cut:], v[:, cut:]))
    torch.testing.assert_close(out.float(), want, rtol=0, atol=2 * TOLERANCE[dtype])
    torch.testing.assert_close(lse, want_lse, rtol=0, atol=TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", DTYPES)
def test_attend_equals_reference(dtype: torch.dtype) -> None:
    check_attend(dtype, "cpu")


@pytest.mark.parametrize("dtype", DTYPES)
def test_parts_merge_to_the_whole(dtype: torch.dtype) -> None:
    check_merge(dtype, "cpu")


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dim", [64, 128])
@pytest.mark.parametrize(("t", "x"), [(77, 123), (180, 540), (4680, 9360)])
def test_attend_equals_reference_on_cuda(dtype: torch.dtype, dim: int, t: int, x: int) -> None:
    check_attend(dtype, "cuda", t=t, x=x, dim=dim)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
def test_parts_merge_to_the_whole_on_cuda(dtype: torch.dtype) -> None:
    check_merge(dtype, "cuda", t=180, x=540)


def test_no_keys_is_neutral_in_a_merge() -> None:
    q, k, v = random_qkv(torch.float32, "cpu")
    empty = attend(q, k[:, :0], v[:, :0])
    assert torch.isneginf(empty[1]).all()
    full = attend(q, k, v)
    for out, lse in (merge(*empty, *full), merge(*full, *empty)):
        torch.testing.assert_close(out, full[0])
        torch.testing.assert_close(lse, full[1])
    out, lse = merge(*empty, *empty)
    assert torch.isneginf(lse).all() and not out.isnan().any()


def test_merge_keeps_a_float32_accumulator() -> None:
    q, k, v = random_qkv(torch.bfloat16, "cpu")
    out, lse = attend(q, k, v)
    merged, _ = merge(out.float(), lse, out, lse)
    assert merged.dtype == torch.float32


def test_disagreeing_shapes_are_named() -> None:
    q, k, v = random_qkv(torch.float32, "cpu")
    with pytest.raises(ConfigError, match="differ in heads"):
        attend(q[:2], k, v)
    with pytest.raises(ConfigError, match="one dtype"):
        attend(q.bfloat16(), k, v)
