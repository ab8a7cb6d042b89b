"""Every Triton kernel in the variants that are used: what `compile_check` compiles."""

# Triton has no type stubs.
# mypy: disable-error-code="import-untyped, no-untyped-call"
from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
import triton.language as tl

from longtake.kernels import (
    arena_triton,
    attention_fp8_triton,
    attention_triton,
    dense_triton,
    exchange_triton,
    fp8_rows_triton,
    norm_silu_triton,
    principal_triton,
    rotary_triton,
    rtn_triton,
    scaling_triton,
    transform_encode_triton,
    transform_triton,
    vae_layers_triton,
)
from longtake.kernels.codec import BlockGeometry
from longtake.kernels.transform import DEEPEST, MOST_DEPTH, TransformCodec

ARENA = {
    "pages": "*u8",
    "slots": "*i32",
    "temporal": "*fp32",
    "spatial": "*fp32",
    "out": "*bf16",
    "centre": "*fp32",
    "scale": "*fp32",
    "stride_slot": "i64",
    "stride_page": "i32",
    "stride_oh": "i32",
    "stride_ox": "i32",
    "stride_od": "i32",
    "tokens": "i32",
    "tokens_per_frame": "i32",
}
ROWS = arena_triton.DEFAULT_LAUNCH.rows
UNALIGNED = (
    "tokens",
    "tokens_per_frame",
    "num_heads",
    "num_keys",
    "num_queries",
    "first_row",
    "rows",
    "tiles",
    "height",
    "width",
    "num_pixels",
    "rank",
    "rows_a_gate",
    "rows_a_group",
    "frames",
    "sampled",
    "stride",
    "softmax_scale",
    "k_tile_bytes",
    "v_tile_bytes",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """One variant of a kernel.

    Args:
        name: shown in the report.
        kernel: the jitted function.
        types: Triton's type of every run-time argument.
        constants: value of every compile-time argument.
        options: num_warps and the like.
        local: bytes it may spill; only for what is spilled outside the main loop.
    """

    name: str
    kernel: Any
    types: dict[str, str]
    constants: dict[str, Any]
    options: dict[str, Any] = field(default_factory=dict)
    local: int = 0


def cases() -> Iterator[Case]:
    """Every kernel, in the variants that are used."""
    for dim, pairs in ((64, 12), (128, 22)):
        tokens = 4680 if dim == 128 else 180
        yield Case(
            name=f"rotate {dim}",
            kernel=rotary_triton.rotate_kernel,
            types={"x": "*bf16", "y": "*bf16", "temporal": "*fp32", "spatial": "*fp32", "out": "*bf16",
                   **sides("xy", "stride_t", "stride_h"), "tokens": "i32", "tokens_per_frame": "i32",
                   "num_heads": "i32"},
            constants={"D": dim, "PT": pairs, "HEADS": 4, "ROWS": ROWS},
        )  # fmt: skip
        for sums in ("bf16", "fp32"):
            yield Case(
                name=f"merge {dim} {sums}",
                kernel=attention_triton.merge_kernel,
                types={"out_a": f"*{sums}", "lse_a": "*fp32", "out_b": "*bf16", "lse_b": "*fp32", "out": f"*{sums}",
                       "lse": "*fp32", "stride_ah": "i32", "stride_at": "i32", "stride_bh": "i32", "stride_bt": "i32",
                       "num_queries": "i32"},
                constants={"D": dim, "ROWS": attention_triton.MERGE_ROWS},
            )  # fmt: skip
        yield Case(
            name=f"restore {dim}",
            kernel=attention_triton.restore_kernel,
            types={"out": "*bf16", "lse": "*fp32", "centre": "*fp32", "shift": "*fp32", "stride_oh": "i32",
                   "stride_ot": "i32", "num_queries": "i32"},
            constants={"D": dim, "ROWS": attention_triton.RESTORE_ROWS},
        )  # fmt: skip
        for turned in (pairs, 0):
            what = "k" if turned else "v"
            for types, target, fp8 in outputs(what, dim):
                yield Case(
                    name=f"bf16 materialise {what} {dim}{target}",
                    kernel=dense_triton.materialise_kernel,
                    types=types,
                    constants={"D": dim, "PT": turned, "STORED": tl.bfloat16, "HEADS": 4, "ROWS": ROWS, **fp8},
                )
                for bits in (2, 4, 8):
                    yield Case(
                        name=f"rtn{bits} materialise {what} {dim}{target}",
                        kernel=rtn_triton.materialise_kernel,
                        types=types,
                        constants={"D": dim, "PT": turned, "BITS": bits, "GRID_OFFSET": tokens * dim * bits // 8,
                                   "HEADS": 4, "ROWS": ROWS, **fp8},
                    )  # fmt: skip
        for bits in (2, 4, 8):
            yield Case(
                name=f"rtn{bits} encode {dim}",
                kernel=rtn_triton.encode_kernel,
                types={"x": "*bf16", "out": "*u8", "stride_t": "i32", "stride_h": "i32", "stride_page": "i32",
                       "tokens": "i32"},
                constants={"D": dim, "BITS": bits, "GRID_OFFSET": tokens * dim * bits // 8,
                           "ROWS": rtn_triton.ENCODE_ROWS},
                options={"enable_fp_fusion": False},
            )  # fmt: skip


def sides(names: str, *strides: str) -> dict[str, str]:
    """Types of the strides of several tensors, x_stride_t and the like."""
    return {f"{name}_{stride}": "i32" for name in names for stride in strides}


def transform_cases() -> Iterator[Case]:
    """The transform codec at Wan's size and mini's, of a line of tokens in tiles of 11, and as `pc` has it.

    Its plan is read, so one number of bits stands for all.
    """
    types = ARENA | {"k": "*bf16", "v": "*bf16", "cosines": "*fp32", "energies": "*fp32", "totals": "*fp32",
                     "table": "*u8", "order": "*i32", "steps": "*fp32", "quads": "*i32"}  # fmt: skip
    types |= dict.fromkeys(("k_stride_t", "k_stride_h", "v_stride_t", "v_stride_h", "num_words", "split"), "i32")
    types |= dict.fromkeys(("k_codes", "v_codes", "k_tile_bytes", "v_tile_bytes"), "i32")
    for family, dim, tokens, grid, rotated in (
        ("tc", 64, 180, (6, 10), {"k": 12, "v": 0}),
        ("tc", 128, 4680, (30, 52), {"k": 22, "v": 0}),
        ("tc", 64, 77, None, {"line": 0}),
        ("pc", 64, 180, (6, 10), {"y": 0}),
        ("pc", 128, 4680, (30, 52), {"y": 0}),
    ):
        geometry, depth = BlockGeometry(num_tokens=tokens, head_dim=dim, grid=grid), {"tc": MOST_DEPTH, "pc": DEEPEST}
        codec = TransformCodec(geometry, 3.0, most_depth=depth[family])
        sizes, places = transform_triton.tiling(codec), transform_triton.places(codec)
        for what, pairs in rotated.items():
            for outs, target, fp8 in outputs(what, dim):
                launch = transform_triton.default_launch(scaled=fp8["SCALED"], turned=fp8["TURNED"])
                constants = {"PT": pairs, "K": codec.num_tiles, "TILES": launch.tiles, "C": launch.channels,
                             "tokens_per_frame": math.prod(grid or (tokens,)), **sizes, **places, **fp8,
                             "ALIGN": scaling_triton.token_alignment(tokens)}  # fmt: skip
                yield Case(
                    name=f"{family} materialise {what} {dim}{target}",
                    kernel=transform_triton.materialise_kernel,
                    types=types | outs,
                    constants=constants,
                    options={
                        "num_warps": launch.warps,
                        "maxnreg": launch.registers,
                        "num_stages": transform_triton.STAGES,
                    },
                    local=48,  # so that two programs fit on a processor
                )
        page = torch.empty(1, 2 * codec.num_bytes, dtype=torch.uint8)
        encode = transform_encode_triton.DEFAULT_LAUNCH
        x_THD = torch.empty(tokens, 1, dim)
        known = transform_encode_triton.sizes((x_THD, x_THD), page, (codec, codec), encode)
        for kernel, tiles, warps in (
            (transform_encode_triton.measure_kernel, encode.measure_tiles, encode.measure_warps),
            (transform_encode_triton.plan_kernel, 0, encode.plan_warps),
            (transform_encode_triton.quantise_kernel, encode.quantise_tiles, encode.quantise_warps),
        ):
            yield Case(
                name=f"{family} {kernel.__name__.removesuffix('_kernel')} {dim}{' line' * (grid is None)}",
                kernel=kernel,
                types=types | {"out": "*u8"},
                constants={name: value for name, value in known.items() if name.isupper()} | {"TILES": tiles},
                options={"num_warps": warps},
            )


def principal_cases() -> Iterator[Case]:
    """Heads that are turned back, into bfloat16 and FP8 rows with values either way, and turned for encoding."""
    for dim, pairs in ((64, 12), (128, 22)):
        for name, out, values_turned, back in (
            ("back", "bf16", False, True),
            ("back fp8", "fp8e4nv", False, True),
            ("back fp8 turned", "fp8e4nv", True, True),
            ("forth", "bf16", False, False),
        ):
            yield Case(
                name=f"pc {name} {dim}",
                kernel=principal_triton.turn_kernel,
                types={**dict.fromkeys(("x", "z", "matrix"), "*bf16"), **dict.fromkeys(("out_k", "out_v"), f"*{out}"),
                       **dict.fromkeys(("temporal", "spatial"), "*fp32" if back else "*bf16"),
                       **dict.fromkeys(("centre_k", "scale_k", "centre_v", "scale_v"), "*fp32"),
                       **dict.fromkeys(("stride_xh", "stride_xr", "stride_zh", "stride_zr"), "i32"),
                       **sides("kv", "stride_oh", "stride_ox", "stride_od"),
                       **dict.fromkeys(("first_row", "rows", "tiles"), "i32")},
                constants={"D": dim, "PT": pairs * back, "tokens_per_frame": 1560 if back else 1,
                           "SCALED": out == "fp8e4nv", "K_TURNED": False, "V_TURNED": values_turned,
                           "ROWS": principal_triton.ROWS, "ALIGN": 8, "JOINED": back, "k_stride_od": 1,
                           "v_stride_ox" if values_turned else "v_stride_od": 1},
                options={"num_warps": principal_triton.WARPS, "num_stages": principal_triton.STAGES},
            )  # fmt: skip


def outputs(what: str, dim: int) -> Iterator[tuple[dict[str, str], str, dict[str, Any]]]:
    """Types, suffix of the name and constants of materialise into bfloat16 and into FP8 rows."""
    align = 8 if dim == 128 else 4
    yield ARENA, "", {"SCALED": False, "TURNED": False, "ALIGN": align, "stride_od": 1}
    turned = what == "v"
    stride = {"stride_ox": 1} if turned else {"stride_od": 1}
    yield ARENA | {"out": "*fp8e4nv"}, " fp8", {"SCALED": True, "TURNED": turned, "ALIGN": align, **stride}


def fp8_cases() -> Iterator[Case]:
    """Attention over FP8 rows, what stores a block's own rows, and GELU before an FP8 matrix."""
    attend = {
        "q": "*bf16", "q8": "*fp8e4nv", "q_scale": "*fp32", "shift": "*fp32", "k": "*fp8e4nv", "v": "*fp8e4nv",
        "k_scale": "*fp32", "v_scale": "*fp32", "k_centre": "*fp32", "v_centre": "*fp32", "out": "*bf16",
        "lse": "*fp32", "softmax_scale": "fp32",
        **dict.fromkeys(("stride_qh", "stride_qt", "stride_kh", "stride_kx", "stride_vh", "stride_oh"), "i32"),
        **dict.fromkeys(("stride_vd", "stride_ot", "num_queries", "num_keys"), "i32"),
    }  # fmt: skip
    for dim in (64, 128):
        yield Case(
            name=f"attend {dim}",
            kernel=attention_fp8_triton.attend_kernel,
            types=attend,
            constants={"D": dim, "BM": attention_fp8_triton.ROWS, "BN": attention_fp8_triton.COLUMNS,
                       "DOT": tl.float8e4nv, "STAGES": attention_fp8_triton.STAGES},
            options={"num_warps": attention_fp8_triton.WARPS},
        )  # fmt: skip
        for by_head in (False, True):
            yield Case(
                name=f"queries {dim}{' by head' * by_head}",
                kernel=attention_fp8_triton.quantise_queries_kernel,
                types=attend,
                constants={"D": dim, "ROWS": attention_fp8_triton.QUERY_ROWS, "BY_HEAD": by_head},
            )
        for centred in (0, 2):
            yield Case(
                name=f"calibrate {dim}{' centred' * (centred > 0)}",
                kernel=scaling_triton.calibrate_kernel,
                types={**dict.fromkeys("xyz", "*bf16"), "centre": "*fp32", "scale": "*fp32", "sampled": "i32",
                       **sides("xyz", "stride_t", "stride_h"), "stride": "i32"},
                constants={"D": dim, "CENTRED": centred, "ROWS": scaling_triton.CALIBRATE_ROWS, "TARGET": 56.0,
                           "LEAST": 2.0**-4, "BITS": 7, "TINY": 1e-30, "STAGES": scaling_triton.CALIBRATE_STAGES},
                options={"num_warps": scaling_triton.CALIBRATE_WARPS},
            )  # fmt: skip
        for turned in (False, True):
            yield Case(
                name=f"store {dim}{' turned' * turned}",
                kernel=scaling_triton.store_kernel,
                types={"x": "*bf16", "y": "*bf16", "first_row": "i32", "tokens": "i32",
                       "out_x": "*fp8e4nv", "out_y": "*fp8e4nv",
                       **dict.fromkeys(("centre_x", "scale_x", "centre_y", "scale_y"), "*fp32"),
                       **sides("xy", "stride_t", "stride_h", "stride_oh", "stride_ox", "stride_od")},
                constants={"D": dim, "TURNED": turned, "ROWS": scaling_triton.STORE_ROWS, "ALIGN": 8,
                           "x_stride_od": 1, "y_stride_ox" if turned else "y_stride_od": 1},
            )  # fmt: skip
    for width in (8960, 13824, 14336):
        main, rest = fp8_rows_triton.tiles(width)
        yield Case(
            name=f"gelu and round {width}",
            kernel=fp8_rows_triton.gelu_round_rows_kernel,
            types={"x": "*bf16", "out": "*fp8e4nv", "scale": "*fp32"},
            constants={"WIDTH": width, "MAIN": main, "REST": rest, "FLOOR": 1e-12},
            options={"num_warps": fp8_rows_triton.num_warps(width)},
        )

    for width in (384, 1536, 3072, 5120):
        main, rest = fp8_rows_triton.tiles(width)
        yield Case(
            name=f"norm and round {width}",
            kernel=fp8_rows_triton.add_norm_round_rows_kernel,
            types={**dict.fromkeys(("x", "update", "added"), "*bf16"), "out": "*fp8e4nv",
                   **dict.fromkeys(("gate", "factor", "shift", "scale"), "*fp32"),
                   **dict.fromkeys(("gate_stride", "factor_stride", "shift_stride"), "i32"),
                   **dict.fromkeys(("rows_a_gate", "rows_a_group"), "i32")},
            constants={"WIDTH": width, "MAIN": main, "REST": rest, "EPS": 1e-6, "FLOOR": 1e-12, "UPDATED": True,
                       "GATED": True, "AROUND_ONE": True},
            options={"num_warps": fp8_rows_triton.num_warps(width, fp8_rows_triton.NORM_ELEMENTS_A_WARP)},
        )  # fmt: skip


def other_cases() -> Iterator[Case]:
    """What lies between the VAE's convolutions, at Wan's widths, and mini's norms; stores into other ranks' memory."""
    yield Case(
        name="spread",
        kernel=exchange_triton.spread_kernel,
        types={"x": "*i32", "buffers": "*i64", "words": "i32", "stride": "i32", "place": "i32"},
        constants={"WORDS": exchange_triton.WORDS},
    )
    yield Case(
        name="sum of ranks",
        kernel=exchange_triton.sum_kernel,
        types={"parts": "*bf16", "out": "*bf16", "elements": "i32"},
        constants={"n": 4, "ELEMENTS": exchange_triton.ELEMENTS},
    )
    for kernel, given in ((exchange_triton.to_heads_kernel, "qkv"), (exchange_triton.to_tokens_kernel, ("out",))):
        yield Case(
            name=kernel.__name__.removesuffix("_kernel").replace("_", " "),
            kernel=kernel,
            types={**dict.fromkeys(given, "*bf16"), "buffers": "*i64", "rank": "i32", "stride_t": "i32",
                   "stride_h": "i32"},
            constants={"m": 1, "F": 3, "S": 1560, "s": 390, "h": 3, "D": 128, "ROWS": exchange_triton.ROWS},
            options={"num_warps": exchange_triton.WARPS},
        )  # fmt: skip
    for channels in (24, 36, 32, 48):
        padded, rows = vae_layers_triton.tile(channels)
        yield Case(
            name=f"norm and SiLU {channels}",
            kernel=norm_silu_triton.norm_silu_kernel,
            types={"x_NC": "*bf16", "gamma_C": "*bf16", "out_NC": "*bf16", "scale": "fp32", "floor": "fp32",
                   "num_pixels": "i32"},
            constants={"C": channels, "CP": padded, "ROWS": rows},
        )  # fmt: skip
    for channels in (96, 192, 384):
        padded, rows = vae_layers_triton.tile(channels)
        sizes = {"C": channels, "CP": padded, "ROWS": rows}
        yield Case(
            name=f"norm into a buffer {channels}",
            kernel=vae_layers_triton.normed_kernel,
            types={"x_THWC": "*bf16", "bias_C": "*bf16", "gamma_C": "*bf16", "past_PHWC": "*bf16", "buffer": "*bf16",
                   "last_PHWC": "*bf16", "scale": "fp32", "floor": "fp32", "frames": "i32", "height": "i32",
                   "width": "i32"},
            constants=sizes | {"BIAS": True},
        )  # fmt: skip
        yield Case(
            name=f"border {channels}",
            kernel=vae_layers_triton.bordered_kernel,
            types={"x_THWKC": "*bf16", "bias_KC": "*bf16", "buffer": "*bf16", "height": "i32", "width": "i32"},
            constants=sizes | {"K": 2, "BIAS": True},
        )
        yield Case(
            name=f"four phases {channels}",
            kernel=vae_layers_triton.spread_kernel,
            types={"x_THWQC": "*bf16", "bias_C": "*bf16", "out": "*bf16", "height": "i32", "width": "i32"},
            constants=sizes,
        )
        yield Case(
            name=f"bias and residual {channels}",
            kernel=vae_layers_triton.add_kernel,
            types={"x_NC": "*bf16", "bias_C": "*bf16", "residual_NC": "*bf16", "num_pixels": "i32"},
            constants=sizes,
        )
