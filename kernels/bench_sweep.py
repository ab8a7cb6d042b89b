"""Which variant of a kernel is fastest on this device: FP8 attention, and materialise of every codec with kernels.

Variants are compiled by several processes first, into Triton's cache on disk; a variant that does not compile or run is
reported and left out.

Shape legend: N blocks, T tokens of a block, H heads, D head dim, X rows of the scratch.
"""

from __future__ import annotations

import itertools
import multiprocessing
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from longtake.kernels import synthetic
from longtake.kernels.attention import attend
from longtake.kernels.attention_fp8 import Fp8Scratch, attend_fp8, fp8_scratch
from longtake.kernels.clock import Clock, relative_error
from longtake.kernels.codec import PairCodec, TensorCodec, make_codec
from longtake.kernels.dense import DenseCodec
from longtake.kernels.lt2 import LowRankTwoBit
from longtake.kernels.rotary import Rotary, rotary_table
from longtake.kernels.rtn import RoundToNearest
from longtake.kernels.scaling import Scaling, calibrate, unscaled
from longtake.kernels.transform import TransformCodec

if TYPE_CHECKING:
    from longtake.kernels.attention_fp8_triton import AttendLaunch
    from longtake.kernels.rotary_triton import Launch
    from longtake.kernels.transform_triton import TileLaunch

NUM_COMPILERS = 8
MATERIALISE_LAUNCHES = (
    (16, 4, 4),
    (32, 4, 4),
    (32, 1, 4),
    (64, 4, 4),
    (64, 1, 4),
    (64, 1, 8),
    (128, 1, 8),
    (128, 4, 8),
)
TILE_LAUNCHES = (  # of the transform codec: tiles, channels, warps, registers
    (26, 64, 8, 128),
    (13, 64, 8, 128),
    (39, 64, 8, 128),
    (26, 64, 8, None),
    (26, 128, 16, None),
    (39, 128, 16, None),
)
FINALISTS = 5


@dataclass(frozen=True, slots=True, kw_only=True)
class Sizes:
    """What is swept.

    Args:
        grid: of a block.
        heads, dim: of the model.
        blocks: lengths of history; the first is swept, the fastest variants run on the others too.
    """

    grid: synthetic.Grid
    heads: int
    dim: int
    blocks: tuple[int, ...]


def attend_variants() -> list[tuple[bool, AttendLaunch]]:
    """(values in FP8, launch) of everything that is tried."""
    from longtake.kernels.attention_fp8_triton import AttendLaunch

    tiles = ((64, 128, 4, 3), (64, 128, 4, 2), (64, 64, 4, 3), (128, 128, 8, 3), (128, 128, 8, 2), (128, 64, 4, 3))
    found = [
        (True, AttendLaunch(rows=rows, columns=columns, warps=warps, stages=stages, tma=tma))
        for (rows, columns, warps, stages), tma in itertools.product(tiles, (False, True))
    ]
    for rows, columns, warps, stages in tiles:
        found.append(
            (
                True,
                AttendLaunch(
                    rows=rows, columns=columns, warps=warps, stages=stages, tma=True, wide_sum=False, ahead=True
                ),
            )
        )
    for rows, warps, per_sm in ((64, 4, 2), (128, 8, 1)):
        plain = AttendLaunch(rows=rows, warps=warps, tma=True)
        found += [
            (True, replace(plain, wide_sum=False)),
            (True, replace(plain, programs_per_sm=per_sm)),
            (True, replace(plain, programs_per_sm=per_sm, wide_sum=False, ahead=True)),
            (True, replace(plain, warp_specialize=True)),
            (False, replace(plain, stages=2)),
            (False, replace(plain, stages=2, wide_sum=False, ahead=True)),
            (False, replace(plain, stages=2, tma=False)),
        ]
    found.append((True, AttendLaunch(columns=64, tma=True, ahead=True)))
    found.append((False, AttendLaunch(columns=64, tma=True)))
    return found


@dataclass(frozen=True, slots=True, kw_only=True)
class Rows:
    """Dense rows in FP8 and what they were made from."""

    q_HTD: Tensor
    k_XHD: Tensor
    v_XHD: Tensor
    k_scaling: Scaling
    v_scaling: Scaling
    fp8: Fp8Scratch
    bf16v: Fp8Scratch

    def attend(self, values_fp8: bool, launch: AttendLaunch) -> Tensor:
        """Attend all rows."""
        scratch = self.fp8 if values_fp8 else self.bf16v
        return attend_fp8(self.q_HTD, scratch, self.k_scaling, self.v_scaling, self.k_XHD.shape[0], launch=launch)[0]


