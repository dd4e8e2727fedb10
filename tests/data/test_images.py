"""Images of any size become what a backbone takes: normalized, resized, cropped, padded."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms import v2

from dinov3_framework.configs import ImagesConfig
from dinov3_framework.data.images import (
    EvaluationTransform,
    ImageFit,
    evaluation_image,
    normalize,
    resize,
)
from dinov3_framework.errors import DataError


def picture(channels: int, height: int, width: int) -> torch.Tensor:
    """Smooth structure with noise on it, uint8 [C, H, W]."""
    rng = np.random.default_rng(7)
    y, x = np.mgrid[0:height, 0:width]
    waves = [np.sin(x / (9 + c)) * np.cos(y / (13 + c)) for c in range(channels)]
    noise = rng.normal(0, 12, (channels, height, width))
    return torch.from_numpy((128 + 90 * np.stack(waves) + noise).clip(0, 255).astype(np.uint8))


def test_normalize_is_what_torchvision_does() -> None:
    images = torch.stack([picture(3, 20, 30)] * 2)
    spec = ImagesConfig()
    expected = v2.Normalize(spec.mean, spec.std)(v2.functional.to_dtype(images, scale=True))
    torch.testing.assert_close(normalize(images, spec), expected, rtol=1e-5, atol=1e-5)


def test_normalize_maps_the_mean_to_zero_and_one_deviation_to_one() -> None:
    spec = ImagesConfig(channels=2, mean=(0.2, 0.4), std=(0.2, 0.6))
    images = torch.tensor([51, 255], dtype=torch.uint8).view(2, 1, 1).expand(5, 4, 2, 3, 3)
    normalized = normalize(images, spec)
    assert normalized.shape == (5, 4, 2, 3, 3)
    assert normalized.dtype == torch.float32
    torch.testing.assert_close(normalized[0, 0, :, 0, 0], torch.tensor([0.0, 1.0]))


def test_normalize_leaves_its_input_and_floating_point_images_alone() -> None:
    images = picture(3, 8, 8)
    before = images.clone()
    normalize(images, ImagesConfig())
    assert torch.equal(images, before)
    floats = torch.randn(2, 3, 8, 8, dtype=torch.bfloat16)
    assert normalize(floats, ImagesConfig()) is floats


@pytest.mark.parametrize("shape", [(1, 8, 8), (2, 4, 8, 8), (8, 8)])
def test_normalize_refuses_another_channel_count(shape: tuple[int, ...]) -> None:
    with pytest.raises(DataError, match=r"images\.channels = 3"):
        normalize(torch.zeros(shape, dtype=torch.uint8), ImagesConfig())


@pytest.mark.parametrize("channels", [1, 3, 5])
@pytest.mark.parametrize(
    ("height", "width", "size"),
    [(375, 500, 224), (500, 375, 224), (41, 300, 96), (28, 29, 28), (17, 13, 32), (256, 300, 224)],
)
def test_evaluation_image_is_torchvisions_resize_and_crop(
    channels: int, height: int, width: int, size: int
) -> None:
    image = picture(channels, height, width)
    reference = v2.Compose(
        [
            v2.Resize(
                round(size * 256 / 224),
                interpolation=v2.InterpolationMode.BICUBIC,
                antialias=True,
            ),
            v2.CenterCrop(size),
        ]
    )
    result = evaluation_image(image, size)
    assert result.shape == (channels, size, size)
    assert result.dtype == torch.uint8
    assert torch.equal(result, reference(image))


@pytest.mark.parametrize("shape", [(2, 60_000), (60_000, 2), (1, 70_001), (3, 30_000)])
def test_long_and_thin_images_are_cut_before_they_are_enlarged(shape: tuple[int, int]) -> None:
    """As a whole they would take gigabytes; the crop is that of the whole, to half a pixel."""
    middle = 2000 // min(shape)  # enough that nothing of the crop sees the ends
    image = torch.randint(0, 256, (3, *shape), dtype=torch.uint8, generator=seeded(0))
    axis = 1 if shape[0] > shape[1] else 2
    odd = shape[axis - 1] % 2
    part = image.narrow(axis, (shape[axis - 1] - middle) // 2, middle + (middle + odd) % 2)
    crop = evaluation_image(image, 32)
    assert crop.shape == (3, 32, 32)
    difference = (crop.int() - evaluation_image(part, 32).int()).abs()
    assert difference.max() <= 12  # of noise, each value of which becomes a dozen pixels


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_resizing_keeps_what_fits_and_what_is_shown() -> None:
    image = torch.zeros(3, 20, 30, dtype=torch.uint8)
    image[:, :, 15:] = 200
    assert resize(image, 20, 30) is image
    larger = resize(image, 40, 60)
    assert larger.dtype == torch.uint8
    assert (larger[:, :, :26] <= 16).all()
    assert (larger[:, :, 34:] >= 184).all()


@pytest.mark.parametrize("shape", [(40, 30), (9, 200), (64, 65)])
def test_resize_is_torchvisions(shape: tuple[int, int]) -> None:
    image = picture(3, 50, 70)
    cubic = v2.InterpolationMode.BICUBIC
    assert torch.equal(
        resize(image, *shape), v2.functional.resize(image, list(shape), cubic, antialias=True)
    )


def test_evaluation_image_does_not_depend_on_memory_layout() -> None:
    image = picture(3, 60, 80)
    as_decoded = image.permute(1, 2, 0).contiguous().permute(2, 0, 1)
    difference = evaluation_image(image, 28).int() - evaluation_image(as_decoded, 28).int()
    assert difference.abs().max() <= 1


def test_an_image_of_the_size_asked_for_is_left_alone() -> None:
    image = picture(1, 28, 28)
    assert torch.equal(evaluation_image(image, 28), image)


@pytest.mark.parametrize(
    "image",
    [torch.zeros(3, 8, 8), torch.zeros(8, 8, dtype=torch.uint8)],
    ids=["float", "two dimensions"],
)
def test_evaluation_image_refuses_what_is_no_uint8_image(image: torch.Tensor) -> None:
    with pytest.raises(DataError, match=r"must be uint8 \[C, H, W\]"):
        evaluation_image(image, 4)


# --------------------------------------------------------------------------- fitting
IMAGES = ImagesConfig(channels=2, mean=(0.25, 0.5), std=(0.2, 0.4))


def image(height: int, width: int) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (2, height, width), dtype=torch.uint8, generator=generator)


def fit(name: str, size: int | None = None) -> ImageFit:
    return ImageFit(IMAGES, 8, name, size)


def test_crop_is_the_evaluation_image() -> None:
    given = image(50, 70)
    assert torch.equal(fit("crop", 24)(given), evaluation_image(given, 24))


def test_squash_keeps_all_of_the_image() -> None:
    wide = torch.zeros(2, 20, 200, dtype=torch.uint8)
    wide[:, :, :20] = wide[:, :, -20:] = 255
    squashed = fit("squash", 40)(wide)
    assert squashed.shape == (2, 40, 40)
    assert (squashed[:, :, 0] == 255).all()
    assert (squashed[:, :, -1] == 255).all()
    assert (fit("crop", 40)(wide) == 0).all(), "which a crop does not"


def test_pad_adds_the_mean_color_at_the_right_and_bottom() -> None:
    given = image(9, 24)
    padded = fit("pad")(given)
    assert padded.shape == (2, 16, 24)
    assert torch.equal(padded[:, :9], given)
    assert padded[0, 9:].unique().tolist() == [64]
    assert padded[1, 9:].unique().tolist() == [128]
    assert normalize(padded, IMAGES)[:, 9:].abs().max() < 0.01
    assert torch.equal(fit("pad")(image(16, 8)), image(16, 8))


@pytest.mark.parametrize(
    ("given", "size", "shape"),
    [
        ((100, 50), 40, (40, 24)),  # 40 x 20, padded
        ((50, 100), 40, (24, 40)),
        ((10, 10), 40, (40, 40)),  # small ones are enlarged
        ((400, 1), 16, (16, 8)),
        ((100, 52), 33, (40, 24)),  # 33 x 17
    ],
)
def test_pad_with_a_size(given: tuple[int, int], size: int, shape: tuple[int, int]) -> None:
    assert fit("pad", size)(image(*given)).shape[1:] == shape


def test_native_leaves_the_image_alone_or_says_which_sizes_are_near() -> None:
    given = image(16, 24)
    assert torch.equal(fit("native")(given), given)
    with pytest.raises(DataError, match=r"16 x 30 pixels .* resize it to 16 x 24 or 32, or"):
        fit("native")(image(16, 30))
    with pytest.raises(DataError, match=r"resize it to 8 x 8, or"):
        fit("native")(image(3, 8))


@pytest.mark.parametrize(
    ("name", "size", "option"),
    [
        ("crop", None, "size"),
        ("crop", 20, "size"),
        ("squash", 4, "size"),
        ("native", 16, "size"),
        ("pad", 0, "size"),
        ("stretch", 16, "fit"),
    ],
)
def test_rules_that_cannot_work(name: str, size: int | None, option: str) -> None:
    complaint = fit(name, size).complaint()
    assert complaint is not None
    assert complaint[0] == option


@pytest.mark.parametrize(
    ("name", "size"), [("crop", 16), ("squash", 16), ("pad", None), ("pad", 20), ("native", None)]
)
def test_rules_that_work(name: str, size: int | None) -> None:
    assert fit(name, size).complaint() is None


@pytest.mark.parametrize("name", ["crop", "squash", "pad", "native"])
@pytest.mark.parametrize(
    "wrong", [torch.rand(2, 16, 16), torch.zeros(16, 16, dtype=torch.uint8), image(0, 16)]
)
def test_what_is_no_image(name: str, wrong: Any) -> None:
    with pytest.raises(DataError, match="an image must be uint8"):
        fit(name, 16)(wrong)


def test_the_transform_goes_from_a_file_to_normalized_floats(tmp_path: Path) -> None:
    rgb = ImagesConfig(mean=(0.1, 0.2, 0.3), std=(0.5, 0.6, 0.7))
    Image.new("RGB", (33, 40), (51, 102, 153)).save(tmp_path / "a.png")
    transform = EvaluationTransform(ImageFit(rgb, 8, "crop", 16))
    # Loader workers receive it pickled.
    pixels = pickle.loads(pickle.dumps(transform))(tmp_path / "a.png")
    assert pixels.shape == (3, 16, 16)
    assert pixels.dtype == torch.float32
    expected = torch.tensor([(0.2 - 0.1) / 0.5, (0.4 - 0.2) / 0.6, (0.6 - 0.3) / 0.7])
    torch.testing.assert_close(pixels[:, 0, 0], expected)
