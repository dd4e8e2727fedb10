"""The loss of mask classification: against an independent implementation, and by definition."""

from __future__ import annotations

import itertools
import sys

import numpy as np
import pytest
import torch
from dinov3_segment.configs_masks import MaskClassificationConfig
from dinov3_segment.criterion import MaskCriterion
from dinov3_segment.matching import match
from dinov3_segment.points import uncertain_points, values_at
from masks_processes import CLASSES, leaves, made_up_masks, made_up_outputs
from torch import Tensor

from dinov3_framework import DataError


def config(**options: object) -> MaskClassificationConfig:
    return MaskClassificationConfig(**{"points": 200, **options})  # type: ignore[arg-type]


def loss(outputs: dict, masks: Tensor, ignore: int | None = 255, seed: int = 3, **options: object):
    torch.manual_seed(seed)
    return MaskCriterion(config(**options))(outputs, masks, ignore)


# ---------------------------------------------------------------------------- transformers
@pytest.fixture
def same_points(monkeypatch: pytest.MonkeyPatch) -> None:
    """Points that depend on nothing but how many of them are drawn."""

    def rand(*shape: int, **_: object) -> Tensor:
        count = shape[-2]
        points = np.random.default_rng(count).random((count, 2), dtype=np.float32)
        return torch.from_numpy(points).expand(*shape).contiguous()

    monkeypatch.setattr(torch, "rand", rand)


@pytest.mark.slow  # imports transformers
def test_the_loss_is_that_of_transformers(same_points: None) -> None:
    transformers = pytest.importorskip("transformers")
    from transformers.models.mask2former.modeling_mask2former import Mask2FormerLoss

    options = transformers.Mask2FormerConfig(
        num_labels=CLASSES, train_num_points=200, no_object_weight=0.1
    )
    outputs, masks = made_up_outputs(), made_up_masks()
    masks[0][masks[0] == 2] = 1  # images with unequally many classes
    theirs = Mask2FormerLoss(options, {})
    classes = [each.unique() for each in masks]
    renamed = [
        {"masks_queries_logits": o["pred_masks"], "class_queries_logits": o["pred_logits"]}
        for o in [outputs, *outputs["aux_outputs"]]
    ]
    wanted = theirs(
        **renamed[0],
        mask_labels=[(m == c[:, None, None]).float() for m, c in zip(masks, classes, strict=True)],
        class_labels=classes,
        auxiliary_predictions=renamed[1:],
    )
    found = loss(outputs, masks)
    weights = {"loss_cross_entropy": 2.0, "loss_mask": 5.0, "loss_dice": 5.0}
    total = sum(weights[name.rstrip("_012")] * value for name, value in wanted.items())
    assert len(wanted) == 9
    torch.testing.assert_close(found.loss, total, rtol=1e-5, atol=1e-6)
    for name, metric in {"cross_entropy": "class", "mask": "mask", "dice": "dice"}.items():
        torch.testing.assert_close(found.metrics[f"loss_{metric}"], wanted[f"loss_{name}"].detach())
    given = leaves(outputs)
    for mine, other in zip(
        torch.autograd.grad(found.loss, given), torch.autograd.grad(total, given), strict=True
    ):
        torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-6)


# ---------------------------------------------------------------------------- matching
def test_an_assignment_is_the_cheapest_of_all() -> None:
    for costs in torch.randn(20, 4, 4, generator=torch.Generator().manual_seed(0)):
        ((queries, masks),) = match([costs])
        best = min(
            sum(costs[row, column] for row, column in enumerate(order))
            for order in itertools.permutations(range(4))
        )
        assert sorted(queries.tolist()) == sorted(masks.tolist()) == [0, 1, 2, 3]
        torch.testing.assert_close(costs[queries, masks].sum(), best)


@pytest.mark.parametrize(("queries", "masks"), [(6, 2), (2, 6), (3, 0)])
def test_the_fewer_of_both_are_matched_once(queries: int, masks: int) -> None:
    ((rows, columns),) = match([torch.randn(queries, masks)])
    assert len(set(rows.tolist())) == len(set(columns.tolist())) == min(queries, masks)


def test_a_cost_that_is_not_finite_is_taken_last() -> None:
    costs = torch.tensor([[float("nan"), 1.0], [0.0, float("inf")], [float("-inf"), 9.0]])
    ((queries, masks),) = match([costs])
    assert dict(zip(queries.tolist(), masks.tolist(), strict=True)) == {0: 1, 1: 0}


def test_logits_that_are_not_finite_are_left_to_the_finite_check() -> None:
    outputs = made_up_outputs(layers=1)
    outputs["pred_masks"].data[:] = float("nan")
    assert not loss(outputs, made_up_masks()).loss.isfinite()


def test_more_classes_than_queries() -> None:
    outputs = made_up_outputs(layers=1)
    few = {key: value[:, :2] for key, value in outputs.items() if key != "aux_outputs"}
    assert loss(few, made_up_masks()).loss.isfinite()


