"""The project's transform codec behind a turn of each head's channels, `pc2`, `pc3` and `pc4`: 2.33, 3 and 4 bits.

    [k | v] A = [y1 | y2]        of a head, before RoPE; read back by A^-1

A cosine transform takes away what neighbouring tokens share, not what channels share; and a head's keys and values, two
views of the same tokens, share much. The matrices of a layer's heads come with the model (`longtake calibrate` makes
them, engine/basis.py reads them): they turn keys and values together to principal components, after weighing them by
what an error costs, so that an error of any component costs the same. Components are dealt in turn to two tensors of D
channels, which `tc` stores as it does keys and values, with as many bits for each, and in codes of up to 7 bits: the
largest components hold most, and with 6 they alone would say how small errors can be. Source of the idea: KV Cache
Transform Coding, arXiv 2511.01815, whose principal components are calibrated too, of K and V apart.

Layers do not count alike: with the matrices come the rates of the layers, in quarters of a bit an element. A payload of
a layer with n quarters is n units, of a quarter of a bit for each of the 2 T D elements, less what 32 does not divide:

    payload of one head:   | y1: section of tc, n / 2 units | y2: section of tc, n / 2 units |

Without rates all layers have the codec's bits, and a payload is one unit.

On a GPU some blocks at a time are unpacked by `tc`'s kernel into components, and those turned back and put in place,
with RoPE or scaled for FP8, by another (principal_triton.py).

Shape legend: L layers, H heads, T tokens of a block, D head dim, E = 2 D components, N blocks, G slots, P payload
bytes, X rows.
"""

from __future__ import annotations

import copy

import torch
from torch import Tensor

from longtake.kernels.codec import BlockGeometry, Codec, PairCodec, Rates
from longtake.kernels.errors import ConfigError
from longtake.kernels.rotary import HeadRotary, Rotary, Turns, rotate_pairs
from longtake.kernels.scaling import Scaling
from longtake.kernels.transform import DEEPEST, TransformCodec

BITS = {"pc2": 2.33, "pc3": 3.0, "pc4": 4.0}
LEAST_QUARTERS, MOST_QUARTERS = 2, 24  # of a bit an element of one layer
UNIT_ALIGNMENT = 32  # so that half a unit is a multiple of 16
BYTES_AN_ENTRY = 4  # of a table in memory: a bfloat16 there, one back
_CHUNK_ELEMENTS = 1 << 26  # components that the reference unpacks at a time


class HistoryBasis:
    """The matrices of all layers, for the heads that are kept here.

    Args:
        turn_LHEE: bfloat16 [L, H, E, E], on the device of the rollout: a row of a head's keys and values times its
            matrix is a row of components, those of y1 before those of y2.

    Raises:
        ConfigError: a matrix has no inverse.
    """

    def __init__(self, turn_LHEE: Tensor) -> None:
        self.turn_LHEE = turn_LHEE.contiguous()
        back = [torch.linalg.inv_ex(turn_HEE.double())[0].to(torch.bfloat16) for turn_HEE in turn_LHEE.cpu()]
        self.back_LHEE = torch.stack(back).to(turn_LHEE.device)
        if not self.back_LHEE.isfinite().all():
            raise ConfigError("a matrix of the model's table has no inverse; run  longtake calibrate FILM.toml")

    @property
    def num_layers(self) -> int:
        """Layers of the model."""
        return len(self.turn_LHEE)

    @property
    def num_bytes(self) -> int:
        """Bytes on the device."""
        num_bytes: int = self.turn_LHEE.nbytes + self.back_LHEE.nbytes
        return num_bytes


