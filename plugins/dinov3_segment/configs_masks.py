"""Options of heads that classify masks: what is learned, and by which loss."""

from __future__ import annotations

from dinov3_framework import HeadConfig, config, fraction, not_negative, option, positive


def _oversample(value: float) -> str | None:
    return None if value >= 1 else f"must be 1 or more, is {value}"


@config
class MaskClassificationConfig(HeadConfig):
    """What heads have in common that predict a set of masks, each with a class.

    Weights and numbers of points are those of Mask2Former (arXiv:2112.01527).
    """

    target: str = option("which target of the data is predicted, of kind mask", default="mask")
    class_weight: float = option(
        "weight of the cross-entropy over classes, in the matching and in the loss",
        default=2.0,
        check=not_negative,
    )
    mask_weight: float = option(
        "weight of the binary cross-entropy of masks, in the matching and in the loss",
        default=5.0,
        check=not_negative,
    )
    dice_weight: float = option(
        "weight of the Dice loss of masks, in the matching and in the loss",
        default=5.0,
        check=not_negative,
    )
    no_object_weight: float = option(
        "weight in the cross-entropy of queries that stand for nothing",
        default=0.1,
        check=not_negative,
    )
    points: int = option(
        "points at which a predicted mask is compared with a true one",
        default=12544,
        check=positive,
    )
    oversample: float = option(
        "how many times as many points are drawn, of which the most uncertain are taken",
        default=3.0,
        check=_oversample,
    )
    importance: float = option(
        "share of the points that are the most uncertain ones; the rest are drawn anywhere",
        default=0.75,
        check=fraction,
    )
