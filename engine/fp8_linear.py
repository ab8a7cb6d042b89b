"""Linear layers in FP8: half the memory of bfloat16, and on recent GPUs twice the speed.

Rows of the weight and, at every call, of the input are scaled to e4m3's range and rounded; products are summed in
float32 (W8A8 with dynamic row-wise scales, as torchao's). On a GPU without FP8 matrix units, and on a CPU, the plain
twin computes the same from the same rounded numbers.

Shape legend: R rows of the input, I input width, O output width.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from longtake.engine.model import Block, CausalWan, GELUProjection, Rows
from longtake.engine.tensor_parallel import RowLinear
from longtake.kernels.fp8_rows import Rounded, gelu_round_rows, round_rows

_FP8_CAPABILITY = (8, 9)


class Fp8Linear(nn.Module):
    """A frozen linear layer in FP8; made from one in another type.

    Args:
        linear: its weight and bias; not changed.
        gelu: take GELU (tanh) of the input first, in the pass that rounds it.
    """

    def __init__(self, linear: nn.Linear, *, gelu: bool = False) -> None:
        super().__init__()
        weight_OI, scale_O1 = round_rows(linear.weight.detach())
        self.weight = nn.Parameter(weight_OI, requires_grad=False)
        self.scale = nn.Parameter(scale_O1, requires_grad=False)
        self.bias: nn.Parameter | None = None
        if linear.bias is not None:
            self.bias = nn.Parameter(linear.bias.detach(), requires_grad=False)
        self._round = gelu_round_rows if gelu else round_rows
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.dtype = linear.weight.dtype

    def forward(self, x: Rows) -> Tensor:
        """[..., I] to [..., O], in the type of the layer it was made from."""
        if isinstance(x, Tensor):
            x = Rounded(*(one.unflatten(0, x.shape[:-1]) for one in self._round(x.reshape(-1, self.in_features))))
        x_RI, scale_R1 = x.rows.reshape(-1, self.in_features), x.scale.reshape(-1, 1)
        if has_fp8(x_RI.device) and self.dtype == torch.bfloat16:
            out_RO = torch._scaled_mm(
                x_RI, self.weight.t(), scale_a=scale_R1, scale_b=self.scale.t(), bias=self.bias, out_dtype=self.dtype
            )
        else:
            out_RO = (x_RI.float() @ self.weight.float().t()) * scale_R1 * self.scale.t()
            out_RO = (out_RO if self.bias is None else out_RO + self.bias.float()).to(self.dtype)
        out: Tensor = out_RO.unflatten(0, x.rows.shape[:-1])
        return out


class Fp8RowLinear(Fp8Linear):
    """As RowLinear: of some input columns, whose scales are these columns' own; results are summed over the ranks."""

    def __init__(self, linear: RowLinear, *, gelu: bool = False) -> None:
        super().__init__(linear, gelu=gelu)
        self.joint = linear.joint
        if not self.joint.first:
            self.bias = None

    def forward(self, x: Rows) -> Tensor:
        return self.joint.sum(super().forward(x))


def has_fp8(device: torch.device) -> bool:
    """Whether the device multiplies FP8 matrices."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= _FP8_CAPABILITY


def is_fp8(model: CausalWan) -> bool:
    """Whether the linear layers of the blocks were replaced."""
    return any(isinstance(module, Fp8Linear) for module in model.blocks.modules())


def quantise_linears(model: CausalWan) -> CausalWan:
    """Replace the linear layers of all blocks, one after the other, in place; what is outside of blocks stays.

    The feed-forward's second one takes over the GELU before it, and norms round what the others take.
    """
    for block in model.blocks:
        assert isinstance(block, Block)
        first, net = block.ffn.net[0], block.ffn.net
        assert isinstance(first, GELUProjection)
        first.gelu, net[2] = nn.Identity(), _in_fp8(net[2], gelu=True)
        block.rounds = True
        for parent in list(block.modules()):
            for name, child in list(parent.named_children()):
                if isinstance(child, nn.Linear):
                    setattr(parent, name, _in_fp8(child))
    return model


def _in_fp8(linear: nn.Module, *, gelu: bool = False) -> Fp8Linear:
    if isinstance(linear, RowLinear):
        return Fp8RowLinear(linear, gelu=gelu)
    assert isinstance(linear, nn.Linear)
    return Fp8Linear(linear, gelu=gelu)