def dense_rows(queries: int, rows: int, heads: int, dim: int, device: torch.device) -> Rows:
    """Gaussian queries, keys and values, with an offset in K."""
    g = torch.Generator(device).manual_seed(0)
    q, k, v = (
        torch.randn(n, heads, dim, generator=g, device=device, dtype=torch.bfloat16) for n in (queries, rows, rows)
    )
    k[:, :, :4] += 10
    k_scaling, v_scaling = calibrate(k), calibrate(v)
    scratches = [fp8_scratch(heads, rows, dim, device, values_fp8=fp8) for fp8 in (True, False)]
    for scratch in scratches:
        scratch.k_HXD[:, :rows] = k_scaling.store(k.transpose(0, 1))
    scratches[0].v_HXD[:, :rows] = v_scaling.store(v.transpose(0, 1))
    scratches[1].v_HXD[:, :rows] = v.transpose(0, 1)
    return Rows(
        q_HTD=q.transpose(0, 1),
        k_XHD=k,
        v_XHD=v,
        k_scaling=k_scaling,
        v_scaling=v_scaling,
        fp8=scratches[0],
        bf16v=scratches[1],
    )


def compile_variant(index: int, dim: int) -> str:
    """Run a variant once on something small, in a process of its own; "" or what went wrong."""
    values_fp8, launch = attend_variants()[index]
    try:
        dense_rows(256, 1000, 2, dim, torch.device("cuda")).attend(values_fp8, launch)
        torch.cuda.synchronize()
    except Exception as error:
        return f"{type(error).__name__}: {str(error).strip().splitlines()[-1] if str(error).strip() else ''}"[:200]
    return ""


def sweep_attend(sizes: Sizes, clock: Clock) -> list[dict[str, Any]]:
    """All variants on the first length of history, the fastest on all; fastest first."""
    variants = attend_variants()
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(NUM_COMPILERS, mp_context=context) as pool:
        failures = list(pool.map(compile_variant, range(len(variants)), itertools.repeat(sizes.dim)))
    for (values_fp8, launch), failure in zip(variants, failures, strict=True):
        if failure:
            print("sweep attend", values_fp8, launch, "failed:", failure, file=sys.stderr, flush=True)
    alive = [variant for variant, failure in zip(variants, failures, strict=True) if not failure]
    found: list[dict[str, Any]] = []
    for blocks in sizes.blocks:
        tokens = sizes.grid.num_tokens
        rows = dense_rows(tokens, blocks * tokens, sizes.heads, sizes.dim, clock.device)
        k_HXD, v_HXD = rows.k_XHD.transpose(0, 1).contiguous(), rows.v_XHD.transpose(0, 1).contiguous()
        want = attend(rows.q_HTD, k_HXD, v_HXD)[0]
        dense = clock(lambda rows=rows, k=k_HXD, v=v_HXD: attend(rows.q_HTD, k, v)).median_ms  # type: ignore[misc]
        flop = 4 * sizes.heads * tokens * blocks * tokens * sizes.dim
        here = []
        for values_fp8, launch in alive:
            got = rows.attend(values_fp8, launch)
            timing = clock(lambda rows=rows, v=values_fp8, n=launch: rows.attend(v, n))  # type: ignore[misc]
            here.append(
                {
                    "kv_tokens": blocks * tokens,
                    "values": "fp8" if values_fp8 else "bf16",
                    **asdict(launch),
                    **asdict(timing),
                    "TFLOP_per_s": flop / timing.median_ms / 1e9,
                    "ratio_to_dense": timing.median_ms / dense,
                    "relative_error": relative_error(got, want),
                }
            )
        order = sorted(range(len(here)), key=lambda i: float(here[i]["median_ms"]))
        for i in order[:8]:
            print("sweep attend", {k: v for k, v in here[i].items() if k not in ("p10_ms", "p90_ms")}, file=sys.stderr)
        found += [here[i] for i in order]
        alive = [alive[i] for i in order[:FINALISTS]]
    return found


