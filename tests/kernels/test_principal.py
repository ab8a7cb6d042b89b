"""Codecs that turn a head's keys and values together, by a table: what that is worth, and that a head stays apart."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from longtake.kernels import principal
from longtake.kernels.codec import BlockGeometry, Codec, Rates, make_codec
from longtake.kernels.errors import ConfigError
from longtake.kernels.principal import HistoryBasis, PrincipalCodec
from longtake.kernels.rotary import HeadRotary, rotary_table
from longtake.kernels.scaling import calibrate_reference
from longtake.kernels.synthetic import random_basis

MINI = BlockGeometry(num_tokens=180, head_dim=64, grid=(6, 10))
SMALL = BlockGeometry(num_tokens=45, head_dim=64, grid=(3, 5))
HEADS = 3


def shared_kv(seed: int, dim: int = 64) -> tuple[Tensor, Tensor]:
    """[T, H, D] keys and values of each head that are views of the same 24 numbers of a token."""
    g = torch.Generator().manual_seed(seed)
    views = torch.randn(HEADS, 24, 2 * dim, generator=torch.Generator().manual_seed(99))
    x_THE = torch.einsum("tc,hce->the", torch.randn(180, 24, generator=g), views)
    x_THE = x_THE + 0.2 * torch.randn(x_THE.shape, generator=g) + 2.0
    return x_THE[..., :dim], x_THE[..., dim:]


def components(heads: int = HEADS) -> HistoryBasis:
    """The principal components of other blocks of the same views, dealt in turn."""
    x_HTE = torch.cat([torch.cat(shared_kv(seed), dim=-1) for seed in range(50, 60)]).transpose(0, 1).double()
    x_HTE = x_HTE - x_HTE.mean(1, keepdim=True)
    vectors_HEE = torch.linalg.eigh(x_HTE.mT @ x_HTE)[1].flip(-1)
    dealt_HEE = torch.cat((vectors_HEE[..., 0::2], vectors_HEE[..., 1::2]), dim=-1)
    return HistoryBasis(dealt_HEE[None, :heads].to(torch.bfloat16))


def round_trip(codec: Codec, k_THD: Tensor, v_THD: Tensor) -> tuple[Tensor, Tensor]:
    """Keys at position 0 and values, [H, T, D], read from a page of their own."""
    tokens, heads, dim = k_THD.shape
    page = torch.zeros(1, heads, codec.payload_bytes, dtype=torch.uint8)
    codec.encode(k_THD, v_THD, page[0])
    still = rotary_table([0.0] * 3, 6, 10, dim)
    still = replace(still, spatial_SQ2=torch.tensor([1.0, 0.0]).expand_as(still.spatial_SQ2))
    k_HXD, v_HXD = (torch.full((heads, tokens, dim), torch.nan) for _ in range(2))
    codec.materialise(page, torch.zeros(1, dtype=torch.int32), still, k_HXD, v_HXD)
    return k_HXD, v_HXD


def error(codec: Codec, seed: int) -> float:
    k_THD, v_THD = shared_kv(seed)
    got = torch.cat(round_trip(codec, k_THD, v_THD))
    want = torch.cat((k_THD, v_THD), dim=1).transpose(0, 1)
    return float((got - want).norm() / (want - want.mean(1, keepdim=True)).norm())


@pytest.mark.parametrize("name", ["pc2", "pc3", "pc4"])
def test_what_channels_share_costs_nothing(name: str) -> None:
    """24 of 128 numbers matter: with the table they get most of the bits."""
    plain = make_codec(name, MINI)
    assert isinstance(plain, PrincipalCodec) and plain.wants_basis
    assert plain.payload_bytes == 2 * plain.coder.num_bytes
    assert error(plain.of_layer(components(), 0), 1) < 0.4 * error(plain, 1)
    assert error(plain, 1) == pytest.approx(error(make_codec(name.replace("pc", "tc"), MINI), 1), rel=0.1)


@pytest.mark.parametrize("rates", [(), ((13,),) * 3])
def test_a_heads_payload_is_its_own(rates: Rates) -> None:
    """Two of the heads, encoded by the matrices of those two, have the bytes that they have among all."""
    k_THD, v_THD = shared_kv(2)
    pages = []
    for heads in (HEADS, 2):
        codec = make_codec("pc2", MINI, rates).of_layer(components(heads), 0)
        pages.append(torch.zeros(heads, codec.payload_bytes, dtype=torch.uint8))
        codec.encode(k_THD[:, :heads], v_THD[:, :heads], pages[-1])
    assert torch.equal(pages[0][:2], pages[1])


def test_each_layer_has_its_own_matrices() -> None:
    basis = HistoryBasis(torch.cat((random_basis(1, HEADS, 64).turn_LHEE, components().turn_LHEE)))
    first, second = (make_codec("pc3", MINI).of_layer(basis, layer) for layer in range(basis.num_layers))
    assert error(second, 3) < 0.7 * error(first, 3)


RATES = ((2, 9, 24),) * 3


@pytest.mark.parametrize("geometry", [MINI, BlockGeometry(num_tokens=4680, head_dim=128, grid=(30, 52))])
def test_layers_have_their_rates(geometry: BlockGeometry) -> None:
    """Whole units, as many as the layer has quarters, of a quarter of a bit each; sections that storage may align."""
    codec = make_codec("pc2", geometry, RATES)
    quarter = 2 * geometry.num_tokens * geometry.head_dim / 4 / 8
    assert codec.rows == (2, 9, 24) and codec.unit_bytes % 32 == 0
    assert quarter - 32 < codec.unit_bytes <= quarter
    mean = 35 * codec.unit_bytes * 8 / (3 * 2 * geometry.num_tokens * geometry.head_dim)
    assert codec.bits_per_element == pytest.approx(mean) and mean <= 35 / 12
    basis = random_basis(3, HEADS, geometry.head_dim)
    for layer, quarters in enumerate(codec.rows):
        bound = codec.of_layer(basis, layer)
        assert isinstance(bound, PrincipalCodec) and bound.rows == ()
        assert bound.payload_bytes == bound.unit_bytes == quarters * codec.unit_bytes
        assert bound.coder.num_bytes % 16 == 0
        used, section = bound.coder.layout.offset("plan") + 16, bound.payload_bytes // 2
        assert section - 16 - bound.coder.num_tiles < used <= section or quarters == 24
    with pytest.raises(ConfigError, match="differ by layer"):
        codec.payload_bytes  # noqa: B018
    plain = make_codec("int4", geometry, RATES)
    assert plain.rows == () and plain.unit_bytes == plain.payload_bytes


def test_the_error_falls_with_the_rate() -> None:
    basis = HistoryBasis(components().turn_LHEE.expand(8, -1, -1, -1))
    codec = make_codec("pc3", MINI, ((2, 4, 6, 9, 12, 16, 20, 24),) * 3)
    errors = [error(codec.of_layer(basis, layer), 1) for layer in range(8)]
    assert all(after < before for before, after in pairwise(errors))
    assert errors[0] < 0.5 and errors[-1] < 0.025, "finer than codes of 6 bits, a 31st of what varies"


def test_what_no_tile_gets_of_a_layers_payload_is_zero() -> None:
    bound = make_codec("pc2", SMALL, RATES).of_layer(random_basis(3, HEADS, 64), 2)
    assert isinstance(bound, PrincipalCodec)
    page = torch.full((HEADS, bound.payload_bytes), 0xAB, dtype=torch.uint8)
    k_THD, v_THD = shared_kv(0)
    bound.encode(k_THD[:45], v_THD[:45], page)
    behind = bound.coder.layout.offset("plan") + 16
    assert behind < bound.coder.num_bytes and not page.unflatten(1, (2, -1))[:, :, behind:].any()


def test_blocks_too_small_for_their_header_have_larger_units() -> None:
    codec = make_codec("pc2", SMALL, RATES)
    assert codec.unit_bytes > 2 * 45 * 64 / 4 / 8 and codec.bits_per_element > 35 / 12
    assert codec.of_layer(random_basis(3, HEADS, 64), 0).payload_bytes == 2 * codec.unit_bytes


@pytest.mark.parametrize("rates", [(), ((13,),) * 3])
def test_chunks_heads_that_turn_apart_and_scaled_rows(monkeypatch: pytest.MonkeyPatch, rates: Rates) -> None:
    """However many blocks are unpacked at a time; tables of one head each as one for all; e4m3 as scaled afterwards."""
    codec = make_codec("pc2", MINI, rates).of_layer(components(), 0)
    arena = torch.zeros(4, HEADS, codec.payload_bytes, dtype=torch.uint8)
    for slot in range(4):
        codec.encode(*shared_kv(slot), arena[slot])
    slots, rows = torch.tensor([3, 0, 2], dtype=torch.int32), 3 * 180
    rotary = rotary_table([float(n) for n in range(9)], 6, 10, 64)

    def read(**options: object) -> list[Tensor]:
        out = [torch.full((HEADS, rows + 2, 64), torch.nan) for _ in range(2)]
        codec.materialise(arena, slots, rotary, *out, **options)  # type: ignore[arg-type]
        assert all(x[:, rows:].isnan().all() for x in out)
        return [x[:, :rows] for x in out]

    whole = read()
    monkeypatch.setattr(principal, "_CHUNK_ELEMENTS", 2 * 2 * 180 * 64 * HEADS)
    for part, want in zip(read(), whole, strict=True):
        torch.testing.assert_close(part, want)
    apart = [torch.empty(HEADS, rows, 64) for _ in range(2)]
    codec.materialise(arena, slots, HeadRotary(heads=(rotary,) * HEADS), *apart)
    assert all(torch.equal(got, want) for got, want in zip(apart, whole, strict=True))

    scalings = [calibrate_reference(x) for x in shared_kv(0)]
    stored = [torch.empty(HEADS, rows, 64, dtype=torch.float8_e4m3fn) for _ in range(2)]
    codec.materialise(arena, slots, rotary, *stored, k_scaling=scalings[0], v_scaling=scalings[1])
    for got, want, scaling in zip(stored, whole, scalings, strict=True):
        assert torch.equal(got.float(), scaling.store(want).float())


def test_pages_that_overlap_are_read_where_they_are() -> None:
    """An arena may be seen at every unit of memory, so that pages begin anywhere."""
    codec = make_codec("pc2", MINI).of_layer(components(), 0)
    size, unit = HEADS * codec.payload_bytes, 64
    memory = torch.zeros(3 * size, dtype=torch.uint8)
    pages = memory.as_strided(((3 * size - size) // unit + 1, HEADS, codec.payload_bytes), (unit, size // HEADS, 1))
    rotary, read = rotary_table([0.0, 1.0, 2.0], 6, 10, 64), []
    for slot in (0, (size + 3 * unit) // unit):
        codec.encode(*shared_kv(4), pages[slot])
        out = [torch.full((HEADS, 180, 64), torch.nan) for _ in range(2)]
        codec.materialise(pages, torch.tensor([slot], dtype=torch.int32), rotary, *out)
        read.append(out)
    assert principal.sections(pages).data_ptr() == memory.data_ptr()
    assert all(torch.equal(x, y) for x, y in zip(*read, strict=True))


def test_bad_tables_and_names() -> None:
    turn_LHEE = random_basis(1, 2, 64).turn_LHEE.clone()
    turn_LHEE[0, 1, :, 5] = 0
    with pytest.raises(ConfigError, match="no inverse"):
        HistoryBasis(turn_LHEE)
    for name in ("k=pc2,v=bf16", "pc2+rtn2"):
        with pytest.raises(ConfigError, match="write it alone"):
            make_codec(name, MINI)
    with pytest.raises(ConfigError, match="did you mean 'pc2'"):
        make_codec("pc22", MINI)
