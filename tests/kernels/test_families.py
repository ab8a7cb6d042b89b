"""Each family of codecs: its bits, its error on noise and on structure, and what sets it apart."""

from __future__ import annotations

import pytest
import torch

from longtake.kernels import synthetic
from longtake.kernels.codec import BlockGeometry, PairCodec, Side, codec_names, make_codec
from longtake.kernels.errors import ConfigError
from longtake.kernels.hadamard import hadamard, rotate_back, rotate_randomly
from longtake.kernels.qvg import num_centroids

MINI = BlockGeometry(num_tokens=180, head_dim=64)
WAN = BlockGeometry(num_tokens=4680, head_dim=128)
GRIDS = {MINI: synthetic.Grid(frames=3, height=6, width=10), WAN: synthetic.Grid(frames=3, height=30, width=52)}

# name -> (bits at 4680 x 128, bits at 180 x 64, largest relative error on Gaussian noise for either tensor).
# What theory says of a unit Gaussian: Lloyd-Max leaves sqrt(0.1175, 0.03454, 0.0095) = 0.343, 0.186, 0.097 with 2, 3, 4
# bits; 4 levels between the extremes of 64 numbers (2.4 sigma) leave a step of 1.6 sigma / sqrt(12) = 0.46
EXPECTED = {
    "bf16": (16.0, 16.0, 0.002),
    "fp32": (32.0, 32.0, 0.0),
    "int8": (8.5, 8.5, 0.006),
    "fp8": (8.0003, 8.012, 0.028),
    "nvfp4": (4.5003, 4.512, 0.1),
    "int4": (4.5, 4.5, 0.095),
    "rtn4": (4.5, 4.5, 0.095),
    "rtn2": (2.5, 2.5, 0.47),
    "kivi2": (2.504, 2.517, 0.47),
    "kivi4": (4.504, 4.517, 0.095),
    "quarot2": (2.5, 2.5, 0.47),
    "quarot4": (4.5, 4.5, 0.095),
    "prq2": (5.0, 5.0, 0.155),
    "prq4": (9.0, 9.0, 0.0065),
    "qvg": (2.6255, 2.634, 0.33),
    "qvg-pro": (4.501, 4.445, 0.27),
    "budget-pca": (2.33, 2.58, 0.5),
    "tc2": (2.33, 2.33, 0.41),
    "tc3": (3.0, 3.0, 0.29),  # its keys have 2.67 bits, 0.15 of them a small block's header: some 2, some 3
    "tc4": (4.0, 4.0, 0.165),
    "turboquant2": (2.125, 2.256, 0.347),
    "turboquant3": (3.125, 3.256, 0.19),
    "turboquant4": (4.125, 4.256, 0.1),
    "qaq2": (2.875, 2.89, 0.41),
    "qaq4": (4.875, 4.89, 0.085),
    "tptq2": (3.032, 3.079, 0.39),
    "tptq4": (5.532, 5.579, 0.078),
}


def errors(name: str, geometry: BlockGeometry, kind: str) -> dict[Side, float]:
    """Norm of what a round trip changes over the norm of what varies (the mean over tokens taken away)."""
    codec = make_codec(name, geometry)
    assert isinstance(codec, PairCodec)  # pc is tc without a model's table: test_principal.py
    draw = synthetic.structured if kind == "structured" else synthetic.noise
    history = draw(GRIDS[geometry], blocks=1, heads=1, dim=geometry.head_dim, seed=3)
    found = {}
    for side, tensor_codec, x_NTHD in ((Side.K, codec.k, history.k_NTHD), (Side.V, codec.v, history.v_NTHD)):
        x_HTD = x_NTHD[0].transpose(0, 1)
        section = tensor_codec.pack(x_HTD)
        assert torch.equal(section, tensor_codec.pack(x_HTD.clone())), "not repeatable"
        varying = x_HTD - x_HTD.mean(1, keepdim=True)
        found[side] = float((tensor_codec.unpack(section) - x_HTD).norm() / varying.norm())
    return found


def test_every_codec_is_expected_here() -> None:
    assert set(EXPECTED) | {"pc2", "pc3", "pc4"} == set(codec_names())


@pytest.mark.parametrize("geometry", [WAN, MINI], ids=["4680x128", "180x64"])
@pytest.mark.parametrize("name", sorted(EXPECTED))
def test_bits_and_error_on_noise(name: str, geometry: BlockGeometry) -> None:
    bits = EXPECTED[name][0 if geometry is WAN else 1]
    assert bits - 0.01 < make_codec(name, geometry).bits_per_element <= bits
    for side, error in errors(name, geometry, "noise").items():
        assert error <= EXPECTED[name][2], f"{side}: {error}"


def test_structure_is_used_where_a_codec_says_so() -> None:
    """Keys with loud channels: centroids, means and grids along tokens cope; grids across loud channels do not."""
    error = {n: errors(n, WAN, "structured")[Side.K] for n in ("rtn2", "quarot2", "kivi2", "budget-pca", "qvg")}
    assert error["qvg"] < min(error["budget-pca"], error["kivi2"]), error
    assert max(error["budget-pca"], error["kivi2"]) < error["quarot2"] < error["rtn2"], error


def test_mixed_names_take_each_side_from_its_own_family() -> None:
    mixed = make_codec("k=kivi2,v=quarot4", MINI)
    assert isinstance(mixed, PairCodec)
    kivi, quarot = make_codec("kivi2", MINI), make_codec("quarot4", MINI)
    assert isinstance(kivi, PairCodec) and isinstance(quarot, PairCodec)
    assert (mixed.k.num_bytes, mixed.v.num_bytes) == (kivi.k.num_bytes, quarot.v.num_bytes)


def test_rotations_are_orthogonal_and_exact_to_undo() -> None:
    x = torch.randn(5, 96, generator=torch.Generator().manual_seed(0))
    for y in (hadamard(hadamard(x)), rotate_back(rotate_randomly(x))):
        torch.testing.assert_close(y, x, rtol=0, atol=1e-6)
    torch.testing.assert_close(rotate_randomly(x).norm(dim=-1), x.norm(dim=-1))
    assert torch.equal(hadamard(x)[2:3], hadamard(x[2:3])), "bits depend on what is rotated beside"


def test_constant_and_zero_blocks_survive() -> None:
    for name in EXPECTED:
        codec = make_codec(name, MINI)
        assert isinstance(codec, PairCodec)
        for value in (0.0, 0.75):
            x = torch.full((1, 180, 64), value)
            y = codec.k.unpack(codec.k.pack(x))
            assert torch.isfinite(y).all() and (y - x).norm() <= 0.5 * x.norm() + 1e-6, name


def test_blocks_a_family_cannot_hold_are_named() -> None:
    with pytest.raises(ConfigError, match="65536"):
        make_codec("tptq2", BlockGeometry(num_tokens=70000, head_dim=64))
    with pytest.raises(ConfigError, match="groups of 16"):
        make_codec("nvfp4", BlockGeometry(num_tokens=180, head_dim=40))


def test_centroids_fit_the_block() -> None:
    assert [num_centroids(t) for t in (4680, 4096, 1560, 180, 16, 3)] == [256, 256, 64, 8, 1, 1]
