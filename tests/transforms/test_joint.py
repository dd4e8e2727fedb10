"""The transform ``joint``: geometry of image and targets, values of any type, randomness."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from dinov3_transforms import JointConfig
from dinov3_transforms.joint import Joint
from PIL import Image
from torch import Tensor
from torchvision import tv_tensors

from dinov3_framework import (
    DataError,
    ImagesConfig,
    InvalidOption,
    RecipeError,
    Sample,
    Target,
    evaluation_image,
    normalize,
)
from dinov3_framework.testing import TransformSuite

BAND = ImagesConfig(channels=1, mean=(0.5,), std=(0.25,))
WIDE = ImagesConfig(channels=6, mean=(0.5,) * 6, std=(0.25,) * 6)


class TestEvaluation(TransformSuite):
    config = JointConfig(resize=40, crop=32)


class TestSquashed(TransformSuite):
    config = JointConfig(resize=32, side="both", interpolation="bilinear")


class TestAsTheyAre(TransformSuite):
    config = JointConfig(multiple_of=16)


class TestSegmentationTraining(TransformSuite):
    config = JointConfig(
        resize=32, scale=(0.5, 2.0), crop=48, crop_at="random", flip=0.5, distort=0.5
    )

    def test_sample_types(self) -> None:
        pytest.skip("distortions round 8-bit images at each step")


class TestClassifierTraining(TransformSuite):
    config = JointConfig(area=(0.2, 0.6), crop=32, flip=0.5)


class TestManyChannels(TransformSuite):
    config = JointConfig(resize=24, crop=16, crop_at="random")
    images = WIDE


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


# ---------------------------------------------------------------------------- geometry
def test_without_options_an_image_is_normalized_alone() -> None:
    image = ramp(20, 30)
    assert torch.equal(joint()(Sample(image)).image, normalize(image, BAND))


@pytest.mark.parametrize("size", [(40, 64), (64, 40), (29, 97)])
def test_resize_and_center_crop_are_those_of_evaluations(size: tuple[int, int]) -> None:
    image = ramp(*size)
    expected = normalize(evaluation_image(image, 28), BAND)
    found = joint(resize=32, crop=28)(Sample(image)).image
    assert found.shape == expected.shape
    # The longer side is rounded instead of cut.
    assert float((found - expected).abs().mean()) < 0.2


@pytest.mark.parametrize(
    ("side", "expected"), [("shorter", (16, 32)), ("longer", (8, 16)), ("both", (16, 16))]
)
def test_sides_that_are_resized(side: str, expected: tuple[int, int]) -> None:
    assert joint(resize=16, side=side)(Sample(ramp(20, 40))).image.shape[1:] == expected


def test_a_mask_goes_where_the_image_goes() -> None:
    """An image that shows its own mask, through every geometric change."""
    mask = torch.zeros(60, 90, dtype=torch.uint8)
    mask[10:50, 20:70] = 3
    targets = {"mask": Target("mask", 4, ignore_index=255)}
    transform = joint(targets, resize=50, scale=(0.5, 1.5), crop=40, crop_at="random", flip=0.5)
    for seed in range(20):
        torch.manual_seed(seed)
        sample = transform(Sample(mask[None] * 60, {"mask": tv_tensors.Mask(mask)}))
        shown, found = raw(sample.image)[0], sample.targets["mask"].as_subclass(Tensor)
        assert found.dtype == torch.uint8
        inside = found != 255
        # But for the edge, where the image is interpolated.
        assert float(((shown > 90) == (found == 3))[inside].float().mean()) > 0.95
        assert set(found.unique().tolist()) <= {0, 3, 255}


@pytest.mark.parametrize(
    "options",
    [
        {"resize": 100, "side": "both"},
        {"area": (1.0, 1.0), "aspect": (1.0, 1.0), "crop": 100},
    ],
    ids=["resize", "area"],
)
def test_masks_are_resized_around_the_centers_of_pixels(options: dict[str, Any]) -> None:
    """As Pillow does; torchvision's own are half a pixel of the result further to the left."""
    columns = torch.arange(250).expand(250, 250)
    targets = {"mask": Target("mask", 250, ignore_index=255), "depth": Target("map", unit="m")}
    sample = Sample(
        torch.zeros(1, 250, 250, dtype=torch.uint8),
        {"mask": columns.to(torch.uint8), "depth": columns.float()},
    )
    found = joint(targets, **options)(sample).targets
    pillow = Image.fromarray(columns.to(torch.uint8).numpy()).resize((100, 100), Image.NEAREST)
    expected = torch.from_numpy(np.array(pillow))
    assert torch.equal(found["mask"].as_subclass(Tensor), expected)
    assert torch.equal(found["depth"].as_subclass(Tensor), expected.float())


