"""Normalisation and the evaluation transform, against torchvision."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torchvision.transforms import v2

from dinov3_framework.configs import ImagesConfig
from dinov3_framework.data.images import evaluation_image, normalize
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
