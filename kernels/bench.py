"""Figures of the kernels on one device: `python -m longtake.kernels.bench --json FILE`.

For each number of history blocks and each kind of input: attention by cuDNN over dense bfloat16 keys and values, and,
for each codec, encoding of one block, materialise, materialise + attend (and its ratio to dense attention), the same in
chunks merged by log-sum-exp, and the error of the attention output against dense attention. Every call is timed apart
with the L2 cache overwritten before it; medians, 10th and 90th percentiles. Nothing is asserted.

--sweep also times materialise under other tile sizes. On a CPU (small sizes only) the same program runs, slowly.

Shape legend: N blocks, T tokens of a block, H heads, D head dim, X = N*T rows of the scratch.
"""

from __future__ import annotations

import argparse
import itertools
import json
import platform
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from longtake.kernels import synthetic
from longtake.kernels.attention import attend, merge
from longtake.kernels.codec import BlockGeometry, Codec, PairCodec, make_codec
from longtake.kernels.rotary import Rotary, apply_rotary, rotary_table

FLUSH_BYTES = 1 << 30  # many times the L2, and slow enough (0.3 ms) that launches queue up ahead of the device
DEFAULT_CODECS = "bf16,int8,int4,rtn2"


@dataclass(frozen=True, slots=True, kw_only=True)
class Timing:
    """Milliseconds of one call: median, 10th and 90th percentile of `repeats` calls."""

    median_ms: float
    p10_ms: float
    p90_ms: float
    repeats: int


def _event() -> torch.cuda.Event:
    return torch.cuda.Event(enable_timing=True)


