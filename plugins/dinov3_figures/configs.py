"""The config of the ``figures`` observer."""

from __future__ import annotations

from dinov3_framework import DatasetConfig, ObserverConfig, config, option, positive


@config
class FiguresConfig(ObserverConfig):
    """Draws crops.png, curves.png and patch_pca.png into the run's folder ``figures``."""

    every: int = option(
        "iterations between two drawings of the curves", default=1000, check=positive
    )
    images: int = option(
        "images shown in crops.png and in patch_pca.png", default=6, check=positive
    )
    dataset: DatasetConfig | None = option(
        "where the images of patch_pca.png come from; left out, global crops of the stream",
        default=None,
    )
    upscale: int = option(
        "patch_pca.png also shows images enlarged this many times, which gives small ones a finer "
        "grid of patches; 1 leaves that out",
        default=4,
        check=positive,
    )
