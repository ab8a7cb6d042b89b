"""Muon: momentum whose matrices are made nearly orthogonal before they are applied.

Jordan et al. 2024, https://kellerjordan.github.io/posts/muon; the scale that lets AdamW's learning rates carry over is
Moonlight's (arXiv 2502.16982): an orthogonal matrix of R x C has entries of root mean square 1 / sqrt(max(R, C)).
A convolution's kernel [out, in, ...] counts as a matrix [out, in * taps].

Matrices of one shape are treated as one batch, so a step is some twenty kernels a shape; nothing waits for the device.
Shape legend: N matrices of one shape, R rows, C columns.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

# A quintic that takes singular values of (0, 1] to about 1 (0.7 .. 1.2) in five rounds.
_QUINTIC = (3.4445, -4.7750, 2.0315)
_ROUNDS = 5
_RMS = 0.2  # of AdamW's usual update


def leave_out_unless_finite(gradients: Iterable[Tensor], norm: Tensor) -> Tensor:
    """Make a step whose gradient is not finite change nothing: its gradients become zero. Does not wait for the device.

    Args:
        gradients: of a step, changed in place.
        norm: of all of them.

    Returns:
        Whether the step counts, a bool scalar on the device.
    """
    finite = norm.isfinite()
    for gradient in gradients:
        gradient.copy_(torch.where(finite, gradient, 0.0))
    return finite


def orthogonalise(matrices_NRC: Tensor, *, dtype: torch.dtype | None = None) -> Tensor:
    """Replace each matrix U S V^T by nearly U V^T (Newton-Schulz); zero stays zero.

    Args:
        matrices_NRC: float [N, R, C].
        dtype: of the products; None: bfloat16 on CUDA, else float32.

    Returns:
        [N, R, C] of that dtype.
    """
    a, b, c = _QUINTIC
    x = matrices_NRC.float()
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-12)
    x = x.to(dtype or (torch.bfloat16 if x.is_cuda else torch.float32))
    tall = x.shape[1] > x.shape[2]
    if tall:
        x = x.transpose(1, 2)
    for _ in range(_ROUNDS):
        gram = torch.bmm(x, x.transpose(1, 2))
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.transpose(1, 2) if tall else x


class Muon(torch.optim.Optimizer):
    """Momentum, orthogonalised; for parameters of two or more dimensions.

    Args:
        params: tensors or groups of them, each of at least two dimensions.
        lr: step size, as one would choose it for AdamW.
        momentum: of the running mean of gradients, applied the way of Nesterov.
        weight_decay: decoupled, times `lr`.

    Raises:
        ValueError: a parameter has fewer than two dimensions.
    """

    def __init__(
        self,
        params: Iterable[Tensor] | Iterable[dict[str, Any]],
        lr: float,
        momentum: float = 0.95,
        weight_decay: float = 0.0,
    ) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.ndim < 2:
                    raise ValueError(f"Muon is for matrices, not for a parameter of shape {tuple(parameter.shape)}")

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Apply the gradients; parameters without one are left alone."""
        assert closure is None
        for group in self.param_groups:
            alike: dict[tuple[int, int], list[Tensor]] = {}
            for parameter in group["params"]:
                if parameter.grad is not None:
                    alike.setdefault((parameter.shape[0], parameter[0].numel()), []).append(parameter)
            for (rows, columns), parameters in alike.items():
                self._step(parameters, rows, columns, group)

    def _step(self, parameters: list[Tensor], rows: int, columns: int, group: dict[str, Any]) -> None:
        gradients = [p.grad.float() for p in parameters if p.grad is not None]
        for parameter in parameters:
            if "momentum" not in self.state[parameter]:
                self.state[parameter]["momentum"] = torch.zeros_like(parameter, dtype=torch.float32)
        means = [self.state[p]["momentum"] for p in parameters]
        torch._foreach_lerp_(means, gradients, 1 - group["momentum"])
        ahead = torch._foreach_lerp(gradients, means, group["momentum"])
        update = orthogonalise(torch.stack([g.reshape(rows, columns) for g in ahead]))
        update = update.float() * (_RMS * max(rows, columns) ** 0.5)
        if group["weight_decay"]:
            torch._foreach_mul_(parameters, 1 - group["lr"] * group["weight_decay"])
        changes = [u.reshape(p.shape).to(p.dtype) for u, p in zip(update.unbind(), parameters, strict=True)]
        torch._foreach_add_(parameters, changes, alpha=-group["lr"])
