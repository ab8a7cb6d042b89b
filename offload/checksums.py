"""CRC-32C of a concatenation from those of its parts, so that data is read once for both.

Appending n zero bytes to a message is a linear map of its CRC over GF(2) (Mark Adler's crc32_combine), and
crc(a + b) = zeros_len(b)(crc(a)) ^ crc(b).
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from longtake.offload.files import crc32c


class EqualParts:
    """Combines the checksums of parts that all have the same length."""

    def __init__(self, part_bytes: int) -> None:
        zeros = np.zeros(part_bytes, dtype=np.uint8)
        origin = crc32c(zeros)
        self._columns = [crc32c(zeros, 1 << bit) ^ origin for bit in range(32)]

    def combine(self, checksums: Iterable[int]) -> int:
        """CRC-32C of the parts laid end to end; 0 for none."""
        total = 0
        for checksum in checksums:
            shifted = 0
            for bit, column in enumerate(self._columns):
                if total >> bit & 1:
                    shifted ^= column
            total = shifted ^ checksum
        return total
