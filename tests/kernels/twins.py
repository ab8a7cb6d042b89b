"""What tests of Triton kernels against their plain twins share: inputs, tolerances, the interpreter."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from longtake.kernels.rotary import Rotary, rotary_table

# name of a check -> (absolute tolerance as a share of the largest value, or as ONE_ULP of it, and the reason)
ONE_ULP = -1.0
TOLERANCE = {
    "encode": (0.0, "same operations in the same order, fused multiply-add switched off: equal bytes"),
    "copy": (0.0, "no arithmetic"),
    "float32": (2e-6, "materialise and RoPE use fused multiply-add: a few float32 ulps of the larger term"),
    "bfloat16": (ONE_ULP, "float32 results a few ulps apart may round to neighbours: one ulp of the largest"),
    "float8_e4m3fn": (ONE_ULP, "float32 results a few ulps apart may round to neighbours: one ulp of the largest"),
    "float8_e4m3fn interpreted": (0.5, "the interpreter loses the carry when it rounds up to a power of two"),
    "product float32": (2**-18, "256 products of a sum on tensor cores, which cut off 2^-23 of it at each of 16 steps"),
    "float16": (ONE_ULP, "float32 results a few ulps apart may round to neighbours: one ulp of the largest"),
    "transform float32": (2**-10, "coefficients and cosines rounded to float16, 2^-12 each, summed over a tile"),
    "transform bfloat16": (ONE_ULP, "results that far apart often round to neighbours: one ulp of the largest"),
    "attention": (0.03, "queries and weights rounded to e4m3 relative to other maxima: 2^-4 each, averaged over keys"),
    "attention interpreted": (0.07, "also the interpreter's roundings to e4m3, see above; 100 keys average less"),
}


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


def tables(tokens: int, blocks: int, dim: int, device: str) -> Rotary:
    frames = next(f for f in (3, 7, 1) if tokens % f == 0)
    positions = [2.0 * i + 11 for i in range(frames * blocks)]
    return rotary_table(positions, 1, tokens // frames, dim, device)


def close_fp8(got: torch.Tensor, want: torch.Tensor, equal: float = 0.999) -> None:
    """Nearly all equal, the others neighbours."""
    close(got, want, "float8_e4m3fn" if got.is_cuda else "float8_e4m3fn interpreted")
    assert (got.float() == want.float()).float().mean() > (equal if got.is_cuda else 0.9)


def run_interpreted(module: str) -> None:
    """Run a module's `main` in a process of its own, whose kernels Triton's interpreter runs."""
    pytest.importorskip("triton")
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    root = Path(__file__).parents[2]
    done = subprocess.run([sys.executable, "-m", module], env=environment, cwd=root, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
