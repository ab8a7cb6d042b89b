"""Codecs side by side; ``longtake bench codecs`` is the command.

For each kind of input and each codec: bits an element, the error of K and of V, the error of attention's output, and
the time to encode a block. Everything runs the plain references in float32, on a CPU if need be. Errors are norms:

    k_error, v_error   of the difference, over the norm of what varies (each channel's mean over all tokens taken away)
    output_error       of the difference of attention's output, over the norm of the exact output (fp32, dense)

Inputs: "noise" and "structured" (synthetic.py), what a caller recorded, or a .safetensors file with K/V of a model:

    k_THD, v_THD   [N*T, H, D] blocks one after the other, after norm, before RoPE
    q_THD          [T', H, D] queries after norm, before RoPE, of one block
    positions      int [latent frames of K, then of q]
    metadata       "frames" of a block, "height" and "width" of a latent frame in tokens, as decimal strings

Several such groups may be in one file, each name with a prefix of its own ("layer3.k_THD"); their errors are averaged.

Shape legend: N blocks, T tokens of a block, H heads, D head dim, X = N*T rows.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from longtake.kernels import synthetic
from longtake.kernels.attention import attend
from longtake.kernels.clock import relative_error
from longtake.kernels.codec import BlockGeometry, Codec, Rates, make_codec
from longtake.kernels.errors import ConfigError
from longtake.kernels.principal import HistoryBasis
from longtake.kernels.rotary import Rotary, apply_rotary, rotary_table


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """What one layer's attention reads, before RoPE, in float32.

    Args:
        k_NTHD: keys of N blocks.
        v_NTHD: values.
        q_THD: queries, turned to their positions.
        rotary: tables of the keys.
        grid: rows and columns of a latent frame's tokens.
        layer: of the model, where one was recorded.
    """

    k_NTHD: Tensor
    v_NTHD: Tensor
    q_THD: Tensor
    rotary: Rotary
    grid: tuple[int, int]
    layer: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One codec on one kind of input."""

    kind: str
    codec: str
    bits_per_element: float
    k_error: float
    v_error: float
    output_error: float
    encode_block_ms: float


def synthetic_sample(kind: str, grid: synthetic.Grid, *, blocks: int, heads: int, dim: int, seed: int) -> Sample:
    """Noise or structure, queries of the block after the last.

    Raises:
        ConfigError: there is no such kind.
    """
    draws = {"noise": synthetic.noise, "structured": synthetic.structured}
    if kind not in draws:
        raise ConfigError(f"{kind!r} is no kind of made-up input; use {' or '.join(draws)}")
    history = draws[kind](grid, blocks=blocks, heads=heads, dim=dim, seed=seed)
    frames = blocks * grid.frames
    own = rotary_table(range(frames, frames + grid.frames), grid.height, grid.width, dim)
    return Sample(
        k_NTHD=history.k_NTHD,
        v_NTHD=history.v_NTHD,
        q_THD=apply_rotary(history.q_THD, own),
        rotary=rotary_table(range(frames), grid.height, grid.width, dim),
        grid=(grid.height, grid.width),
    )


def load_samples(path: Path) -> list[Sample]:
    """Read K, V and Q of a model (the format is in this module's docstring).

    Raises:
        ConfigError: there is no such file, a tensor or a piece of metadata is missing, or they do not fit each other.
    """
    samples = []
    if not path.is_file():
        raise ConfigError("there is no such file.", path=path)
    with safe_open(path, framework="pt") as file:
        names, metadata = set(file.keys()), file.metadata() or {}
        prefixes = sorted(name.removesuffix("k_THD") for name in names if name.endswith("k_THD"))
        missing = [key for key in ("frames", "height", "width") if key not in metadata]
        missing += [p + n for p in prefixes for n in ("v_THD", "q_THD", "positions") if p + n not in names]
        if missing or not prefixes:
            raise ConfigError(f"the file lacks {', '.join(missing or ['k_THD'])}.", path=path)
        frames, height, width = (int(metadata[key]) for key in ("frames", "height", "width"))
        for prefix in prefixes:
            k, v, q = (file.get_tensor(prefix + name).float() for name in ("k_THD", "v_THD", "q_THD"))
            positions = file.get_tensor(prefix + "positions").tolist()
            per_frame, (_, heads, dim) = height * width, k.shape
            split = k.shape[0] // per_frame
            if k.shape[0] % (frames * per_frame) or len(positions) * per_frame != k.shape[0] + q.shape[0]:
                raise ConfigError(f"{prefix or 'the'} tensors do not fit {len(positions)} positions.", path=path)
            samples.append(
                Sample(
                    k_NTHD=k.reshape(-1, frames * per_frame, heads, dim),
                    v_NTHD=v.reshape(-1, frames * per_frame, heads, dim),
                    q_THD=apply_rotary(q, rotary_table(positions[split:], height, width, dim)),
                    rotary=rotary_table(positions[:split], height, width, dim),
                    grid=(height, width),
                )
            )
    return samples