class Clock:
    """Times calls one by one.

    Args:
        device: where they run.
        repeats: timed calls, after a fifth as many untimed ones.
    """

    def __init__(self, device: torch.device, repeats: int) -> None:
        self.device = device
        self.repeats = repeats
        self.flush = torch.empty(FLUSH_BYTES if device.type == "cuda" else 0, dtype=torch.uint8, device=device)

    def __call__(self, call: Callable[[], object]) -> Timing:
        for _ in range(max(2, self.repeats // 5)):
            call()
        times = sorted(self._cuda(call) if self.device.type == "cuda" else self._cpu(call))
        tenth = len(times) // 10
        return Timing(
            median_ms=times[len(times) // 2], p10_ms=times[tenth], p90_ms=times[-1 - tenth], repeats=len(times)
        )

    def _cuda(self, call: Callable[[], object]) -> list[float]:
        pairs = []
        for _ in range(self.repeats):
            start, stop = _event(), _event()
            self.flush.zero_()
            start.record()
            call()
            stop.record()
            pairs.append((start, stop))
        torch.cuda.synchronize()
        return [float(start.elapsed_time(stop)) for start, stop in pairs]

    def _cpu(self, call: Callable[[], object]) -> list[float]:
        times = []
        for _ in range(self.repeats):
            start = time.perf_counter()
            call()
            times.append(1e3 * (time.perf_counter() - start))
        return times


def setting(commit: str) -> dict[str, str]:
    """What the figures were measured on."""
    found: dict[str, str] = {"python": platform.python_version(), "torch": torch.__version__, "commit": commit}
    if not commit:
        call = ["git", "-C", str(Path(__file__).resolve().parent), "rev-parse", "HEAD"]
        done = subprocess.run(call, capture_output=True, text=True)
        found["commit"] = done.stdout.strip() or "unknown"
    try:
        import triton  # type: ignore[import-untyped]

        found["triton"] = triton.__version__
    except ImportError:
        found["triton"] = "none"
    if torch.cuda.is_available():
        found["device"] = torch.cuda.get_device_name()
        found["cuda"] = str(torch.version.cuda)
        found["cudnn"] = str(torch.backends.cudnn.version())
    else:
        found["device"] = platform.processor() or platform.machine()
    return found


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """Everything one measurement needs.

    Args:
        codec: codec measured.
        k_NTHD: keys of all blocks in the compute dtype, before RoPE.
        v_NTHD: values.
        q_HTD: queries, turned.
        rotary: tables of all blocks' tokens.
        k_HXD: scratch of keys.
        v_HXD: scratch of values.
    """

    codec: Codec
    k_NTHD: Tensor
    v_NTHD: Tensor
    q_HTD: Tensor
    rotary: Rotary
    k_HXD: Tensor
    v_HXD: Tensor

    def encode(self, arena_GHP: Tensor, block: int) -> None:
        """Encode one block into its slot."""
        self.codec.encode(self.k_NTHD[block], self.v_NTHD[block], arena_GHP[block], block=block, layer=0)

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


def relative_error(got: Tensor, want: Tensor) -> float:
    """Norm of the difference over the norm of what is wanted."""
    return float(((got.float() - want.float()).norm() / want.float().norm()).item())


def measure_codec(case: Case, dense_ms: float, want: Tensor, clock: Clock, chunk: int) -> dict[str, Any]:
    """All figures of one codec on one input."""
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
    }


def measure(args: argparse.Namespace, kind: str, blocks: int, clock: Clock) -> dict[str, Any]:
    """Dense attention and every codec on one kind of input and one length of history."""
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
    flop = 4 * args.heads * q_HTD.shape[1] * rows * args.dim
    result: dict[str, Any] = {
        "kind": kind,
        "blocks": blocks,
        "kv_tokens": rows,
        "dense_attend": asdict(dense),
        "dense_TFLOP_per_s": flop / dense.median_ms / 1e9,
        "rotate_queries": asdict(clock(lambda: apply_rotary(q_THD, own))),
        "merge": asdict(clock(lambda: merge(want, lse, want, lse))),
        "codecs": {},
    }
    copy = torch.empty_like(k_dense)
    result["copy_TB_per_s"] = 2 * copy.nbytes / clock(lambda: copy.copy_(k_dense)).median_ms / 1e9
    result["fill_TB_per_s"] = copy.nbytes / clock(lambda: copy.zero_()).median_ms / 1e9
    scratch = (copy, torch.empty_like(v_dense))
    for name in args.codecs.split(",") if "=" not in args.codecs else args.codecs.split(";"):
        codec = make_codec(name, BlockGeometry(num_tokens=grid.num_tokens, head_dim=args.dim))
        case = Case(
            codec=codec, k_NTHD=k_NTHD, v_NTHD=v_NTHD, q_HTD=q_HTD, rotary=rotary, k_HXD=scratch[0], v_HXD=scratch[1]
        )
        result["codecs"][name] = measure_codec(case, dense.median_ms, want, clock, args.chunk)
        print(line(kind, rows, name, result), file=sys.stderr, flush=True)
    return result


def line(kind: str, rows: int, name: str, result: dict[str, Any]) -> str:
    """One codec's figures for the terminal."""
    of = result["codecs"][name]
    dense = result["dense_attend"]["median_ms"]
    return (
        f"{kind:<10} kv {rows:>7} {name:<14} {of['bits_per_element']:6.3f} bits  dense {dense:7.3f} ms"
        f"  encode {of['encode_block']['median_ms']:7.3f}  materialise {of['materialise']['median_ms']:7.3f}"
        f" ({of['materialise_write_TB_per_s']:.2f} TB/s)  ratio {of['ratio_to_dense']:.3f}"
        f"  chunked {of['chunked_ratio_to_dense']:.3f}  error {of['output_relative_error']:.5f}"
    )


def sweep(args: argparse.Namespace, clock: Clock) -> list[dict[str, Any]]:
    """Materialise of one tensor under other tile sizes, keys and values apart; fastest first."""
    from longtake.kernels import dense_triton, rtn_triton
    from longtake.kernels.dense import DenseCodec
    from longtake.kernels.rotary_triton import Launch
    from longtake.kernels.rtn import RoundToNearest

    tokens, blocks = args.frames * args.height * args.width, int(args.blocks.split(",")[0])
    rotary = rotary_table(range(blocks * args.frames), args.height, args.width, args.dim, clock.device)
    slots = torch.arange(blocks, dtype=torch.int32, device=clock.device)
    out = torch.empty((args.heads, blocks * tokens, args.dim), dtype=torch.bfloat16, device=clock.device)
    found = []
    for name in ("bf16", "int4", "rtn2"):
        pair = make_codec(name, BlockGeometry(num_tokens=tokens, head_dim=args.dim))
        assert isinstance(pair, PairCodec)
        arena = torch.zeros((blocks, args.heads, pair.k.num_bytes), dtype=torch.uint8, device=clock.device)
        for turned, rows, heads, warps in itertools.product((rotary, None), (16, 32, 64), (1, 2, 4, 6, 12), (4, 8)):
            launch = Launch(rows=rows, heads=heads, warps=warps)
            common = (arena, slots, turned, out, tokens)
            if isinstance(pair.k, RoundToNearest):
                more = (*common, pair.k.bits, pair.k.layout.offset("grid"), None, launch)
                timing = clock(lambda more=more: rtn_triton.materialise(*more))  # type: ignore[misc]
            elif isinstance(pair.k, DenseCodec):
                plain = (*common, pair.k.dtype, None, launch)
                timing = clock(lambda plain=plain: dense_triton.materialise(*plain))  # type: ignore[misc]
            found.append({"codec": name, "rope": turned is not None, **asdict(launch), **asdict(timing)})
    found.sort(key=lambda entry: (str(entry["codec"]), str(entry["rope"]), float(str(entry["median_ms"]))))
    for _, entries in itertools.groupby(found, key=lambda entry: (entry["codec"], entry["rope"])):
        for entry in list(entries)[:4]:
            print("sweep", entry, file=sys.stderr)
    return found


def main() -> int:
    """Measure, print a line for each codec, write JSON."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--json", type=Path, required=True, help="where the figures go")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument(
        "--codecs", default=DEFAULT_CODECS, help="names with commas; mixed ones (k=A,v=B) with semicolons"
    )
    parser.add_argument("--blocks", default="7,28", help="lengths of history, in blocks")
    parser.add_argument("--kinds", default="noise,structured")
    parser.add_argument("--chunk", type=int, default=7, help="blocks of a chunk")
    parser.add_argument("--repeats", type=int, default=30)
    parser.add_argument("--sweep", action="store_true")
    parser.add_argument("--commit", default="", help="recorded when this is no git checkout")
    for name, value in (("frames", 3), ("height", 30), ("width", 52), ("heads", 12), ("dim", 128)):
        parser.add_argument(f"--{name}", type=int, default=value)
    args = parser.parse_args()
    clock = Clock(torch.device(args.device), args.repeats)
    report: dict[str, Any] = {
        "benchmark": "kernels",
        "setting": setting(args.commit),
        "config": {k: str(v) for k, v in vars(args).items()},
        "results": [
            measure(args, kind, int(blocks), clock)
            for kind, blocks in itertools.product(args.kinds.split(","), args.blocks.split(","))
        ],
    }
    if args.sweep and clock.device.type == "cuda":
        report["sweep"] = sweep(args, clock)
    args.json.parent.mkdir(parents=True, exist_ok=True)
    args.json.write_text(json.dumps(report, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
