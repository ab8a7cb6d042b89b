"""What a codec promises, and how one is found by name.

A codec turns the keys and values of one block of one layer into a fixed number of bytes for each head, and back.
Payloads are self-contained: heads can be dealt to any number of ranks, blocks read in any order. Keys are encoded
before RoPE and turned when they are read.

    payload of one head:   | K section ................. | V section ................. |
                           0                             ^ a multiple of 16            P, a multiple of 16

Most codecs treat K and V alike or apart, one tensor at a time: they are TensorCodecs, and `PairCodec` joins two of
them. make_codec("k=quarot2,v=rtn4") joins any two; "rtn4+rtn2" codes the centre of each frame by the first and the
rest by the second (kernels/spatial.py).

Shape legend: T tokens of a block, H heads, D head dim, P payload bytes, G slots of an arena, N blocks read, X rows of
the scratch (X >= N*T), B bytes of one tensor's section.
"""

from __future__ import annotations

import difflib
import importlib
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING, TypeAlias

import torch
from torch import Tensor

from longtake.kernels.errors import ConfigError
from longtake.kernels.grid import FP8
from longtake.kernels.layout import ALIGNMENT_BYTES
from longtake.kernels.rotary import HeadRotary, Turns, check_heads
from longtake.kernels.scaling import Scaling
from longtake.kernels.tensor_codec import TensorCodec

if TYPE_CHECKING:
    from longtake.kernels.principal import HistoryBasis

