"""Options of the multi-crop augmentation; the defaults are those of the published recipes."""

from __future__ import annotations

import math
from collections.abc import Callable

from dinov3_framework import (
    AugmentationConfig,
    config,
    fraction,
    interval,
    not_negative,
    option,
    positive,
)


def _positive_interval(high: float = math.inf) -> Callable[[tuple[float, float]], str | None]:
    check_order = interval(0.0, high)

    def check(value: tuple[float, float]) -> str | None:
        if len(value) == 2 and value[0] <= 0:
            return f"must be two increasing numbers above 0, is {list(value)}"
        complaint: str | None = check_order(value)
        return complaint

    return check


def _two_fractions(value: tuple[float, ...]) -> str | None:
    if len(value) == 2 and all(0 <= item <= 1 for item in value):
        return None
    return f"must be two numbers in 0..1, one for each global crop, is {list(value)}"


def _hue(value: float) -> str | None:
    return None if 0 <= value <= 0.5 else f"must lie in 0..0.5 (turns of the wheel), is {value}"


def _odd(value: int) -> str | None:
    return None if value > 0 and value % 2 else f"must be odd and above 0, is {value}"


def _level(value: int) -> str | None:
    return None if 0 <= value <= 255 else f"must lie in 0..255, is {value}"


@config
class DistortionsConfig:
    """Photometric distortions; sizes are in pixels, levels in 0..255.

    On images that are not RGB, saturation, hue and grayscale are left out. The published code asks
    for blur with probabilities 1.0, 0.1 and 0.5 (first global crop, second, local) but hands
    their complements to what applies it, so that its models were trained with 0.0, 0.9 and 0.5;
    those are the defaults here.
    """

    jitter_probability: float = option(
        "probability of the four jitters (brightness to hue) together", default=0.8, check=fraction
    )
    brightness: float = option("brightness factor within 1 ± this", default=0.4, check=not_negative)
    contrast: float = option("contrast factor within 1 ± this", default=0.4, check=not_negative)
    saturation: float = option("saturation factor within 1 ± this", default=0.2, check=not_negative)
    hue: float = option("hue shift within ± this, in turns", default=0.1, check=_hue)
    grayscale_probability: float = option(
        "probability of losing all color", default=0.2, check=fraction
    )
    blur_probability: tuple[float, float] = option(
        "probability of blur in the first and second global crop",
        default=(0.0, 0.9),
        check=_two_fractions,
    )
    local_blur_probability: float = option(
        "probability of blur in a local crop", default=0.5, check=fraction
    )
    blur_sigma: tuple[float, float] = option(
        "range of the blur's standard deviation", default=(0.1, 2.0), check=_positive_interval()
    )
    blur_kernel: int = option(
        "width of the blur's kernel; less in crops that are narrower", default=9, check=_odd
    )
    solarize_probability: tuple[float, float] = option(
        "probability of solarization in the first and second global crop",
        default=(0.0, 0.2),
        check=_two_fractions,
    )
    solarize_threshold: int = option("levels from this on are inverted", default=128, check=_level)


@config
class MaskingConfig:
    """Blocks of patches hidden from the student, over the global batch (BEiT, iBOT)."""

    probability: float = option(
        "share of the global crops that are masked; 0 turns masking off",
        default=0.5,
        check=fraction,
    )
    ratio: tuple[float, float] = option(
        "least and greatest share of a masked crop's patches; the crops of a batch are spread "
        "evenly over it",
        default=(0.1, 0.5),
        check=interval(0.0, 1.0),
    )
    circular_shift: bool = option(
        "roll each mask by a random offset, so that borders are masked as often as the middle",
        default=False,
    )
    block_min_patches: int = option("least area aimed at for a block", default=4, check=positive)
    block_max_share: float = option(
        "greatest area aimed at for a block, as a share of all patches", default=0.5, check=fraction
    )
    block_aspect: tuple[float, float] = option(
        "range of a block's height over width", default=(0.3, 1 / 0.3), check=_positive_interval()
    )


@config
class ResolutionConfig:
    """Sizes that the crops of some steps have; the augmentation's own where left out."""

    ratio: float = option("share of the steps; those of all resolutions sum to 1", check=positive)
    global_size: int | None = option("side of a global crop", default=None, check=positive)
    local_size: int | None = option("side of a local crop", default=None, check=positive)
    anchor_size: int | None = option(
        "side of an anchor crop; over global_size the same in all resolutions",
        default=None,
        check=positive,
    )


@config
class MultiCropConfig(AugmentationConfig):
    """Two global crops, local crops and anchor crops of each image, and masks.

    Each crop is a random box resized to a square (bicubic, antialiased), flipped and distorted.
    Sizes are in pixels and multiples of the backbone's patch size; scales are shares of the
    image's area.
    """

    global_size: int = option("side of a global crop", default=224, check=positive)
    global_scale: tuple[float, float] = option(
        "area of a global crop", default=(0.32, 1.0), check=_positive_interval(1.0)
    )
    local_crops: int = option("local crops per image", default=8, check=not_negative)
    local_size: int = option("side of a local crop", default=96, check=positive)
    local_scale: tuple[float, float] = option(
        "area of a local crop", default=(0.05, 0.32), check=_positive_interval(1.0)
    )
    aspect_ratio: tuple[float, float] = option(
        "range of a box's width over height", default=(3 / 4, 4 / 3), check=_positive_interval()
    )
    horizontal_flips: bool = option("mirror half of the crops", default=True)
    local_from_global: bool = option(
        "cut local crops, patch-aligned, from re-distorted global crops, half from each",
        default=False,
    )
    share_color_jitter: bool = option(
        "jitter and grayscale the image once, before cropping, instead of each crop",
        default=False,
    )
    anchor_size: int | None = option(
        "side of the anchor crops, which show what the global crops show; left out, none",
        default=None,
        check=positive,
    )
    anchor_without_distortions: bool = option(
        "take anchor crops from before the crop's distortions, not from after", default=False
    )
    teacher_scale: float | None = option(
        "side of the teacher's global crops over the student's; left out, the teacher sees the "
        "student's",
        default=None,
        check=positive,
    )
    trim_local_crops: bool = option(
        "cut what is over whole patches off local crops, on the right and below, rather than "
        "refuse their size",
        default=False,
    )
    resolutions: tuple[ResolutionConfig, ...] = option(
        "sizes of which each step has one, drawn by their ratios; left out, always those above",
        default=(),
    )
    distortions: DistortionsConfig = option(
        "color jitter, grayscale, blur and solarization", factory=DistortionsConfig
    )
    masking: MaskingConfig | None = option(
        "which patches of the global crops the student does not see", factory=MaskingConfig
    )
