"""ConvNeXt's config, and one config per published size."""

from __future__ import annotations

from dinov3_framework import BackboneConfig, config, not_negative, option, positive, preset

STAGES = 4
STRIDE = 32  # pixels along the side of what one position of the last stage's map stands for


def _one_per_stage(values: tuple[int, ...]) -> str | None:
    if len(values) != STAGES:
        return f"must be {STAGES} numbers, one for each stage, is {list(values)}"
    return None if min(values) > 0 else f"must all be above 0, is {list(values)}"


def _depths(values: tuple[int, ...]) -> str | None:
    """Files name depths too; far deeper ones would be built without end."""
    most = (
        f"must all be at most 1,000, is {list(values)}" if max(values, default=0) > 1000 else None
    )
    return _one_per_stage(values) or most


def _below_one(value: float) -> str | None:
    return None if 0 <= value < 1 else f"must be at least 0 and below 1, is {value}"


@config
class ConvNextConfig(BackboneConfig):
    """A ConvNeXt (Liu et al. 2022, "A ConvNet for the 2020s"); the defaults give ConvNeXt-T."""

    depths: tuple[int, ...] = option(
        "number of blocks in each of the four stages", default=(3, 3, 9, 3), check=_depths
    )
    dims: tuple[int, ...] = option(
        "channels of each of the four stages; the last is the width of a token",
        default=(96, 192, 384, 768),
        check=_one_per_stage,
    )
    patch_size: int | None = option(
        "resize intermediate layers to the grid of a ViT with patches of so many pixels; left out, "
        "each keeps its stage's own. Patch tokens have a stride of 32 pixels in any case",
        default=None,
        check=positive,
    )
    drop_path_rate: float = option(
        "probability that a sample skips the last block's residual branch, in training; it rises "
        "linearly from 0 at the first block",
        default=0.0,
        check=_below_one,
    )
    layer_scale_init_value: float | None = option(
        "initial scale of each residual branch; 0 for none", default=1e-6, check=not_negative
    )

    def evaluation_settings(self) -> dict[str, object]:
        return {"patch_size": self.patch_size}


@preset(depths=(3, 3, 9, 3), dims=(96, 192, 384, 768))
class ConvNextTinyConfig(ConvNextConfig):
    """DINOv3's ConvNeXt-T, 27.8M parameters."""


@preset(depths=(3, 3, 27, 3), dims=(96, 192, 384, 768))
class ConvNextSmallConfig(ConvNextConfig):
    """DINOv3's ConvNeXt-S, 49.5M parameters."""


@preset(depths=(3, 3, 27, 3), dims=(128, 256, 512, 1024))
class ConvNextBaseConfig(ConvNextConfig):
    """DINOv3's ConvNeXt-B, 87.6M parameters."""


@preset(depths=(3, 3, 27, 3), dims=(192, 384, 768, 1536))
class ConvNextLargeConfig(ConvNextConfig):
    """DINOv3's ConvNeXt-L, 196.2M parameters."""


PRESETS: dict[str, type[ConvNextConfig]] = {
    "convnext_tiny": ConvNextTinyConfig,
    "convnext_small": ConvNextSmallConfig,
    "convnext_base": ConvNextBaseConfig,
    "convnext_large": ConvNextLargeConfig,
}
