"""Promises of a transform."""

from __future__ import annotations

import pickle
from collections.abc import Mapping
from functools import cached_property
from typing import Any

import torch
from attrs import evolve
from torch import Tensor

from dinov3_framework.configs import ImagesConfig
from dinov3_framework.contracts.data import Sample, Target, Transform
from dinov3_framework.testing.datasets import expect_targets
from dinov3_framework.testing.suite import Suite
from dinov3_framework.training.simulation import made_up_sample

SCHEMA: Mapping[str, Target] = {
    "label": Target("class", 5),
    "mask": Target("mask", 7, ignore_index=255),
    "depth": Target("map", unit="m"),
    "boxes": Target("boxes"),
    "instances": Target("instances"),
    "ids": Target("class", 3, per_object=True),
    "area": Target("number", per_object=True),
    "caption": Target("text"),
}


class TransformSuite(Suite):
    """Promises of a transform, tried on images of ``sizes`` with the targets of ``schema``."""

    kind = "transform"
    contract = Transform
    images: ImagesConfig = ImagesConfig()
    schema: Mapping[str, Target] = SCHEMA
    sizes: tuple[tuple[int, int], ...] = ((48, 64), (64, 40), (33, 33))

    def arguments(self) -> dict[str, Any]:
        return {"images": self.images, "targets": self.schema}

    @cached_property
    def transform(self) -> Transform:
        transform: Transform = self.build()
        return transform

    def samples(self) -> list[Sample]:
        channels = self.images.channels
        return [made_up_sample(self.schema, size, channels, n) for n, size in enumerate(self.sizes)]

    def transformed(
        self, sample: Sample, transform: Transform | None = None, seed: int = 3
    ) -> Sample:
        """What becomes of a sample with one state of torch's global generator."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return (transform or self.transform)(sample)

    # ------------------------------------------------------------------ promises
    def test_images(self) -> None:
        """Images come out as finite float32, of ``size`` if there is one."""
        for sample in self.samples():
            image = self.transformed(sample).image
            assert image.dtype == torch.float32 and len(image) == self.images.channels, (
                f"an image comes out as {image.dtype} {list(image.shape)}"
            )
            assert bool(image.isfinite().all()), "an image has values that are not finite"
            if (size := self.transform.size) is not None:
                assert tuple(image.shape[1:]) == size, f"{list(image.shape)} is not of size {size}"

    def test_targets(self) -> None:
        """Targets are what the schema says of the image that comes out, and all are there."""
        for sample in self.samples():
            changed = self.transformed(sample)
            lost = sample.targets.keys() - changed.targets.keys()
            assert not lost, f"targets are lost: {', '.join(sorted(lost))}"
            expect_targets("what comes out", changed, self.schema)

    def test_sample_types(self) -> None:
        """16-bit and floating-point images mean the same as 8-bit ones."""
        sample = self.samples()[0]
        expected = self.transformed(sample).image
        wide = (sample.image.int() * 257).to(torch.uint16)
        for image in (wide, sample.image.float() / 255):
            difference = self.transformed(evolve(sample, image=image)).image - expected
            # 8-bit images are rounded, and kept in their range, each time that they are resized.
            levels = float(difference.abs().mean()) * 255 * min(self.images.std)
            assert levels < 2, f"{image.dtype} comes out otherwise, by {levels:.1f} levels of 255"

    def test_randomness(self) -> None:
        """torch's global generator alone decides, in loader workers too; nothing is written to."""
        copied = pickle.loads(pickle.dumps(self.transform))
        for sample in self.samples():
            before = sample.image.clone()
            first = self.transformed(sample).image
            assert torch.equal(sample.image, before), "writes into the image that it is given"
            for other in (self.transform, copied):
                again = self.transformed(sample, other).image
                assert torch.equal(first, again), "gives another image for the same seed"

    def test_what_is_not_random(self) -> None:
        """A transform that says it is not random makes the same of a sample whatever the seed."""
        if self.transform.random:
            return
        for sample in self.samples():
            first, other = (self.transformed(sample, seed=seed) for seed in (3, 4))
            assert torch.equal(first.image, other.image), "another image for another seed"
            for name in self.schema:
                one, two = first.targets[name], other.targets[name]
                if isinstance(one, Tensor) and one.is_floating_point():  # unknown is NaN
                    one, two = one.nan_to_num(), two.nan_to_num()
                same = torch.equal(one, two) if isinstance(one, Tensor) else one == two
                assert same, f"another target {name!r} for another seed"

    def test_batches(self) -> None:
        """A batch has images of one size in one tensor, and targets per object in lists."""
        samples = [self.transformed(sample) for sample in self.samples()]
        batch = self.transform.collate(samples)
        assert len(batch) == len(samples), f"a batch of {len(samples)} has {len(batch)} images"
        whole = isinstance(batch.images, Tensor)
        assert whole or self.transform.size is None, "images of one size come as a list"
        for name, target in self.schema.items():
            values = batch.targets[name]
            assert len(values) == len(samples), f"the target {name!r} is not one for each image"
            assert isinstance(values, list) or not target.per_object, (
                f"the target {name!r} has a value for each object, and is no list"
            )
