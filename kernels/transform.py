"""The project's own transform codec, `tc2`, `tc3` and `tc4`: 2.33, 3 and 4 bits an element, as pictures are coded.

Neighbouring tokens of a video look alike. A block's tokens are cut into tiles of neighbours in time, height and width
(3 x 5 x 4 of 3 x 30 x 52, 3 x 3 x 5 of 3 x 6 x 10), and a cosine transform turns each channel of a tile into
frequencies, most of which are small. The larger a coefficient is to be expected, the more bits it gets, none to 6 each,
so that bits go where they take away most error (reverse water-filling; the same idea with calibrated principal
components instead of cosines: KV Cache Transform Coding, arXiv 2511.01815). What is to be expected is stored as well: a
power of two for each channel and one for each frequency of a head's block; their sum says how many bits.

    y = DCT of x - mean over the tokens of a tile
    y[f, c] = gain of the tile * sigma[f, c] * step(b) * (code - (2^b - 1) / 2),   b = depth[f, c]
    sigma[f, c] = unit * 2^(-(row[f] + fall[c]) / 2)

    section of one head:   | codes: K tiles of whole bytes | channels: D x u16 | rows: F x u8 | gains: K x e4m3 |
                           | unit: f32 | plan: i32 x 2 |

Codes of a tile follow one another without gaps, frequency by frequency, each as wide as its depth, little-endian.
Depths follow from the exponents alone: all pairs (exponent, one more bit) stand in one fixed order, by the error that
the bit takes away; the first `plan[0]` pairs have their bit, and of the coefficients of the next pair those before
`plan[1]`, so that a tile's bytes are full. A channel's 16 bits are its mean, a float16 short of 4 bits, and its fall.

Values get two thirds of a bit more than keys: on mini's, that is worth 0.4 dB or nothing, by the world.

Shape legend: T tokens, H heads, D head dim, K tiles, F tokens of a tile, and as many frequencies.
"""

from __future__ import annotations

import math
from functools import cache

import torch
from torch import Tensor

from longtake.kernels.codec import BlockGeometry, Side
from longtake.kernels.errors import ConfigError
from longtake.kernels.grid import FP8, to_fp8
from longtake.kernels.head_dims import HEAD_DIMS
from longtake.kernels.layout import Field, Layout
from longtake.kernels.rotary import Rotary
from longtake.kernels.scaling import Scaling
from longtake.kernels.tensor_codec import HeadwiseCodec, TensorCodec

MEAN_BITS = {"tc2": 2.33, "tc3": 3.0, "tc4": 4.0}
VALUES_MORE = 1 / 3  # bits that values have above the mean, and keys below it
MOST_TILE_TOKENS = 64
MOST_FALL, MOST_ROW, MOST_DEPTH = 15, 31, 6
DEEPEST = 7  # that codes may have at all, for who asks for it
TINY = 1e-20
MOST_MEAN = 32752.0  # half of what a float16 can be

# Best uniform quantiser of a unit Gaussian with 1 to 6 bits: step and mean squared error (Max, 1960). With 7 bits the
# step is a fifth above the best one: exponents are alike for a row and a column, and what is larger than they say is
# cut off, which at such a depth would be most of the error.
STEPS = (0.0, 1.5958, 0.9957, 0.5860, 0.3352, 0.1881, 0.1041, 0.0682)
ERRORS = (1.0, 0.3634, 0.1188, 0.03744, 0.01154, 0.003495, 0.00104, 0.00039)


