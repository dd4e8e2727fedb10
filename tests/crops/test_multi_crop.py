"""Views, options, determinism and errors of the multi-crop augmentation."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
import torch
from dinov3_crops import DistortionsConfig, MaskingConfig, MultiCropConfig, dinov3_augmentations
from dinov3_crops.boxes import resize
from dinov3_crops.multi_crop import MultiCrop

from dinov3_framework import DataError, InvalidOption, RecipeError

SIZES = {"global_size": 48, "local_size": 16, "local_crops": 4}
PLAIN = DistortionsConfig(
    jitter_probability=0.0,
    grayscale_probability=0.0,
    blur_probability=(0.0, 0.0),
    local_blur_probability=0.0,
    solarize_probability=(0.0, 0.0),
)


def build(channels: int = 3, patch_size: int = 8, **options) -> MultiCrop:
    return MultiCrop(MultiCropConfig(**(SIZES | options)), channels=channels, patch_size=patch_size)


@pytest.fixture
def image(picture) -> torch.Tensor:
    return torch.from_numpy(picture).permute(2, 0, 1)


def crops_of(augmentation: MultiCrop, image: torch.Tensor, seed: int = 0):
    return augmentation(image, np.random.default_rng(seed))


def test_it_is_registered():
    (component,) = dinov3_augmentations()
    assert component.name == "multi_crop"
    assert component.resolve() is MultiCrop


def test_registering_imports_neither_torch_nor_numpy():
    code = (
        "import sys, dinov3_crops; dinov3_crops.dinov3_augmentations(); "
        "sys.exit(bool({'torch', 'numpy', 'PIL'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize("channels", [1, 2, 3, 4, 6])
@pytest.mark.parametrize("extra", [{}, {"anchor_size": 64}, {"local_from_global": True}])
def test_views_are_what_is_made(picture, channels, extra):
    image = torch.from_numpy(np.tile(picture, 2)[..., :channels].copy()).permute(2, 0, 1)
    augmentation = build(channels, **extra)
    crops = crops_of(augmentation, image)
    assert set(crops) == set(augmentation.views)
    for name, view in augmentation.views.items():
        assert crops[name].shape == (view.crops, channels, view.size, view.size)
        assert crops[name].dtype == torch.uint8
        assert crops[name].is_contiguous()
    assert set(augmentation.views) == {"global", "local"} | ({"anchor"} & {k[:6] for k in extra})


def test_no_local_crops(image):
    augmentation = build(local_crops=0, local_size=7)
    assert set(augmentation.views) == {"global"}
    assert set(crops_of(augmentation, image)) == {"global"}


@pytest.mark.parametrize("side", [1, 2, 9, 28])
@pytest.mark.parametrize("channels", [1, 3])
def test_tiny_images(channels, side):
    pixels = np.random.default_rng(0).integers(0, 256, (channels, side, side), np.uint8)
    augmentation = build(channels, 7, global_size=28, local_size=14, local_crops=6)
    for seed in range(5):
        crops = crops_of(augmentation, torch.from_numpy(pixels), seed)
        assert crops["global"].shape == (2, channels, 28, 28)
        assert crops["local"].shape == (6, channels, 14, 14)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"share_color_jitter": True},
        {"local_from_global": True},
        {"anchor_size": 64},
        {"anchor_size": 64, "anchor_without_distortions": True},
    ],
    ids=str,
)
def test_crops_depend_on_the_generator_alone(image, options):
    first, again, other = (crops_of(build(**options), image, seed) for seed in (1, 1, 2))
    for name in first:
        assert torch.equal(first[name], again[name])
        assert not torch.equal(first[name], other[name])


def test_memory_layout_does_not_matter_and_the_image_is_not_touched(image):
    before = image.clone(memory_format=torch.contiguous_format)
    for options in ({}, {"share_color_jitter": True}):
        first = crops_of(build(**options), image)
        second = crops_of(build(**options), image.contiguous())
        assert all(torch.equal(first[name], second[name]) for name in first)
    assert torch.equal(image, before)


def test_threads_do_not_change_a_bit(image):
    threads = torch.get_num_threads()
    try:
        results = []
        for count in (1, 3):
            torch.set_num_threads(count)
            results.append(crops_of(build(global_size=160, local_size=96), image))
        assert all(torch.equal(results[0][name], results[1][name]) for name in results[0])
    finally:
        torch.set_num_threads(threads)


def test_crops_of_an_image_differ(image):
    crops = crops_of(build(distortions=PLAIN), image)
    for view in crops.values():
        assert len({one.numpy().tobytes() for one in view}) == len(view)


def test_shared_jitter_gives_every_crop_the_same_colours():
    flat = torch.tensor([[[200]], [[90]], [[30]]], dtype=torch.uint8).expand(3, 64, 64)
    colors = []
    for seed in range(20):
        crops = crops_of(build(share_color_jitter=True, horizontal_flips=True), flat, seed)
        # The second global crop may be solarized besides.
        views = (crops["global"][:1], crops["local"])
        pixels = torch.cat([view.movedim(1, -1).reshape(-1, 3) for view in views])
        assert len(torch.unique(pixels, dim=0)) == 1
        colors.append(tuple(pixels[0].tolist()))
    assert len(set(colors)) > 10
    apart = crops_of(build(), flat)["local"]
    assert len(torch.unique(apart[:, :, 0, 0], dim=0)) > 1


def test_undistorted_anchors_show_the_same_boxes(image):
    options = {"anchor_size": 64, "anchor_without_distortions": True}
    clean = crops_of(build(distortions=PLAIN, **options), image)
    assert torch.equal(clean["global"], torch.from_numpy(resize(clean["anchor"].numpy(), 48)))
    distorted = crops_of(build(**options), image)
    assert torch.equal(distorted["anchor"], clean["anchor"])
    assert not torch.equal(distorted["global"], clean["global"])


def test_distorted_anchors_are_the_distorted_crops(image):
    crops = crops_of(build(anchor_size=64), image)
    assert torch.equal(crops["global"], torch.from_numpy(resize(crops["anchor"].numpy(), 48)))
    smaller = crops_of(build(anchor_size=32), image)
    assert torch.equal(smaller["anchor"], torch.from_numpy(resize(smaller["global"].numpy(), 32)))
    same = crops_of(build(anchor_size=48), image)
    assert torch.equal(same["anchor"], same["global"])
    assert same["anchor"].data_ptr() != same["global"].data_ptr()


def places(window: np.ndarray, whole: np.ndarray) -> set[tuple[int, int]]:
    size = window.shape[-1]
    span = range(whole.shape[-1] - size + 1)
    return {
        (i, j)
        for i in span
        for j in span
        if np.array_equal(whole[:, i : i + size, j : j + size], window)
    }


@pytest.mark.parametrize("anchor_size", [None, 64])
def test_local_crops_from_global_ones_lie_on_its_patches(image, anchor_size):
    options = {"anchor_size": anchor_size, "anchor_without_distortions": anchor_size is not None}
    augmentation = build(distortions=PLAIN, local_from_global=True, **options)
    seen = set()
    for seed in range(12):
        crops = {name: view.numpy() for name, view in crops_of(augmentation, image, seed).items()}
        for n, local in enumerate(crops["local"]):
            (place,) = places(local, crops["global"][n // 2])
            seen.add(place)
    offsets = {offset for place in seen for offset in place}
    assert offsets == {0, 8, 16, 24, 32}  # up to the far border
    assert len(seen) > 12


def test_local_crops_from_global_ones_are_distorted_anew(image):
    crops = crops_of(build(local_from_global=True, global_size=48, local_size=48), image)
    assert len({one.numpy().tobytes() for one in crops["local"]}) == 4
    assert not any((crops["global"][0] == one).all() for one in crops["local"])


def problem_keys(error: pytest.ExceptionInfo[RecipeError]) -> list[str]:
    return [problem.where for problem in error.value.problems]


def test_sizes_have_to_fit_the_patches():
    with pytest.raises(RecipeError) as error:
        build(patch_size=14, global_size=224, local_size=100, anchor_size=20)
    assert problem_keys(error) == ["augmentation.local_size", "augmentation.anchor_size"]
    assert "100 is no multiple of the patch size 14" in str(error.value)
    assert "try 98 or 112" in str(error.value)
    with pytest.raises(RecipeError, match="try 14") as error:
        build(patch_size=14, global_size=10, local_crops=0)
    assert problem_keys(error) == ["augmentation.global_size"]


def test_local_crops_from_global_ones_have_to_be_possible():
    with pytest.raises(RecipeError) as error:
        build(local_from_global=True, local_crops=5, local_size=56)
    assert problem_keys(error) == ["augmentation.local_crops", "augmentation.local_size"]
    assert "5 is odd" in str(error.value)
    assert "56 is above global_size = 48" in str(error.value)


@pytest.mark.parametrize(
    "wrong",
    [
        torch.zeros(1, 20, 20, dtype=torch.uint8),
        torch.zeros(3, 20, 20),
        torch.zeros(20, 20, dtype=torch.uint8),
    ],
)
def test_an_image_of_another_kind(wrong):
    with pytest.raises(DataError, match=r"multi_crop takes uint8 images \[3, H, W\], got"):
        crops_of(build(), wrong)


@pytest.mark.parametrize(
    ("make", "option", "value", "message"),
    [
        (MultiCropConfig, "global_scale", (0.0, 1.0), "two increasing numbers above 0"),
        (MultiCropConfig, "global_scale", (0.5, 1.5), "two increasing numbers in 0..1"),
        (MultiCropConfig, "local_scale", (0.5, 0.1), "two increasing numbers in 0..1"),
        (MultiCropConfig, "aspect_ratio", (-1.0, 2.0), "two increasing numbers above 0"),
        (MultiCropConfig, "local_crops", -1, "must not be negative"),
        (MultiCropConfig, "global_size", 0, "must be above 0"),
        (MultiCropConfig, "anchor_size", 0, "must be above 0"),
        (DistortionsConfig, "hue", 0.6, "0..0.5"),
        (DistortionsConfig, "brightness", -0.1, "must not be negative"),
        (DistortionsConfig, "blur_kernel", 8, "must be odd"),
        (DistortionsConfig, "blur_sigma", (0.0, 2.0), "two increasing numbers above 0"),
        (DistortionsConfig, "blur_probability", (0.0, 1.1), "one for each global crop"),
        (DistortionsConfig, "solarize_probability", (0.1,), "one for each global crop"),
        (DistortionsConfig, "solarize_threshold", 300, "0..255"),
        (DistortionsConfig, "jitter_probability", 2.0, "0..1"),
        (MaskingConfig, "ratio", (0.5, 0.1), "two increasing numbers in 0..1"),
        (MaskingConfig, "probability", 1.5, "0..1"),
        (MaskingConfig, "block_aspect", (0.0, 1.0), "two increasing numbers above 0"),
        (MaskingConfig, "block_min_patches", 0, "must be above 0"),
    ],
)
def test_options_out_of_range(make, option, value, message):
    with pytest.raises(InvalidOption, match=message) as error:
        make(**{option: value})
    assert error.value.name == option


def test_strengths_of_zero_change_nothing(image):
    options = {"brightness": 0.0, "contrast": 0.0, "saturation": 0.0, "hue": 0.0}
    still = DistortionsConfig(
        jitter_probability=1.0,
        grayscale_probability=0.0,
        blur_probability=(0.0, 0.0),
        local_blur_probability=0.0,
        solarize_probability=(0.0, 0.0),
        **options,
    )
    first, second = (crops_of(build(distortions=one), image) for one in (still, PLAIN))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_a_single_channel_is_jittered_but_never_turned(picture):
    image = torch.from_numpy(picture[..., :1].copy()).permute(2, 0, 1)
    only = DistortionsConfig(
        brightness=0.0, contrast=0.0, blur_probability=(0.0, 0.0), local_blur_probability=0.0,
        solarize_probability=(0.0, 0.0),
    )  # fmt: skip
    unchanged, plain, usual = (
        crops_of(build(1, distortions=one), image) for one in (only, PLAIN, DistortionsConfig())
    )
    assert torch.equal(unchanged["local"], plain["local"])
    assert not torch.equal(usual["local"], plain["local"])
