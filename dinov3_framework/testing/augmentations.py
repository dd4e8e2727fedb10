"""Promises of an augmentation."""

from __future__ import annotations

import pickle
import random
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dinov3_framework.contracts.data import Augmentation, View
from dinov3_framework.testing.suite import Suite

_IMAGES = ((40, 40), (64, 23), (17, 90), (5, 3))  # heights and widths
_BATCH = 6
_STEPS = 50  # that an augmentation is asked for its variant of
_SUM_TOLERANCE = 1e-5  # of the variants' shares


class AugmentationSuite(Suite):
    """Promises of an augmentation and each of its variants, for images of ``channels`` channels."""

    kind = "augmentation"
    contract = Augmentation
    channels: int = 3
    patch_size: int = 4

    def arguments(self) -> dict[str, Any]:
        return {"channels": self.channels, "patch_size": self.patch_size}

    @cached_property
    def augmentation(self) -> Augmentation:
        augmentation: Augmentation = self.build()
        return augmentation

    @cached_property
    def pickled(self) -> Augmentation:
        """The same, as a loader worker gets it."""
        pickled: Augmentation = pickle.loads(pickle.dumps(self.augmentation))
        return pickled

    def with_pickled(self) -> Iterator[tuple[Augmentation, Augmentation]]:
        """Everything that makes crops, and the same once pickled."""
        variants = self.augmentation.variants()
        yield from zip(variants, self.pickled.variants(), strict=True)
        if len(variants) > 1:
            yield self.augmentation, self.pickled  # which is none of them, and makes crops as well

    def images(self) -> Iterator[Tensor]:
        for height, width in _IMAGES:
            shape = (self.channels, height, width)
            pixels = np.random.default_rng(height).integers(0, 256, shape, np.uint8)
            yield torch.from_numpy(pixels)

    # ------------------------------------------------------------------ promises
    def test_views(self) -> None:
        """``views`` holds global crops, and whole patches."""
        self._expect_views(self.augmentation)

    def _expect_views(self, augmentation: Augmentation) -> None:
        views = getattr(augmentation, "views", None)
        known = isinstance(views, Mapping) and all(isinstance(v, View) for v in views.values())
        assert known and views is not None, f"views must map names to View(...), is {views!r}"
        assert "global" in views and views["global"].crops > 0, (
            f"views has no global crops, which every training needs: {views}"
        )
        for name, view in views.items():
            # The teacher's crops are cut into patches of the teacher's.
            whole = view.size % self.patch_size == 0 or name == "teacher"
            assert view.crops >= 0 and view.size > 0 and whole, (
                f"the view {name!r} is {view}; its size must be a multiple of the patch size "
                f"{self.patch_size}"
            )
        assert views.get("teacher", views["global"]).crops == views["global"].crops, (
            f"teacher crops are the teacher's version of the global ones, but not as many: {views}"
        )

    def test_variants(self) -> None:
        """Variants make the same views in other sizes; their shares sum to 1."""
        whole, variants = self.augmentation, self.augmentation.variants()
        known = isinstance(variants, Sequence) and len(variants) > 0
        assert known and all(isinstance(variant, Augmentation) for variant in variants), (
            f"variants() must give one or more augmentations, gave {variants!r}"
        )
        for variant in variants:
            self._expect_views(variant)
            same = _counts(variant) == _counts(whole) and variant.makes_masks == whole.makes_masks
            assert same, (
                "variants must make the same views, as many crops of each, and masks all or none: "
                f"{variant.views} differs from {whole.views} in more than sizes"
            )
            is_one = len(variant.variants()) == 1 and variant.at(0, 0).views == variant.views
            assert is_one, "a variant has variants of its own"
        shares = [variant.share for variant in variants]
        assert min(shares) > 0 and abs(sum(shares) - 1) < _SUM_TOLERANCE, (
            f"the variants' shares must be above 0 and sum to 1, are {shares}"
        )
        largest = max(variants, key=_pixels).views
        assert dict(whole.views) == dict(largest), (
            f"views must be those of the largest variant, {largest}, are {whole.views}"
        )

    def test_variant_of_a_step(self) -> None:
        """``at`` picks a variant by seed and step alone."""

        def views(asked: Augmentation, steps: Iterable[int]) -> dict[int, Mapping[str, View]]:
            return {step: asked.at(5, step).views for step in steps}

        first = views(self.augmentation, range(_STEPS))
        known = [variant.views for variant in self.augmentation.variants()]
        for found in first.values():
            assert found in known, f"at() gave the views {found}, which no variant has"
        for other in (self.augmentation, self.pickled):
            assert first == views(other, reversed(range(_STEPS))), (
                "at() gives a step another variant when asked again, or once pickled: it must "
                "depend on seed and step alone"
            )

    def test_crops(self) -> None:
        """Every image, whatever its shape, gives the declared crops, uint8 or finite floats."""
        for augmentation, _ in self.with_pickled():
            views = augmentation.views
            for image in self.images():
                before, shape = image.clone(), list(image.shape)
                crops = _crops(augmentation, image, 1)
                assert torch.equal(image, before), "writes into the image that it is given"
                found = f"makes the views {sorted(crops)}, declares {sorted(views)}"
                assert crops.keys() == views.keys(), found
                for name, view in views.items():
                    made, wanted = crops[name], [view.crops, shape[0], view.size, view.size]
                    assert list(made.shape) == wanted, (
                        f"{name} crops of an image {shape} are {list(made.shape)}, declared as "
                        f"{wanted}"
                    )
                    finite = made.is_floating_point() and bool(made.isfinite().all())
                    assert made.dtype == torch.uint8 or finite, (
                        f"{name} crops must be uint8 or finite floats, are {made.dtype}"
                    )

    def test_randomness(self) -> None:
        """All randomness comes from ``rng``, in loader workers too."""
        for augmentation, pickled in self.with_pickled():
            for image in self.images():
                crops = _crops(augmentation, image, 1)
                for other, when in (
                    (augmentation, "for the same rng: it draws from elsewhere, or remembers"),
                    (pickled, "once pickled"),
                ):
                    again = _crops(other, image, 2)
                    same = all(torch.equal(crops[name], again[name]) for name in crops)
                    assert same, f"gives other crops {when}"

    def test_masks(self) -> None:
        """Masks are bool, one value a patch, and depend on seed, step and row alone."""
        for augmentation, _ in self.with_pickled():
            if augmentation.makes_masks:
                self._expect_masks(augmentation)

    def _expect_masks(self, augmentation: Augmentation) -> None:
        view = augmentation.views["global"]
        total, patches = view.crops * _BATCH, (view.size // self.patch_size) ** 2

        def masks(rows: Sequence[int], step: int = 3) -> Tensor:
            return augmentation.masks(rows=rows, total=total, seed=1, step=step)

        whole = masks(range(total))
        assert whole.dtype == torch.bool and list(whole.shape) == [total, patches], (
            f"masks are {whole.dtype} {list(whole.shape)}, not torch.bool {[total, patches]}"
        )
        assert whole.any(), f"makes_masks is true, but {total} crops have no patch masked"
        assert not whole.all(1).any(), "a mask leaves no patch of its crop to be seen"
        masks(range(total), step=4)  # whatever it may remember of another step
        backwards = list(range(total))[::-2]
        assert torch.equal(masks(backwards), whole[backwards]), (
            "masks depend on which rows are asked for together, not on seed, step and row alone"
        )


def _crops(augmentation: Augmentation, image: Tensor, elsewhere: int) -> Mapping[str, Tensor]:
    """Crops for one rng, with the global generators in a state of their own."""
    legacy, state = np.random.get_state(), random.getstate()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(elsewhere)
        random.seed(elsewhere)
        np.random.seed(elsewhere)
        try:
            return augmentation(image, np.random.default_rng(11))
        finally:
            random.setstate(state)
            np.random.set_state(legacy)


def _counts(augmentation: Augmentation) -> dict[str, int]:
    return {name: view.crops for name, view in augmentation.views.items()}


def _pixels(augmentation: Augmentation) -> int:
    return sum(view.crops * view.size**2 for view in augmentation.views.values())
