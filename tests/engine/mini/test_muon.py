"""Muon: updates are nearly orthogonal, of AdamW's size, the same for kernels and matrices, and fit a least squares."""

from __future__ import annotations

import pytest
import torch

from longtake.engine.mini.muon import Muon, orthogonalise


@pytest.mark.parametrize("shape", [(2, 8, 8), (1, 6, 40), (3, 40, 6)])
def test_singular_values_are_about_one(shape: tuple[int, int, int]) -> None:
    torch.manual_seed(0)
    values = torch.linalg.svdvals(orthogonalise(torch.randn(shape) * 1e-3))
    assert values.min() > 0.3 and values.max() < 1.3


def test_zero_stays_zero() -> None:
    assert orthogonalise(torch.zeros(1, 4, 4)).abs().max() == 0


def test_a_kernel_counts_as_a_matrix_and_the_update_has_adams_size() -> None:
    torch.manual_seed(0)
    kernel = torch.nn.Parameter(torch.zeros(16, 4, 3, 3))
    matrix = torch.nn.Parameter(torch.zeros(16, 36))
    kernel.grad = torch.randn(16, 4, 3, 3)
    matrix.grad = kernel.grad.reshape(16, 36).clone()
    Muon([kernel], lr=0.1).step()
    Muon([matrix], lr=0.1).step()
    assert torch.equal(kernel.reshape(16, 36), matrix)
    assert 0.6 < matrix.square().mean().sqrt() / (0.1 * 0.2 * (16 / 36) ** 0.5 * 6 / 4) < 1.4


def test_fits() -> None:
    torch.manual_seed(0)
    inputs, truth = torch.randn(64, 8), torch.randn(8, 8)
    weight = torch.nn.Parameter(torch.zeros(8, 8))
    optimiser = Muon([weight], lr=0.2)
    for step in range(200):
        optimiser.param_groups[0]["lr"] = 0.2 * (1 - step / 200)
        weight.grad = inputs.T @ (inputs @ weight.detach() - inputs @ truth) / 64
        optimiser.step()
    assert (weight - truth).abs().max() < 0.1


def test_vectors_are_refused() -> None:
    with pytest.raises(ValueError, match="matrices"):
        Muon([torch.nn.Parameter(torch.zeros(3))], lr=0.1)
