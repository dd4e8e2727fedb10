"""Promises of an augmentation."""

from __future__ import annotations

import pickle
import random
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dinov3_framework.contracts.data import Augmentation, View
from dinov3_framework.kinds import AugmentationConfig
from dinov3_framework.registry import Registry
from dinov3_framework.testing.subject import Subject

_IMAGES = ((40, 40), (64, 23), (17, 90), (5, 3))  # heights and widths
_BATCH = 6
_STEPS = 50  # that an augmentation is asked for its variant of
_SUM_TOLERANCE = 1e-5  # of the variants' shares


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
    value for each patch, and each row's depend on seed, step and row alone. All of that holds for
    each of its variants, if it has any; these make the same views in other sizes, and ``at`` picks
    one by seed and step alone.
    """
    subject = Subject.of(
        "augmentation", config, registry, factory, channels=channels, patch_size=patch_size
    )
    augmentation: Augmentation = subject.built(Augmentation)
    _check_views(subject, augmentation, patch_size)
    variants = _variants(subject, augmentation, patch_size)
    with subject.doing("pickling"):
        copied = pickle.loads(pickle.dumps(augmentation))
    _check_steps(subject, augmentation, copied, variants)
    each = list(zip(variants, copied.variants(), strict=True))
    if len(variants) > 1:
        each.append((augmentation, copied))  # which is none of them, and makes crops as well
    for one, copied in each:
        for height, width in _IMAGES:
            shape = (channels, height, width)
            values = np.random.default_rng(height).integers(0, 256, shape, np.uint8)
            _check_crops(subject, one, copied, torch.from_numpy(values))
        if one.makes_masks:
            _check_masks(subject, one, patch_size)


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
        # The teacher's crops are cut into patches of the teacher's.
        whole = view.size % patch_size == 0 or name == "teacher"
        subject.require(
            view.crops >= 0 and view.size > 0 and whole,
            f"the view {name!r} is {view}; its size must be a multiple of the patch size "
            f"{patch_size}",
        )
    of_teacher = augmentation.views.get("teacher", augmentation.views["global"])
    subject.require(
        of_teacher.crops == augmentation.views["global"].crops,
        f"teacher crops are the teacher's version of the global ones, but not as many: "
        f"{augmentation.views}",
    )


def _variants(
    subject: Subject, augmentation: Augmentation, patch_size: int
) -> Sequence[Augmentation]:
    """The augmentation's variants, which agree with it and with each other."""
    with subject.doing("variants()"):
        variants = augmentation.variants()
    subject.require(
        isinstance(variants, Sequence)
        and len(variants) > 0
        and all(isinstance(variant, Augmentation) for variant in variants),
        f"variants() must give one or more augmentations, gave {variants!r}",
    )
    crops = _crops_by_view(augmentation)
    for variant in variants:
        _check_views(subject, variant, patch_size)
        subject.require(
            _crops_by_view(variant) == crops and variant.makes_masks == augmentation.makes_masks,
            "variants must make the same views, as many crops of each, and masks all or none: "
            f"{variant.views} differs from {augmentation.views} in more than sizes",
        )
        subject.require(
            len(variant.variants()) == 1 and _shown(variant.at(0, 0)) == _shown(variant),
            "a variant has variants of its own",
        )
    shares = [variant.share for variant in variants]
    subject.require(
        min(shares) > 0 and abs(sum(shares) - 1) < _SUM_TOLERANCE,
        f"the variants' shares must be above 0 and sum to 1, are {shares}",
    )
    largest = max(variants, key=_pixels)
    subject.require(
        dict(augmentation.views) == dict(largest.views),
        f"views must be those of the largest variant, {largest.views}, are {augmentation.views}",
    )
    return variants


def _crops_by_view(augmentation: Augmentation) -> dict[str, int]:
    return {name: view.crops for name, view in augmentation.views.items()}


def _pixels(augmentation: Augmentation) -> int:
    return sum(view.crops * view.size**2 for view in augmentation.views.values())


def _shown(augmentation: Augmentation) -> dict[str, View]:
    """What tells variants apart."""
    return dict(augmentation.views)


def _check_steps(
    subject: Subject,
    augmentation: Augmentation,
    copied: Augmentation,
    variants: Sequence[Augmentation],
) -> None:
    """``at`` gives one of ``variants``, and the same again in another process."""

    def found(asked: Augmentation, steps: Iterable[int]) -> dict[int, dict[str, View]]:
        with subject.doing("at()"):
            return {step: _shown(asked.at(5, step)) for step in steps}

    first = found(augmentation, range(_STEPS))
    known = [_shown(variant) for variant in variants]
    for views in first.values():
        subject.require(views in known, f"at() gave the views {views}, which no variant has")
    for other in (augmentation, copied):
        subject.require(
            first == found(other, reversed(range(_STEPS))),
            "at() gives a step another variant when asked again, or once pickled: it must depend "
            "on seed and step alone",
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
