"""The linear head: its contract, its loss, its training."""

from __future__ import annotations

import math

import pytest
import torch
from dinov3_segment.configs_linear import LinearSegmentationConfig
from dinov3_segment.linear import LinearSegmentation
from torch import Tensor
from torch.testing import assert_close

from dinov3_framework import FeatureInfo, HeadFeatures, Target, UserError
from dinov3_framework.testing import HeadSuite

IGNORED = 255


class TestLinearSegmentation(HeadSuite):
    config = LinearSegmentationConfig()


class TestLayersSideBySide(HeadSuite):
    config = LinearSegmentationConfig(
        layers=(0, 2, -1), norm=False, class_token=True, dropout=0.0, dice_weight=0.5
    )
    features = (FeatureInfo(16, 8), FeatureInfo(8, 8), FeatureInfo(24, 16), FeatureInfo(32, 16))


class TestWithoutBatchNorm(HeadSuite):
    config = LinearSegmentationConfig(batchnorm=False, ce_weight=0.0, dice_weight=1.0)


def head(ignored: int | None = IGNORED, **options: float) -> LinearSegmentation:
    target = Target("mask", n_classes=3, ignore_index=ignored)
    config = LinearSegmentationConfig(**options)  # type: ignore[arg-type]
    return LinearSegmentation(config, features=(FeatureInfo(4, 8),), targets={"mask": target})


def outputs() -> Tensor:
    return torch.randn(2, 3, 2, 3, generator=torch.Generator().manual_seed(0))


def mask() -> Tensor:
    drawn = torch.randint(3, (2, 16, 24), generator=torch.Generator().manual_seed(1))
    drawn[:, :5] = IGNORED
    return drawn.to(torch.uint8)


def test_the_loss_is_that_of_resized_logits_over_all_pixels() -> None:
    logits = torch.nn.functional.interpolate(outputs(), (16, 24), mode="bilinear")
    log_shares, truth = logits.log_softmax(1), mask().long()
    known = truth != IGNORED
    picked = log_shares.gather(1, truth.masked_fill(~known, 0)[:, None])[:, 0]
    wanted = -(picked * known).sum() / truth.numel()
    found = head().loss(outputs(), {"mask": mask()})
    assert_close(found.loss, wanted)
    right = (logits.argmax(1) == truth)[known].float().mean()
    assert_close(found.metrics["pixel_accuracy"], right)


def test_the_dice_loss_by_its_definition() -> None:
    logits = torch.nn.functional.interpolate(outputs(), (16, 24), mode="bilinear")
    terms = []
    for image, truth in zip(logits, mask().long(), strict=True):
        for number in range(3):
            share = image[number].sigmoid()[truth != IGNORED].double()
            there = (truth == number)[truth != IGNORED].double()
            fraction = (2 * (share * there).sum() + 1) / ((share**2 + there**2).sum() + 1)
            terms.append(1 - float(fraction))
    found = head(ce_weight=0.0, dice_weight=2.0).loss(outputs(), {"mask": mask()})
    assert float(found.loss) == pytest.approx(2 * math.fsum(terms) / len(terms), rel=1e-5)


@pytest.mark.parametrize("weights", [(1.0, 0.0), (0.0, 1.0)])
def test_a_batch_that_is_ignored_teaches_nothing(weights: tuple[float, float]) -> None:
    given = outputs().requires_grad_()
    nothing = torch.full((2, 16, 24), IGNORED)
    network = head(ce_weight=weights[0], dice_weight=weights[1])
    found = network.loss(given, {"mask": nothing})
    found.loss.backward()
    assert found.loss.item() == 0
    assert given.grad is not None
    assert float(given.grad.abs().max()) == 0
    assert float(found.metrics["pixel_accuracy"]) == 0


def test_dropout_is_for_training_alone() -> None:
    network = head(dropout=0.5)
    features = HeadFeatures([torch.rand(1, 4, 2, 3)], (), (16, 24))
    torch.manual_seed(0)
    trained = [network(features) for _ in range(4)]
    assert any(not torch.equal(trained[0], each) for each in trained[1:])
    network.eval()
    assert torch.equal(network(features), network(features))


def test_mistakes() -> None:
    def build(target: Target, **options: object) -> None:
        LinearSegmentation(
            LinearSegmentationConfig(**options),  # type: ignore[arg-type]
            features=(FeatureInfo(4, 8),),
            targets={"mask": target},
        )

    with pytest.raises(UserError, match="this backbone has 0 to 0"):
        build(Target("mask", n_classes=3), layers=(1,))
    with pytest.raises(UserError, match="how many classes"):
        build(Target("mask"))
    with pytest.raises(UserError, match="of kind class"):
        build(Target("class", n_classes=3))
    with pytest.raises(ValueError, match="nothing is learned"):
        LinearSegmentationConfig(ce_weight=0.0)
