"""The ``figures`` observer: when each figure is drawn, and what happens if that fails."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from dinov3_figures.canvas import save_png
from dinov3_figures.configs import FiguresConfig
from dinov3_figures.crops import crops_figure
from dinov3_figures.curves import curves_figure
from dinov3_figures.pca import patch_features, patch_map, pca_figure
from dinov3_figures.series import read_series
from dinov3_framework import (
    CorruptSampleError,
    DataError,
    Dataset,
    ImagesConfig,
    Observer,
    Run,
    StepRecord,
    evaluation_image,
    normalize,
)
from dinov3_framework.runtime import collectives

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Below the framework's logger, whose handlers write run.log.
log = logging.getLogger("dinov3_framework.figures")


class Figures(Observer):
    """Draws crops.png at the start, curves.png as training goes on, patch_pca.png at the end.

    What cannot be drawn is logged and left out: a figure is never worth a training run.
    """

    def __init__(self, config: FiguresConfig) -> None:
        self.config = config
        self._dataset: Dataset | None = None

    def check(self, build: Callable[..., Any], images: ImagesConfig) -> None:
        if self.config.dataset is not None:
            build(self.config.dataset, channels=images.channels)

    def on_start(self, run: Run, iteration: int) -> Mapping[str, float] | None:
        # Not caught: a dataset that is not there should be known now, not after the last step.
        if self.config.dataset is not None:
            self._dataset = run.build(self.config.dataset, channels=run.images.channels)
        path = _folder(run) / "crops.png"
        if run.is_main and (iteration == 0 or not path.exists()):
            _draw(path, lambda: self._crops(run))
        return None

    def on_step(self, run: Run, step: StepRecord) -> Mapping[str, float] | None:
        # The last step's figures are not in the file yet; on_end draws them.
        if run.is_main and step.iteration < run.total_iterations:
            _draw_curves(run)
        return None

    def on_end(self, run: Run) -> None:
        if run.is_main:
            _draw_curves(run)
        self._draw_patch_pca(run)

    # ------------------------------------------------------------------ crops
    def _crops(self, run: Run) -> Figure:
        return crops_figure(
            run.sample_batch(self.config.images), run.images, run.model().backbone.patch_size
        )

    # ------------------------------------------------------------------ patch features
    def _draw_patch_pca(self, run: Run) -> None:
        path = _folder(run) / "patch_pca.png"
        images = self._images_of_all(run, path)
        if images is None:
            return
        features = _features(run, images, self.config.upscale, path)
        if run.is_main and features:
            _draw(path, lambda: _pca(run, images, features))

    def _images_of_all(self, run: Run, path: Path) -> Tensor | None:
        """The images [n, C, s, s], or None on every process if any could not get them.

        A teacher may be sharded: either all processes go on to call it, or none does.
        """
        images, complaint = None, None
        try:
            images = self._images(run)
        except Exception as error:
            complaint = _say(error)
        complaints = [said for said in collectives.all_gather_object(complaint) if said]
        if complaints:
            _warn(path, str(complaints[0]))
            return None
        return images

    def _images(self, run: Run) -> Tensor:
        crops: Tensor = run.sample_batch(self.config.images)["global"][0]
        if self._dataset is None:
            return crops
        return spread_images(self._dataset, self.config.images, crops.shape[-1])


def spread_images(dataset: Dataset, count: int, size: int) -> Tensor:
    """``count`` evaluation images spread evenly over a dataset, uint8 [count, C, size, size].

    A sample that cannot be decoded gives way to the one after it. Raises ``DataError`` where none
    can be, and returns fewer where the dataset is smaller.
    """
    images = []
    for start in np.linspace(0, len(dataset), min(count, len(dataset)), endpoint=False, dtype=int):
        for index in range(int(start), len(dataset)):
            try:
                image = dataset[index].image
            except CorruptSampleError:
                continue
            images.append(evaluation_image(image, size))
            break
    if not images:
        raise DataError(f"{dataset.describe()}: no image to show")
    return torch.stack(images)


def _features(run: Run, images: Tensor, upscale: int, path: Path) -> dict[int, Tensor]:
    """The teacher's patches by scale: at the images' own size, and enlarged if it allows that.

    Called on every process; the colours are left to the one that draws.
    """
    backbone, seen = run.model().backbone, normalize(images.to(run.device), run.images)
    features: dict[int, Tensor] = {}
    for scale in sorted({1, upscale}):
        try:
            features[scale] = patch_features(backbone, seen, scale)
        except Exception as error:
            size = scale * images.shape[-1]
            _warn(path, f"patch features of {size} px images: {_say(error)}")
            break
    return features


def _pca(run: Run, images: Tensor, features: Mapping[int, Tensor]) -> Figure:
    size = images.shape[-1]
    maps = [patch_map(tokens, scale * size) for scale, tokens in features.items()]
    return pca_figure(images, maps, run.images)


# ---------------------------------------------------------------------- drawing without risk
def _folder(run: Run) -> Path:
    folder: Path = run.output_dir / "figures"
    return folder


def _draw_curves(run: Run) -> None:
    series = read_series(run.output_dir / "metrics.jsonl")
    if not series:
        return  # nothing was logged yet
    done = max(int(each.iterations[-1]) for each in series.values())
    title = f"{run.output_dir.name}: {done:,} of {run.total_iterations:,} iterations"
    _draw(_folder(run) / "curves.png", lambda: curves_figure(series, title))


def _draw(path: Path, figure: Callable[[], Figure]) -> None:
    try:
        save_png(figure(), path)
    except Exception as error:
        _warn(path, _say(error))


def _warn(path: Path, reason: str) -> None:
    if collectives.is_main():
        log.warning("%s: not drawn, or not in full; training goes on: %s", path, reason)


def _say(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"


def _patch(run: Run) -> int:
    patch: int = run.model().backbone.patch_size
    return patch
