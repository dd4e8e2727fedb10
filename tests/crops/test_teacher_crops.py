"""The teacher's version of the global crops shows what the student's shows, in another size."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from dinov3_crops import DistortionsConfig, MultiCropConfig, ResolutionConfig
from dinov3_crops.boxes import resize
from dinov3_crops.multi_crop import MultiCrop

from dinov3_framework import InvalidOption, RecipeError, View

COMMON = {"global_size": 48, "local_size": 16, "local_crops": 4}
BLURRED = DistortionsConfig(blur_probability=(1.0, 1.0), blur_sigma=(1.5, 2.0))


def crops_of(picture: np.ndarray, seed: int = 0, **options) -> dict[str, np.ndarray]:
    augmentation = MultiCrop(MultiCropConfig(**(COMMON | options)), channels=3, patch_size=8)
    image = torch.from_numpy(picture).permute(2, 0, 1)
    return {name: view.numpy() for name, view in augmentation(image, _rng(seed)).items()}


def _rng(seed: int) -> np.random.Generator:
    return np.random.default_rng(seed)


ANCHORS = [
    {},
    {"anchor_size": 72},
    {"anchor_size": 72, "anchor_without_distortions": True},
    {"anchor_size": 24, "anchor_without_distortions": True},
]


@pytest.mark.parametrize("anchor", ANCHORS, ids=str)
@pytest.mark.parametrize("scale", [0.5, 0.75, 1.0, 1.25, 2.0])
def test_it_is_the_students_crop_in_another_size(picture, scale, anchor):
    side = round(48 * scale)
    for seed in range(4):
        crops = crops_of(picture, seed, teacher_scale=scale, distortions=BLURRED, **anchor)
        student, teacher = crops["global"], crops["teacher"]
        assert teacher.shape == (2, 3, side, side)
        larger, smaller = sorted((student, teacher), key=lambda of: of.shape[-1])[::-1]
        # Exact where the larger is what both were made of, else resized twice from a third.
        exact = not (anchor.get("anchor_size") == 72 and len(anchor) == 1) or side > 72
        off = resize(larger, smaller.shape[-1]).astype(int) - smaller
        assert np.abs(off).max() == 0 if exact else np.abs(off).mean() < 2
        assert teacher.flags["C_CONTIGUOUS"]
        assert not np.shares_memory(student, teacher)


def test_distortions_are_the_students(picture):
    """Crops of another seed differ far more, in boxes as in colors."""
    first, other = (crops_of(picture, seed, teacher_scale=0.5) for seed in (1, 2))
    same = np.abs(resize(first["global"], 24).astype(int) - first["teacher"]).mean()
    apart = np.abs(resize(first["global"], 24).astype(int) - other["teacher"]).mean()
    assert same == 0
    assert apart > 20


@pytest.mark.parametrize("anchor", ANCHORS, ids=str)
@pytest.mark.parametrize("local_from_global", [False, True])
def test_smaller_teacher_crops_leave_the_others_alone(picture, anchor, local_from_global):
    options = anchor | {"local_from_global": local_from_global}
    plain, scaled = crops_of(picture, **options), crops_of(picture, teacher_scale=0.5, **options)
    assert set(scaled) == {*plain, "teacher"}
    assert all(np.array_equal(plain[name], scaled[name]) for name in plain)


def test_undistorted_anchors_stay_undistorted(picture):
    options = {"anchor_size": 72, "anchor_without_distortions": True, "teacher_scale": 2.0}
    still = DistortionsConfig(
        jitter_probability=0.0,
        grayscale_probability=0.0,
        blur_probability=(0.0, 0.0),
        solarize_probability=(0.0, 0.0),
    )
    clean, distorted = crops_of(picture, distortions=still, **options), crops_of(picture, **options)
    assert np.array_equal(clean["anchor"], distorted["anchor"])
    assert not np.array_equal(clean["teacher"], distorted["teacher"])
    assert np.array_equal(clean["anchor"], resize(clean["teacher"], 72))


def test_each_resolution_has_its_own_size(picture):
    tables = tuple(ResolutionConfig(ratio=0.5, global_size=side) for side in (32, 48))
    config = MultiCropConfig(local_size=16, teacher_scale=0.5, resolutions=tables)
    augmentation = MultiCrop(config, channels=3, patch_size=8)
    views = [variant.views["teacher"] for variant in augmentation.variants()]
    assert views == [View(2, 16), View(2, 24)]
    image = torch.from_numpy(picture).permute(2, 0, 1)
    for variant, view in zip(augmentation.variants(), views, strict=True):
        assert variant(image, _rng(0))["teacher"].shape == (2, 3, view.size, view.size)


def test_its_size_need_not_be_whole_patches_of_the_student(picture):
    assert crops_of(picture, teacher_scale=0.3125)["teacher"].shape == (2, 3, 15, 15)


@pytest.mark.parametrize("scale", [1 / 3, 0.333333])
def test_a_rounded_third_will_do(picture, scale):
    assert crops_of(picture, teacher_scale=scale)["teacher"].shape[-1] == 16


@pytest.mark.parametrize(
    ("scale", "words"),
    [
        (0.3, "0.3 x global_size = 48 is 14.4 pixels, which is no whole number"),
        (0.3, r"try 0.291667 \(14 px\) or 0.3125 \(15 px\)"),
        (0.01, r"try 0.0208333 \(1 px\)"),
    ],
)
def test_half_a_pixel_is_refused(picture, scale, words):
    with pytest.raises(RecipeError, match=words) as error:
        crops_of(picture, teacher_scale=scale)
    assert [problem.where for problem in error.value.problems] == ["augmentation.teacher_scale"]


def test_a_scale_is_above_zero():
    with pytest.raises(InvalidOption, match="must be above 0"):
        MultiCropConfig(teacher_scale=0.0)