def variants(
    codec: TensorCodec, arena: Tensor, slots: Tensor, rotary: Rotary | None, out: Tensor, scaling: Scaling | None
) -> Iterator[tuple[Launch | TileLaunch, Callable[[], None]]]:
    """The codec's kernel in every variant of its launch."""
    from longtake.kernels import dense_triton, lt2_triton, rtn_triton, transform_triton
    from longtake.kernels.rotary_triton import Launch

    common, tokens = (arena, slots, rotary, out), codec.geometry.num_tokens
    if isinstance(codec, TransformCodec):
        for tiles, channels, warps, registers in TILE_LAUNCHES:
            tile_launch = transform_triton.TileLaunch(tiles=tiles, channels=channels, warps=warps, registers=registers)
            yield tile_launch, partial(transform_triton.materialise, *common, codec, scaling, tile_launch)
        return
    for rows, heads, warps in MATERIALISE_LAUNCHES:
        launch = Launch(rows=rows, heads=heads, warps=warps)
        if isinstance(codec, RoundToNearest):
            grid = codec.layout.offset("grid")
            yield launch, partial(rtn_triton.materialise, *common, tokens, codec.bits, grid, scaling, launch)
        elif isinstance(codec, LowRankTwoBit):
            yield launch, partial(lt2_triton.materialise, *common, codec, scaling, launch)
        else:
            assert isinstance(codec, DenseCodec)
            yield launch, partial(dense_triton.materialise, *common, tokens, codec.dtype, scaling, launch)


def materialise_targets(
    sizes: Sizes, blocks: int, device: torch.device
) -> Iterator[tuple[str, Rotary | None, Tensor, Scaling | None]]:
    """Name, tables, rows and scaling: keys and values in bfloat16 and FP8."""
    grid = sizes.grid
    rows = blocks * grid.num_tokens
    rotary = rotary_table(range(blocks * grid.frames), grid.height, grid.width, sizes.dim, device)
    out = torch.empty((sizes.heads, rows, sizes.dim), dtype=torch.bfloat16, device=device)
    scratch, scaling = fp8_scratch(sizes.heads, rows, sizes.dim, device), unscaled(sizes.heads, sizes.dim, device)
    yield "k bf16", rotary, out, None
    yield "v bf16", None, out, None
    yield "k fp8", rotary, scratch.k_HXD, scaling
    yield "v fp8", None, scratch.v_HXD, scaling


def materialise_calls(
    sizes: Sizes, name: str, blocks: int, device: torch.device
) -> Iterator[tuple[str, Launch | TileLaunch, Callable[[], None]]]:
    """Target, launch and call of one codec's kernel in every variant."""
    pair = make_codec(name, sizes.grid.geometry(sizes.dim))
    assert isinstance(pair, PairCodec)
    slots = torch.arange(blocks, dtype=torch.int32, device=device)
    arena = torch.zeros((blocks, sizes.heads, pair.k.num_bytes), dtype=torch.uint8, device=device)
    noise_THD = torch.randn(sizes.grid.num_tokens, sizes.heads, sizes.dim, device=device, dtype=torch.bfloat16)
    for page_HB in arena:
        pair.k.pack_into(noise_THD, page_HB, [0] * sizes.heads)
    for target, rotary, out, scaling in materialise_targets(sizes, blocks, device):
        for launch, call in variants(pair.k, arena, slots, rotary, out, scaling):
            yield target, launch, call


def compile_materialise(sizes: Sizes, name: str, part: int) -> None:
    """Run every NUM_COMPILERS-th variant once on one block."""
    calls = materialise_calls(sizes, name, 1, torch.device("cuda"))
    for _, _, call in itertools.islice(calls, part, None, NUM_COMPILERS):
        call()
    torch.cuda.synchronize()


def sweep_materialise(sizes: Sizes, clock: Clock) -> list[dict[str, Any]]:
    """Materialise of one tensor under several tile sizes; fastest first."""
    names = ("rtn2", "lt2", "tc2")
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(NUM_COMPILERS, mp_context=context) as pool:
        jobs = [pool.submit(compile_materialise, sizes, n, part) for n in names for part in range(NUM_COMPILERS)]
        for job in jobs:
            job.result()
    found: list[dict[str, Any]] = []
    for name in names:
        for target, launch, call in materialise_calls(sizes, name, sizes.blocks[0], clock.device):
            found.append({"codec": name, "target": target, **asdict(launch), **asdict(clock(call))})
    found.sort(key=lambda entry: (entry["codec"], entry["target"], entry["median_ms"]))
    for _, entries in itertools.groupby(found, key=lambda entry: (entry["codec"], entry["target"])):
        for entry in list(entries)[:3]:
            print("sweep materialise", entry, file=sys.stderr, flush=True)
    return found
