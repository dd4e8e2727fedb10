"""Options of depth heads: how scores become depth, and what scores them."""

from __future__ import annotations

from typing import Literal

from dinov3_depth.configs_losses import DepthHeadConfig
from dinov3_framework.configs import InvalidOption, config, option, positive


def _some(value: tuple[int, ...]) -> str | None:
    return None if value else "must name at least one"


def _four(value: tuple[int, ...] | None) -> str | None:
    if value is None or len(value) == 4:
        return None
    return f"must name four layers, is {list(value)}"


def _widths(value: tuple[int, ...]) -> str | None:
    if len(value) == 4 and min(value) > 0:
        return None
    return f"must be four widths above 0, is {list(value)}"


@config
class BinsConfig(DepthHeadConfig):
    """Depth as the mean of bins between two depths, weighed by their scores (AdaBins,
    arXiv:2011.14141), or, with one bin, by regression.
    """

    bins: int = option(
        "bins between the least and the largest depth; 1: the depth itself is predicted",
        default=256,
        check=positive,
    )
    min_depth: float = option(
        "the least depth, in the unit of the data", default=0.001, check=positive
    )
    max_depth: float = option("the largest depth", default=10.0, check=positive)
    spacing: Literal["linear", "log", "sid", "mixed_log"] = option(
        "where bins are: evenly by depth, by its logarithm, the centers of spacing-increasing "
        "intervals (DORN, arXiv:1806.02446), or from logarithmic to even, as CHMv2",
        default="linear",
    )
    weighting: Literal["linear", "softmax", "sigmoid", "mixed_log"] = option(
        "how scores become weights: cut off below 0, by softmax, by sigmoid, or as CHMv2",
        default="linear",
    )

    def __attrs_post_init__(self) -> None:
        super().__attrs_post_init__()
        if self.max_depth <= self.min_depth:
            raise InvalidOption("max_depth", f"must be above min_depth, {self.min_depth:g}")
        if self.spacing == "mixed_log" and self.max_depth / 8 <= self.min_depth:
            raise InvalidOption("max_depth", "must be above 8 x min_depth where bins are mixed_log")


@config
class LinearDepthConfig(BinsConfig):
    """Bins by a batch norm and one linear layer on the patches of chosen layers.

    As it is, the published linear evaluation on NYU.
    """

    layers: tuple[int, ...] = option(
        "layers of the backbone, from 0, or from -1 for the last backwards",
        default=(-1,),
        check=_some,
    )
    norm: bool = option("whether the backbone's final norm is applied", default=True)
    batch_norm: bool = option("normalize the patches over the batch", default=True)
    class_token: bool = option("put the class token beside each patch", default=False)


@config
class DptDepthConfig(BinsConfig):
    """Bins by DPT's decoder (Ranftl et al. 2021, arXiv:2103.13413) on four layers."""

    layers: tuple[int, ...] | None = option(
        "four layers of the backbone; left out, the last of each quarter",
        default=None,
        check=_four,
    )
    norm: bool = option("whether the backbone's final norm is applied", default=True)
    batch_norm: bool = option("normalize the patches of each layer over the batch", default=True)
    readout: Literal["ignore", "add", "project"] = option(
        "what becomes of the class token: nothing, added to patches, or put beside and projected",
        default="ignore",
    )
    widths: tuple[int, ...] = option(
        "channels of the four layers after reassembling",
        default=(128, 256, 512, 1024),
        check=_widths,
    )
    channels: int = option("channels of the fusion", default=256, check=positive)
    hidden: int = option("channels before the last layer", default=32, check=positive)
    bias: bool = option("biases in the residual units", default=False)
    projection: bool = option("a convolution after the fusion", default=True)


# The published ones, on ViT-7B/16 and on the satellite ViT-L/16.
SYNTHMIX = DptDepthConfig(max_depth=100.0, widths=(2048,) * 4, channels=512, layers=(9, 19, 29, 39))
CHMV2 = DptDepthConfig(
    max_depth=96.0,
    spacing="mixed_log",
    weighting="mixed_log",
    layers=(5, 11, 17, 23),
    batch_norm=False,
    readout="project",
    hidden=128,
    bias=True,
    projection=False,
)
