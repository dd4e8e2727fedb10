"""Multi-crop augmentation and block masking, as DINOv3 trains with.

One image becomes two global crops, a number of local ones and, for Gram anchoring, two anchor
crops; the global batch gets the masks of the iBOT objective. See ``multi_crop`` for how.
"""

from __future__ import annotations

from dinov3_crops.configs import (
    DistortionsConfig,
    MaskingConfig,
    MultiCropConfig,
    ResolutionConfig,
)
from dinov3_framework import Component, hookimpl

__all__ = ["DistortionsConfig", "MaskingConfig", "MultiCropConfig", "ResolutionConfig"]


@hookimpl
def dinov3_augmentations() -> list[Component]:
    return [Component("multi_crop", MultiCropConfig, "dinov3_crops.multi_crop:MultiCrop")]
