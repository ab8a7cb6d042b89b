"""Which launch of materialise is fastest on this device, for every codec with kernels.

Variants are compiled by several processes first, into Triton's cache on disk.

Shape legend: N blocks, T tokens of a block, H heads, D head dim, X rows of the scratch.
"""

from __future__ import annotations

import itertools
import multiprocessing
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from longtake.kernels import synthetic
from longtake.kernels.attention_fp8 import fp8_scratch
from longtake.kernels.clock import Clock
from longtake.kernels.codec import PairCodec, make_codec
from longtake.kernels.dense import DenseCodec
from longtake.kernels.rotary import Rotary, rotary_table
from longtake.kernels.rtn import RoundToNearest
from longtake.kernels.scaling import Scaling, unscaled
from longtake.kernels.tensor_codec import TensorCodec
from longtake.kernels.transform import TransformCodec

if TYPE_CHECKING:
    from longtake.kernels.arena_triton import Launch
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
    (26, 64, 4, None),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Sizes:
    """What is swept.

    Args:
        grid: of a block.
        heads, dim: of the model.
        blocks: length of history.
    """

    grid: synthetic.Grid
    heads: int
    dim: int
    blocks: int


def variants(
    codec: TensorCodec, arena: Tensor, slots: Tensor, rotary: Rotary | None, out: Tensor, scaling: Scaling | None
) -> Iterator[tuple[Launch | TileLaunch, Callable[[], None]]]:
    """The codec's kernel in every variant of its launch."""
    from longtake.kernels import dense_triton, rtn_triton, transform_triton
    from longtake.kernels.arena_triton import Launch

    common = (arena, slots, rotary, out)
    if isinstance(codec, TransformCodec):
        for tiles, channels, warps, registers in TILE_LAUNCHES:
            tile_launch = transform_triton.TileLaunch(tiles=tiles, channels=channels, warps=warps, registers=registers)
            yield tile_launch, partial(transform_triton.materialise, *common, codec, scaling, tile_launch)
        return
    for rows, heads, warps in MATERIALISE_LAUNCHES:
        launch = Launch(rows=rows, heads=heads, warps=warps)
        if isinstance(codec, RoundToNearest):
            yield launch, partial(rtn_triton.materialise, *common, codec, scaling, launch)
        else:
            assert isinstance(codec, DenseCodec)
            yield launch, partial(dense_triton.materialise, *common, codec, scaling, launch)


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
        pair.k.pack_into(noise_THD, page_HB)
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
    names = ("rtn2", "tc2")
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(NUM_COMPILERS, mp_context=context) as pool:
        jobs = [pool.submit(compile_materialise, sizes, n, part) for n in names for part in range(NUM_COMPILERS)]
        for job in jobs:
            job.result()
    found: list[dict[str, Any]] = []
    for name in names:
        for target, launch, call in materialise_calls(sizes, name, sizes.blocks, clock.device):
            found.append({"codec": name, "target": target, **asdict(launch), **asdict(clock(call))})
    found.sort(key=lambda entry: (entry["codec"], entry["target"], entry["median_ms"]))
    for _, entries in itertools.groupby(found, key=lambda entry: (entry["codec"], entry["target"])):
        for entry in list(entries)[:3]:
            print("sweep materialise", entry, file=sys.stderr, flush=True)
    return found
