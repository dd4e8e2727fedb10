"""Every operation against torchvision's of the same name."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from dinov3_crops import DistortionsConfig
from dinov3_crops.blur import gaussian_blur, kernel_taps
from dinov3_crops.boxes import crop, random_boxes, resize
from dinov3_crops.color import blend, column, luminance, mean_luminance, shift_hue, solarize
from dinov3_crops.distortions import (
    BRIGHTNESS,
    CONTRAST,
    HUE,
    SATURATION,
    Blur,
    apply_jitter,
    distort,
    make_jitter,
)
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2 import functional as F

THEIRS = {
    BRIGHTNESS: F.adjust_brightness,
    CONTRAST: F.adjust_contrast,
    SATURATION: F.adjust_saturation,
    HUE: F.adjust_hue,
}
FACTORS = (0.0, 0.6, 1.0, 1.4, 3.0)


def stack(picture: np.ndarray, copies: int) -> np.ndarray:
    """[copies, C, H, W]"""
    return np.ascontiguousarray(np.stack([picture.transpose(2, 0, 1)] * copies))


def one_jitter(kind: int, factors: tuple[float, ...]):
    table = np.tile((1.0, 1.0, 1.0, 0.0), (len(factors), 1))
    table[:, kind] = factors
    order = np.tile(np.arange(4), (len(factors), 1))
    return make_jitter(order, table, np.zeros(len(factors), bool))


def distance(ours: np.ndarray, theirs: torch.Tensor) -> int:
    return int(np.abs(ours.astype(int) - theirs.numpy().astype(int)).max())


@pytest.mark.parametrize("kind", [BRIGHTNESS, CONTRAST, SATURATION])
def test_factors_mean_what_torchvision_means(picture, kind):
    crops = stack(picture, len(FACTORS))
    expected = [THEIRS[kind](torch.from_numpy(crops[0]).clone(), factor) for factor in FACTORS]
    apply_jitter(crops, one_jitter(kind, FACTORS))
    for ours, theirs, factor in zip(crops, expected, FACTORS, strict=True):
        # torchvision cuts off the fraction of the luminance, which a great factor magnifies
        assert distance(ours, theirs) <= (2 if factor > 2 else 1)


def test_hue_is_the_round_trip_through_hsv(picture):
    colors = np.array(list(itertools.product((0, 1, 60, 128, 200, 255), repeat=3)), np.uint8)
    pixels = np.concatenate([picture.reshape(-1, 3), colors]).T.reshape(3, 1, -1)
    shifts = (-0.5, -0.31, -0.1, 0.0, 0.02, 0.1, 1 / 3, 0.5)
    crops = np.ascontiguousarray(np.stack([pixels] * len(shifts)))
    apply_jitter(crops, one_jitter(HUE, shifts))
    for ours, shift in zip(crops, shifts, strict=True):
        assert distance(ours, F.adjust_hue(torch.from_numpy(pixels).clone(), shift)) <= 1


def test_hue_keeps_gray_gray_and_turns_red_to_green():
    pixels = np.array([[255, 77], [0, 77], [0, 77]], np.float32).reshape(1, 3, 1, 2)
    shift_hue(pixels, np.array([1 / 3], np.float32))
    np.testing.assert_allclose(pixels[0, :, 0, 0], [0, 255, 0], atol=1e-3)
    np.testing.assert_allclose(pixels[0, :, 0, 1], 77)


def test_luminance_and_its_mean(picture):
    pixels = stack(picture, 2).astype(np.float32)
    pixels[1] *= 0.5
    gray = luminance(pixels)
    assert distance(gray[0].astype(np.uint8), F.rgb_to_grayscale(torch.tensor(pixels[0]))) <= 1
    np.testing.assert_allclose(mean_luminance(pixels), gray.mean(axis=(1, 2, 3)), rtol=1e-4)


def test_mean_of_other_channel_counts_is_the_plain_mean(picture):
    pixels = stack(picture, 1).astype(np.float32)[:, :2]
    np.testing.assert_allclose(mean_luminance(pixels), pixels.mean(), rtol=1e-5)


def test_blend_stays_within_levels():
    pixels = np.array([10.0, 100.0, 250.0], np.float32).reshape(1, 1, 1, 3)
    blend(pixels, np.array([2.0], np.float32), np.float32([-90.0]).reshape(1, 1, 1, 1))
    np.testing.assert_array_equal(pixels.ravel(), [0, 110, 255])


@pytest.mark.parametrize("order", list(itertools.permutations(range(4))))
def test_jitters_follow_their_order(picture, order):
    factors = np.array([[1.35, 1.3, 0.8, 0.08]])
    crops = stack(picture, 1)
    expected = torch.from_numpy(crops[0]).float().div(255)
    for kind in order:
        expected = THEIRS[kind](expected, factors[0, kind])
    apply_jitter(crops, make_jitter(np.array([order]), factors, np.zeros(1, bool)))
    assert distance(crops[0], expected.mul(255).round()) <= 1


def test_a_group_of_small_crops_gives_what_each_gives_alone():
    rng = np.random.default_rng(0)
    crops = rng.integers(0, 256, (24, 3, 16, 16), np.uint8)
    orders = np.array(list(itertools.permutations(range(4))))
    factors = rng.uniform((0.6, 0.6, 0.8, -0.1), (1.4, 1.4, 1.2, 0.1), (24, 4))
    factors[:5] = (1, 1, 1, 0)
    gray = rng.random(24) < 0.3
    sigma = rng.uniform(0.1, 2.0, 24) * (rng.random(24) < 0.5)
    config = DistortionsConfig()
    together = crops.copy()
    blur = Blur(sigma, np.zeros(24, bool))
    distort(together, make_jitter(orders, factors, gray), blur, config)
    for n in range(24):
        one = slice(n, n + 1)
        alone = crops[one].copy()
        distort(
            alone,
            make_jitter(orders[one], factors[one], gray[one]),
            Blur(sigma[one], np.zeros(1, bool)),
            config,
        )
        assert np.abs(alone.astype(int) - together[one]).max() <= 1
        assert (alone == together[one]).mean() > 0.99


def test_grayscale_replaces_all_channels(picture):
    crops = stack(picture, 2)
    neutral = np.tile((1.0, 1.0, 1.0, 0.0), (2, 1))
    order = np.tile(np.arange(4), (2, 1))
    expected = F.rgb_to_grayscale(torch.from_numpy(crops[0]), num_output_channels=3)
    apply_jitter(crops, make_jitter(order, neutral, np.array([True, False])))
    assert distance(crops[0], expected) <= 1
    np.testing.assert_array_equal(crops[1], picture.transpose(2, 0, 1))


@pytest.mark.parametrize("sigma", [0.1, 0.3, 0.7, 1.2, 2.0])
def test_blur(picture, sigma):
    pixels = stack(picture, 1)
    blurred = gaussian_blur(pixels.astype(np.float32), np.array([sigma]), 9)
    expected = F.gaussian_blur(torch.from_numpy(pixels[0]), [9, 9], [sigma, sigma])
    assert distance(np.rint(blurred[0]).astype(np.uint8), expected) <= 1


def test_each_crop_is_blurred_by_its_own_sigma(picture):
    pixels = stack(picture, 3).astype(np.float32)
    sigma = np.array([0.1, 0.8, 2.0])
    for ours, own in zip(gaussian_blur(pixels, sigma, 9), sigma, strict=True):
        expected = F.gaussian_blur(torch.from_numpy(pixels[0]), [9, 9], [own, own]).numpy()
        np.testing.assert_allclose(ours, expected, atol=0.1)


def test_blur_is_narrower_in_tiny_crops():
    pixels = np.random.default_rng(0).uniform(0, 255, (1, 1, 3, 3)).astype(np.float32)
    expected = F.gaussian_blur(torch.from_numpy(pixels[0]), [5, 5], [2.0, 2.0]).numpy()
    np.testing.assert_allclose(gaussian_blur(pixels, np.array([2.0]), 9)[0], expected, atol=1e-3)
    dot = pixels[:, :, :1, :1]
    np.testing.assert_array_equal(gaussian_blur(dot, np.array([2.0]), 9), dot)


def test_kernels_sum_to_one_and_lose_idle_taps():
    taps = kernel_taps(np.array([0.5, 2.0]), 4)
    np.testing.assert_allclose(2 * taps.sum(axis=0) - taps[0], 1, rtol=1e-6)
    assert len(kernel_taps(np.array([0.1]), 4)) == 1


@pytest.mark.parametrize("threshold", [0, 100, 128, 255])
def test_solarize(picture, threshold):
    image = picture.transpose(2, 0, 1).copy()
    expected = F.solarize(torch.from_numpy(image).clone(), threshold)
    solarize(image, threshold)
    assert distance(image, expected) == 0


def test_column_broadcasts_over_crops():
    assert column(np.ones(5, np.float32)).shape == (5, 1, 1, 1)


@pytest.mark.parametrize("size", [24, 60, 200])
@pytest.mark.parametrize("channels", [1, 2, 3, 5])
def test_crop_cuts_resizes_and_mirrors(picture, size, channels):
    pixels = np.ascontiguousarray(np.concatenate([picture, picture[..., ::-1]], 2)[..., :channels])
    boxes = np.array([[10, 20, 50, 70], [0, 0, 90, 120]])
    crops = crop(pixels, boxes, np.array([True, False]), size)
    for ours, (top, left, height, width), flip in zip(crops, boxes, (True, False), strict=True):
        image = torch.from_numpy(pixels).permute(2, 0, 1)[
            :, top : top + height, left : left + width
        ]
        bicubic = {"interpolation": InterpolationMode.BICUBIC, "antialias": True}
        expected = F.resize(image, [size, size], **bicubic)
        assert distance(ours, expected.flip(-1) if flip else expected) <= 1


def test_resize_of_a_stack(picture):
    crops = stack(picture[:, :90], 2)
    expected = F.resize(
        torch.from_numpy(crops), [40, 40], interpolation=InterpolationMode.BICUBIC, antialias=True
    )
    assert distance(resize(crops, 40), expected) <= 1
    same = resize(crops, 90)
    assert not np.shares_memory(same, crops)
    np.testing.assert_array_equal(same, crops)


def test_boxes_have_the_asked_area_and_aspect_ratio():
    boxes = random_boxes(np.random.default_rng(0), 4000, 400, 400, (0.1, 0.3), (0.5, 2.0))
    top, left, height, width = boxes.T
    share = height * width / 400**2
    assert share.min() >= 0.099
    assert share.max() <= 0.301
    assert share.mean() == pytest.approx(0.2, abs=0.004)
    assert np.log(width / height).std() == pytest.approx(np.log(4) / np.sqrt(12), rel=0.05)
    assert np.log(width / height).mean() == pytest.approx(0, abs=0.03)
    # Uniform over the places that are left: halfway on average.
    assert (top / (400 - height)).mean() == pytest.approx(0.5, abs=0.03)
    assert (left / (400 - width)).mean() == pytest.approx(0.5, abs=0.03)


@pytest.mark.parametrize(
    ("height", "width", "box"),
    [
        (10, 400, (0, 193, 10, 13)),  # far too wide: as wide as is allowed, from the middle
        (400, 10, (193, 0, 13, 10)),
    ],
)
def test_boxes_fall_back_to_the_center(height, width, box):
    boxes = random_boxes(np.random.default_rng(0), 5, height, width, (0.9, 1.0), (3 / 4, 4 / 3))
    np.testing.assert_array_equal(boxes, [box] * 5)


def test_a_single_pixel_is_an_image():
    boxes = random_boxes(np.random.default_rng(0), 3, 1, 1, (0.05, 0.3), (3 / 4, 4 / 3))
    np.testing.assert_array_equal(boxes, [(0, 0, 1, 1)] * 3)
