"""Sinkhorn-Knopp in one process."""

from __future__ import annotations

import pytest
import torch
from dinov3_losses.sinkhorn import sinkhorn_knopp
from loss_support import randn
from torch import Tensor

from dinov3_framework import UserError


def by_hand(logits: Tensor, temperature: float, iterations: int) -> Tensor:
    """The published algorithm word by word, in float64."""
    q = (logits.double() / temperature).exp().T
    prototypes, samples = q.shape
    q = q / q.sum()
    for _ in range(iterations):
        q = q / q.sum(dim=1, keepdim=True) / prototypes
        q = q / q.sum(dim=0, keepdim=True) / samples
    return (q * samples).T


@pytest.mark.parametrize("iterations", [1, 2, 3, 7])
@pytest.mark.parametrize("temperature", [0.04, 0.07, 1.0])
def test_by_hand(temperature: float, iterations: int) -> None:
    logits = randn(13, 29)
    actual = sinkhorn_knopp(logits, temperature, iterations)
    expected = by_hand(logits, temperature, iterations).float()
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-6)


def test_both_sides_are_balanced() -> None:
    assignment = sinkhorn_knopp(randn(40, 10), 0.5, 50)
    torch.testing.assert_close(assignment.sum(dim=1), torch.ones(40))
    torch.testing.assert_close(assignment.sum(dim=0), torch.full((10,), 4.0))


@pytest.mark.parametrize("scale", [1.0, 10.0, 1e3, 1e6])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_finite_whatever_the_logits(scale: float, dtype: torch.dtype) -> None:
    logits = (randn(6, 16) * scale).to(dtype)
    logits[0] -= scale * 10  # a sample far below, and a prototype that nobody is near
    logits[:, 3] -= scale * 20
    assignment = sinkhorn_knopp(logits, 0.04)
    assert assignment.dtype == torch.float32
    assert assignment.isfinite().all()
    torch.testing.assert_close(assignment.sum(dim=1), torch.ones(6))


def test_input_is_left_alone() -> None:
    logits = randn(4, 8).requires_grad_()
    before = logits.detach().clone()
    assert not sinkhorn_knopp(logits, 1.0).requires_grad
    assert torch.equal(logits, before)


def test_no_samples() -> None:
    assert sinkhorn_knopp(torch.empty(0, 8), 0.1).shape == (0, 8)


def test_impossible_temperature() -> None:
    with pytest.raises(UserError, match="temperature must be above 0, is 0"):
        sinkhorn_knopp(randn(2, 3), 0.0)
