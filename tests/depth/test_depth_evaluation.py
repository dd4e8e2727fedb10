"""The evaluation ``depth``: which pixels count, alignment, means, files, processes."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from depth_support import (
    GRAY,
    Brightness,
    Scenes,
    ScenesConfig,
    depth,
    evaluated,
    everything,
    model_of,
    registry,
)
from dinov3_depth.configs_evaluation import DepthConfig
from dinov3_depth.scoring import cropped
from PIL import Image
from process_groups import run_processes

from dinov3_framework import DataError, InvalidOption
from dinov3_framework.data.dense_config import DenseInferenceConfig
from dinov3_framework.testing import EvaluationSuite

SIZES = ((16, 24), (20, 16), (12, 12), (16, 16), (8, 20))
OFF = {"sizes": SIZES, "shift": 0.1}  # the error of image n is n / 10 m all over


class TestContract(EvaluationSuite):
    config = depth(OFF)
    registry = registry()
    images = GRAY
    head = Brightness().eval()


class TestAligned(TestContract):
    config = depth({"sizes": SIZES, "factor": 1.2}, align="scale", crop="garg")
    head = Brightness(tilt=0.5).eval()


# --------------------------------------------------------------------------- numbers
def test_rmse_is_the_mean_of_those_of_images() -> None:
    _, metrics = evaluated(depth(OFF))
    errors = np.array([0.1, 0.2, 0.3, 0.4, 0.5])
    pixels = np.array([(height - 1) * width for height, width in SIZES])
    assert metrics["rmse"] == pytest.approx(errors.mean(), rel=1e-5)
    assert metrics["mae"] == pytest.approx(errors.mean(), rel=1e-5)
    pooled = math.sqrt((pixels * errors**2).sum() / pixels.sum())
    assert metrics["rmse_pooled"] == pytest.approx(pooled, rel=1e-5)
    assert set(metrics) == {
        *("rmse", "rmse_pooled", "abs_rel", "a1", "a2", "a3"),
        *("log10", "rmse_log", "silog", "sq_rel", "mae"),
    }


def test_a_right_prediction_has_no_error() -> None:
    _, metrics = evaluated(depth({"sizes": SIZES}))
    assert [metrics[name] for name in ("a1", "a2", "a3")] == [1, 1, 1]
    assert max(value for name, value in metrics.items() if name not in ("a1", "a2", "a3")) < 1e-3


def test_truth_outside_the_range_is_void_and_predictions_are_clamped() -> None:
    scenes = Scenes(ScenesConfig(shift=1.0))
    config = depth({"shift": 1.0}, least=3.0, most=6.0)
    evaluation, metrics = evaluated(config)
    expected = []
    for index in range(2):
        truth = scenes.truth(index).double()
        known = (truth > 3) & (truth < 6)
        predicted = (truth - (index + 1)).clamp(3, 6)
        expected.append(float(((predicted - truth)[known] ** 2).mean().sqrt()))
    assert metrics["rmse"] == pytest.approx(np.mean(expected), rel=1e-5)
    assert evaluation.protocol(model_of())["range"] == "3..6"


def test_without_an_upper_limit_all_counts() -> None:
    far = {"shift": 100.0}
    with pytest.raises(DataError, match="depth is known of no pixel that counts"):
        evaluated(depth(far))
    _, metrics = evaluated(depth(far, most=None))
    assert metrics["rmse"] == pytest.approx(150, rel=1e-4)


def test_images_without_truth_are_left_out_and_counted() -> None:
    scenes = OFF | {"empty": (1,), "corrupt": (3,)}
    evaluation, metrics = evaluated(depth(scenes))
    assert metrics["rmse"] == pytest.approx((0.1 + 0.3 + 0.5) / 3, rel=1e-5)
    protocol = evaluation.protocol(model_of())
    assert protocol["images without known depth"] == 1
    assert protocol["unreadable images"] == 1
    rows = evaluation.details().tables["images"]
    assert [row["image"] for row in rows] == [f"rooms/{index}.png" for index in (0, 1, 2, 4)]
    assert [row["pixels"] for row in rows] == [15 * 24, 0, 11 * 12, 7 * 20]
    assert rows[1]["rmse"] is None
    assert [row["rmse"] for row in rows if row["pixels"]] == pytest.approx([0.1, 0.3, 0.5], 1e-4)


def test_intervals_hold_the_metrics_and_shrink_with_equal_images() -> None:
    evaluation, metrics = evaluated(depth(OFF))
    for name, (low, high) in evaluation.details().intervals.items():
        assert low <= metrics[name] <= high
    low, high = evaluation.details().intervals["rmse"]
    assert 0.15 < low < 0.25 < 0.35 < high < 0.45
    again, _ = evaluated(depth(OFF))
    assert again.details().intervals == evaluation.details().intervals


# --------------------------------------------------------------------------- crops
def test_the_crop_of_nyu_is_the_published_one_and_goes_with_the_size() -> None:
    assert cropped("nyu_eigen", 480, 640) == (slice(45, 471), slice(41, 601))
    assert cropped("nyu_eigen", 240, 320) == (slice(22, 235), slice(20, 300))
    assert cropped("garg", 375, 1242) == (slice(153, 371), slice(44, 1197))
    assert cropped("none", 48, 64) == (slice(0, 48), slice(0, 64))


def test_what_a_crop_leaves_out_does_not_count() -> None:
    scenes = {"sizes": ((48, 64),)}
    evaluation, _ = evaluated(depth(scenes, crop="nyu_eigen"))
    assert evaluation.details().tables["images"][0]["pixels"] == 43 * 56
    assert evaluation.protocol(model_of())["crop"] == "nyu_eigen"


# --------------------------------------------------------------------------- alignment
def test_scale_and_shift_are_taken_out_and_the_name_says_so() -> None:
    moved = {"sizes": SIZES, "factor": 1.2, "shift": -0.1}
    assert evaluated(depth(moved))[1]["rmse"] > 0.3
    evaluation, metrics = evaluated(depth(moved, align="scale_shift"))
    assert metrics["rmse@scale_shift"] < 1e-5
    assert "rmse" not in metrics
    assert evaluation.protocol(model_of())["align"] == "scale_shift"
    row = evaluation.details().tables["images"][2]
    assert (row["scale"], row["shift"]) == pytest.approx((1.2, -0.3), abs=1e-4)


def test_alignment_is_the_least_squares_solution() -> None:
    config = depth({"sizes": SIZES, "factor": 1.1}, align="scale_shift", most=None)
    evaluation, _ = evaluated(config, Brightness(tilt=2.0))
    scenes = Scenes(config.data)
    for index, row in enumerate(evaluation.details().tables["images"]):
        truth = scenes.truth(index)[1:].double().numpy()
        found = scenes.truth(index)[1:].double().numpy() / 1.1
        found = found + 2 * np.linspace(0, 1, found.shape[1])
        system = np.stack([found.ravel(), np.ones(found.size)], axis=1)
        expected = np.linalg.lstsq(system, truth.ravel(), rcond=None)[0]
        assert (row["scale"], row["shift"]) == pytest.approx(expected, rel=1e-3)


def test_a_scale_is_the_ratio_of_medians() -> None:
    _, metrics = evaluated(depth({"sizes": SIZES, "factor": 1.2}, align="scale"))
    assert metrics["rmse@scale"] < 1e-5
    evaluation, _ = evaluated(depth(OFF, align="scale"))
    scenes = Scenes(depth(OFF).data)
    truth = scenes.truth(4)[1:].numpy()
    row = evaluation.details().tables["images"][4]
    expected = np.median(truth) / np.median(truth - 0.5)
    assert row["scale"] == pytest.approx(expected, rel=1e-4)


def test_a_prediction_of_one_value_is_only_shifted() -> None:
    _, metrics = evaluated(depth(OFF, align="scale_shift"), Brightness(factor=0.0, shift=2.0))
    baselines = evaluated(depth(OFF, align="scale_shift"))[0].baselines(model_of())
    assert metrics["rmse@scale_shift"] == pytest.approx(
        baselines["mean depth"]["rmse@scale_shift"], rel=1e-3
    )


# --------------------------------------------------------------------------- images
def test_a_mirror_image_evens_out_what_depends_on_the_side() -> None:
    flip = DenseInferenceConfig(flip=True)
    plain = evaluated(depth({"sizes": ((16, 16),)}), Brightness(tilt=1.0))[1]
    evened = evaluated(depth({"sizes": ((16, 16),)}, inference=flip), Brightness(tilt=1.0))[1]
    assert plain["rmse"] == pytest.approx(math.sqrt(np.mean(np.linspace(0, 1, 16) ** 2)), rel=1e-4)
    assert evened["rmse"] == pytest.approx(0.5, rel=1e-4)
    assert plain["silog"] > 1.5 * evened["silog"]


def test_predictions_are_resized_to_the_truth() -> None:
    scenes = {"sizes": SIZES, "enlarged": 2}
    evaluation, metrics = evaluated(depth(scenes))
    assert evaluation.details().tables["images"][0]["pixels"] == 30 * 48
    assert 0 < metrics["rmse"] < 2


def test_the_protocol_names_all_that_changes_a_number() -> None:
    inference = DenseInferenceConfig(resize=32, mode="slide", window=16, flip=True)
    config = depth({"sizes": ((16, 24),)}, inference=inference, crop="garg")
    assert evaluated(config)[0].protocol(model_of()) == {
        "align": "none",
        "range": "0.001..10",
        "crop": "garg",
        "resize": "32 px, shorter side",
        "interpolation": "bilinear",
        "windows": "16 px, stride 10",
        "scales": [1.0],
        "flip": True,
        "unit": "m",
    }


# --------------------------------------------------------------------------- mistakes
def test_what_is_not_finite_is_said() -> None:
    with pytest.raises(DataError, match=r"rooms/0.png: the prediction is not finite"):
        evaluated(depth(OFF), Brightness(factor=math.nan))


@pytest.mark.parametrize(
    ("scenes", "options", "place", "words"),
    [
        ({"name": "height"}, {}, "data", "have no target 'depth'"),
        ({"unit": "cm"}, {}, "data", "the head predicts 'm'"),
        ({}, {"target": "height"}, "target", "predicts no such pixels"),
        ({}, {"inference": DenseInferenceConfig(mode="slide")}, "inference.window", "how large"),
    ],
)
def test_what_does_not_fit(
    scenes: dict[str, Any], options: dict[str, Any], place: str, words: str
) -> None:
    evaluation = registry().build(depth(scenes, **options))
    evaluation.prepare(registry().build, GRAY)
    found = evaluation.problems(model_of())
    assert place in [each.where for each in found]
    assert words in " ".join(map(str, found))


def test_a_range_that_is_none() -> None:
    with pytest.raises(InvalidOption, match="most"):
        depth(OFF, least=5.0, most=4.0)


# --------------------------------------------------------------------------- mean predictor
def test_the_mean_depth_is_what_a_head_has_to_beat() -> None:
    config = depth(OFF)
    evaluation, metrics = evaluated(config)
    found = evaluation.baselines(model_of())["mean depth"]
    truths = [Scenes(config.data).truth(index)[1:].double() for index in range(5)]
    mean = float(torch.cat([truth.flatten() for truth in truths]).mean())
    expected = np.mean([float(((truth - mean) ** 2).mean().sqrt()) for truth in truths])
    assert found["rmse"] == pytest.approx(expected, rel=1e-4)
    assert found["rmse"] > 3 * metrics["rmse"]
    assert evaluated(depth(OFF, mean_predictor=False))[0].baselines(model_of()) == {}


# --------------------------------------------------------------------------- processes
@pytest.mark.slow
@pytest.mark.parametrize("processes", [2, 3])
def test_processes_find_what_one_finds(processes: int, tmp_path: Path) -> None:
    config = depth(OFF | {"empty": (1,), "corrupt": (3,)})
    alone = everything(config)
    for found in run_processes(processes, tmp_path, everything, config):
        assert found == alone


# --------------------------------------------------------------------------- files
@pytest.mark.parametrize("formats", [("npy",), ("npy", "png")])
def test_a_run_that_was_cut_off_goes_on_with_what_is_saved(
    formats: tuple[str, ...], tmp_path: Path
) -> None:
    config = depth(OFF, save=formats)
    _, whole = evaluated(depth(OFF))
    _, first = evaluated(config, folder=tmp_path)
    files = sorted(path for path in tmp_path.rglob("*.npy"))
    assert len(files) == len(SIZES)
    files[2].unlink()
    before = files[0].stat().st_mtime_ns
    _, again = evaluated(config, folder=tmp_path)
    assert whole == first == again
    assert files[2].exists()
    assert files[0].stat().st_mtime_ns == before


def test_predictions_of_other_weights_are_not_taken(tmp_path: Path) -> None:
    config: DepthConfig = depth(OFF, save=("npy",))
    evaluated(config, folder=tmp_path)
    with pytest.raises(DataError, match="weights"):
        evaluated(config, Brightness(factor=2.0), folder=tmp_path)


def test_pictures_of_depth_are_in_millimeters_and_clipping_is_said(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    evaluated(depth(OFF, save=("png",)), folder=tmp_path / "near")
    with Image.open(tmp_path / "near" / "rooms" / "0.png") as picture:
        stored = np.asarray(picture)
    expected = Scenes(depth(OFF).data).image(0)[0].double().numpy() / 255 * 8
    assert np.abs(stored / 1000 - expected).max() < 6e-4
    assert not caplog.records
    far = depth(OFF | {"shift": 1000.0}, most=None, save=("png",))
    _, metrics = evaluated(far, Brightness(shift=1000.0), folder=tmp_path / "far")
    assert metrics["rmse"] > 500  # of what was predicted, not of the picture
    assert "clipped" in caplog.text