def test_boxes_are_float32_to_the_end_and_objects_are_filtered_together() -> None:
    targets = {
        "boxes": Target("boxes"),
        "instances": Target("instances"),
        "label": Target("class", 9, per_object=True),
        "area": Target("number", per_object=True),
        "crowd": Target("class", 2, per_object=True),
        "names": Target("text", per_object=True),
        "mask": Target("mask", 2, ignore_index=255),
    }
    boxes = torch.tensor([[0.0, 0, 9, 9], [20.5, 20.25, 30.75, 31.5], [38, 38, 40, 40]])
    sample = Sample(
        ramp(40, 40),
        {
            "boxes": tv_tensors.BoundingBoxes(boxes, format="XYXY", canvas_size=(40, 40)),
            "instances": tv_tensors.Mask(torch.ones(3, 40, 40, dtype=torch.bool)),
            "label": torch.tensor([4, 5, 6]),
            "area": torch.tensor([81.0, 115, 4]),
            "crowd": torch.tensor([0, 1, 0]),
            "names": ["a", "b", "c"],
            "mask": tv_tensors.Mask(torch.ones(40, 40, dtype=torch.uint8)),
        },
    )
    kept = joint(targets)(sample).targets
    assert kept["boxes"].dtype == torch.float32
    assert torch.equal(kept["boxes"].as_subclass(Tensor), boxes)
    cut = joint(targets, crop=20)(sample).targets  # 10..30
    assert cut["boxes"].tolist() == [[10.5, 10.25, 20.0, 20.0]]
    assert cut["label"].tolist() == [5]
    assert cut["area"].tolist() == [115.0]
    assert cut["crowd"].tolist() == [1]
    assert cut["names"] == ["b"]
    assert cut["instances"].shape == (1, 20, 20)
    assert cut["mask"].shape == (20, 20)


def test_instances_without_boxes_go_when_nothing_of_them_is_left() -> None:
    masks = torch.zeros(2, 30, 30, dtype=torch.bool)
    masks[0, :5, :5] = masks[1, 12:20, 12:20] = True
    targets = {"instances": Target("instances"), "label": Target("class", 3, per_object=True)}
    sample = Sample(
        ramp(30, 30), {"instances": tv_tensors.Mask(masks), "label": torch.tensor([1, 2])}
    )
    found = joint(targets, crop=10)(sample).targets
    assert found["label"].tolist() == [2]
    assert found["instances"].shape == (1, 10, 10)


def test_padding_counts_for_nothing() -> None:
    targets = {"mask": Target("mask", 2, ignore_index=255), "depth": Target("map", unit="m")}
    ones = torch.ones(10, 12)
    sample = Sample(
        ramp(10, 12),
        {"mask": tv_tensors.Mask(ones.to(torch.uint8)), "depth": tv_tensors.Mask(ones)},
    )
    found = joint(targets, crop=16)(sample)
    assert found.image.shape == (1, 16, 16)
    assert float(found.image[:, 10:].abs().max()) == 0  # the mean
    assert set(found.targets["mask"][10:].unique().tolist()) == {255}
    assert bool(found.targets["depth"][:, 12:].isnan().all())
    assert not bool(found.targets["depth"][:10, :12].isnan().any())


