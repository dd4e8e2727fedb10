"""What trainings on masks want of the joint transform: crops of several classes, colors."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from dinov3_transforms import JointConfig
from dinov3_transforms.joint import Joint
from torch import Tensor
from torchvision import tv_tensors

from dinov3_framework import ImagesConfig, Sample, Target

IGNORED = 255
PLAIN = ImagesConfig(mean=(0.0,) * 3, std=(1.0,) * 3)


def joint(**options: Any) -> Joint:
    targets = {"mask": Target("mask", n_classes=4, ignore_index=IGNORED)}
    return Joint(JointConfig(**options), images=PLAIN, targets=targets)


def sample(mask: Tensor) -> Sample:
    image = torch.randint(0, 256, (3, *mask.shape), dtype=torch.uint8)
    return Sample(image, {"mask": tv_tensors.Mask(mask)})


def crops(mask: Tensor, count: int = 40, **options: Any) -> list[Tensor]:
    torch.manual_seed(0)
    made = joint(crop=16, crop_at="random", **options)
    return [made(sample(mask)).targets["mask"].as_subclass(Tensor) for _ in range(count)]


def reached(mask: Tensor, share: float) -> bool:
    """Whether one class has so much of the known pixels."""
    counts = torch.bincount(mask[mask != IGNORED].long().flatten(), minlength=4)
    return bool(counts.max() >= share * counts.sum())


def test_crops_show_more_than_one_class() -> None:
    """Half of the image is of one class alone, the other half of stripes, some of them ignored."""
    mask = torch.zeros(40, 80, dtype=torch.uint8)
    mask[:, 40:] = torch.tensor([1, 2, 1, 2, IGNORED]).repeat(8)
    plain = sum(reached(each, 0.75) for each in crops(mask))
    varied = sum(reached(each, 0.75) for each in crops(mask, crop_max_share=0.75))
    assert plain > 10
    assert varied == 0


def test_a_mask_of_one_class_is_cropped_all_the_same() -> None:
    found = crops(torch.ones(40, 80, dtype=torch.uint8), 3, crop_max_share=0.75)
    assert [each.shape for each in found] == [(16, 16)] * 3
    nothing = torch.full((40, 80), IGNORED, dtype=torch.uint8)
    assert bool((crops(nothing, 1, crop_max_share=0.75)[0] == IGNORED).all())


def test_a_share_needs_random_crops() -> None:
    for options in ({"crop": 16}, {"crop_at": "random"}):
        with pytest.raises(ValueError, match="crop_max_share"):
            JointConfig(crop_max_share=0.75, **options)  # type: ignore[arg-type]


@pytest.mark.parametrize("floating", [False, True])
@pytest.mark.parametrize("channels", [1, 3])
def test_published_distortion_keeps_range_and_swaps_no_channels(
    channels: int, floating: bool
) -> None:
    """Gray stays gray, values stay in their range, and there is some change in most images."""
    images = ImagesConfig(channels=channels, mean=(0.0,) * channels, std=(1.0,) * channels)
    config = JointConfig(distort=0.5, distort_as="mmsegmentation")
    made = Joint(config, images=images, targets={})
    gray = torch.randint(0, 256, (1, 9, 9), dtype=torch.uint8).repeat(channels, 1, 1)
    image = gray / 255 if floating else gray
    torch.manual_seed(0)
    found = [made(Sample(image)).image for _ in range(30)]
    whole = gray / 255
    assert sum(not torch.allclose(each, whole, atol=0.01) for each in found) > 10
    for each in found:
        assert 0 <= float(each.min()) <= float(each.max()) <= 1
        torch.testing.assert_close(each, each[:1].expand_as(each), rtol=0, atol=0.02)


def test_no_distortion_without_its_probability() -> None:
    given = sample(torch.zeros(8, 8, dtype=torch.uint8))
    found = joint(distort_as="mmsegmentation")(given)
    torch.testing.assert_close(found.image, given.image / 255)