def test_scipy_is_asked_for_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "scipy.optimize", None)
    with pytest.raises(DataError, match=r"dinov3-framework\[dense\]"):
        loss(made_up_outputs(), made_up_masks())


# ---------------------------------------------------------------------------- points
def test_values_between_pixels_are_bilinear() -> None:
    values = torch.arange(12.0).view(1, 1, 3, 4)
    points = torch.tensor([[0.5 / 4, 0.5 / 3], [1.0 / 4, 0.5 / 3], [1.75 / 4, 2.0 / 3], [0.0, 0.0]])
    found = values_at(values, points[None])[0, 0]
    # (1.75 - 0.5, 2.0 - 0.5) lies a quarter on from column 1 and half on from row 1.
    torch.testing.assert_close(found, torch.tensor([0.0, 0.5, 1.25 + 1.5 * 4, 0.0]))


def test_points_are_chosen_where_a_mask_is_uncertain() -> None:
    ramp = torch.linspace(-10, 10, 64).expand(2, 64, 64)  # the border is at x = 0.5
    options = {"count": 400, "oversample": 3.0}

    def off(importance: float) -> Tensor:
        generator = torch.Generator().manual_seed(0)
        points = uncertain_points(ramp, lambda _: None, generator, importance=importance, **options)
        assert points.shape == (2, 400, 2)
        assert points.min() >= 0
        assert points.max() <= 1
        return (points[..., 0] - 0.5).abs()

    assert off(1.0).quantile(0.9) < 0.25, "the nearest third, and what fades at the border"
    assert 0.2 < off(0.0).mean() < 0.3, "drawn anywhere, the mean distance is a quarter"
    near = (off(0.75) < 0.1).float().mean()
    assert near > 0.55, "all within a tenth: of 1,200 points 240, and a fifth of the 100 others"


# ---------------------------------------------------------------------------- what is ignored
def framed() -> tuple[Tensor, Tensor]:
    """Masks [1, 16, 16] whose left half is ignored, and which pixels lie well within that half."""
    masks = made_up_masks(1)
    masks[:, :, :8] = 255
    inside = torch.zeros(16, 16, dtype=torch.bool)
    inside[:, :7] = True
    return masks, inside


def test_ignored_pixels_count_nowhere() -> None:
    masks, inside = framed()
    one, other = (made_up_outputs(1, side=16) for _ in range(2))
    for layer in [other, *other["aux_outputs"]]:
        layer["pred_masks"].data[..., inside] = 40.0
    found = [loss(each, masks, points=500) for each in (one, other)]
    # More of the uncertain points may fall among those that count nothing, none of them changes it.
    torch.testing.assert_close(found[0].loss, found[1].loss)
    found[1].loss.backward()
    assert not other["pred_masks"].grad[..., inside].any()
    assert other["pred_masks"].grad[..., ~inside].any()


def test_the_background_of_a_mask_is_not_what_is_ignored() -> None:
    """A mask that fills all but the ignored half is right about all that counts."""
    masks, _ = framed()
    masks[masks != 255] = 1
    outputs = made_up_outputs(1, side=16, layers=1)
    outputs["pred_masks"].data[:] = 40.0
    found = loss(outputs, masks, importance=0.0).metrics
    assert found["loss_dice"] < 0.05
    masks[masks == 255] = 0
    assert loss(outputs, masks, importance=0.0).metrics["loss_dice"] > 0.2


def test_ignored_by_no_index_is_a_class() -> None:
    masks = torch.full((1, 16, 16), 4)
    masks[0, 0, 0] = 255
    with pytest.raises(DataError, match="class id 255"):
        loss(made_up_outputs(1), masks, ignore=None)
    assert loss(made_up_outputs(1), masks, ignore=255).loss.isfinite()


@pytest.mark.parametrize("fill", [255, 4])
def test_a_gradient_reaches_everything_whatever_is_in_the_images(fill: int) -> None:
    outputs = made_up_outputs()
    result = loss(outputs, torch.full((2, 16, 16), fill))
    assert result.loss.isfinite()
    result.loss.backward()
    for layer in [outputs, *outputs["aux_outputs"]]:
        assert layer["pred_logits"].grad.any()
        assert layer["pred_masks"].grad is not None
        assert layer["pred_masks"].grad.any() == (fill != 255)


# ---------------------------------------------------------------------------- randomness
def test_the_same_seed_gives_the_same_bits() -> None:
    outputs, masks = made_up_outputs(), made_up_masks()
    first, again = loss(outputs, masks).loss, loss(outputs, masks).loss
    assert first.item() == again.item()
    assert loss(outputs, masks, seed=4).loss.item() != first.item()


def test_the_weights_are_the_options() -> None:
    outputs, masks = made_up_outputs(layers=1), made_up_masks()
    options = {"class_weight": 0.5, "mask_weight": 3.0, "dice_weight": 2.0}
    found = loss(outputs, masks, **options)
    names = ("loss_class", "loss_mask", "loss_dice")
    total = sum(
        weight * found.metrics[name] for name, weight in zip(names, options.values(), strict=True)
    )
    torch.testing.assert_close(found.loss.detach(), total)
