"""Config of the linear head."""

from __future__ import annotations

from dinov3_framework import HeadConfig, InvalidOption, config, not_negative, option


def _share(value: float) -> str | None:
    return None if 0 <= value < 1 else f"must lie between 0 and 1, is {value}"


@config
class LinearSegmentationConfig(HeadConfig):
    """Batch normalization and a linear layer on patch tokens, as in the published ADE20K probe.

    As it is, of the last block, after the final norm. Logits are resized to the image (bilinear).
    """

    target: str = option("which target of the data is predicted, of kind mask", default="mask")
    layers: tuple[int, ...] = option(
        "layers of the backbone whose tokens are taken side by side, from 0 or from -1 backwards",
        default=(-1,),
    )
    norm: bool = option("apply the backbone's final norm to the tokens", default=True)
    class_token: bool = option("put the class token beside each patch token", default=False)
    batchnorm: bool = option("normalize each channel over the images of a step", default=True)
    dropout: float = option(
        "probability that training blanks a channel of an image", default=0.1, check=_share
    )
    ce_weight: float = option(
        "weight of the cross entropy; its mean is over all pixels, those that are ignored count "
        "as 0",
        default=1.0,
        check=not_negative,
    )
    dice_weight: float = option(
        "weight of the dice loss of each class's probability (sigmoid)",
        default=0.0,
        check=not_negative,
    )

    def __attrs_post_init__(self) -> None:
        if self.ce_weight == self.dice_weight == 0:
            raise InvalidOption("ce_weight", "and dice_weight are both 0: nothing is learned")