class PrincipalCodec(Codec):
    """The transform codec, of turned heads; of one layer once it has its basis, without it heads stay as they are.

    Args:
        name: of BITS.
        geometry: the block.
        quarters: of a bit an element, by layer; none: all layers have the bits that the name says.
    """

    def __init__(self, name: str, geometry: BlockGeometry, quarters: tuple[int, ...] = ()) -> None:
        super().__init__(name, geometry)
        self.quarters = quarters
        self.coder = TransformCodec(geometry, BITS[name], most_depth=DEEPEST)
        self._turn_HEE: Tensor | None = None
        self._back_HEE: Tensor | None = None

    @property
    def payload_bytes(self) -> int:
        if self.quarters:
            raise ConfigError(f"payloads of codec {self.name} differ by layer: ask the codec of a layer.")
        return 2 * self.coder.num_bytes

    @property
    def unit_bytes(self) -> int:
        return _unit_bytes(self.geometry) if self.quarters else self.payload_bytes

    @property
    def rows(self) -> tuple[int, ...]:
        return self.quarters

    @property
    def bits_per_element(self) -> float:
        """Stored bits for one element of K or V; of all layers, in the mean."""
        if not self.quarters:
            return super().bits_per_element
        mean_bytes = sum(self.quarters) * self.unit_bytes / len(self.quarters)
        return mean_bytes * 8 / (2 * self.geometry.num_tokens * self.geometry.head_dim)

    @property
    def recordable(self) -> bool:
        return self.coder.recordable

    @property
    def wants_basis(self) -> bool:
        return True

    def of_layer(self, basis: HistoryBasis, layer: int) -> PrincipalCodec:
        bound = self.at_rate(self.quarters[layer]) if self.quarters else copy.copy(self)
        bound._turn_HEE, bound._back_HEE = basis.turn_LHEE[layer], basis.back_LHEE[layer]
        return bound

    def at_rate(self, quarters: int) -> PrincipalCodec:
        """The codec of a layer with so many quarters of a bit, LEAST_QUARTERS or more; its basis stays."""
        bound = copy.copy(self)
        bound.quarters = ()
        section_bytes = quarters * _unit_bytes(self.geometry) // 2
        bound.coder = TransformCodec(self.geometry, num_bytes=section_bytes, most_depth=DEEPEST)
        return bound

    def encode(self, k_THD: Tensor, v_THD: Tensor, out_HP: Tensor) -> None:
        self._check_encode(k_THD, v_THD, out_HP)
        dim, by_kernels = self.geometry.head_dim, self._has_kernels(out_HP)
        if by_kernels and self._turn_HEE is not None and k_THD.dtype == v_THD.dtype and k_THD.element_size() == 2:
            from longtake.kernels import principal_triton

            y_THE = principal_triton.components(k_THD, v_THD, self._turn_HEE)
        else:
            y_HTE = torch.cat((k_THD, v_THD), dim=-1).transpose(0, 1)
            if not by_kernels:
                y_HTE = y_HTE.float()
            if self._turn_HEE is not None:
                y_HTE = turned(y_HTE, self._turn_HEE.to(y_HTE.dtype))
            y_THE = y_HTE.transpose(0, 1)
        self.coder.pack_pair_into(self.coder, y_THE[..., :dim], y_THE[..., dim:], out_HP)

    def materialise(
        self,
        pages_GHP: Tensor,
        slots_N: Tensor,
        rotary: Turns,
        k_out_HXD: Tensor,
        v_out_HXD: Tensor,
        *,
        k_scaling: Scaling | None = None,
        v_scaling: Scaling | None = None,
    ) -> None:
        self._check_materialise(pages_GHP, slots_N, rotary, (k_out_HXD, k_scaling), (v_out_HXD, v_scaling))
        keys, values = (k_out_HXD, k_scaling), (v_out_HXD, v_scaling)
        if not self._has_kernels(pages_GHP):
            self._materialise_plainly(pages_GHP, slots_N, rotary, keys, values)
        elif self._back_HEE is None:
            pair = PairCodec(self.name, self.geometry, k=self.coder, v=self.coder)
            pair.materialise(pages_GHP, slots_N, rotary, k_out_HXD, v_out_HXD, k_scaling=k_scaling, v_scaling=v_scaling)
        else:
            from longtake.kernels import principal_triton

            principal_triton.materialise(sections(pages_GHP), slots_N, rotary, keys, values, self.coder, self._back_HEE)

    def _materialise_plainly(
        self,
        pages_GHP: Tensor,
        slots_N: Tensor,
        rotary: Turns,
        keys: tuple[Tensor, Scaling | None],
        values: tuple[Tensor, Scaling | None],
    ) -> None:
        """By the reference, some blocks at a time."""
        tokens, dim = self.geometry.num_tokens, self.geometry.head_dim
        chunk = max(1, _CHUNK_ELEMENTS // (2 * tokens * dim * pages_GHP.shape[1]))
        for first in range(0, len(slots_N), chunk):
            slots = slots_N[first : first + chunk]
            rows = slice(first * tokens, (first + len(slots)) * tokens)
            y_HXE = self._components(pages_GHP, slots)
            k_HXD = self._channels(y_HXE, slice(0, dim))
            if isinstance(rotary, HeadRotary):
                pairs = zip(k_HXD, rotary.heads, strict=True)
                k_HXD = torch.stack([rotate_pairs(k_XD, part(one, rows)) for k_XD, one in pairs])
            else:
                k_HXD = rotate_pairs(k_HXD, part(rotary, rows))
            for x_HXD, (out_HXD, scaling) in ((k_HXD, keys), (self._channels(y_HXE, slice(dim, 2 * dim)), values)):
                out_HXD[:, rows].copy_(x_HXD if scaling is None else scaling.store(x_HXD))

    def _has_kernels(self, x: Tensor) -> bool:
        return x.is_cuda and self.coder.has_kernels

    def _components(self, pages_GHP: Tensor, slots_N: Tensor) -> Tensor:
        """Components of some slots' tokens, float32 [H, X, E]."""
        (_, num_heads, _), dim = pages_GHP.shape, self.geometry.head_dim
        shape = (len(slots_N) * self.geometry.num_tokens, 2 * num_heads, dim)
        y_XID = torch.empty(shape, dtype=torch.float32, device=pages_GHP.device)  # I: y1 and y2 of each head
        self.coder.unpack_into(sections(pages_GHP), slots_N, None, y_XID.transpose(0, 1), None)
        return y_XID.view(-1, num_heads, 2 * dim).transpose(0, 1)

    def _channels(self, y_HXE: Tensor, which: slice) -> Tensor:
        """Keys before RoPE, or values: [H, X, D], contiguous."""
        if self._back_HEE is None:
            return y_HXE[..., which].contiguous()
        return turned(y_HXE, self._back_HEE[..., which].to(y_HXE.dtype))


def sections(pages_GHP: Tensor) -> Tensor:
    """y1's and y2's sections of each head, [G, 2 H, P / 2]: a view, for heads follow one another."""
    slots, heads, size = pages_GHP.shape
    return pages_GHP.view(slots, 2 * heads, size // 2)


def turned(x_HTE: Tensor, matrix_HED: Tensor) -> Tensor:
    """Rows times their head's matrix; on a CPU head by head, for a batch's bits may depend on its size."""
    if x_HTE.is_cuda:
        return torch.bmm(x_HTE, matrix_HED)
    return torch.stack([x_TE @ matrix_ED for x_TE, matrix_ED in zip(x_HTE, matrix_HED, strict=True)])


def part(rotary: Rotary, rows: slice) -> Rotary:
    """The tables of some rows, whole frames."""
    first, last = rows.start // rotary.tokens_per_frame, rows.stop // rotary.tokens_per_frame
    return rotary.frames(first, last - first)


def _unit_bytes(geometry: BlockGeometry) -> int:
    """Bytes of a quarter of a bit for each element; more if LEAST_QUARTERS of them would be too few for a header."""
    nominal = geometry.num_tokens * geometry.head_dim // 16 // UNIT_ALIGNMENT * UNIT_ALIGNMENT
    least = TransformCodec(geometry).num_bytes
    needed = -(-2 * least // (LEAST_QUARTERS * UNIT_ALIGNMENT)) * UNIT_ALIGNMENT
    return max(nominal, needed)


def codec(name: str, geometry: BlockGeometry, rates: Rates = ()) -> PrincipalCodec:
    """Make `pc2`, `pc3` or `pc4`, without a basis; ``rates``: of each of them, or none."""
    return PrincipalCodec(name, geometry, rates[list(BITS).index(name)] if rates else ())