def test_a_part_of_some_area_is_resized_to_the_crop() -> None:
    transform = joint(area=(0.25, 0.25), aspect=(1.0, 1.0), crop=20)
    columns = torch.arange(100).repeat(100, 1)[None].to(torch.uint8)
    starts = set()
    for seed in range(8):
        torch.manual_seed(seed)
        row = raw(transform(Sample(columns)).image)[0, 10]
        assert 40 < float(row[-1] - row[0]) < 56  # half of the image's 100 columns
        starts.add(round(float(row[0])))
    assert len(starts) > 3


# ---------------------------------------------------------------------------- values
def test_16_bit_images_do_not_wrap_around() -> None:
    """torchvision 0.29.1 resizes uint16 by bicubic interpolation to 65,535 beside dark borders."""
    image = torch.zeros(1, 40, 40, dtype=torch.int32)
    image[:, 10:30, 10:30] = 65535
    found = raw(joint(resize=64, side="both")(Sample(image.to(torch.uint16))).image)
    assert float(found.min()) >= -0.01
    assert float(found.max()) <= 255.01
    assert float(found[0, 0:8].max()) < 1  # beside the border, where it wrapped
    assert float(found[0, 32, 32]) > 254


def test_an_image_of_other_channels_is_a_user_error() -> None:
    with pytest.raises(DataError, match=r"images\.channels = 1 asks for"):
        joint()(Sample(torch.zeros(3, 8, 8, dtype=torch.uint8)))


def test_mirror_images_and_distortions_come_as_often_as_asked() -> None:
    image = ramp(8, 8)
    plain, changed = joint()(Sample(image)).image, joint(distort=1.0)
    mirrored = [
        torch.equal(joint(flip=0.25)(Sample(image)).image, plain.flip(-1)) for _ in range(400)
    ]
    assert 60 < sum(mirrored) < 140
    assert not torch.equal(changed(Sample(image)).image, plain)


# ---------------------------------------------------------------------------- mistakes
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"area": (0.1, 1.0)}, "area: needs crop"),
        ({"area": (0.1, 1.0), "crop": 8, "resize": 9}, "area: and resize"),
        ({"scale": (2.0, 1.0)}, "scale: must be two increasing numbers"),
        ({"flip": 2.0}, "flip: must lie in 0..1"),
    ],
)
def test_options_that_contradict_each_other(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidOption, match=message):
        JointConfig(**options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"distort": 0.5}, "distort: is for images of 1 or 3 channels, these have 6"),
        ({"crop": 16}, "crop: smaller images are padded, and the mask 'mask' has no ignore_index"),
        ({"resize": 16, "scale": (0.5, 2.0), "crop": 16}, "crop: smaller images are padded"),
        ({"multiple_of": 16}, "multiple_of: smaller images are padded"),
    ],
)
def test_what_the_data_do_not_allow(options: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        joint({"mask": Target("mask", 2)}, WIDE, **options)


def test_a_mask_that_is_never_padded_needs_no_class_for_it() -> None:
    transform = joint({"mask": Target("mask", 2)}, resize=16, crop=16, scale=(1.0, 2.0))
    assert transform.size == (16, 16)


@pytest.mark.parametrize(
    "options",
    [
        {"scale": (0.5, 2.0), "resize": 40},
        {"area": (0.2, 0.9), "crop": 24},
        {"turn": 0.5},
        {"crop": 24, "crop_at": "random"},
        {"flip": 0.5},
        {"distort": 0.5},
        {"shade": 0.5},
    ],
)
def test_what_draws_at_random_is_named(options: dict[str, Any]) -> None:
    """By its option: the one of these without which nothing is drawn."""
    images = ImagesConfig()
    transform = Joint(JointConfig(**options), images=images, targets={})
    assert transform.random
    (name,) = transform.random_options()
    assert name in options
    still = {key: value for key, value in options.items() if key != name}
    assert not Joint(JointConfig(**still), images=images, targets={}).random
    sample = Sample(torch.randint(256, (3, 40, 48), dtype=torch.uint8), {})
    seen = []
    for seed in range(12):
        torch.manual_seed(seed)
        seen.append(transform(sample).image)
    assert any(not torch.equal(seen[0], other) for other in seen)
