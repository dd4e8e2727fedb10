"""Gram anchoring."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from dinov3_losses.configs import GramConfig
from dinov3_losses.gram import GramLoss, fit_anchor, gram_loss
from loss_support import features, randn, step
from torch import Tensor

from dinov3_framework import Anchor, AnchorConfig, InvalidOption, LossResult, UserError


def run(student: Tensor, anchor: Tensor, masks: Tensor | None = None, **options: Any) -> LossResult:
    return GramLoss(GramConfig(**options))(
        step(
            student={"global": features(patches=student)},
            anchor=features(patches=anchor),
            masks=masks,
        )
    )


def by_definition(student: Tensor, anchor: Tensor) -> float:
    """Over one set of patches [N, D], with cosines."""
    total = 0.0
    for i in range(len(student)):
        for j in range(len(student)):
            a = F.cosine_similarity(student[i].double(), student[j].double(), dim=0)
            b = F.cosine_similarity(anchor[i].double(), anchor[j].double(), dim=0)
            total += (a - b).item() ** 2
    return total / len(student) ** 2


STUDENT, ANCHOR = randn(2, 2, 4, 5, seed=1), randn(2, 2, 4, 5, seed=2)
MASKS = torch.tensor([[[1, 0, 1, 0], [0, 0, 0, 0]], [[1, 1, 1, 1], [0, 1, 0, 0]]]).bool()


def test_within_images() -> None:
    pairs = zip(STUDENT.flatten(0, 1), ANCHOR.flatten(0, 1), strict=True)
    expected = sum(by_definition(*pair) for pair in pairs) / 4
    assert run(STUDENT, ANCHOR).loss.item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize(
    ("tokens", "kept"), [("all", MASKS | ~MASKS), ("masked", MASKS), ("unmasked", ~MASKS)]
)
def test_within_the_batch(tokens: str, kept: Tensor) -> None:
    result = run(STUDENT, ANCHOR, MASKS, tokens=tokens, image_level=False)
    expected = by_definition(STUDENT[kept], ANCHOR[kept])
    assert result.loss.item() == pytest.approx(expected, rel=1e-5)


def test_statistics() -> None:
    student = STUDENT.clone().requires_grad_()
    metrics = run(student, ANCHOR, MASKS, compute_stats=True).metrics
    for name, kept in (("masked", MASKS), ("unmasked", ~MASKS)):
        expected = by_definition(STUDENT[kept], ANCHOR[kept])
        assert metrics[name].item() == pytest.approx(expected, rel=1e-5)
        assert not metrics[name].requires_grad


def test_negative_similarities() -> None:
    student, anchor = torch.eye(2) - 0.5, torch.tensor([[1.0, 0.0], [-1.0, 0.0]])
    # Cosines off the diagonal: -1 in both; after clipping 0 in both, or 0 in the anchor's alone.
    assert gram_loss(student, anchor) == pytest.approx(0)
    assert gram_loss(student, anchor, remove_negative=True) == pytest.approx(0)
    only = gram_loss(student, anchor, remove_only_teacher_negative=True)
    assert only == pytest.approx((1 + 1) / 4)


def test_without_normalization() -> None:
    student, anchor = torch.tensor([[2.0, 0.0]]), torch.tensor([[0.0, 3.0]])
    assert gram_loss(student, anchor) == 0
    assert gram_loss(student, anchor, normalized=False) == (4 - 9) ** 2


def test_gradient_goes_to_the_student() -> None:
    student, anchor = STUDENT.clone().requires_grad_(), ANCHOR.clone().requires_grad_()
    run(student, anchor).loss.backward()
    assert student.grad.abs().sum() > 0
    assert anchor.grad is None


def test_nothing_masked() -> None:
    student = STUDENT.clone().requires_grad_()
    nothing = torch.zeros_like(MASKS)
    result = run(student, ANCHOR, nothing, tokens="masked", image_level=False, compute_stats=True)
    result.loss.backward()
    assert result.loss == result.metrics["masked"] == 0
    assert student.grad.abs().sum() == 0


def test_bf16_under_autocast_is_calculated_in_float32() -> None:
    student, anchor = STUDENT.bfloat16(), ANCHOR.bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        loss = run(student, anchor).loss
    torch.testing.assert_close(loss, run(student.float(), anchor.float()).loss, rtol=1e-6, atol=0)


# ------------------------------------------------------------------------- resizing
def test_the_anchor_is_resized_to_the_students_grid() -> None:
    # Features that change linearly along one axis do so after resizing as well.
    rows = torch.linspace(-1, 1, 8)[:, None].expand(8, 4)
    columns = torch.linspace(-1, 1, 4)[None].expand(8, 4)
    patches = torch.stack([rows, columns], dim=-1).reshape(1, 1, 32, 2).repeat(2, 3, 1, 1)
    anchor = features(samples=3, grid=(8, 4), patches=patches)
    fitted = fit_anchor(anchor, features(samples=3, grid=(4, 2)), antialias=False)
    assert fitted.shape == (2, 3, 8, 2)
    fitted = fitted.view(2, 3, 4, 2, 2)
    assert torch.allclose(fitted[..., 0, 0], fitted[..., 1, 0])
    assert torch.allclose(fitted[..., 0, :, 1], fitted[..., 3, :, 1])
    middle = (fitted[..., 1, 0, 0] - fitted[..., 2, 0, 0]).abs()
    torch.testing.assert_close(middle, torch.full((2, 3), 2 * 2 / 7))


def test_antialias_is_passed_on() -> None:
    anchor, student = features(grid=(8, 8)), features(grid=(4, 4))
    plain, smooth = (fit_anchor(anchor, student, antialias) for antialias in (False, True))
    assert smooth.std() < plain.std()
    result = GramLoss(GramConfig(resize_antialias=True))(
        step(student={"global": student}, anchor=anchor)
    )
    expected = gram_loss(student.patches.flatten(0, 1), smooth.flatten(0, 1))
    torch.testing.assert_close(result.loss, expected)


def test_the_same_grid_is_left_alone() -> None:
    anchor = features()
    assert fit_anchor(anchor, features(), antialias=False) is anchor.patches


# ------------------------------------------------------------------------- what it says of itself
def test_needs() -> None:
    patches = {"student.global.patches", "anchor.anchor.patches"}
    assert GramLoss(GramConfig()).needs == patches
    for options in ({"compute_stats": True}, {"tokens": "masked", "image_level": False}):
        assert GramLoss(GramConfig(**options)).needs == {*patches, "masks"}
    assert not GramLoss(GramConfig()).sees_batch
    assert GramLoss(GramConfig(image_level=False)).sees_batch


def test_anchor() -> None:
    assert GramLoss(GramConfig()).anchor() == Anchor()
    anchor = AnchorConfig(period=10, first_refresh=5, max_refreshes=3)
    assert GramLoss(GramConfig(anchor=anchor)).anchor() == Anchor(config=anchor)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"remove_negative": True, "remove_only_teacher_negative": True},
            "remove_only_teacher_negative: contradicts remove_negative",
        ),
        ({"tokens": "masked"}, "tokens: is 'masked', .* set image_level = false"),
    ],
)
def test_impossible_configs(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidOption, match=message):
        GramConfig(**options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"first_refresh": 5}, "first_refresh: has no effect without period"),
        ({"max_refreshes": 0}, "max_refreshes: has no effect without period"),
        ({"period": 0}, "period: must be above 0"),
    ],
)
def test_impossible_anchors(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidOption, match=message):
        AnchorConfig(**options)


def test_what_a_step_must_bring() -> None:
    with pytest.raises(UserError, match="needs an anchor"):
        GramLoss(GramConfig())(step())
    with pytest.raises(UserError, match="needs masks"):
        run(STUDENT, ANCHOR, compute_stats=True)
    with pytest.raises(UserError, match="2 global and 1 anchor crops of 4 and 4 samples"):
        GramLoss(GramConfig())(step(anchor=features(crops=1)))