def round_trip(codec: Codec, sample: Sample) -> tuple[Tensor, Tensor, float]:
    """Encode and materialise all blocks: k and v [H, X, D], keys turned, and the median time to encode one, in ms."""
    blocks, tokens, heads, dim = sample.k_NTHD.shape
    arena = torch.zeros((blocks, heads, codec.payload_bytes), dtype=torch.uint8)
    times = []
    for block in range(blocks):
        start = time.perf_counter()
        codec.encode(sample.k_NTHD[block], sample.v_NTHD[block], arena[block])
        times.append(1e3 * (time.perf_counter() - start))
    k_HXD, v_HXD = (torch.full((heads, blocks * tokens, dim), torch.nan) for _ in range(2))
    codec.materialise(arena, torch.arange(blocks, dtype=torch.int32), sample.rotary, k_HXD, v_HXD)
    return k_HXD, v_HXD, sorted(times)[len(times) // 2]


def exact(sample: Sample) -> tuple[Tensor, Tensor]:
    """Uncoded keys (turned) and values, [H, X, D]."""
    k_XHD, v_XHD = sample.k_NTHD.flatten(0, 1), sample.v_NTHD.flatten(0, 1)
    return apply_rotary(k_XHD, sample.rotary).transpose(0, 1), v_XHD.transpose(0, 1)


def varying(x_NTHD: Tensor) -> float:
    """Norm of what is left when each channel's mean is taken away."""
    x_XHD = x_NTHD.flatten(0, 1)
    return float((x_XHD - x_XHD.mean(0)).norm())


def measure(
    kind: str,
    name: str,
    samples: Sequence[Sample],
    num_queries: int,
    basis: HistoryBasis | None = None,
    rates: Rates = (),
) -> Row:
    """One codec over all samples of a kind; errors are averaged, the time is the median's mean.

    Codecs that turn heads do so by ``basis``, of the model whose layers were recorded, at its ``rates``; without it
    heads stay, and all layers have the same bits.
    """
    sums, bits = [0.0] * 4, 0.0
    for sample in samples:
        tokens, dim = sample.k_NTHD.shape[1], sample.k_NTHD.shape[3]
        geometry = BlockGeometry(num_tokens=tokens, head_dim=dim, grid=sample.grid)
        if basis is not None and sample.layer is not None:
            codec = make_codec(name, geometry, rates).of_layer(basis, sample.layer)
        else:
            codec = make_codec(name, geometry)
        bits += codec.bits_per_element / len(samples)
        stride = max(1, sample.q_THD.shape[0] // num_queries)
        q_HTD = sample.q_THD[::stride].transpose(0, 1)
        (k_HXD, v_HXD), (k_got, v_got, encode_ms) = exact(sample), round_trip(codec, sample)
        want, got = attend(q_HTD, k_HXD, v_HXD)[0], attend(q_HTD, k_got, v_got)[0]
        found = (
            float((k_got - k_HXD).norm()) / varying(sample.k_NTHD),
            float((v_got - v_HXD).norm()) / varying(sample.v_NTHD),
            relative_error(got, want),
            encode_ms,
        )
        sums = [total + value / len(samples) for total, value in zip(sums, found, strict=True)]
    return Row(
        kind=kind,
        codec=name,
        bits_per_element=bits,
        k_error=sums[0],
        v_error=sums[1],
        output_error=sums[2],
        encode_block_ms=sums[3],
    )


def table(rows: Sequence[Row]) -> str:
    """Rows as text, fewest bits first."""
    lines = [f"{'input':<12}{'codec':<24}{'bits':>8}{'K error':>10}{'V error':>10}{'output':>10}{'encode ms':>11}"]
    for row in sorted(rows, key=lambda r: (r.kind, r.bits_per_element, r.output_error)):
        lines.append(
            f"{row.kind:<12}{row.codec:<24}{row.bits_per_element:>8.3f}{row.k_error:>10.4f}{row.v_error:>10.4f}"
            f"{row.output_error:>10.4f}{row.encode_block_ms:>11.2f}"
        )
    return "\n".join(lines)
