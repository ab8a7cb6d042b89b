"""Figures of the kernels on one device: `longtake bench attention --json FILE`.

For each number of history blocks and each kind of input: attention by cuDNN over dense bfloat16 keys and values, and,
for each codec, encoding of one block, materialise, materialise + attend (and its ratio to dense attention), the same in
chunks merged by log-sum-exp, and the error of the attention output against dense attention; then each way to attend
beside that, in FP8 and by FlashAttention-3: materialise, attention, both, what they take relative to dense attention,
and the error that this adds relative to the codec's own. Every call is timed apart with the L2 cache overwritten before
it; medians, 10th and 90th percentiles. Nothing is asserted. Figures are written as they come; a case that fails is
listed under "failed".

--splits also times FlashAttention-3 in FP8 over exact keys and values in more and fewer splits, with the error of each;
--codecs "" leaves all codecs out. --sweep also times materialise under other tile sizes (bench_sweep.py). On a CPU
(small sizes only) the same program runs, slowly.

Shape legend: N blocks, T tokens of a block, H heads, D head dim, X = N*T rows of the scratch.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from longtake.kernels import bench_sweep, flash3, synthetic
from longtake.kernels.attention import attend, merge
from longtake.kernels.attention_path import make_path
from longtake.kernels.clock import Clock, relative_error, setting, survive
from longtake.kernels.codec import Codec, make_codec
from longtake.kernels.rotary import Rotary, apply_rotary, rotary_table
from longtake.kernels.scaling import calibrate

DEFAULT_CODECS = "bf16,int8,int4,rtn2,tc2,pc2"
SPLITS = (1, 2, 4, 8, 16, 32)
PATHS = ("fp8", "dense/flash3", "fp8/flash3")  # FlashAttention-3's where it is installed


def bound(codec: Codec, heads: int, device: torch.device) -> Codec:
    """The codec, with some basis if it wants one."""
    if not codec.wants_basis:
        return codec
    return codec.of_layer(synthetic.random_basis(1, heads, codec.geometry.head_dim, device), 0)


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """Everything one measurement needs.

    Args:
        codec: codec measured.
        k_NTHD: keys of all blocks in the compute dtype, before RoPE.
        v_NTHD: values.
        q_THD: queries of the block after them, before RoPE.
        q_HTD: the same, turned.
        own: tables of that block.
        rotary: tables of all blocks' tokens.
        k_HXD: scratch of keys.
        v_HXD: scratch of values.
    """

    codec: Codec
    k_NTHD: Tensor
    v_NTHD: Tensor
    q_THD: Tensor
    q_HTD: Tensor
    own: Rotary
    rotary: Rotary
    k_HXD: Tensor
    v_HXD: Tensor

    def encode(self, arena_GHP: Tensor, block: int) -> None:
        """Encode one block into its slot."""
        self.codec.encode(self.k_NTHD[block], self.v_NTHD[block], arena_GHP[block])

    def materialise(self, arena_GHP: Tensor, slots_N: Tensor) -> None:
        """Unpack all blocks."""
        self.codec.materialise(arena_GHP, slots_N, self.rotary, self.k_HXD, self.v_HXD)

    def read(self, arena_GHP: Tensor, slots_N: Tensor) -> Tensor:
        """Unpack all blocks, then attend."""
        self.materialise(arena_GHP, slots_N)
        return attend(self.q_HTD, self.k_HXD, self.v_HXD)[0]

    def read_chunks(self, arena_GHP: Tensor, slots_N: Tensor, chunk: int) -> Tensor:
        """Unpack `chunk` blocks at a time into the front of the scratch, attend, merge."""
        tokens = self.codec.geometry.num_tokens
        frames = tokens // self.rotary.tokens_per_frame
        out, lse = None, None
        for first in range(0, slots_N.shape[0], chunk):
            slots = slots_N[first : first + chunk]
            rows, count = slots.shape[0] * tokens, slots.shape[0]
            k, v = self.k_HXD[:, :rows], self.v_HXD[:, :rows]
            self.codec.materialise(arena_GHP, slots, self.rotary.frames(first * frames, count * frames), k, v)
            part = attend(self.q_HTD, k, v)
            out, lse = part if out is None or lse is None else merge(out, lse, *part)
        assert out is not None
        return out


def measure_codec(
    case: Case, dense_ms: float, want: Tensor, clock: Clock, chunk: int, failed: dict[str, str], label: str
) -> dict[str, Any]:
    """All figures of one codec on one input; FP8 paths that fail are left out and noted under the label."""
    blocks, _, heads, _ = case.k_NTHD.shape
    arena = torch.zeros((blocks, heads, case.codec.payload_bytes), dtype=torch.uint8, device=case.q_HTD.device)
    slots = torch.arange(blocks, dtype=torch.int32, device=arena.device)
    for block in range(blocks):
        case.encode(arena, block)
    case.k_HXD.fill_(torch.nan)
    case.v_HXD.fill_(torch.nan)
    got = case.read(arena, slots)
    encode, unpack = clock(lambda: case.encode(arena, 0)), clock(lambda: case.materialise(arena, slots))
    both, chunks = clock(lambda: case.read(arena, slots)), clock(lambda: case.read_chunks(arena, slots, chunk))
    written = 2 * case.k_HXD.numel() * case.k_HXD.element_size()
    paths: dict[str, Any] = {}
    for name in paths_here(case):
        with survive(failed, f"{label} {name}"):
            paths[name] = measure_path(case, name, (arena, slots), dense_ms, (got, want), clock)
    return {
        "bits_per_element": case.codec.bits_per_element,
        "encode_block": asdict(encode),
        "materialise": asdict(unpack),
        "materialise_write_TB_per_s": written / unpack.median_ms / 1e9,
        "materialise_read_and_write_TB_per_s": (written + arena.numel()) / unpack.median_ms / 1e9,
        "materialise_and_attend": asdict(both),
        "ratio_to_dense": both.median_ms / dense_ms,
        "chunked": asdict(chunks),
        "chunk_blocks": chunk,
        "chunked_ratio_to_dense": chunks.median_ms / dense_ms,
        "output_relative_error": relative_error(got, want),
        "paths": paths,
    }


def paths_here(case: Case) -> list[str]:
    """What can be measured here."""
    has_flash3 = flash3.available(case.q_HTD.device, case.q_HTD.shape[-1])
    return [name for name in PATHS if has_flash3 or "/" not in name]


def measure_path(
    case: Case,
    name: str,
    history: tuple[Tensor, Tensor],
    dense_ms: float,
    outputs: tuple[Tensor, Tensor],
    clock: Clock,
) -> dict[str, Any]:
    """One path over a codec's pages.

    Args:
        case: what is attended.
        name: of the path; attention is our own kernel's, or, as PATH/flash3, FlashAttention-3's.
        history: the arena and its slots.
        dense_ms: of dense attention.
        outputs: the codec's output through bfloat16, and the exact one.
        clock: times it.
    """
    got, want = outputs
    rows, tokens = case.k_HXD.shape[1], case.codec.geometry.num_tokens
    kind, _, flash = name.partition("/")
    path = make_path(kind, case.codec, want.shape[0], rows + tokens, want.dtype, want.device, use_flash3=bool(flash))

    def begin() -> None:
        path.begin(case.q_THD, case.k_NTHD[-1], case.v_NTHD[-1], case.own)

    def read() -> Tensor:
        path.write_history(*history, case.rotary)
        return path.attend(rows)[0]

    begin()
    found = read()
    unpack, attention = clock(lambda: path.write_history(*history, case.rotary)), clock(lambda: path.attend(rows))
    both = clock(read)
    # scratch bytes of the rows written: one or two for a key and for a value
    written = rows * want.shape[0] * want.shape[2] * (4 if kind == "dense" else 2)
    flop = 4 * want.shape[0] * want.shape[1] * rows * want.shape[2]
    own_error, added = relative_error(got, want), relative_error(found, got)
    return {
        "begin": asdict(clock(begin)),
        "write_own": asdict(clock(lambda: path.write_own(rows))),
        "materialise": asdict(unpack),
        "materialise_write_TB_per_s": written / unpack.median_ms / 1e9,
        "attend": asdict(attention),
        "attend_TFLOP_per_s": flop / attention.median_ms / 1e9,
        "materialise_and_attend": asdict(both),
        "ratio_to_dense": both.median_ms / dense_ms,
        "output_relative_error": relative_error(found, want),
        "fp8_difference": added,
        "error_growth": relative_error(found, want) / own_error - 1 if own_error else None,
    }


def measure_splits(
    q_HTD: Tensor, k_HXD: Tensor, v_HXD: Tensor, want: Tensor, own_tokens: int, clock: Clock
) -> list[dict[str, Any]]:
    """FlashAttention-3 in FP8 by the number of splits; scaled as the paths do it, by the last block's own tokens."""
    k_scaling, v_scaling = (calibrate(x_HXD[:, -own_tokens:].transpose(0, 1)) for x_HXD in (k_HXD, v_HXD))
    queries = flash3.quantise(q_HTD, calibrate(q_HTD.transpose(0, 1), centred=False), k_scaling)
    k8_HXD, v8_HXD = k_scaling.store(k_HXD), v_scaling.store(v_HXD)
    flop, found = 4 * q_HTD.numel() * k_HXD.shape[1], []
    chosen = flash3.fp8_splits(*q_HTD.shape, k_HXD.shape[1])
    for splits in sorted({*SPLITS, chosen}):

        def call(splits: int = splits) -> Tensor:
            return flash3.attend_fp8(queries, k8_HXD, v8_HXD, k_scaling, v_scaling, num_splits=splits)[0]

        error, timing = relative_error(call(), want), clock(call)
        rate = flop / timing.median_ms / 1e9
        found.append(
            {"splits": splits, "chosen": splits == chosen, **asdict(timing), "TFLOP_per_s": rate, "error": error}
        )
        print(
            f"{'':<11}keys {k_HXD.shape[1]:>7} splits {splits:>2}{' (chosen)' if splits == chosen else '':<9}"
            f"{timing.median_ms:8.3f} ms ({rate:.0f} TFLOP/s)  error {error:.5f}",
            file=sys.stderr,
            flush=True,
        )
    return found


