"""Images of any size become what a backbone takes."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor

from dinov3_framework.configs import ImagesConfig
from dinov3_framework.data.images import EvaluationTransform, ImageFit, evaluation_image, normalize
from dinov3_framework.errors import DataError

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


def test_pad_adds_the_mean_colour_at_the_right_and_bottom() -> None:
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


def test_the_transform_goes_from_a_file_to_normalised_floats(tmp_path: Path) -> None:
    rgb = ImagesConfig(mean=(0.1, 0.2, 0.3), std=(0.5, 0.6, 0.7))
    Image.new("RGB", (33, 40), (51, 102, 153)).save(tmp_path / "a.png")
    transform = EvaluationTransform(ImageFit(rgb, 8, "crop", 16))
    # Loader workers receive it pickled.
    pixels = pickle.loads(pickle.dumps(transform))(tmp_path / "a.png")
    assert pixels.shape == (3, 16, 16)
    assert pixels.dtype == torch.float32
    expected = torch.tensor([(0.2 - 0.1) / 0.5, (0.4 - 0.2) / 0.6, (0.6 - 0.3) / 0.7])
    torch.testing.assert_close(pixels[:, 0, 0], expected)
