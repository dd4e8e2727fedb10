"""What trainings on depth ask of ``joint``: regions, crops of any shape, turns, shades."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from dinov3_transforms import JointConfig
from dinov3_transforms.joint import Joint
from torch import Tensor
from torchvision import tv_tensors

from dinov3_framework import (
    DataError,
    ImagesConfig,
    InvalidOption,
    RecipeError,
    Sample,
    Target,
    normalize,
)
from dinov3_framework.testing import TransformSuite

BAND = ImagesConfig(channels=1, mean=(0.5,), std=(0.25,))
DEPTH = {"depth": Target("map", unit="m")}


class TestDepthTraining(TransformSuite):
    """The published one of NYU, of smaller images."""

    config = JointConfig(
        region=(3, 2, 30, 31),
        turn=0.5,
        turn_by=20.0,
        crop=24,
        crop_width=26,
        crop_at="random",
        flip=0.5,
        shade=0.5,
        brightness=(0.75, 1.25),
    )


def joint(
    targets: dict[str, Target] | None = None, images: ImagesConfig = BAND, **options: Any
) -> Joint:
    return Joint(JointConfig(**options), images=images, targets=targets or {})


def raw(image: Tensor, images: ImagesConfig = BAND) -> Tensor:
    """Values in 0..255 of a normalized image."""
    mean, std = (torch.tensor(each)[:, None, None] for each in (images.mean, images.std))
    return (image * std + mean) * 255


def ramp(height: int, width: int) -> Tensor:
    return (torch.arange(height * width) % 251).view(1, height, width).to(torch.uint8)


def test_a_region_is_cut_out_at_first() -> None:
    image = ramp(20, 30)
    depth = tv_tensors.Mask(image[0].float())
    found = joint(DEPTH, region=(3, 4, 18, 28))(Sample(image, {"depth": depth}))
    assert torch.equal(found.image, normalize(image[:, 3:18, 4:28], BAND))
    assert torch.equal(found.targets["depth"].as_subclass(Tensor), image[0, 3:18, 4:28].float())
    with pytest.raises(DataError, match=r"20 x 30 pixels has no region \[3, 4, 21, 28\]"):
        joint(DEPTH, region=(3, 4, 21, 28))(Sample(image, {"depth": depth}))


def test_crops_that_are_no_squares() -> None:
    transform = joint(DEPTH, crop=16, crop_width=24, crop_at="random")
    assert transform.size == (16, 24)
    places = set()
    for seed in range(30):
        torch.manual_seed(seed)
        image = transform(Sample(ramp(20, 30), {"depth": torch.zeros(20, 30)})).image
        assert image.shape == (1, 16, 24)
        places.add(round(float(raw(image)[0, 0, 0])))
    assert len(places) > 15
    padded = transform(Sample(ramp(10, 30), {"depth": torch.ones(10, 30)}))
    assert padded.image.shape == (1, 16, 24)
    assert bool(padded.targets["depth"][10:].isnan().all())
    with pytest.raises(InvalidOption, match="needs crop"):
        JointConfig(crop_width=16)


def test_a_turn_takes_the_truth_along() -> None:
    """A map that is the image: where it is known after a turn, it is the image's."""
    rows, columns = torch.meshgrid(torch.arange(60.0), torch.arange(90.0), indexing="ij")
    picture = (rows + columns)[None] / 150
    transform = joint(DEPTH, turn=1.0, turn_by=30.0)
    shares = []
    for seed in range(20):
        torch.manual_seed(seed)
        sample = transform(Sample(picture, {"depth": tv_tensors.Mask(picture[0] * 150)}))
        depth = sample.targets["depth"].as_subclass(Tensor)
        known = depth.isfinite()
        shown = raw(sample.image)[0] / 255 * 150
        around = F.max_pool2d(F.pad((~known).float()[None], (1, 1, 1, 1), value=1.0), 3, stride=1)
        inside = around[0] == 0
        assert float((shown - depth)[inside].abs().max()) < 1.5
        # What came into the image is its mean color, 0 once normalized.
        new = F.max_pool2d(F.pad(known.float()[None], (1, 1, 1, 1)), 3, stride=1)[0] == 0
        assert not bool(new.any()) or float(sample.image[0][new].abs().max()) < 1e-5
        shares.append(float(known.float().mean()))
    assert 0.6 < min(shares) < 0.85
    assert max(shares) > 0.95


def test_a_turn_of_masks_has_their_ids_alone() -> None:
    mask = torch.zeros(40, 40, dtype=torch.int64)
    mask[10:30, 10:30] = 3
    targets = {"mask": Target("mask", 4, ignore_index=255)}
    torch.manual_seed(1)
    found = joint(targets, turn=1.0, turn_by=40.0)(Sample(ramp(40, 40), {"mask": mask}))
    assert found.targets["mask"].dtype == torch.int64
    assert set(found.targets["mask"].unique().tolist()) == {0, 3, 255}
    with pytest.raises(RecipeError, match="no ignore_index"):
        joint({"mask": Target("mask", 4)}, turn=0.5)


def test_shades_are_the_published_formula() -> None:
    rgb = ImagesConfig()
    image = torch.stack([ramp(12, 12)[0], ramp(12, 12)[0] // 2, ramp(12, 12)[0] // 3])
    one = {"gamma": (1.1, 1.1), "brightness": (0.75, 0.75), "color": (0.9, 0.9)}
    found = raw(joint({}, rgb, shade=1.0, **one)(Sample(image)).image, rgb)
    expected = (image.double() ** 1.1 * 0.75 * 0.9).clamp(max=255)
    torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-3)
    means = []
    for seed in range(200):
        torch.manual_seed(seed)
        shown = raw(joint({}, rgb, shade=0.5, gamma=(1.0, 1.0))(Sample(image)).image, rgb)
        means.append(float(shown.mean() / image.double().mean()))
    unchanged = sum(abs(mean - 1) < 1e-4 for mean in means)
    assert 70 < unchanged < 130
    assert 0.8 < min(means) < 0.93
    assert 1.07 < max(means) < 1.22
