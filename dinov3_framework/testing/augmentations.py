"""Promises of an augmentation."""

from __future__ import annotations

import pickle
import random
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dinov3_framework.configs import AugmentationConfig
from dinov3_framework.contracts import Augmentation, View
from dinov3_framework.registry import Registry
from dinov3_framework.testing.subject import Subject

_IMAGES = ((40, 40), (64, 23), (17, 90), (5, 3))  # heights and widths
_BATCH = 6


def check_augmentation(
    config: AugmentationConfig,
    *,
    registry: Registry | None = None,
    factory: Callable[..., Any] | None = None,
    channels: int = 3,
    patch_size: int = 4,
) -> None:
    """Check that an augmentation keeps its contract, for images of ``channels`` channels.

    Promises: ``views`` holds global crops and whole patches; every image, whatever its shape, gives
    the declared crops, uint8 or finite floats; all randomness comes from ``rng``; the image is not
    written to; the object can be pickled for loader workers; masks, if it makes any, are bool, one
    value for each patch, and each row's depend on seed, step and row alone.
    """
    subject = Subject.of(
        "augmentation", config, registry, factory, channels=channels, patch_size=patch_size
    )
    augmentation: Augmentation = subject.built(Augmentation)
    _check_views(subject, augmentation, patch_size)
    with subject.doing("pickling"):
        copied = pickle.loads(pickle.dumps(augmentation))
    for height, width in _IMAGES:
        shape = (channels, height, width)
        image = torch.from_numpy(np.random.default_rng(height).integers(0, 256, shape, np.uint8))
        _check_crops(subject, augmentation, copied, image)
    if augmentation.makes_masks:
        _check_masks(subject, augmentation, patch_size)


def _check_views(subject: Subject, augmentation: Augmentation, patch_size: int) -> None:
    views = getattr(augmentation, "views", None)
    subject.require(
        isinstance(views, Mapping) and all(isinstance(view, View) for view in views.values()),
        f"views must map names to View(crops, size), is {views!r}",
    )
    subject.require(
        "global" in augmentation.views and augmentation.views["global"].crops > 0,
        f"views has no global crops, which every training needs: {augmentation.views}",
    )
    for name, view in augmentation.views.items():
        subject.require(
            view.crops >= 0 and view.size > 0 and view.size % patch_size == 0,
            f"the view {name!r} is {view}; its size must be a multiple of the patch size "
            f"{patch_size}",
        )


def _check_crops(
    subject: Subject, augmentation: Augmentation, copied: Augmentation, image: Tensor
) -> None:
    require, shape = subject.require, list(image.shape)
    before = image.clone()
    crops = _crops(subject, augmentation, image, 1)
    require(torch.equal(image, before), "writes into the image that it is given")
    views = augmentation.views
    require(
        crops.keys() == views.keys(),
        f"makes the views {sorted(crops)}, declares {sorted(views)}",
    )
    for name, view in views.items():
        made, wanted = crops[name], [view.crops, shape[0], view.size, view.size]
        require(
            list(made.shape) == wanted,
            f"{name} crops of an image {shape} are {list(made.shape)}, declared as {wanted}",
        )
        require(
            made.dtype == torch.uint8 or (made.is_floating_point() and bool(made.isfinite().all())),
            f"{name} crops must be uint8 or finite floats, are {made.dtype}",
        )
    for other, complaint in (
        (augmentation, "gives other crops for the same rng: it draws from elsewhere, or remembers"),
        (copied, "gives other crops once pickled"),
    ):
        again = _crops(subject, other, image, 2)
        require(all(torch.equal(crops[name], again[name]) for name in views), complaint)


def _crops(
    subject: Subject, augmentation: Augmentation, image: Tensor, elsewhere: int
) -> Mapping[str, Tensor]:
    """Crops for one rng, with the global generators in a state of their own."""
    legacy = np.random.get_state()
    state = random.getstate()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(elsewhere)
        random.seed(elsewhere)
        np.random.seed(elsewhere)
        try:
            with subject.doing(f"an image of {list(image.shape)}"):
                return augmentation(image, np.random.default_rng(11))
        finally:
            random.setstate(state)
            np.random.set_state(legacy)


def _check_masks(subject: Subject, augmentation: Augmentation, patch_size: int) -> None:
    require, view = subject.require, augmentation.views["global"]
    total, patches = view.crops * _BATCH, (view.size // patch_size) ** 2

    def masks(rows: list[int], step: int = 3) -> Tensor:
        with subject.doing("masks()"):
            return augmentation.masks(rows=rows, total=total, seed=1, step=step)

    rows = list(range(total))
    whole = masks(rows)
    require(
        whole.dtype == torch.bool and list(whole.shape) == [total, patches],
        f"masks are {whole.dtype} {list(whole.shape)}, not torch.bool {[total, patches]}",
    )
    require(bool(whole.any()), f"makes_masks is true, but {total} crops have no patch masked")
    require(not bool(whole.all(1).any()), "a mask leaves no patch of its crop to be seen")
    masks(rows, step=4)  # whatever it may remember of another step
    backwards = rows[::-2]
    require(
        torch.equal(masks(backwards), whole[backwards]),
        "masks depend on which rows are asked for together, not on seed, step and row alone",
    )