def measure(
    args: argparse.Namespace, kind: str, blocks: int, clock: Clock, report: dict[str, Any], write: Callable[[], None]
) -> None:
    """Dense attention and every codec on one kind of input and one length of history, added to the report."""
    device = clock.device
    grid = synthetic.Grid(frames=args.frames, height=args.height, width=args.width)
    draw = synthetic.structured if kind == "structured" else synthetic.noise
    history = draw(grid, blocks=blocks, heads=args.heads, dim=args.dim, seed=1, device=device)
    dtype = torch.bfloat16
    k_NTHD, v_NTHD, q_THD = (x.to(dtype) for x in (history.k_NTHD, history.v_NTHD, history.q_THD))
    del history
    frames = blocks * args.frames
    rotary = rotary_table(range(frames), args.height, args.width, args.dim, device)
    own = rotary_table(range(frames, frames + args.frames), args.height, args.width, args.dim, device)
    rows = blocks * grid.num_tokens
    k_dense = apply_rotary(k_NTHD.reshape(rows, args.heads, args.dim), rotary).transpose(0, 1).contiguous()
    v_dense = v_NTHD.reshape(rows, args.heads, args.dim).transpose(0, 1).contiguous()
    q_HTD = apply_rotary(q_THD, own).transpose(0, 1)
    want, lse = attend(q_HTD, k_dense, v_dense)
    dense = clock(lambda: attend(q_HTD, k_dense, v_dense))
    flash, splits, failed = None, None, report["failed"]
    if flash3.available(device, args.dim):
        with survive(failed, f"{kind} {blocks} flash3"):
            flash = asdict(clock(lambda: flash3.attend(q_HTD, k_dense, v_dense)))
        if args.splits:
            with survive(failed, f"{kind} {blocks} splits"):
                splits = measure_splits(q_HTD, k_dense, v_dense, want, grid.num_tokens, clock)
    flop = 4 * args.heads * q_HTD.shape[1] * rows * args.dim
    result: dict[str, Any] = {
        "kind": kind,
        "blocks": blocks,
        "kv_tokens": rows,
        "dense_attend": asdict(dense),
        "dense_TFLOP_per_s": flop / dense.median_ms / 1e9,
        "dense_flash3_attend": flash,
        "fp8_flash3_splits": splits,
        "rotate_queries": asdict(clock(lambda: apply_rotary(q_THD, own))),
        "merge": asdict(clock(lambda: merge(want, lse, want, lse))),
        "codecs": {},
    }
    copy = torch.empty_like(k_dense)
    result["copy_TB_per_s"] = 2 * copy.nbytes / clock(lambda: copy.copy_(k_dense)).median_ms / 1e9
    result["fill_TB_per_s"] = copy.nbytes / clock(lambda: copy.zero_()).median_ms / 1e9
    scratch = (copy, torch.empty_like(v_dense))
    report["results"].append(result)
    write()
    for name in filter(None, args.codecs.split(";" if "=" in args.codecs else ",")):
        with survive(failed, label := f"{kind} {blocks} {name}"):
            case = Case(
                codec=bound(make_codec(name, grid.geometry(args.dim)), k_NTHD.shape[2], k_NTHD.device),
                k_NTHD=k_NTHD,
                v_NTHD=v_NTHD,
                q_THD=q_THD,
                q_HTD=q_HTD,
                own=own,
                rotary=rotary,
                k_HXD=scratch[0],
                v_HXD=scratch[1],
            )
            result["codecs"][name] = measure_codec(case, dense.median_ms, want, clock, args.chunk, failed, label)
            print(line(kind, rows, name, result), file=sys.stderr, flush=True)
        write()


