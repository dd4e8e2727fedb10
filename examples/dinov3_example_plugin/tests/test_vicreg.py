"""VICReg's terms have the values that the paper's equations give."""

from __future__ import annotations

import pytest
import torch
from dinov3_example_plugin import VicRegConfig
from dinov3_example_plugin.vicreg import EPSILON, VicReg, covariance, variance

from dinov3_framework import LossResult, StepOutputs, UserError, ViewFeatures


def step(cls: torch.Tensor) -> StepOutputs:
    features = ViewFeatures(cls=cls, storage=cls[:, :, None], patches=cls[:, :, None], grid=(1, 1))
    return StepOutputs(
        iteration=0,
        total_iterations=1,
        student={"global": features},
        teacher={},
        anchor=None,
        masks=None,
        project=lambda tokens: tokens,
        project_teacher=lambda tokens: tokens,
    )


def loss(cls: torch.Tensor, **factors: float) -> LossResult:
    result: LossResult = VicReg(VicRegConfig(**factors))(step(cls))
    return result


def test_variance_by_hand() -> None:
    # Deviations of the columns: 0 and sqrt(2), the latter above the target.
    embeddings = torch.tensor([[1.0, 1.0], [1.0, 3.0]])
    assert float(variance(embeddings)) == pytest.approx((1 - EPSILON**0.5) / 2)


def test_covariance_by_hand() -> None:
    # The columns' covariance is 2; it stands in the matrix twice.
    embeddings = torch.tensor([[1.0, 1.0], [3.0, 3.0]])
    assert float(covariance(embeddings)) == pytest.approx(2 * 2.0**2 / 2)
    decorrelated = torch.tensor([[1.0, 1.0], [1.0, -1.0], [-1.0, 1.0], [-1.0, -1.0]])
    assert float(covariance(decorrelated)) == pytest.approx(0.0)


def test_the_terms_and_their_factors() -> None:
    generator = torch.Generator().manual_seed(0)
    crops = torch.randn(2, 8, 6, generator=generator)
    result = loss(crops, invariance=2.0, variance=3.0, covariance=5.0)
    metrics = {name: float(value) for name, value in result.metrics.items()}
    assert metrics["invariance"] == pytest.approx(float((crops[0] - crops[1]).square().mean()))
    total = 2 * metrics["invariance"] + 3 * metrics["variance"] + 5 * metrics["covariance"]
    assert float(result.loss) == pytest.approx(total)


def test_equal_crops_differ_in_nothing_but_may_collapse() -> None:
    same = torch.ones(2, 4, 6)
    metrics = loss(same).metrics
    assert float(metrics["invariance"]) == 0
    assert float(metrics["variance"]) == pytest.approx(1 - EPSILON**0.5)


def test_gradient_descent_undoes_a_collapse() -> None:
    generator = torch.Generator().manual_seed(1)
    crops = (1e-2 * torch.randn(2, 16, 4, generator=generator)).requires_grad_()
    optimizer = torch.optim.SGD([crops], lr=0.1)
    for _ in range(200):
        optimizer.zero_grad()
        loss(crops).loss.backward()
        optimizer.step()
    assert float(crops.detach().std(1).mean()) > 0.9
    assert float((crops[0] - crops[1]).detach().abs().max()) < 0.1


def test_two_crops_are_needed() -> None:
    with pytest.raises(UserError, match="compares two global crops, the augmentation makes 1"):
        loss(torch.zeros(1, 4, 6))
