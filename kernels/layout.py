"""Where the fields of a payload lie, and how small codes are packed into bytes.

A payload is a row of bytes that holds named fields one after another, each at a multiple of 16 bytes, so that kernels
may load 16 bytes at a time:

    | codes ............ | scales .... |pad| centroids ...... |pad|
    0                    ^ 16-aligned      ^ 16-aligned           num_bytes, a multiple of 16

Codes of `bits` bits are little-endian in a byte: with 4 bits, byte i holds code 2i in its low half and code 2i+1 in its
high half.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

ALIGNMENT_BYTES = 16


def align(num_bytes: int) -> int:
    """The next multiple of the payload alignment."""
    return -(-num_bytes // ALIGNMENT_BYTES) * ALIGNMENT_BYTES


@dataclass(frozen=True, slots=True, kw_only=True)
class Field:
    """One tensor inside a payload.

    Args:
        name: what it is.
        dtype: of its elements.
        shape: of one payload's tensor.
    """

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def num_bytes(self) -> int:
        """Bytes it takes, without padding."""
        return math.prod(self.shape) * self.dtype.itemsize


class Layout:
    """Offsets of a payload's fields; views of them in real payloads.

    Args:
        fields: in the order they are stored.
        num_bytes: of the whole payload, a multiple of 16, what is left behind the fields unused; None: what they take.
    """

    __slots__ = ("_places", "fields", "num_bytes")

    def __init__(self, *fields: Field, num_bytes: int | None = None) -> None:
        self.fields = fields
        self._places: dict[str, tuple[int, Field]] = {}
        offset = 0
        for field in fields:
            self._places[field.name] = (offset, field)
            offset = align(offset + field.num_bytes)
        self.num_bytes = offset if num_bytes is None else num_bytes
        assert self.num_bytes >= offset, "fields fit their payload"

    def offset(self, name: str) -> int:
        """First byte of a field."""
        return self._places[name][0]

    def view(self, payload_N: Tensor, name: str) -> Tensor:
        """A field of one or many payloads, sharing their memory.

        Args:
            payload_N: uint8 [..., num_bytes], last dim contiguous, aligned to 16 bytes.
            name: the field.

        Returns:
            [..., *shape] of the field's dtype.
        """
        offset, field = self._places[name]
        flat = payload_N[..., offset : offset + field.num_bytes].view(field.dtype)
        return flat.view((*flat.shape[:-1], *field.shape))

    def clear_padding(self, payload_N: Tensor) -> None:
        """Zero the bytes between fields, so that equal contents are equal bytes; most geometries have none."""
        ends = [self._places[field.name][0] for field in self.fields[1:]] + [self.num_bytes]
        for field, end in zip(self.fields, ends, strict=True):
            start = self._places[field.name][0] + field.num_bytes
            if start < end:
                payload_N[..., start:end].zero_()

    def empty(self, lead: tuple[int, ...], device: torch.device) -> Tensor:
        """Zeroed payloads, uint8 [*lead, num_bytes]."""
        return torch.zeros((*lead, self.num_bytes), dtype=torch.uint8, device=device)


def packed_bytes(num_codes: int, bits: int) -> int:
    """Bytes that a run of codes takes; the run must fill whole bytes."""
    total = num_codes * bits
    if total % 8:
        raise ValueError(f"{num_codes} codes of {bits} bits do not fill whole bytes")
    return total // 8


def pack_codes(codes: Tensor, bits: int) -> Tensor:
    """Pack codes into bytes.

    Args:
        codes: uint8 [..., n], each below 2^bits.
        bits: 1, 2, 3, 4 or 8.

    Returns:
        uint8 [..., n*bits/8].
    """
    if bits == 8:
        return codes
    per_group = 8 if bits == 3 else 8 // bits
    group_bytes = per_group * bits // 8
    grouped = codes.reshape((*codes.shape[:-1], -1, per_group)).to(torch.int32)
    shift = torch.arange(per_group, dtype=torch.int32, device=codes.device) * bits
    word: Tensor = (grouped << shift).sum(-1, dtype=torch.int32)
    byte_shift = torch.arange(group_bytes, dtype=torch.int32, device=codes.device) * 8
    return ((word.unsqueeze(-1) >> byte_shift) & 0xFF).to(torch.uint8).flatten(-2)


def unpack_codes(packed: Tensor, bits: int) -> Tensor:
    """Undo `pack_codes`: uint8 [..., n*bits/8] -> uint8 [..., n]."""
    if bits == 8:
        return packed
    if bits != 3:
        shift = torch.arange(8 // bits, dtype=torch.uint8, device=packed.device) * bits
        few: Tensor = ((packed.unsqueeze(-1) >> shift) & (2**bits - 1)).flatten(-2)
        return few
    grouped = packed.reshape((*packed.shape[:-1], -1, 3)).to(torch.int32)
    byte_shift = torch.arange(3, dtype=torch.int32, device=packed.device) * 8
    word: Tensor = (grouped << byte_shift).sum(-1, dtype=torch.int32)
    shift_8 = torch.arange(8, dtype=torch.int32, device=packed.device) * 3
    codes: Tensor = ((word.unsqueeze(-1) >> shift_8) & 7).to(torch.uint8).flatten(-2)
    return codes