def line(kind: str, rows: int, name: str, result: dict[str, Any]) -> str:
    """One codec's figures for the terminal."""
    of = result["codecs"][name]
    dense = result["dense_attend"]["median_ms"]
    fp8 = "".join(
        f"\n{'':<22}{name:<12} materialise {path['materialise']['median_ms']:7.3f}"
        f" attend {path['attend']['median_ms']:7.3f} ({path['attend_TFLOP_per_s']:.0f} TFLOP/s)"
        f"  ratio {path['ratio_to_dense']:.3f}  error {path['output_relative_error']:.5f}"
        f" (differs {path['fp8_difference']:.5f})  begin {path['begin']['median_ms']:.3f}"
        f" own {path['write_own']['median_ms']:.3f}"
        for name, path in of["paths"].items()
    )
    return (
        f"{kind:<10} kv {rows:>7} {name:<14} {of['bits_per_element']:6.3f} bits  dense {dense:7.3f} ms"
        f"  encode {of['encode_block']['median_ms']:7.3f}  materialise {of['materialise']['median_ms']:7.3f}"
        f" ({of['materialise_write_TB_per_s']:.2f} TB/s)  ratio {of['ratio_to_dense']:.3f}"
        f"  chunked {of['chunked_ratio_to_dense']:.3f}  error {of['output_relative_error']:.5f}{fp8}"
    )


