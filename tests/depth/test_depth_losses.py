"""Losses of depth: their formulas, what is not known, and groups of images."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from dinov3_depth.configs_losses import DepthHeadConfig
from dinov3_depth.losses import depth_loss
from torch import Tensor

from dinov3_framework import InvalidOption

ALL = {"sigma": 1.0, "gradient": 1.0, "gradient_log": 1.0, "l1": 1.0}


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return 0.5 + 9 * torch.rand(shape, generator=torch.Generator().manual_seed(seed))


def loss_of(prediction: Tensor, truth: Tensor, **options: Any) -> float:
    weights = dict.fromkeys(ALL, 0.0)
    return float(depth_loss(DepthHeadConfig(**(weights | options)), prediction, truth).loss)


def test_sigma_is_the_formula_pixel_by_pixel() -> None:
    prediction, truth = drawn(1, 4, 5), drawn(1, 4, 5, seed=1)
    truth[0, 1, 2] = math.nan
    errors = [
        math.log(float(p) + 0.001) - math.log(float(t) + 0.001)
        for p, t in zip(prediction.flatten(), truth.flatten(), strict=True)
        if not math.isnan(t)
    ]
    expected = math.sqrt(np.var(errors, ddof=1) + 0.15 * np.mean(errors) ** 2)
    assert loss_of(prediction, truth, sigma=1.0) == pytest.approx(expected, rel=1e-5)


def test_gradients_of_a_tilted_error() -> None:
    """An error that grows by 1 in each column: pixels two columns apart differ by 2."""
    truth = drawn(1, 24, 24)
    prediction = truth + torch.arange(24.0)
    expected = 0.0
    for step in (1, 2, 4, 6):
        side = 24 // step
        expected += side * (side - 2) * 2 * step / side**2
    assert loss_of(prediction, truth, gradient=1.0) == pytest.approx(expected, rel=1e-4)


def test_a_factor_is_no_gradient_of_logarithms() -> None:
    truth = 100 + drawn(1, 24, 24)
    assert loss_of(2 * truth, truth, gradient_log=1.0) < 1e-4
    assert loss_of(2 * truth, truth, gradient=1.0) > 0.1


def test_weights_add_up() -> None:
    prediction, truth = drawn(2, 12, 12), drawn(2, 12, 12, seed=1)
    parts = {name: loss_of(prediction, truth, **{name: 1.0}) for name in ALL}
    weights = {"sigma": 1.0, "gradient": 0.5, "gradient_log": 0.25, "l1": 3.0}
    expected = sum(weights[name] * value for name, value in parts.items())
    assert loss_of(prediction, truth, **weights) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("void", [math.nan, 0.0, 80.0, math.inf])
def test_what_is_not_known_has_no_say(void: float) -> None:
    prediction, truth = drawn(2, 16, 16), drawn(2, 16, 16, seed=1)
    truth[:, :5] = void
    config = DepthHeadConfig(max_truth=50.0, **ALL)
    other = prediction.clone()
    other[:, :5] = 1e6
    first, second = (depth_loss(config, each, truth).loss for each in (prediction, other))
    assert float(first) == float(second)
    assert math.isfinite(first)


def test_truth_of_nothing_is_a_loss_of_zero_with_a_gradient() -> None:
    prediction = drawn(2, 16, 16).requires_grad_()
    result = depth_loss(DepthHeadConfig(**ALL), prediction, torch.full((2, 16, 16), math.nan))
    result.loss.backward()
    assert float(result.loss) == 0
    assert float(prediction.grad.abs().max()) == 0
    assert all(float(value) == 0 for value in result.metrics.values())


def test_gradients_are_finite_where_the_prediction_is_right_or_negative() -> None:
    for prediction in (drawn(2, 16, 16), drawn(2, 16, 16) - 20):
        given = prediction.clone().requires_grad_()
        depth_loss(DepthHeadConfig(**ALL), given, prediction.abs()).loss.backward()
        assert bool(given.grad.isfinite().all())


def test_losses_are_of_float32_whatever_is_given() -> None:
    prediction, truth = drawn(2, 16, 16), drawn(2, 16, 16, seed=1)
    half = depth_loss(DepthHeadConfig(**ALL), prediction.bfloat16(), truth).loss
    same = depth_loss(DepthHeadConfig(**ALL), prediction.bfloat16().float(), truth).loss
    assert half.dtype == torch.float32
    assert float(half) == float(same)


def test_a_prediction_is_resized_to_the_truth() -> None:
    prediction, truth = drawn(2, 4, 6), drawn(2, 16, 24, seed=1)
    resized = torch.nn.functional.interpolate(prediction[:, None], (16, 24), mode="bilinear")
    assert loss_of(prediction, truth, **ALL) == loss_of(resized[:, 0], truth, **ALL)


def test_groups_make_a_batch_the_same_on_any_number_of_processes() -> None:
    """Eight images of one process, or four on each of two: the means of the losses are equal."""
    prediction, truth = drawn(8, 16, 16), drawn(8, 16, 16, seed=1)
    truth[3, :9] = math.nan
    shares = [slice(0, 4), slice(4, 8)]
    for together, agree in ((2, True), (1, True), (None, False)):
        whole = loss_of(prediction, truth, together=together, **ALL)
        parts = [loss_of(prediction[s], truth[s], together=together, **ALL) for s in shares]
        assert math.isclose(sum(parts) / 2, whole, rel_tol=1e-6) is agree


@pytest.mark.parametrize(
    ("options", "name"),
    [({"sigma": 0.0}, "sigma"), ({"max_truth": 0.0005}, "max_truth"), ({"l1": -1.0}, "l1")],
)
def test_options_that_make_no_sense(options: dict[str, float], name: str) -> None:
    with pytest.raises(InvalidOption, match=name):
        DepthHeadConfig(**options)
