"""The config of the evaluation of depth."""

from __future__ import annotations

from typing import Literal

from dinov3_framework import (
    DatasetConfig,
    EvaluationConfig,
    InvalidOption,
    config,
    not_negative,
    option,
    positive,
)
from dinov3_framework.data.dense_config import DenseInferenceConfig

CROPS = ("none", "nyu_eigen", "garg")


def _formats(value: tuple[str, ...]) -> str | None:
    return None if len(set(value)) == len(value) else "names a format twice"


@config
class DepthConfig(EvaluationConfig):
    """Errors of a head that predicts depth, or any other map, by pixel.

    Each is the mean over images of the image's own: ``rmse``, ``abs_rel``, ``a1`` to ``a3``,
    ``log10``, ``rmse_log``, ``silog``, ``sq_rel`` and ``mae``; ``rmse_pooled`` is that of all
    pixels of all images. Predictions are resized to the truth, aligned, then clamped to the range.
    With ``align`` names end in @ and the mode: such numbers are not comparable with others.
    """

    data: DatasetConfig = option("images with depth")
    target: str = option("which of the head's targets is looked at", default="depth")
    inference: DenseInferenceConfig = option(
        "how images are looked at", factory=lambda: DenseInferenceConfig()
    )
    least: float = option(
        "the truth is void up to this, and predictions are clamped to it",
        default=0.001,
        check=positive,
    )
    most: float | None = option(
        'the truth is void from this on, and predictions are clamped to it; "none": no limit',
        default=10.0,
        check=positive,
    )
    crop: Literal["none", "nyu_eigen", "garg"] = option(
        "part of the truth that counts: nyu_eigen is rows 45..470 and columns 41..600 of 480 x 640 "
        "pixels, garg the one for KITTI; in proportion for other sizes",
        default="none",
    )
    align: Literal["none", "scale", "scale_shift"] = option(
        "what predictions are moved by before, image by image, to fit the truth: a factor (ratio "
        "of medians), or a factor and a shift (least squares)",
        default="none",
    )
    mean_predictor: bool = option(
        "measure the mean depth of these data as a prediction, too; reads them once more",
        default=True,
    )
    save: tuple[Literal["npy", "png"], ...] = option(
        "forms in which predictions are kept, before they are aligned: npy (float32), from which a "
        "run that was cut off goes on, png (16 bits, for the eye and other programs)",
        default=(),
        check=_formats,
    )
    workers: int = option("loader workers of each process", default=0, check=not_negative)
    seed: int = option("seed of confidence intervals", default=0, check=not_negative)

    def __attrs_post_init__(self) -> None:
        if self.most is not None and self.most <= self.least:
            raise InvalidOption("most", f"must be above least, {self.least:g}")