def main(arguments: list[str]) -> int:
    """Measure, print a line for each codec, write JSON."""
    parser = argparse.ArgumentParser(prog="longtake bench attention", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--json", type=Path, required=True, help="where the figures go")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument(
        "--codecs", default=DEFAULT_CODECS, help="names with commas; mixed ones (k=A,v=B) with semicolons"
    )
    parser.add_argument("--blocks", default="7,28", help="lengths of history, in blocks")
    parser.add_argument("--kinds", default="noise,structured")
    parser.add_argument("--chunk", type=int, default=7, help="blocks of a chunk")
    parser.add_argument("--repeats", type=int, default=30)
    parser.add_argument("--splits", action="store_true")
    parser.add_argument("--sweep", action="store_true")
    parser.add_argument("--commit", default="", help="recorded when this is no git checkout")
    for name, value in (("frames", 3), ("height", 30), ("width", 52), ("heads", 12), ("dim", 128)):
        parser.add_argument(f"--{name}", type=int, default=value)
    args = parser.parse_args(arguments)
    clock = Clock(torch.device(args.device), args.repeats)
    report: dict[str, Any] = {
        "benchmark": "kernels",
        "setting": setting(args.commit),
        "config": {k: str(v) for k, v in vars(args).items()},
        "failed": {},
        "results": [],
    }
    args.json.parent.mkdir(parents=True, exist_ok=True)

    def write() -> None:
        args.json.write_text(json.dumps(report, indent=1) + "\n")

    for kind, blocks in itertools.product(args.kinds.split(","), args.blocks.split(",")):
        with survive(report["failed"], f"{kind} {blocks}"):
            measure(args, kind, int(blocks), clock, report, write)
    if args.sweep and clock.device.type == "cuda":
        sizes = bench_sweep.Sizes(
            grid=synthetic.Grid(frames=args.frames, height=args.height, width=args.width),
            heads=args.heads,
            dim=args.dim,
            blocks=int(args.blocks.split(",")[0]),
        )
        with survive(report["failed"], "sweep materialise"):
            report["sweep_materialise"] = bench_sweep.sweep_materialise(sizes, clock)
    write()
    return 1 if report["failed"] else 0