# Quarters of a bit an element, by layer, for each of `pc2`, `pc3` and `pc4` (kernels/principal.py).
Rates: TypeAlias = tuple[tuple[int, ...], ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class BlockGeometry:
    """Size of what one payload holds.

    Args:
        num_tokens: tokens of a block (T).
        head_dim: channels of a head (D).
        grid: rows and columns of a latent frame's tokens, for codecs that look at where a token lies; None: unknown.
    """

    num_tokens: int
    head_dim: int
    grid: tuple[int, int] | None = None

    def __post_init__(self) -> None:
        if self.num_tokens < 1 or self.head_dim < 1:
            raise ConfigError(f"a block needs tokens and channels: got {self.num_tokens} x {self.head_dim}.")
        if self.grid is not None and (min(self.grid) < 1 or self.num_tokens % (self.grid[0] * self.grid[1])):
            raise ConfigError(f"a block of {self.num_tokens} tokens is no number of frames of {self.grid} tokens.")


class Side(Enum):
    """Which tensor a TensorCodec is for; some treat keys and values differently."""

    K = "k"
    V = "v"


class Codec(ABC):
    """Keys and values of one block and layer <-> bytes.

    Encoding is deterministic: the same tensors give the same bytes, in any block, layer or head. Instances are
    immutable and may be shared by threads. CUDA work goes to the current stream and does not synchronise.

    Args:
        name: what make_codec was asked for.
        geometry: the block.
    """

    name: str
    geometry: BlockGeometry

    def __init__(self, name: str, geometry: BlockGeometry) -> None:
        self.name = name
        self.geometry = geometry

    @property
    @abstractmethod
    def payload_bytes(self) -> int:
        """Bytes of one (block, layer, head), everything included; a multiple of 16."""

    @property
    def unit_bytes(self) -> int:
        """Bytes of one unit of a head's payload: storage sees a layer's page as `rows` units of each head."""
        return self.payload_bytes

    @property
    def rows(self) -> tuple[int, ...]:
        """Units of a head's payload by layer, for the codec of a whole model whose layers differ; empty: one in each.

        Such a codec is not to encode: `of_layer` has what does, with a payload of ``rows[layer] * unit_bytes``.
        """
        return ()

    @property
    def recordable(self) -> bool:
        """Whether encode and materialise issue the same work for every block and never wait: a CUDA graph's demand."""
        return False

    @property
    def bits_per_element(self) -> float:
        """Stored bits for one element of K or V."""
        return self.payload_bytes * 8 / (2 * self.geometry.num_tokens * self.geometry.head_dim)

    @property
    def wants_basis(self) -> bool:
        """Whether a model's heads are turned first, by matrices that come with it (kernels/principal.py)."""
        return False

    def of_layer(self, basis: HistoryBasis, layer: int) -> Codec:
        """The codec of one layer, which turns its heads so; itself where none are turned."""
        return self

    @abstractmethod
    def encode(self, k_THD: Tensor, v_THD: Tensor, out_HP: Tensor) -> None:
        """Write the payloads of some heads of one block and layer.

        Args:
            k_THD: [T, H, D] keys after norm, before RoPE; float32, bfloat16 or float16; any strides.
            v_THD: [T, H, D] values, likewise.
            out_HP: uint8 [H, P], last dim contiguous, rows aligned to 16 bytes: may be a page of the arena.
        """

    @abstractmethod
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
        """Write N*T rows of keys (turned to their positions) and values.

        Args:
            pages_GHP: uint8 [G, H, P], the arena; last dim contiguous, aligned to 16 bytes.
            slots_N: int32 [N] on the same device: which slots, in the order of the rows.
            rotary: tables of exactly N*T tokens, in the same order.
            k_out_HXD: [H, X, D] float32, bfloat16 or float16, last dim contiguous, or e4m3 with a scaling, channels or
                tokens contiguous; rows from N*T on are left alone.
            v_out_HXD: likewise.
            k_scaling: for e4m3 keys only: rows are stored as (key - centre) / scale.
            v_scaling: for e4m3 values only.
        """

    def _check_encode(self, k_THD: Tensor, v_THD: Tensor, out_HP: Tensor) -> None:
        tokens, dim = self.geometry.num_tokens, self.geometry.head_dim
        if k_THD.ndim != 3 or k_THD.shape != v_THD.shape or (k_THD.shape[0], k_THD.shape[2]) != (tokens, dim):
            raise ConfigError(
                f"codec {self.name} encodes K and V of shape [{tokens}, heads, {dim}]: "
                f"got {tuple(k_THD.shape)} and {tuple(v_THD.shape)}."
            )
        if out_HP.dtype != torch.uint8 or out_HP.shape != (k_THD.shape[1], self.payload_bytes):
            raise ConfigError(
                f"codec {self.name} writes uint8 [{k_THD.shape[1]}, {self.payload_bytes}]: "
                f"got {out_HP.dtype} {tuple(out_HP.shape)}."
            )
        _check_aligned(out_HP, "the page")

    def _check_materialise(
        self,
        pages_GHP: Tensor,
        slots_N: Tensor,
        rotary: Turns,
        *outs: tuple[Tensor, Scaling | None],
    ) -> None:
        tokens, dim = self.geometry.num_tokens, self.geometry.head_dim
        rows = slots_N.shape[0] * tokens
        if pages_GHP.dtype != torch.uint8 or pages_GHP.ndim != 3 or pages_GHP.shape[2] != self.payload_bytes:
            raise ConfigError(
                f"codec {self.name} reads uint8 pages [slots, heads, {self.payload_bytes}]: "
                f"got {pages_GHP.dtype} {tuple(pages_GHP.shape)}."
            )
        if slots_N.dtype != torch.int32 or slots_N.ndim != 1 or slots_N.device != pages_GHP.device:
            raise ConfigError(
                f"slots must be int32 [blocks] on {pages_GHP.device}: "
                f"got {slots_N.dtype} {tuple(slots_N.shape)} on {slots_N.device}."
            )
        if rotary.num_tokens != rows or rotary.head_dim != dim or tokens % rotary.tokens_per_frame:
            raise ConfigError(
                f"rotary tables of {rotary.num_tokens} tokens x {rotary.head_dim} do not fit "
                f"{slots_N.shape[0]} blocks of {tokens} x {dim}."
            )
        if isinstance(rotary, HeadRotary):
            check_heads(rotary, pages_GHP.shape[1])
        for out, scaling in outs:
            if out.ndim != 3 or out.shape[0] != pages_GHP.shape[1] or out.shape[1] < rows or out.shape[2] != dim:
                raise ConfigError(
                    f"the scratch must be [{pages_GHP.shape[1]} heads, >= {rows} rows, {dim}]: got {tuple(out.shape)}."
                )
            if out.stride(-1) != 1 and (out.dtype != FP8 or out.stride(1) != 1):
                raise ConfigError("the scratch's channels must be contiguous, or, in FP8, its tokens.")
            if (out.dtype == FP8) != (scaling is not None):
                raise ConfigError(f"FP8 goes with a scaling, other types without: got {out.dtype}.")
        _check_aligned(pages_GHP, "the arena")


def _check_aligned(payload: Tensor, what: str) -> None:
    strides = payload.stride()
    if strides[-1] != 1 or any(s % ALIGNMENT_BYTES for s in strides[:-1]) or payload.data_ptr() % ALIGNMENT_BYTES:
        raise ConfigError(f"{what}'s rows must be contiguous and start at multiples of {ALIGNMENT_BYTES} bytes.")


class PairCodec(Codec):
    """K by one tensor codec, V by another, one section after the other.

    Args:
        name: what make_codec was asked for.
        geometry: the block.
        k: codec of the keys.
        v: codec of the values.
    """

    def __init__(self, name: str, geometry: BlockGeometry, *, k: TensorCodec, v: TensorCodec) -> None:
        super().__init__(name, geometry)
        self.k = k
        self.v = v

    @property
    def payload_bytes(self) -> int:
        return self.k.num_bytes + self.v.num_bytes

    @property
    def recordable(self) -> bool:
        return self.k.recordable and self.v.recordable

    def encode(self, k_THD: Tensor, v_THD: Tensor, out_HP: Tensor) -> None:
        self._check_encode(k_THD, v_THD, out_HP)
        self.k.pack_pair_into(self.v, k_THD, v_THD, out_HP)

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
        split = self.k.num_bytes
        keys_GHB = pages_GHP[:, :, :split]
        if isinstance(rotary, HeadRotary):
            for head, one in enumerate(rotary.heads):
                alone = slice(head, head + 1)
                scaling = None if k_scaling is None else k_scaling.of_head(head)
                self.k.unpack_into(keys_GHB[:, alone], slots_N, one, k_out_HXD[alone], scaling)
        else:
            self.k.unpack_into(keys_GHB, slots_N, rotary, k_out_HXD, k_scaling)
        self.v.unpack_into(pages_GHP[:, :, split:], slots_N, None, v_out_HXD, v_scaling)


# name -> module of longtake.kernels whose `tensor_codec(name, geometry, side)` makes it; imported when first asked for
_FAMILIES: dict[str, str] = {
    **dict.fromkeys(("fp32", "bf16"), "dense"),
    **dict.fromkeys(("rtn2", "rtn4", "int4", "int8"), "rtn"),
    **dict.fromkeys(("kivi2", "kivi4"), "kivi"),
    **dict.fromkeys(("quarot2", "quarot4"), "quarot"),
    **dict.fromkeys(("prq2", "prq4"), "prq"),
    **dict.fromkeys(("qvg", "qvg-pro"), "qvg"),
    "budget-pca": "pca",
    **dict.fromkeys(("tc2", "tc3", "tc4"), "transform"),
    **dict.fromkeys(("turboquant2", "turboquant3", "turboquant4"), "turboquant"),
    **dict.fromkeys(("qaq2", "qaq4", "tptq2", "tptq4"), "adaptive"),
    **dict.fromkeys(("nvfp4", "fp8"), "minifloat"),
}
# name -> module whose `codec(name, geometry, rates)` makes it, for keys and values together
_JOINT: dict[str, str] = dict.fromkeys(("pc2", "pc3", "pc4"), "principal")


def codec_names() -> list[str]:
    """Every plain codec name; any two but `pc2` to `pc4` join as "k=NAME,v=NAME", and as "CENTRE+REST"."""
    return sorted([*_FAMILIES, *_JOINT])


def make_tensor_codec(name: str, geometry: BlockGeometry, side: Side) -> TensorCodec:
    """Make the codec of one tensor.

    Args:
        name: one of codec_names(), or two joined by "+".
        geometry: the block.
        side: which tensor it is for.

    Raises:
        ConfigError: as make_codec.
    """
    if "+" in name:
        spatial = importlib.import_module("longtake.kernels.spatial")
        split: TensorCodec = spatial.tensor_codec(name, geometry, side)
        return split
    if name in _JOINT:
        raise ConfigError(f"codec {name} is for keys and values together and for all of a block: write it alone.")
    if name not in _FAMILIES:
        nearest = difflib.get_close_matches(name.lower(), codec_names(), n=1)
        hint = f"did you mean {nearest[0]!r}? " if nearest else ""
        raise ConfigError(
            f"unknown codec {name!r}: {hint}Known: {', '.join(codec_names())}; or 'k=NAME,v=NAME', or 'CENTRE+REST'."
        )
    family = importlib.import_module(f"longtake.kernels.{_FAMILIES[name]}")
    make: Callable[[str, BlockGeometry, Side], TensorCodec] = family.tensor_codec
    return make(name, geometry, side)


def make_codec(name: str, geometry: BlockGeometry, rates: Rates = ()) -> Codec:
    """Make a codec by name.

    Args:
        name: one of codec_names(), for K and V alike; "k=NAME,v=NAME"; and in place of a NAME also "CENTRE+REST".
        geometry: the block.
        rates: of the model, for codecs whose bits may differ by layer; none: they are equal.

    Raises:
        ConfigError: no such codec (the nearest name is given), or it cannot hold this geometry.
    """
    if name in _JOINT:
        module = importlib.import_module(f"longtake.kernels.{_JOINT[name]}")
        joint: Codec = module.codec(name, geometry, rates)
        return joint
    key = value = name
    if "=" in name:
        parts = dict(part.partition("=")[::2] for part in name.replace(" ", "").split(","))
        if set(parts) != {"k", "v"}:
            raise ConfigError(f"codec {name!r}: a mixed codec is written 'k=NAME,v=NAME'.")
        key, value = parts["k"], parts["v"]
    k, v = make_tensor_codec(key, geometry, Side.K), make_tensor_codec(value, geometry, Side.V)
    return PairCodec(name, geometry, k=k, v=v)
