"""Decodes images as a dataset's options say."""

from __future__ import annotations

from torch import Tensor

from dinov3_datasets.configs import PicturesConfig
from dinov3_framework.data.pictures import decode_image


def decode(config: PicturesConfig, data: bytes, name: str, channels: int) -> Tensor:
    """The image in the bytes of a file, uint8 [channels, H, W]; raises ``CorruptSampleError``."""
    return decode_image(
        data,
        name,
        channels,
        config.max_pixels,
        values=config.values,
        background=config.background,
    )


def pixel_options(config: PicturesConfig, channels: int) -> str:
    """The options that decide on pixels, for the version of a dataset."""
    color = ",".join(map(str, config.background))
    return f"{channels} channels, values {config.values or 'as stored'}, background {color}"
