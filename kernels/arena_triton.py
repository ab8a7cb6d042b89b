"""What every kernel that reads blocks from an arena is given, and how those that walk over heads are cut."""

# Triton has no type stubs.
# mypy: disable-error-code="import-untyped, no-untyped-call"
from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import triton
from torch import Tensor

from longtake.kernels.rotary import Rotary
from longtake.kernels.scaling import Scaling
from longtake.kernels.scaling_triton import token_alignment


@dataclass(frozen=True, slots=True, kw_only=True)
class Launch:
    """How a kernel is cut into programs.

    Args:
        rows: tokens of a tile, a power of two.
        heads: most heads a program walks over with the same cosines; the largest divisor of the head count is taken.
        warps: of a program.
    """

    rows: int = 32
    heads: int = 4
    warps: int = 4

    def grid(self, num_tokens: int, num_blocks: int, num_heads: int) -> tuple[int, int, int]:
        """Programs along tokens, blocks and heads."""
        return triton.cdiv(num_tokens, self.rows), num_blocks, num_heads // self.heads_of(num_heads)

    def heads_of(self, num_heads: int) -> int:
        """Heads of one program."""
        return max(n for n in range(1, self.heads + 1) if num_heads % n == 0)

    def sizes(self, num_heads: int) -> dict[str, int]:
        """As such kernels take them."""
        return {"HEADS": self.heads_of(num_heads), "ROWS": self.rows, "num_warps": self.warps}


DEFAULT_LAUNCH = Launch()


def reading(
    sections_GHB: Tensor,
    slots_N: Tensor,
    rotary: Rotary | None,
    out_HXD: Tensor,
    scaling: Scaling | None,
    num_tokens: int,
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """First arguments, and constants, of a kernel that writes N*T rows of each head from the sections of some slots.

    Args:
        sections_GHB, slots_N, rotary, out_HXD, scaling: as for TensorCodec.unpack_into.
        num_tokens: of a block.
    """
    temporal, spatial, per_frame, pairs = sections_GHB, sections_GHB, 1, 0
    centre, scale = (slots_N, slots_N) if scaling is None else (scaling.centre_HD, scaling.scale_H)
    if rotary is not None:
        temporal, spatial = rotary.temporal_YP2, rotary.spatial_SQ2
        per_frame, pairs = rotary.tokens_per_frame, temporal.shape[1]
    tensors = (sections_GHB, slots_N, temporal, spatial, out_HXD, centre, scale)
    turned = out_HXD.stride(2) != 1
    constants = {"PT": pairs, "SCALED": scaling is not None, "TURNED": turned, "ALIGN": token_alignment(num_tokens)}
    return (*tensors, *sections_GHB.stride()[:2], *out_HXD.stride(), num_tokens, per_frame), constants
