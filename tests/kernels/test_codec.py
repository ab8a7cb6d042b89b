from __future__ import annotations

import pytest
import torch

from longtake.kernels.codec import BlockGeometry, Codec, Side, codec_names, make_codec, make_tensor_codec
from longtake.kernels.errors import ConfigError
from longtake.kernels.layout import pack_codes, unpack_codes
from longtake.kernels.rotary import HeadRotary, Turns, apply_rotary, rotary_table
from longtake.kernels.scaling import calibrate_reference

MINI = BlockGeometry(num_tokens=180, head_dim=64)
ODD = BlockGeometry(num_tokens=77, head_dim=128)
EXACT = {"fp32": torch.float32, "bf16": torch.bfloat16}


def random_kv(geometry: BlockGeometry, heads: int, seed: int, dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    shape = (geometry.num_tokens, heads, geometry.head_dim)
    return [torch.randn(shape, generator=g).to(dtype) for _ in range(2)]


def arena_of(codec: Codec, heads: int, slots: int) -> torch.Tensor:
    return torch.full((slots, heads, codec.payload_bytes), 0xAB, dtype=torch.uint8)


@pytest.mark.parametrize("name", codec_names())
@pytest.mark.parametrize("geometry", [MINI, ODD], ids=["180x64", "77x128"])
def test_conformance(name: str, geometry: BlockGeometry) -> None:
    """Any codec: repeatable bytes, heads apart from one another, blocks in any order, nothing written outside."""
    codec = make_codec(name, geometry)
    heads, tokens = 2, geometry.num_tokens
    assert codec.payload_bytes % 16 == 0
    assert codec.bits_per_element == codec.payload_bytes * 8 / (2 * tokens * geometry.head_dim)
    arena = arena_of(codec, heads, 4)
    kv = {slot: random_kv(geometry, heads, slot) for slot in (2, 0)}
    for slot, (k, v) in kv.items():
        codec.encode(k, v, arena[slot])
    assert (arena[[1, 3]] == 0xAB).all()

    alone = torch.zeros(1, codec.payload_bytes, dtype=torch.uint8)
    codec.encode(kv[2][0][:, 1:], kv[2][1][:, 1:], alone)
    assert torch.equal(alone[0], arena[2, 1]), "a head's payload depends on other heads"

    frames = 3 if tokens % 3 == 0 else 7
    per_frame = tokens // frames
    rotary = rotary_table([float(5 * f) for f in range(2 * frames)], 1, per_frame, geometry.head_dim)
    rows = 2 * tokens
    k_out, v_out = (torch.full((heads, rows + 5, geometry.head_dim), torch.nan) for _ in range(2))
    codec.materialise(arena, torch.tensor([2, 0], dtype=torch.int32), rotary, k_out, v_out)
    assert k_out[:, rows:].isnan().all() and v_out[:, rows:].isnan().all()
    want_k = torch.cat([kv[2][0], kv[0][0]])
    want_v = torch.cat([kv[2][1], kv[0][1]]).transpose(0, 1)
    want_k = apply_rotary(want_k, rotary).transpose(0, 1)
    assert not k_out[:, :rows].isnan().any() and not v_out[:, :rows].isnan().any()
    for got, want in ((k_out[:, :rows], want_k), (v_out[:, :rows], want_v)):
        relative = ((got - want).norm() / want.norm()).item()
        # Gaussian noise has no structure to use: what b bits keep of it is bounded, and 2 bits keep about 65 %
        assert relative < (0.01 if name in EXACT else 0.75), f"{name}: relative error {relative}"


class OnCuda(torch.Tensor):
    """A tensor that says it is on a GPU."""

    is_cuda = True


@pytest.mark.parametrize("dim", [64, 32])
@pytest.mark.parametrize("name", ["bf16", "int4", "tc2", "kivi2"])
def test_kernels_take_over_on_cuda_where_there_are_some(name: str, dim: int, monkeypatch: pytest.MonkeyPatch) -> None:
    codec = make_tensor_codec(name, BlockGeometry(num_tokens=60, head_dim=dim, grid=(6, 10)), Side.K)
    called: list[str] = []
    for way in ("by kernels", "plainly"):
        for verb in ("pack", "unpack"):
            monkeypatch.setattr(codec, f"{verb}_{way.replace(' ', '_')}", lambda *a, said=way: called.append(said))
    here = torch.zeros(60, 2, dim)
    page, slots = torch.zeros(1, 2, codec.num_bytes, dtype=torch.uint8), torch.zeros(1, dtype=torch.int32)
    expected = "by kernels" if codec.has_kernels else "plainly"
    assert codec.has_kernels == (dim == 64 and name != "kivi2")
    for where, said in ((here, "plainly"), (here.as_subclass(OnCuda), expected)):
        if name != "bf16":  # written by PyTorch's copy
            codec.pack_into(where, page[0])
            assert called.pop() == said
        sections = page.as_subclass(OnCuda) if isinstance(where, OnCuda) else page
        codec.unpack_into(sections, slots, None, here.transpose(0, 1))
        assert called.pop() == said and not called


@pytest.mark.parametrize("name", list(EXACT))
def test_dense_storage_is_exact(name: str) -> None:
    codec = make_codec(name, MINI)
    dtype = EXACT[name]
    k, v = random_kv(MINI, 4, 0, dtype)
    arena = arena_of(codec, 4, 2)
    codec.encode(k, v, arena[1])
    rotary = rotary_table([3, 4, 5], 6, 10, 64)
    k_out, v_out = (torch.full((4, 180, 64), torch.nan, dtype=dtype) for _ in range(2))
    codec.materialise(arena, torch.tensor([1], dtype=torch.int32), rotary, k_out, v_out)
    assert torch.equal(v_out, v.transpose(0, 1))
    assert torch.equal(k_out, apply_rotary(k, rotary).transpose(0, 1))


@pytest.mark.parametrize("name", ["bf16", "int4", "tc2", "kivi2"])
@pytest.mark.parametrize("fp8", [False, True])
def test_heads_that_turn_at_other_speeds(name: str, fp8: bool) -> None:
    """Each head's rows are those of that head's tables alone; values are as ever."""
    codec = make_codec(name, MINI)
    k, v = random_kv(MINI, 3, 0)
    arena = arena_of(codec, 3, 2)
    codec.encode(k, v, arena[1])
    tables = [rotary_table([3, 4, 5], 6, 10, 64, theta=theta) for theta in (10000.0, 3000.0, 17000.0)]
    dtype = torch.float8_e4m3fn if fp8 else torch.float32
    scaling = calibrate_reference(k) if fp8 else None
    slots = torch.tensor([1], dtype=torch.int32)

    def rows(rotary: Turns) -> tuple[torch.Tensor, torch.Tensor]:
        outs = [torch.full((3, 180, 64), torch.nan).to(dtype) for _ in range(2)]
        codec.materialise(arena, slots, rotary, outs[0], outs[1], k_scaling=scaling, v_scaling=scaling)
        return outs[0].float(), outs[1].float()

    keys, values = rows(HeadRotary(heads=tuple(tables)))
    for head, table in enumerate(tables):
        want_keys, want_values = rows(table)
        assert torch.equal(keys[head], want_keys[head]) and torch.equal(values, want_values)
        assert head == 0 or not torch.equal(keys[0], want_keys[0])
    with pytest.raises(ConfigError, match="tables for 2 heads do not fit 3 heads"):
        rows(HeadRotary(heads=tuple(tables[:2])))


def test_strided_page_and_scratch() -> None:
    codec = make_codec("bf16", MINI)
    k, v = random_kv(MINI, 2, 0)
    store = torch.zeros(3, 2, codec.payload_bytes + 32, dtype=torch.uint8)
    page = store[:, :, 16:-16]
    codec.encode(k, v, page[1])
    assert (store[:, :, :16] == 0).all() and (store[:, :, -16:] == 0).all()
    scratch = torch.full((180, 2, 64), torch.nan)
    rotary = rotary_table([0, 0, 0], 6, 10, 64)
    codec.materialise(
        page, torch.tensor([1], dtype=torch.int32), rotary, scratch.transpose(0, 1), scratch.transpose(0, 1).clone()
    )
    assert not scratch.isnan().any()


def test_mixed_codec_uses_one_for_keys_and_one_for_values() -> None:
    codec = make_codec("k=bf16, v=fp32", MINI)
    assert codec.bits_per_element == 24.0


def test_unknown_names_are_helped() -> None:
    with pytest.raises(ConfigError, match="did you mean 'bf16'"):
        make_codec("bf61", MINI)
    with pytest.raises(ConfigError, match="did you mean 'int4'"):
        make_codec("INT4", MINI)
    with pytest.raises(ConfigError, match="unknown codec 'zzz': Known: bf16"):
        make_codec("zzz", MINI)
    with pytest.raises(ConfigError, match="k=NAME,v=NAME"):
        make_codec("k=bf16", MINI)


def test_wrong_arguments_are_named() -> None:
    codec = make_codec("bf16", MINI)
    k, v = random_kv(MINI, 2, 0)
    page = torch.zeros(2, codec.payload_bytes, dtype=torch.uint8)
    with pytest.raises(ConfigError, match=r"\[180, heads, 64\]"):
        codec.encode(k[:77], v[:77], page)
    with pytest.raises(ConfigError, match="multiples of 16"):
        codec.encode(k, v, torch.zeros(2, codec.payload_bytes + 8, dtype=torch.uint8)[:, 8:])
    out = torch.zeros(2, 180, 64)
    with pytest.raises(ConfigError, match="int32"):
        codec.materialise(page[None], torch.tensor([0]), rotary_table([0, 1, 2], 6, 10, 64), out, out)
    with pytest.raises(ConfigError, match="rotary"):
        codec.materialise(page[None], torch.tensor([0], dtype=torch.int32), rotary_table([0], 6, 10, 64), out, out)


@pytest.mark.parametrize("bits", [1, 2, 3, 4, 8])
def test_codes_pack_and_unpack(bits: int) -> None:
    codes = torch.randint(0, 2**bits, (3, 5, 48), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    packed = pack_codes(codes, bits)
    assert packed.shape == (3, 5, 48 * bits // 8)
    assert torch.equal(unpack_codes(packed, bits), codes)
