"""Small floating-point formats: `nvfp4` (e2m1 in groups of 16) and `fp8` (e4m3).

nvfp4: a code is one of +-{0, 0.5, 1, 1.5, 2, 3, 4, 6}; 16 neighbouring channels share an e4m3 scale, and a head's block
a float32 one, as the hardware format has it. Bits an element: 4.5. fp8: e4m3 with one float32 scale for a head's block.
Bits an element: 8.

    nvfp4:   | codes: T rows of D/2 bytes | scales: T x D/16 x e4m3 | unit f32 |pad|
    fp8:     | codes: T x D x e4m3 | unit f32 |pad|

Shape legend: T tokens, H heads, D head dim, G groups of a token, C channels of a group, B bytes of a section.
"""

from __future__ import annotations

import torch
from torch import Tensor

from longtake.kernels.codec import BlockGeometry, Side
from longtake.kernels.errors import ConfigError
from longtake.kernels.grid import FP8, FP8_MAX, nearest_level, to_fp8
from longtake.kernels.layout import Field, Layout, pack_codes, unpack_codes
from longtake.kernels.tensor_codec import TensorCodec

GROUP = 16
E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)


def _reciprocal(x: Tensor) -> Tensor:
    return torch.where(x > 0, 1.0 / x, torch.zeros_like(x))


class NvFp4(TensorCodec):
    """e2m1 codes with two levels of scales.

    Args:
        geometry: the block; the head dim must be a multiple of 16.
    """

    def __init__(self, geometry: BlockGeometry) -> None:
        super().__init__(geometry)
        if geometry.head_dim % GROUP:
            raise ConfigError(f"head dim {geometry.head_dim} does not divide into groups of {GROUP} channels.")
        groups = geometry.head_dim // GROUP
        self.layout = Layout(
            Field(name="codes", dtype=torch.uint8, shape=(geometry.num_tokens, geometry.head_dim // 2)),
            Field(name="scales", dtype=FP8, shape=(geometry.num_tokens, groups)),
            Field(name="unit", dtype=torch.float32, shape=(1,)),
        )

    def pack(self, x_HTD: Tensor) -> Tensor:
        x_HTGC = x_HTD.reshape(*x_HTD.shape[:-1], -1, GROUP)
        unit = x_HTD.abs().amax((-2, -1), keepdim=True) * (1.0 / (E2M1[-1] * FP8_MAX))
        scale = to_fp8(x_HTGC.abs().amax(-1) * (1.0 / E2M1[-1]) * _reciprocal(unit))
        step = scale.float() * unit
        y = x_HTGC * _reciprocal(step).unsqueeze(-1)
        magnitude = nearest_level(y.abs(), torch.tensor(E2M1, device=x_HTD.device))
        codes = (magnitude | (y < 0).to(torch.uint8) << 3).flatten(-2)
        section = self.layout.empty(x_HTD.shape[:1], x_HTD.device)
        self.layout.view(section, "codes").copy_(pack_codes(codes, 4))
        self.layout.view(section, "scales").copy_(scale)
        self.layout.view(section, "unit").copy_(unit.flatten(1))
        return section

    def unpack(self, section_B: Tensor) -> Tensor:
        codes = unpack_codes(self.layout.view(section_B, "codes"), 4).long()
        magnitude = torch.tensor(E2M1, device=section_B.device)[codes & 7]
        value = torch.where(codes > 7, -magnitude, magnitude)
        step = self.layout.view(section_B, "scales").float() * self.layout.view(section_B, "unit").unsqueeze(-1)
        return (value.reshape(*value.shape[:-1], -1, GROUP) * step.unsqueeze(-1)).flatten(-2)


class Fp8(TensorCodec):
    """e4m3 with one scale.

    Args:
        geometry: the block.
    """

    def __init__(self, geometry: BlockGeometry) -> None:
        super().__init__(geometry)
        self.layout = Layout(
            Field(name="codes", dtype=FP8, shape=(geometry.num_tokens, geometry.head_dim)),
            Field(name="unit", dtype=torch.float32, shape=(1,)),
        )

    def pack(self, x_HTD: Tensor) -> Tensor:
        unit = x_HTD.abs().amax((-2, -1), keepdim=True) * (1.0 / FP8_MAX)
        section = self.layout.empty(x_HTD.shape[:1], x_HTD.device)
        self.layout.view(section, "codes").copy_(to_fp8(x_HTD * _reciprocal(unit)))
        self.layout.view(section, "unit").copy_(unit.flatten(1))
        return section

    def unpack(self, section_B: Tensor) -> Tensor:
        return self.layout.view(section_B, "codes").float() * self.layout.view(section_B, "unit").unsqueeze(-1)


def tensor_codec(name: str, geometry: BlockGeometry, side: Side) -> TensorCodec:
    """Make `nvfp4` or `fp8`; both sides alike."""
    return NvFp4(geometry) if name == "nvfp4" else Fp8(geometry)
