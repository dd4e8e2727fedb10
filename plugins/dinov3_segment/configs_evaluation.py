"""Config of the evaluation of masks."""

from __future__ import annotations

from typing import Literal

from dinov3_framework import DatasetConfig, EvaluationConfig, config, not_negative, option
from dinov3_framework.data.dense_config import DenseInferenceConfig


def _once(value: tuple[str, ...]) -> str | None:
    return None if len(set(value)) == len(value) else f"names a format twice: {list(value)}"


@config
class SegmentationConfig(EvaluationConfig):
    """Semantic segmentation by a head: mIoU and what goes with it, in percent.

    Areas are summed over the whole set before they are divided; pixels that the truth ignores leave
    the predicted area, too, and classes that are in neither are left out of means. The truth is
    never resized.
    """

    data: DatasetConfig = option("images with masks")
    target: str = option("which target is compared, of kind mask", default="mask")
    inference: DenseInferenceConfig = option(
        "how images are looked at", factory=DenseInferenceConfig
    )
    save: tuple[Literal["png", "npy"], ...] = option(
        "formats in which predictions are left beside the results, as class ids: png (with the "
        "classes' colors), npy; a run that is started again goes on from them",
        default=(),
        check=_once,
    )
    workers: int = option("loader workers of each process", default=0, check=not_negative)
    seed: int = option("seed of the bootstrap of confidence intervals", default=0)