class TransformCodec(HeadwiseCodec):
    """Cosine transform over tiles of tokens, and bits where they count.

    Args:
        geometry: the block; without a grid its tokens are taken for a line.
        bits: an element, everything counted, that are not to be exceeded (small blocks do, by their header).
        num_bytes: of a section, a multiple of 16, instead of ``bits``: what no tile gets of them is zero.
        most_depth: bits of a code, at most; up to DEEPEST.

    Raises:
        ConfigError: a section of ``num_bytes`` does not hold a block's header and a byte a tile.
    """

    def __init__(
        self,
        geometry: BlockGeometry,
        bits: float = 0.0,
        *,
        num_bytes: int | None = None,
        most_depth: int = MOST_DEPTH,
    ) -> None:
        super().__init__(geometry)
        self.most_depth = most_depth
        tokens, dim = geometry.num_tokens, geometry.head_dim
        self.extent = (1, 1, tokens)
        if geometry.grid is not None:
            self.extent = (tokens // (geometry.grid[0] * geometry.grid[1]), *geometry.grid)
        self.tile = tile_of(self.extent)
        self.tile_tokens = math.prod(self.tile)
        self.num_tiles = tokens // self.tile_tokens
        budget = bits * tokens * dim / 8 if num_bytes is None else num_bytes
        header = self._layout(0).num_bytes
        most = most_depth * self.tile_tokens * dim // 8 - 1  # all codes as wide as can be, but for some bits
        self.layout = self._layout(max(1, min(most, int((budget - header) / self.num_tiles))))
        while self.layout.num_bytes > budget and self.tile_bytes > 1:
            self.layout = self._layout(self.tile_bytes - 1)
        if num_bytes is not None:
            if self.layout.num_bytes > num_bytes:
                least = self.layout.num_bytes
                raise ConfigError(f"{tokens} tokens x {dim} take {least} bytes at least: {num_bytes} are too few.")
            self.layout = self._layout(self.tile_bytes, num_bytes)

    def _layout(self, tile_bytes: int, num_bytes: int | None = None) -> Layout:
        self.tile_bytes = tile_bytes
        dim = self.geometry.head_dim
        return Layout(
            Field(name="codes", dtype=torch.uint8, shape=(self.num_tiles, tile_bytes)),
            Field(name="channels", dtype=torch.int16, shape=(dim,)),
            Field(name="rows", dtype=torch.uint8, shape=(self.tile_tokens,)),
            Field(name="gains", dtype=FP8, shape=(self.num_tiles,)),
            Field(name="unit", dtype=torch.float32, shape=(1,)),
            Field(name="plan", dtype=torch.int32, shape=(2,)),
            num_bytes=num_bytes,
        )

    @property
    def has_kernels(self) -> bool:
        return self.geometry.head_dim in HEAD_DIMS and self.tile_tokens > 1

    def pack_by_kernels(self, x_THD: Tensor, out_HB: Tensor) -> None:
        from longtake.kernels import transform_encode_triton

        transform_encode_triton.encode((x_THD,), out_HB, (self,))

    def pack_pair_into(self, other: TensorCodec, x_THD: Tensor, y_THD: Tensor, out_HB: Tensor) -> None:
        alike = self.has_kernels and x_THD.is_cuda and x_THD.dtype == y_THD.dtype and self.geometry == other.geometry
        if not alike or not isinstance(other, TransformCodec) or self.most_depth != other.most_depth:
            super().pack_pair_into(other, x_THD, y_THD, out_HB)
            return
        from longtake.kernels import transform_encode_triton

        transform_encode_triton.encode((x_THD, y_THD), out_HB, (self, other))

    def unpack_by_kernels(
        self, sections_GHB: Tensor, slots_N: Tensor, rotary: Rotary | None, out_HXD: Tensor, scaling: Scaling | None
    ) -> None:
        from longtake.kernels import transform_triton

        transform_triton.materialise(sections_GHB, slots_N, rotary, out_HXD, self, scaling)

    def pack_head(self, x_TD: Tensor, payload_B: Tensor) -> None:
        self.fit_head(x_TD, payload_B)
        self.quantise_head(x_TD, payload_B)

    def fit_head(self, x_TD: Tensor, payload_B: Tensor) -> None:
        """Write channels, rows, unit and plan."""
        view = self.layout.view
        mean = short_float(x_TD.mean(0))
        energy = self._coefficients(x_TD, mean).square()
        spread = energy.mean((0, 1)).sqrt()
        largest = spread.max()
        fall = _exponent(spread / largest.clamp(min=TINY), MOST_FALL)
        relative_D = torch.exp2(-fall.float())
        height_F = (energy / relative_D).mean((0, 2)).sqrt()
        row = _exponent(height_F / height_F.max().clamp(min=TINY), MOST_ROW)
        view(payload_B, "channels").copy_(mean | fall.to(torch.int16))
        view(payload_B, "rows").copy_(row)
        view(payload_B, "unit").copy_(height_F.max())
        view(payload_B, "plan").copy_(plan(row.unsqueeze(-1) + fall, 8 * self.tile_bytes, self.most_depth))

    def quantise_head(self, x_TD: Tensor, payload_B: Tensor) -> None:
        """Write gains and codes, given what `fit_head` wrote."""
        view = self.layout.view
        channels = view(payload_B, "channels")
        exponent_FD = view(payload_B, "rows").long().unsqueeze(-1) + (channels & 15)
        depth_FD = depths(exponent_FD, view(payload_B, "plan"), self.most_depth)
        sigma_FD = view(payload_B, "unit") * torch.exp2(-0.5 * exponent_FD)
        y_KFD = self._coefficients(x_TD, channels & -16) * _inverse(sigma_FD)
        gain = to_fp8(y_KFD.square().mean((1, 2)).sqrt())
        view(payload_B, "gains").copy_(gain)
        steps_KFD = steps(x_TD.device)[depth_FD] * gain.float().view(-1, 1, 1)
        half = torch.exp2(depth_FD.float() - 1)
        codes_KFD = torch.floor(y_KFD * _inverse(steps_KFD) + half).clamp(min=0).minimum(2 * half - 1)
        view(payload_B, "codes").copy_(pack_stream(codes_KFD, depth_FD, self.tile_bytes))

    def _coefficients(self, x_TD: Tensor, mean: Tensor) -> Tensor:
        """Of tokens less the mean, whose bits are given: float32 [K, F, D]."""
        return self.cosines(x_TD.device) @ self._tiles(x_TD - mean.view(torch.float16).float())

    def unpack(self, section_B: Tensor) -> Tensor:
        view = self.layout.view
        channels = view(section_B, "channels")
        mean = (channels & -16).view(torch.float16).float()
        exponent_FD = view(section_B, "rows").long().unsqueeze(-1) + (channels & 15).unsqueeze(-2)
        depth_FD = depths(exponent_FD, view(section_B, "plan"), self.most_depth)
        steps_FD = steps(section_B.device)[depth_FD] * torch.exp2(-0.5 * exponent_FD)
        steps_FD = steps_FD * view(section_B, "unit").unsqueeze(-1)
        codes_KFD = unpack_stream(view(section_B, "codes"), depth_FD)
        middle_FD = torch.exp2(depth_FD.float() - 1) - 0.5
        y_KFD = (codes_KFD - middle_FD.unsqueeze(-3)) * steps_FD.unsqueeze(-3)
        y_KFD = y_KFD * view(section_B, "gains").float()[..., None, None]
        return self._untile(self.cosines(section_B.device).T @ y_KFD) + mean.unsqueeze(-2)

    def cosines(self, device: torch.device) -> Tensor:
        """The transform of a tile, float32 [F, F]: frequencies by tokens."""
        return _cosines(self.tile, device)

    def _tiles(self, x_TD: Tensor) -> Tensor:
        """Tokens [T, D] -> tiles [K, F, D]."""
        (a, b, c), (t, y, x) = self.extent, self.tile
        split = x_TD.reshape(a // t, t, b // y, y, c // x, x, -1)
        return split.permute(0, 2, 4, 1, 3, 5, 6).reshape(self.num_tiles, self.tile_tokens, -1)

    def _untile(self, x_KFD: Tensor) -> Tensor:
        """Tiles [..., K, F, D] -> tokens [..., T, D]."""
        (a, b, c), (t, y, x) = self.extent, self.tile
        split = x_KFD.reshape(-1, a // t, b // y, c // x, t, y, x, x_KFD.shape[-1])
        return split.permute(0, 1, 4, 2, 5, 3, 6, 7).reshape(*x_KFD.shape[:-3], a * b * c, -1)


def tile_of(extent: tuple[int, int, int]) -> tuple[int, int, int]:
    """The tile of at most 64 tokens that divides a block's frames, rows and columns and is long every way.

    Of what a transform over endlessly many like neighbours gains, one over n of them lacks about one n-th: the sum of
    the sides' reciprocals is to be small.
    """
    sides = [[n for n in range(1, size + 1) if size % n == 0] for size in extent]
    fitting = [(t, y, x) for t in sides[0] for y in sides[1] for x in sides[2] if t * y * x <= MOST_TILE_TOKENS]
    return min(fitting, key=lambda tile: (sum(1 / n for n in tile), tile))


@cache  # tables stay: recorded passes read them
def _cosines(tile: tuple[int, int, int], device: torch.device) -> Tensor:
    """The orthonormal cosine transform (DCT-II) over a tile, float32 [F, F]: frequencies by tokens."""
    matrix = torch.ones(1, 1, dtype=torch.float64)
    for n in tile:
        index = torch.arange(n, dtype=torch.float64)
        one = torch.cos(math.pi / n * (index + 0.5) * index.unsqueeze(-1)) * math.sqrt(2 / n)
        one[0] /= math.sqrt(2)
        matrix = torch.kron(matrix, one)
    return matrix.float().to(device)


def short_float(x: Tensor) -> Tensor:
    """Round to a float16 whose last 4 bits are 0; its bits, int16."""
    bits = x.clamp(-MOST_MEAN, MOST_MEAN).half().view(torch.int16)
    return (bits + 8) & -16


def _exponent(x: Tensor, most: int) -> Tensor:
    """How often x in 0 .. 1 halves its square: int64 of 0 .. most."""
    return torch.floor(-2 * torch.log2(x.clamp(min=TINY)) + 0.5).clamp(0, most).long()


def _inverse(x: Tensor) -> Tensor:
    return torch.where(x > 0, 1.0 / x, torch.zeros_like(x))


@cache
def _order(device: torch.device, most_depth: int) -> tuple[Tensor, Tensor]:
    """All pairs of an exponent and one more bit, most error taken away first.

    Returns:
        The exponent of each pair, int64 [P], P = most_depth N pairs of N exponents, and the bits of each exponent once
        0 .. P pairs have theirs, uint8 [P + 1, N].
    """
    count = MOST_FALL + MOST_ROW + 1
    worth = [math.log2(ERRORS[bit] - ERRORS[bit + 1]) for bit in range(most_depth)]
    pairs = sorted(((n, bit) for n in range(count) for bit in range(most_depth)), key=lambda p: p[0] - worth[p[1]])
    exponent_P = torch.tensor([n for n, _ in pairs])
    bits = torch.zeros(len(pairs) + 1, count, dtype=torch.int64)
    bits[1:] = torch.nn.functional.one_hot(exponent_P, count).cumsum(0)
    return exponent_P.to(device), bits.to(torch.uint8).to(device)


def depth_table(device: torch.device, most_depth: int = MOST_DEPTH) -> Tensor:
    """Bits of each exponent, 0 .. 46, once 0 .. 282 pairs (with 6 bits at most) have theirs: uint8 [283, 47]."""
    return _order(device, most_depth)[1]


@cache
def pair_exponents(device: torch.device, most_depth: int = MOST_DEPTH) -> Tensor:
    """Exponents of the pairs in their order, int32 [282] with 6 bits at most."""
    return _order(device, most_depth)[0].int()


@cache
def steps(device: torch.device) -> Tensor:
    """`STEPS`, float32 [8]."""
    return torch.tensor(STEPS, device=device)


def plan(exponent_FD: Tensor, num_bits: int, most_depth: int = MOST_DEPTH) -> Tensor:
    """What says which coefficient has how many bits, given that a tile has `num_bits`: int32 [2]."""
    exponent_P, _ = _order(exponent_FD.device, most_depth)
    flat = exponent_FD.flatten()
    counts = torch.zeros(MOST_FALL + MOST_ROW + 1, dtype=torch.int64, device=flat.device)
    counts = counts.scatter_add(0, flat, torch.ones_like(flat))
    spent_P = counts[exponent_P].cumsum(0)
    whole = (spent_P <= num_bits).sum()
    left = num_bits - torch.where(whole > 0, spent_P.take((whole - 1).clamp(min=0)), 0)
    following = exponent_P.take(whole.clamp(max=len(exponent_P) - 1))  # an index would make the host wait
    before = ((flat == following).cumsum(0) <= left).sum()
    return torch.stack((whole, before)).int()


def depths(exponent_FD: Tensor, plan_2: Tensor, most_depth: int = MOST_DEPTH) -> Tensor:
    """Bits of each coefficient, int64 [..., F, D], 0 .. most_depth; a section's plan [..., 2]."""
    table = depth_table(exponent_FD.device, most_depth)
    whole, before = plan_2[..., :1, None].long(), plan_2[..., 1:, None]
    index_FD = torch.arange(exponent_FD.shape[-2] * exponent_FD.shape[-1], device=exponent_FD.device)
    num_pairs = whole + (index_FD.view(exponent_FD.shape[-2:]) < before)
    return table[num_pairs.clamp(0, len(table) - 1), exponent_FD].long()


def _starts(depth_FD: Tensor) -> Tensor:
    """The bit at which each code of a tile begins, int64 [..., F*D]."""
    flat = depth_FD.flatten(-2)
    return flat.cumsum(-1) - flat


def pack_stream(codes_KFD: Tensor, depth_FD: Tensor, num_bytes: int) -> Tensor:
    """Codes (whole numbers of any dtype) one after another, uint8 [K, num_bytes]."""
    codes, start, depth = codes_KFD.flatten(1).int(), _starts(depth_FD), depth_FD.flatten()
    bits = torch.zeros(codes.shape[0], 8 * num_bytes + 1, dtype=torch.int32, device=codes.device)
    for bit in range(DEEPEST):
        place = torch.where(depth > bit, start + bit, 8 * num_bytes)  # one past the end: for what is not so wide
        bits.scatter_(1, place.expand(codes.shape), (codes >> bit) & 1)
    bits = bits[:, :-1]
    weight = 2 ** torch.arange(8, dtype=torch.int32, device=codes.device)
    stream: Tensor = (bits.unflatten(1, (num_bytes, 8)) * weight).sum(-1)
    return stream.to(torch.uint8)


def unpack_stream(stream_KB: Tensor, depth_FD: Tensor) -> Tensor:
    """Undo `pack_stream` for sections: uint8 [..., K, B], depths [..., F, D] -> float32 [..., K, F, D]."""
    start, depth = _starts(depth_FD).unsqueeze(-2), depth_FD.flatten(-2).unsqueeze(-2)
    byte = (start >> 3).expand(*stream_KB.shape[:-1], -1)
    low = stream_KB.gather(-1, byte.clamp(max=stream_KB.shape[-1] - 1)).int()
    high = stream_KB.gather(-1, (byte + 1).clamp(max=stream_KB.shape[-1] - 1)).int()
    codes = ((low | (high << 8)) >> (start & 7)) & ((1 << depth) - 1)
    values: Tensor = codes.float().unflatten(-1, depth_FD.shape[-2:])
    return values


def tensor_codec(name: str, geometry: BlockGeometry, side: Side) -> TensorCodec:
    """Make `tc2`, `tc3` or `tc4` for keys or values."""
    more = VALUES_MORE if side is Side.V else -VALUES_MORE
    return TransformCodec(geometry, MEAN_BITS[name] + more)
